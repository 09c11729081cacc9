"""What `buddyrun bench` prints: llama-bench's columns and field names. Measures nothing itself.

Times exclude tokenization and sampling, as llama-bench's do; the tokens are those of a real text,
because which experts are asked for depends on it.
"""

import csv
import io
import json
import platform
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from runner.protocol import BenchSample, ModelInfo
from runner.stats import share
from runner.terminal.terminal_text import visible_line


@dataclass(frozen=True)
class BenchRecord:
    """One test under llama-bench's field names, in its order; from prompt_source on they are ours.

    Rates are shares of the (token, expert) pairs of all timed repetitions.
    """

    cpu_info: str
    gpu_info: str
    backends: str
    model_filename: str
    model_type: str
    model_size: int
    model_n_params: int
    n_batch: int
    n_threads: int
    type_k: str
    type_v: str
    flash_attn: bool
    n_prompt: int
    n_gen: int
    n_depth: int
    test_time: str
    avg_ns: int
    stddev_ns: int
    avg_ts: float
    stddev_ts: float
    samples_ns: tuple[int, ...]
    samples_ts: tuple[float, ...]
    prompt_source: str
    n_expert: int
    n_expert_used: int
    buddyrun_version: str
    ggml_version: str
    moe_cache_bytes: int
    moe_cache_slots: int  # of the layer that has the fewest; 0 = no cache
    moe_cache_policy: str
    hit_rate: float
    load_rate: float
    host_rate: float
    load_bytes: int
    buddy: str  # the policy that let others stand in; "" = nobody did
    buddy_budget: float
    substitute_rate: float
    drop_rate: float


@dataclass(frozen=True)
class BenchSetting:
    """What all tests of a run have in common."""

    info: ModelInfo
    prompt_source: str
    version: str
    now: Callable[[], str]  # the time in ISO 8601, when a test began


def record(sample: BenchSample, setting: BenchSetting, test_time: str) -> BenchRecord:
    """The figures of one test."""
    info = setting.info
    n_tokens = sample.n_prompt + sample.n_gen
    n_pairs = sample.n_pairs
    speeds = tuple(n_tokens * 1e9 / ns for ns in sample.samples_ns)
    return BenchRecord(
        cpu_info=cpu_name(),
        gpu_info=info.device if info.device_memory is not None else "",
        backends=info.backend,
        model_filename=info.path,
        model_type=info.description,
        model_size=info.size_bytes,
        model_n_params=info.n_params,
        n_batch=info.n_batch,
        n_threads=info.n_threads,
        type_k=info.cache_type_k,
        type_v=info.cache_type_v,
        flash_attn=True,
        n_prompt=sample.n_prompt,
        n_gen=sample.n_gen,
        n_depth=0,
        test_time=test_time,
        avg_ns=round(statistics.fmean(sample.samples_ns)),
        stddev_ns=round(_deviation(sample.samples_ns)),
        avg_ts=statistics.fmean(speeds),
        stddev_ts=_deviation(speeds),
        samples_ns=sample.samples_ns,
        samples_ts=speeds,
        prompt_source=setting.prompt_source,
        n_expert=info.n_expert,
        n_expert_used=info.n_expert_used,
        buddyrun_version=setting.version,
        ggml_version=info.ggml_version,
        moe_cache_bytes=info.moe_cache_bytes,
        moe_cache_slots=min(info.moe_cache_slots, default=0),
        moe_cache_policy=info.moe_cache_policy,
        hit_rate=share(sample.n_hit, n_pairs),
        load_rate=share(sample.n_loaded, n_pairs),
        host_rate=share(sample.n_on_host, n_pairs),
        load_bytes=sample.load_bytes,
        buddy=info.buddy,
        buddy_budget=info.buddy_budget,
        substitute_rate=share(sample.n_substituted, n_pairs),
        drop_rate=share(sample.n_dropped, n_pairs),
    )


def records(samples: Iterable[BenchSample], setting: BenchSetting) -> Iterator[BenchRecord]:
    """A record per sample, as they come."""
    began = setting.now()
    for sample in samples:
        yield record(sample, setting, began)
        began = setting.now()


def format_records(results: Iterable[BenchRecord], form: str) -> Iterator[str]:
    """The lines to print as md, json, jsonl or csv, each as soon as it is known."""
    return {"md": _markdown, "json": _json, "jsonl": _jsonl, "csv": _csv}[form](results)


def label_of_test(n_prompt: int, n_gen: int) -> str:
    """As llama-bench calls a test: pp512, tg128, pp512+tg128."""
    if n_prompt and n_gen:
        return f"pp{n_prompt}+tg{n_gen}"
    return f"pp{n_prompt}" if n_prompt else f"tg{n_gen}"


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


_COLUMNS = (("model", 30), ("size", 10), ("params", 10), ("backend", 10), ("threads", 7))
_OPTIONAL = (("n_batch", 7, 512), ("type_k", 6, "f16"), ("type_v", 6, "f16"))
_LAST = (("test", 15), ("t/s", 20))
_CACHE, _HIT, _STOOD_IN = ("cache", 10), ("hit", 7), ("stood in", 8)
_BUDDY = ("buddy", 14)
_LEFT = ("model", "backend")


def _markdown(results: Iterable[BenchRecord]) -> Iterator[str]:
    columns: tuple[tuple[str, int], ...] = ()
    last = None
    for result in results:
        if last is None:
            columns = _columns(result)
            yield _row(columns, {name: name for name, _ in columns})
            yield "| " + " | ".join(_rule(name, width) for name, width in columns) + " |"
        yield _row(columns, _cells(result))
        last = result
    if last is not None:
        yield ""
        yield f"buddyrun {last.buddyrun_version} (ggml {last.ggml_version}); {last.prompt_source}"


def _columns(result: BenchRecord) -> tuple[tuple[str, int], ...]:
    """llama-bench's columns; settings that are not the default get one, and so do a cache and
    stand-ins."""
    added = [(name, width) for name, width, usual in _OPTIONAL if getattr(result, name) != usual]
    if not result.moe_cache_slots:
        return (*_COLUMNS, *added, *_LAST)
    if not result.buddy:
        return (*_COLUMNS, *added, _CACHE, *_LAST, _HIT)
    return (*_COLUMNS, *added, _CACHE, _BUDDY, *_LAST, _HIT, _STOOD_IN)


def _cells(result: BenchRecord) -> dict[str, str]:
    return {
        "model": visible_line(result.model_type),
        "size": _size(result.model_size),
        "params": _count(result.model_n_params),
        "backend": result.backends,
        "threads": str(result.n_threads),
        "n_batch": str(result.n_batch),
        "type_k": result.type_k,
        "type_v": result.type_v,
        "test": label_of_test(result.n_prompt, result.n_gen),
        "t/s": f"{result.avg_ts:.2f} ± {result.stddev_ts:.2f}",
        "cache": f"{result.moe_cache_slots} {result.moe_cache_policy}",
        "hit": f"{100 * result.hit_rate:.1f} %",
        "buddy": f"{result.buddy} {100 * result.buddy_budget:g} %",
        "stood in": f"{100 * (result.substitute_rate + result.drop_rate):.1f} %",
    }


def _row(columns: tuple[tuple[str, int], ...], cells: dict[str, str]) -> str:
    parts = [
        f"{cells[name]:<{width}}" if name in _LEFT else f"{cells[name]:>{width}}"
        for name, width in columns
    ]
    return "| " + " | ".join(parts) + " |"


def _rule(name: str, width: int) -> str:
    return "-" * width if name in _LEFT else "-" * (width - 1) + ":"


def _json(results: Iterable[BenchRecord]) -> Iterator[str]:
    opening = "["
    for result in results:
        yield opening + json.dumps(asdict(result), indent=2)
        opening = ","
    yield "[]" if opening == "[" else "]"


def _jsonl(results: Iterable[BenchRecord]) -> Iterator[str]:
    for result in results:
        yield json.dumps(asdict(result))


def _csv(results: Iterable[BenchRecord]) -> Iterator[str]:
    names = [field.name for field in fields(BenchRecord) if not field.name.startswith("samples_")]
    yield ",".join(names)
    for result in results:
        line = io.StringIO()
        values = [_csv_value(getattr(result, name)) for name in names]
        csv.writer(line, quoting=csv.QUOTE_ALL, lineterminator="").writerow(values)
        yield line.getvalue()


def _csv_value(value: object) -> object:
    """llama-bench writes 1 and 0 for true and false."""
    return int(value) if isinstance(value, bool) else value


def _deviation(values: tuple[int, ...] | tuple[float, ...]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _size(n_bytes: int) -> str:
    """llama-bench counts in powers of 1024."""
    if n_bytes < 1 << 30:
        return f"{n_bytes / 2**20:.2f} MiB"
    return f"{n_bytes / 2**30:.2f} GiB"


def _count(n: int) -> str:
    return f"{n / 1e6:.2f} M" if n < 10**9 else f"{n / 1e9:.2f} B"
