"""`buddyrun bench` prints llama-bench's columns and field names."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.bench import BenchRecord, BenchSetting, format_records, label_of_test, records
from runner.errors import WorkerDiedError
from runner.protocol import BenchSample
from runner.terminal.bench_command import bench_text
from tests.paths import DEMO
from tests.runner.chat_fakes import INFO
from tests.runner.command_line import BUDDYRUN, buddyrun, buddyrun_process
from tests.runner.scripted_client import ScriptedClient

SECOND = 10**9
SAMPLES = [
    BenchSample(512, 0, (SECOND, 2 * SECOND)),
    BenchSample(0, 128, (2 * SECOND, 2 * SECOND)),
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


def lines(form: str, samples: list[BenchSample] = SAMPLES) -> list[str]:
    setting = BenchSetting(INFO, "a text", "1.2.3", lambda: "2026-01-02T03:04:05Z")
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
