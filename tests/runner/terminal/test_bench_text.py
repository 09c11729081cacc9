"""`buddyrun bench` prints llama-bench's columns and field names."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from runner.errors import WorkerDiedError
from runner.miss_policy import RoutingPlan
from runner.protocol import BenchSample, BenchTest, ModelInfo
from runner.speed_test import measure
from runner.stats import StatsSnapshot
from runner.stats_recorder import StatsRecorder
from runner.terminal.bench_command import bench_text
from runner.terminal.bench_text import (
    BenchRecord,
    BenchSetting,
    format_records,
    label_of_test,
    records,
)
from tests.paths import DEMO
from tests.runner.chat_fakes import INFO
from tests.runner.command_line import BUDDYRUN, buddyrun, buddyrun_process
from tests.runner.scripted_client import ScriptedClient

SECOND = 10**9
SAMPLES = [
    BenchSample(512, 0, (SECOND, 2 * SECOND)),
    BenchSample(0, 128, (2 * SECOND, 2 * SECOND)),
]
CACHE_SAMPLES = [
    BenchSample(
        512, 0, (SECOND, SECOND), n_hit=70, n_loaded=10, n_on_host=8, n_substituted=7, n_dropped=5,
        load_bytes=5000,
    ),
    BenchSample(0, 128, (SECOND,)),
]  # fmt: skip
CACHE_INFO = replace(
    INFO, moe_cache_bytes=900, moe_cache_slots=(4, 3, 4), moe_cache_policy="static"
)
CACHE_FIELDS = [
    "moe_cache_bytes",
    "moe_cache_slots",
    "moe_cache_policy",
    "hit_rate",
    "load_rate",
    "host_rate",
    "load_bytes",
    "buddy",
    "buddy_budget",
    "substitute_rate",
    "drop_rate",
]
LLAMA_BENCH_FIELDS = [
    "cpu_info",
    "gpu_info",
    "backends",
    "model_filename",
    "model_type",
    "model_size",
    "model_n_params",
    "n_batch",
    "n_threads",
    "type_k",
    "type_v",
    "flash_attn",
    "n_prompt",
    "n_gen",
    "n_depth",
    "test_time",
    "avg_ns",
    "stddev_ns",
    "avg_ts",
    "stddev_ts",
    "samples_ns",
    "samples_ts",
]


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "model.gguf"
    path.touch()
    return str(path)


def lines(form: str, samples: list[BenchSample] = SAMPLES, info: ModelInfo = INFO) -> list[str]:
    setting = BenchSetting(info, "a text", "1.2.3", lambda: "2026-01-02T03:04:05Z")
    return list(format_records(records(samples, setting), form))


def test_markdown_has_llama_benchs_columns() -> None:
    printed = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines("md")]
    assert printed[0] == ["model", "size", "params", "backend", "threads", "test", "t/s"]
    assert printed[2] == ["llama 8x1B Q8_0", "7.92 GiB", "8.00 B", "CPU", "2", "pp512",
                          "384.00 ± 181.02"]  # fmt: skip
    assert printed[3][-2:] == ["tg128", "64.00 ± 0.00"]
    assert len({len(line) for line in lines("md")[:4]}) == 1


def test_json_has_llama_benchs_fields_and_figures() -> None:
    first, second = json.loads("\n".join(lines("json")))
    assert list(first)[: len(LLAMA_BENCH_FIELDS)] == LLAMA_BENCH_FIELDS
    assert (first["n_prompt"], first["n_gen"], first["n_depth"]) == (512, 0, 0)
    assert first["avg_ns"] == 1_500_000_000
    assert first["stddev_ns"] == 707_106_781
    assert first["avg_ts"] == pytest.approx((512 + 256) / 2)
    assert first["samples_ts"] == [512.0, 256.0]
    assert first["test_time"] == "2026-01-02T03:04:05Z"
    assert (second["n_gen"], second["stddev_ts"], second["prompt_source"]) == (128, 0, "a text")


def test_a_cache_has_a_column_and_its_hits_another() -> None:
    printed = [[cell.strip() for cell in line.strip("|").split("|")]
               for line in lines("md", CACHE_SAMPLES, CACHE_INFO)]  # fmt: skip
    assert printed[0][4:] == ["threads", "cache", "test", "t/s", "hit"]
    assert printed[2][4:] == ["2", "3 static", "pp512", "512.00 ± 0.00", "70.0 %"]
    assert printed[3][-1] == "0.0 %"
    assert len({len(line) for line in lines("md", CACHE_SAMPLES, CACHE_INFO)[:4]}) == 1


def test_json_says_what_the_cache_did() -> None:
    first, second = json.loads("\n".join(lines("json", CACHE_SAMPLES, CACHE_INFO)))
    assert list(first)[-len(CACHE_FIELDS) :] == CACHE_FIELDS
    figures = [900, 3, "static", 0.7, 0.1, 0.08, 5000, "", 0.0, 0.07, 0.05]
    assert [first[name] for name in CACHE_FIELDS] == figures
    assert [second[name] for name in CACHE_FIELDS[3:]] == [0.0, 0.0, 0.0, 0, "", 0.0, 0.0, 0.0]


def test_who_stood_in_has_two_columns_more() -> None:
    info = replace(CACHE_INFO, buddy="router", buddy_budget=0.05)
    printed = [[cell.strip() for cell in line.strip("|").split("|")]
               for line in lines("md", CACHE_SAMPLES, info)]  # fmt: skip
    assert printed[0][5:] == ["cache", "buddy", "test", "t/s", "hit", "stood in"]
    assert printed[2][5:7] == ["3 static", "router 5 %"]
    assert printed[2][-2:] == ["70.0 %", "12.0 %"] and printed[3][-1] == "0.0 %"
    assert len({len(line) for line in lines("md", CACHE_SAMPLES, info)[:4]}) == 1


def test_without_a_cache_the_fields_are_there_and_the_columns_are_not() -> None:
    found = json.loads(lines("jsonl", [BenchSample(8, 0, (SECOND,), n_hit=32)])[0])
    figures = [0, 0, "", 1.0, 0.0, 0.0, 0, "", 0.0, 0.0, 0.0]
    assert [found[name] for name in CACHE_FIELDS] == figures
    assert next(csv.DictReader(io.StringIO("\n".join(lines("csv")))))["moe_cache_slots"] == "0"
    assert "cache" not in lines("md")[0] and "hit" not in lines("md")[0]


class CountingEngine:
    """Two layers; of the four experts of a token two are hits, one is loaded, one on the host."""

    def __init__(self) -> None:
        self._recorder = StatsRecorder(2, (1, 1))

    def reset(self) -> None:
        pass

    def prefill(self, tokens: list[int], cancelled: Callable[[], bool]) -> None:
        self._run(len(tokens))

    def decode(self, token: int) -> None:
        self._run(1)

    def snapshot(self) -> StatsSnapshot:
        return self._recorder.snapshot(0, 64)

    def _run(self, n: int) -> None:
        experts = np.zeros((n, 4), np.int32)
        plan = RoutingPlan(experts, (), (), 2 * n, n, n)
        self._recorder.record_batch(n, (plan, plan), 1, 1, 0, False)
        self._recorder.record_read(1, 100 * n, 1)


def test_what_the_experts_took_is_that_of_the_timed_runs_without_the_warm_up() -> None:
    engine = cast(Any, CountingEngine())
    sample = measure(engine, BenchTest(5, 2), list(range(7)), 3, lambda: False)
    n_tokens = 3 * (5 + 2)
    assert (sample.n_hit, sample.n_loaded, sample.n_on_host) == tuple(
        n_tokens * 2 * each for each in (2, 1, 1)
    )
    assert (sample.n_substituted, sample.n_dropped) == (0, 0)
    assert (sample.load_bytes, sample.n_pairs) == (100 * n_tokens, 4 * 2 * n_tokens)


def test_jsonl_has_one_object_a_line() -> None:
    assert [json.loads(line)["n_prompt"] for line in lines("jsonl")] == [512, 0]


def test_csv_can_be_read_back() -> None:
    rows = list(csv.DictReader(io.StringIO("\n".join(lines("csv")))))
    assert rows[1]["n_gen"] == "128" and float(rows[0]["avg_ts"]) == 384.0
    assert set(LLAMA_BENCH_FIELDS) - set(rows[0]) == {"samples_ns", "samples_ts"}


def test_csv_has_1_for_true() -> None:
    rows = list(csv.DictReader(io.StringIO("\n".join(lines("csv")))))
    assert rows[0]["flash_attn"] == "1"


def test_a_flag_for_traces_gives_the_log_of_the_engine(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> Iterator[BenchSample]:
        raise WorkerDiedError("The engine was killed.")

    monkeypatch.setattr(ScriptedClient, "bench", die)
    assert b"the last words of the engine" in buddyrun("bench", model, "--verbose").stderr
    assert b"the last words of the engine" not in buddyrun("bench", model).stderr


@pytest.mark.parametrize(("form", "expected"), [("json", ["[]"]), ("jsonl", []), ("md", [])])
def test_no_results_are_still_well_formed(form: str, expected: list[str]) -> None:
    assert lines(form, []) == expected


def test_one_repetition_has_no_deviation() -> None:
    assert json.loads(lines("jsonl", [BenchSample(8, 0, (SECOND,))])[0])["stddev_ts"] == 0


def label_of_tests() -> None:
    assert [label_of_test(512, 0), label_of_test(0, 128), label_of_test(4, 2)] == [
        "pp512",
        "tg128",
        "pp4+tg2",
    ]


def test_results_are_printed_as_they_come() -> None:
    def samples() -> Iterator[BenchSample]:
        yield SAMPLES[0]
        raise RuntimeError

    setting = BenchSetting(INFO, "a text", "1.2.3", lambda: "now")
    printed = format_records(records(samples(), setting), "jsonl")
    assert json.loads(next(printed))["n_prompt"] == 512


def test_the_command_measures_lists_of_tests_with_the_text_given(
    model: str, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words")
    done = buddyrun(
        *("bench", "-m", model, "-p", "16,32", "-p", "8", "-n", "0", "-n", "4", "-r", "2"),
        *("-o", "jsonl", "--text", str(text)),
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["n_prompt"], row["n_gen"]) for row in found] == [(16, 0), (32, 0), (8, 0), (0, 4)]
    assert [len(row["samples_ns"]) for row in found] == [2] * 4
    assert found[0]["prompt_source"] == "text.txt"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["-p", "x"], 2, b"not a list of counts"),
        (["-p", "-5"], 2, b"not a list of counts"),
        (["-r", "0"], 2, b"repetitions"),
        (["-o", "xml"], 2, b"xml"),
        (["-p", "0", "-n", "0"], 1, b"nothing to measure"),
        (["--text", "/nowhere"], 1, b"cannot read the text from /nowhere"),
    ],
)
def test_wrong_settings_are_refused(
    arguments: list[str], status: int, message: bytes, model: str
) -> None:
    done = buddyrun("bench", model, *arguments)
    assert done.returncode == status and message in done.stderr


def test_the_fields_are_those_of_the_record() -> None:
    assert list(BenchRecord.__dataclass_fields__)[: len(LLAMA_BENCH_FIELDS)] == LLAMA_BENCH_FIELDS


def test_the_demo_model_is_measured() -> None:
    text = DEMO.parent.parent.parent / "tests" / "data" / "held_out" / "story.txt"
    command = ["bench", str(DEMO), "-p", "32", "-n", "8", "-r", "2", "-o", "json"]
    done = buddyrun_process(*command, "--text", str(text), command=BUDDYRUN)
    assert done.returncode == 0, done.stderr
    prompt, generation = json.loads(done.stdout)
    assert prompt["avg_ts"] > 0 and generation["avg_ts"] > 0
    assert prompt["model_n_params"] > 28_000_000


def test_a_text_comes_with_the_package() -> None:
    text, source = bench_text(None)
    assert len(text) > 2000 and source == "buddyrun's bench.txt"
