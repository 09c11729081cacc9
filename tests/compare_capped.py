"""Speed and memory beside llama.cpp where memory is too small for the model.

    python -m tests.compare_capped [MODEL] [--cap BYTES] [--rounds N] [--json FILE] ...
    python -m tests.compare_capped [MODEL] [--cap BYTES] --endurance TOKENS
    python -m tests.compare_capped [MODEL] --resident

Both sides run one after the other, each in a memory control group of its own and with an empty
page cache (Linux, as root). Without MODEL a random Mixtral of 2.54 GB is written to a temporary
folder first. --endurance looks at buddyrun's memory over many tokens; --resident compares a full
cache with none, without a cap.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from runner.config import BUDDY_OFF, MOE_CACHE_AUTO, MOE_CACHE_OFF, EngineConfig
from runner.engine import Engine
from tests.capped_child import Decoding, Settings, Times, command
from tests.compare_speed import TURN, seconds
from tests.memory_group import NoMemoryGroupError, run_capped
from tests.paths import DEMO
from tests.random_model import write_big_mixtral

N_REFERENCE = 10  # tokens that llama.cpp decodes: about one a second
MAX_OVER_LIMIT = 1.25
MAX_POLICY_US = 20.0
MIN_STANDIN_RATIO = 10.0  # to llama.cpp, where nothing has to be read
MAX_GROWTH_MB = 1.0  # of anonymous memory: what an allocator may keep
MIN_RESIDENT_RATIO = 0.98
_N_SETTLED = 100  # tokens after which memory must not grow
_N_RESIDENT_TURNS = 90
_MAX_TOKENS = 768  # what the context of 1024 has room for behind the prompt


@dataclass(frozen=True)
class Side:
    """One side's figures and what its control group counted."""

    times: Times
    peak_mb: float
    n_at_limit: int
    decoding: Decoding | None = None  # of buddyrun only


@dataclass(frozen=True)
class Round:
    """One turn of each side."""

    theirs: Side
    ours: Side

    @property
    def decoding(self) -> Decoding:
        assert self.ours.decoding is not None
        return self.ours.decoding

    @property
    def disk_bytes_per_s(self) -> float:
        return float(np.mean(self.decoding.disk_gb_per_s)) * 1e9

    @property
    def reads_s(self) -> float:
        """The missed experts of a token, read as fast as the file can be read."""
        return self.decoding.missed_bytes / self.disk_bytes_per_s

    @property
    def limit_s(self) -> float:
        """What a token takes at least: its reads, and the computing that they did not hide."""
        d = self.decoding
        useful_s = d.read_s * d.missed_bytes / d.read_bytes if d.read_bytes else 0.0
        return self.reads_s + d.compute_s - max(0.0, useful_s - d.wait_s)

    @property
    def token_s(self) -> float:
        return float(np.mean(self.ours.times.decode_s))


# figures

Figure = Callable[[Round], float]


def speed_figures(n_prompt: int) -> dict[str, Callable[[Times], float]]:
    """What both sides have, in tokens per second."""
    return {
        "decode, mean": lambda t: float(1 / np.mean(t.decode_s)),
        "decode, median": lambda t: float(1 / np.median(t.decode_s)),
        f"prompt of {n_prompt}, cold": lambda t: n_prompt / t.prompt_cold_s,
        f"prompt of {n_prompt}, warm": lambda t: n_prompt / t.prompt_warm_s,
    }


OWN_FIGURES: dict[str, Figure] = {
    "hit share, %": lambda r: 100 * r.decoding.hit_share,
    "substituted, %": lambda r: 100 * r.decoding.substituted_share,
    "choosing stand-ins, microseconds per layer": lambda r: r.decoding.policy_us,
    "computed on the host, %": lambda r: 100 * r.decoding.on_host_share,
    "read per token, MB": lambda r: r.decoding.read_bytes / 1e6,
    "read in vain per token, MB": lambda r: (r.decoding.read_bytes - r.decoding.missed_bytes) / 1e6,
    "while reading, GB/s": lambda r: r.decoding.read_gb_per_s,
    "the file can be read at, GB/s": lambda r: r.disk_bytes_per_s / 1e9,
    "time per token, ms": lambda r: 1e3 * r.token_s,
    "computing, ms": lambda r: 1e3 * r.decoding.compute_s,
    "waiting for reads, ms": lambda r: 1e3 * r.decoding.wait_s,
    "Python, ms": lambda r: 1e3 * r.decoding.python_s,
    "limit: reads + computing not hidden behind them, ms": lambda r: 1e3 * r.limit_s,
    "time per token / limit": lambda r: r.token_s / r.limit_s,
    "time per token / (reads + all computing)": lambda r: (
        r.token_s / (r.reads_s + r.decoding.compute_s)
    ),
    "anonymous memory after the first token, MB": lambda r: r.decoding.anonymous_mb[0],
    "anonymous memory at the end, MB": lambda r: r.decoding.anonymous_mb[1],
}


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, lowest, highest."""
    return float(np.median(values)), min(values), max(values)


def spread_text(values: list[float]) -> str:
    middle, low, high = spread(values)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def tables(rounds: list[Round], n_prompt: int) -> str:
    """All figures as Markdown: the median of the rounds, the lowest and the highest."""
    lines = ["| tokens/s | llama.cpp | buddyrun | ratio |", "|---|---|---|---|"]
    for name, figure in speed_figures(n_prompt).items():
        theirs = [figure(r.theirs.times) for r in rounds]
        ours = [figure(r.ours.times) for r in rounds]
        ratios = [b / a for a, b in zip(theirs, ours, strict=True)]
        lines.append(" | ".join(["| " + name, *map(spread_text, (theirs, ours, ratios))]) + " |")
    for name, part in (
        ("loading, s", lambda side: side.times.load_s),
        ("peak of the group, MB", lambda side: side.peak_mb),
    ):
        sides = ([part(r.theirs) for r in rounds], [part(r.ours) for r in rounds])
        lines.append(" | ".join(["| " + name, *map(spread_text, sides)]) + " | |")
    lines += ["", "| buddyrun, decoding | |", "|---|---|"]
    lines += [
        f"| {name} | {spread_text([figure(r) for r in rounds])} |"
        for name, figure in OWN_FIGURES.items()
    ]
    return "\n".join(lines)


def summary(rounds: list[Round], n_prompt: int) -> dict[str, tuple[float, float, float]]:
    """The tables' figures, for a file."""
    figures: dict[str, Figure] = dict(OWN_FIGURES)
    for name, figure in speed_figures(n_prompt).items():
        figures[f"llama.cpp: {name}"] = lambda r, f=figure: f(r.theirs.times)
        figures[f"buddyrun: {name}"] = lambda r, f=figure: f(r.ours.times)
        figures[f"ratio: {name}"] = lambda r, f=figure: f(r.ours.times) / f(r.theirs.times)
    return {name: spread([figure(r) for r in rounds]) for name, figure in figures.items()}


# the three modes


def compare(settings: Settings, cap: int, n_rounds: int, json_path: Path | None) -> bool:
    """Both sides in turn, n_rounds times; whether buddyrun keeps to its limit."""
    rounds = []
    for i in range(n_rounds):
        sides = {}
        names = ["llama.cpp", "buddyrun"]
        for name in names if i % 2 == 0 else reversed(names):
            n_decode = N_REFERENCE if name == "llama.cpp" else settings.n_decode
            sides[name] = run_side(name, replace(settings, seed=i, n_decode=n_decode), cap)
        rounds.append(Round(sides["llama.cpp"], sides["buddyrun"]))
        print(f"round {i + 1} of {n_rounds}: {one_line(rounds[-1])}", file=sys.stderr, flush=True)
    print(f"cap {cap / 1e6:.0f} MB, slots per layer {slots_text(rounds[0].decoding.n_slots)}\n")
    print(tables(rounds, settings.n_prompt))
    if json_path is not None:
        found = {
            "settings": asdict(settings) | {"cap": cap},
            "summary": summary(rounds, settings.n_prompt),
            "rounds": [asdict(r) for r in rounds],
        }
        json_path.write_text(json.dumps(found, indent=1))
    peak_mb = max(r.ours.peak_mb for r in rounds)
    is_within = verdict(f"peak {peak_mb:.0f} MB, at most the cap", peak_mb * 1e6 <= cap)
    judge = judge_exact if settings.buddy == BUDDY_OFF else judge_standins
    return judge(rounds, settings) and is_within


def judge_exact(rounds: list[Round], settings: Settings) -> bool:
    """Whether reading and computing take as long as they must."""
    over = spread([r.token_s / r.limit_s for r in rounds])[0]
    return verdict(f"{over:.2f} x the limit, at most {MAX_OVER_LIMIT}", over <= MAX_OVER_LIMIT)


def judge_standins(rounds: list[Round], settings: Settings) -> bool:
    """Whether choosing stand-ins costs little, and, where all may be replaced, what it gains."""
    cost_us = spread([r.decoding.policy_us for r in rounds])[0]
    is_cheap = verdict(
        f"choosing takes {cost_us:.1f} microseconds per layer and token, at most {MAX_POLICY_US}",
        cost_us <= MAX_POLICY_US,
    )
    if settings.buddy_budget < 1.0 or settings.buddy_min_rank > 1:
        return is_cheap
    decode = speed_figures(settings.n_prompt)["decode, mean"]
    ratio = spread([decode(r.ours.times) / decode(r.theirs.times) for r in rounds])[0]
    return is_cheap and verdict(
        f"decode {ratio:.1f} x llama.cpp, at least {MIN_STANDIN_RATIO}", ratio >= MIN_STANDIN_RATIO
    )


def run_side(name: str, settings: Settings, cap: int) -> Side:
    done = run_capped(command(name, settings), cap).check()
    found: dict[str, Any] = json.loads(done.stdout)
    decoding = Decoding(**found["decoding"]) if "decoding" in found else None
    return Side(Times(**found["times"]), done.peak_bytes / 1e6, done.n_at_limit, decoding)


def one_line(r: Round) -> str:
    decode = speed_figures(1)["decode, mean"]
    theirs, ours = decode(r.theirs.times), decode(r.ours.times)
    return (
        f"decode {theirs:.2f} and {ours:.2f} t/s, {ours / theirs:.2f} x; "
        f"hit {100 * r.decoding.hit_share:.1f} %; {r.token_s / r.limit_s:.2f} x the limit"
    )


def endure(settings: Settings, cap: int, json_path: Path | None) -> bool:
    """One long answer under the cap; whether its memory stays as it is."""
    done = run_capped(command("endurance", settings), cap).check()
    found: dict[str, Any] = json.loads(done.stdout)
    samples = dict(found["anonymous_mb"])
    settled = samples[_N_SETTLED]
    largest = max(used for n, used in samples.items() if n >= _N_SETTLED)
    peak = done.peak_bytes
    print(f"{len(found.pop('tokens'))} tokens in a full context of {settings.n_ctx}, shifting")
    print(f"slots per layer {slots_text(found['n_slots'])}; hit {100 * found['hit_share']:.1f} %")
    print(f"{found['tokens_per_s']:.2f} tokens/s")
    print(f"anonymous memory: {settled:.3f} MB after {_N_SETTLED} tokens, then {largest:.3f} MB")
    print(f"at the limit {done.n_at_limit} times, killed for memory {done.n_oom_kills} times")
    if json_path is not None:
        json_path.write_text(json.dumps(found | {"cap": cap, "peak_bytes": peak}, indent=1))
    growth = largest - settled
    return all(
        (
            verdict(f"grew by {growth:.3f} MB, at most {MAX_GROWTH_MB}", growth <= MAX_GROWTH_MB),
            verdict(f"peak {peak / 1e6:.0f} of {cap / 1e6:.0f} MB", peak <= cap),
        )
    )


def compare_resident(path: Path, n_threads: int) -> bool:
    """Every expert in a slot against no cache; turns of tokens, who begins alternates.

    The ratio is the median of the ratios of turns that follow each other.
    """
    off = Engine(path, EngineConfig(n_ctx=1024, n_threads=n_threads, moe_cache_bytes=MOE_CACHE_OFF))
    n_expert = off.model_config.n_expert
    config = replace(off.config, moe_cache_bytes=MOE_CACHE_AUTO, moe_cache_slots=n_expert)
    full = Engine(path, replace(config, moe_miss="load"))
    settings = Settings(str(path), n_threads, n_prompt=256, n_decode=_N_RESIDENT_TURNS * TURN)
    prompt, tokens = settings.tokens(off.model_config.n_vocab)
    for engine in (off, full):
        engine.prefill(prompt)
    off_s: list[float] = []
    full_s: list[float] = []
    for start in range(0, len(tokens), TURN):
        turn = tokens[start : start + TURN]
        sides = [(off, off_s), (full, full_s)]
        for engine, spent in sides if start // TURN % 2 == 0 else reversed(sides):
            spent.append(seconds(lambda e=engine, turn=turn: [e.decode(t) for t in turn]))
    off.close()
    full.close()
    off_per_s, full_per_s = TURN / np.median(off_s), TURN / np.median(full_s)
    low, ratio, high = np.percentile(np.array(off_s) / full_s, [25, 50, 75])
    text = f"{path.name}: no cache {off_per_s:.2f}, all resident {full_per_s:.2f} tokens/s; ratio "
    text += f"{ratio:.3f} (half of {len(off_s)} turns {low:.3f} to {high:.3f})"
    return verdict(f"{text}, at least {MIN_RESIDENT_RATIO}", ratio >= MIN_RESIDENT_RATIO)


def verdict(text: str, is_met: bool) -> bool:
    print(("ok: " if is_met else "MISSED: ") + text, flush=True)
    return is_met


def slots_text(n_slots: tuple[int, ...]) -> str:
    counts = {n: n_slots.count(n) for n in sorted(set(n_slots))}
    return " and ".join(f"{n} in {count} layers" for n, count in counts.items()) or "none"


# the command line


def main() -> None:
    options = parsed()
    with tempfile.TemporaryDirectory() as folder:
        path = options.model or write_big_mixtral(Path(folder) / "mixtral.gguf")
        try:
            is_met = run(path.resolve(), options)
        except NoMemoryGroupError as error:
            sys.exit(str(error))
    sys.exit(0 if is_met else 1)


def run(path: Path, options: argparse.Namespace) -> bool:
    if options.resident:
        paths = {path, DEMO} if options.model is None else {path}
        return all([compare_resident(each, options.threads) for each in sorted(paths)])
    settings = Settings(
        str(path),
        options.threads,
        n_slots=options.slots,
        policy=options.policy,
        miss=options.miss,
        buddy=options.buddy,
        buddy_budget=options.buddy_budget,
        buddy_min_rank=options.buddy_min_rank,
        n_decode=options.endurance or options.tokens,
    )
    if options.endurance:
        return endure(replace(settings, n_ctx=options.context), options.cap, options.json)
    return compare(settings, options.cap, options.rounds, options.json)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--cap", type=int, default=1_500_000_000, help="bytes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48, help="that buddyrun decodes")
    parser.add_argument("--slots", type=int, default=0, help="per layer; 0 = what the cap allows")
    parser.add_argument("--policy", default="lfu")
    parser.add_argument("--miss", default="load")
    parser.add_argument("--buddy", default="off")
    parser.add_argument("--buddy-budget", type=float, default=1.0, help="share; 1 = any")
    parser.add_argument("--buddy-min-rank", type=int, default=1)
    parser.add_argument("--endurance", type=int, default=0, metavar="TOKENS")
    parser.add_argument("--context", type=int, default=4096, help="of --endurance")
    parser.add_argument("--resident", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if 0 < options.endurance < _N_SETTLED:
        parser.error(f"--endurance: at least {_N_SETTLED}")
    if not 0 < options.tokens <= _MAX_TOKENS:
        parser.error(f"--tokens: 1 to {_MAX_TOKENS}")
    return options


if __name__ == "__main__":
    main()
