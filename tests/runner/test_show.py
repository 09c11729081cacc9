"""`buddyrun show` about the expert cache: what a run would have on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runner.show import ReportedDevice
from tests.paths import DEMO
from tests.random_model import RandomModel, write_random_model
from tests.runner.command_line import ROOT, buddyrun

EXPERT = 3 * 256 * 512 * 34 // 32  # bytes of a demo expert, Q8_0
SLOT = EXPERT + 3 * 4096


@pytest.fixture(autouse=True)
def memory_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.show.available_memory_bytes", lambda: 1_000_000_000)


def cache_section(*arguments: str) -> list[str]:
    text = buddyrun("show", str(DEMO), "--device", "cpu", *arguments).stdout.decode()
    return text.split("  Expert cache\n")[1].split("\n\n")[0].splitlines()


def cache_json(*arguments: str) -> Any:
    command = ("show", str(DEMO), "--json", "--device", "cpu")
    return json.loads(buddyrun(*command, *arguments).stdout)["moe_cache"]


def test_without_a_flag_nothing_is_said_of_a_cache() -> None:
    assert b"Expert cache" not in buddyrun("show", str(DEMO), BUDDYRUN_DEVICE="cpu").stdout
    assert json.loads(buddyrun("show", str(DEMO), "--json").stdout)["moe_cache"] is None


GPU0 = ReportedDevice("gpu0", 2_000_000_000, 4_000_000_000, False)


@pytest.mark.parametrize(
    ("arguments", "twins", "asked"),
    [
        (["--moe-cache", "12MB"], {}, "auto"),
        (["--moe-cache-slots", "2"], {}, "auto"),
        (["--fit-margin", "1G"], {}, "auto"),
        (["-ngl", "99"], {}, "gpu"),
        (["--device", "GPU0"], {}, "gpu0"),
        (["--moe-cache", "12MB"], {"BUDDYRUN_DEVICE": "gpu0"}, "gpu0"),
        (["--moe-cache", "12MB"], {"BUDDYRUN_GPU_LAYERS": "0"}, "cpu"),
        (["-ngl", "0"], {}, "cpu"),
    ],
)
def test_the_plan_is_for_the_device_that_a_run_would_take(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], twins: dict[str, str], asked: str
) -> None:
    names: list[str] = []

    def report(name: str) -> ReportedDevice | None:
        names.append(name)
        return None if name == "cpu" else GPU0

    monkeypatch.setattr("runner.terminal.run_command.reported_device", report)
    text = buddyrun("show", str(DEMO), *arguments, **twins).stdout.decode()
    assert names == [asked]
    assert "Expert cache" in text and ("gpu0" in text) == (asked != "cpu")


def test_where_there_is_no_gpu_it_is_said_that_the_plan_is_the_cpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("runner.terminal.run_command.reported_device", lambda name: None)
    done = buddyrun("show", str(DEMO), "-ngl", "99")
    assert b"no GPU can be used here" in done.stderr and b"Expert cache" in done.stdout
    assert b"GPU" not in buddyrun("show", str(DEMO), "--moe-cache", "12MB").stderr


def test_a_size_is_answered_with_slots_and_the_memory_around_them() -> None:
    lines = cache_section("--moe-cache", "12MB")  # 27 slots of 430 kB in 8 layers
    assert lines[:2] == [
        "    slots per layer   3 to 4 of 8",
        "    all slots         11.6 MB, 42.2 % of all experts",
    ]
    assert "    other weights     3.98 MB" in lines
    assert "    KV cache          4.19 MB for 1024 tokens" in lines
    assert "    headroom          121 MB" in lines
    assert "    memory available  1.00 GB" in lines
    assert lines[-1].startswith("    left              8")


def test_context_batch_and_cache_types_change_what_is_left() -> None:
    small = cache_json("--moe-cache", "12MB", "-c", "256", "-b", "32", "-ctk", "q8_0")
    assert (small["n_ctx"], small["n_batch"]) == (256, 32)
    assert small["kv_bytes"] == 256 * 8 * (128 * 2 + 128 // 32 * 34)
    assert small["left_bytes"] > cache_json("--moe-cache", "12MB")["left_bytes"]
    assert small["n_slots"] == [3, 4, 3, 3, 4, 3, 4, 3]


def test_json_has_every_figure() -> None:
    cache = cache_json("--moe-cache-slots", "4")
    assert cache["n_slots"] == [4] * 8
    assert cache["n_bytes"] == cache["budget_bytes"] == 32 * SLOT
    assert cache["resident_share"] == 0.5
    taken = [cache[f"{name}_bytes"] for name in ("weights", "kv", "compute", "headroom")]
    assert cache["left_bytes"] == 1_000_000_000 - 32 * SLOT - sum(taken)


def test_auto_says_what_it_would_choose_here(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = "    slots             none: all experts fit, and are used where the file is mapped"
    assert cache_section("--moe-cache", "auto")[0] == fits
    monkeypatch.setattr("runner.show.available_memory_bytes", lambda: 140_000_000)
    assert cache_section("--moe-cache", "auto")[0].startswith("    slots per layer")
    off = cache_section("--moe-cache", "off")
    assert off[0] == "    slots             none: experts are used where the file is mapped"
    assert off[-1].startswith("    left for experts")


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_size_that_is_too_small_ends_in_the_smallest_that_works(form: list[str]) -> None:
    done = buddyrun("show", str(DEMO), "--device", "cpu", "--moe-cache", "1M", *form)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"the smallest that works is --moe-cache 6720KiB (6.88 MB)" in done.stderr
    assert (
        buddyrun("show", str(DEMO), "--device", "cpu", "--moe-cache", "6720KiB", *form).returncode
        == 0
    )


def test_memory_that_does_not_suffice_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.show.available_memory_bytes", lambda: 100_000_000)
    text = buddyrun("show", str(DEMO), "--device", "cpu", "--moe-cache", "12MB").stdout.decode()
    assert "left              nothing, " in text and "expect it to be slow" in text


def test_a_dense_model_has_no_expert_cache(tmp_path: Path) -> None:
    path = str(write_random_model(tmp_path / "dense.gguf", RandomModel(n_expert=0)))
    done = buddyrun("show", path, "--device", "cpu", "--moe-cache", "1G")
    assert done.returncode == 1 and b"this model has no experts" in done.stderr
    done = buddyrun("show", path, "--device", "cpu", "--moe-cache", "auto")
    assert done.returncode == 0 and b"none: the model has no experts" in done.stdout


def test_a_plan_needs_no_native_code() -> None:
    script = (
        "import sys; from runner.cli import main; main(sys.argv[1:]);"
        "sys.exit(any(name in sys.modules for name in ('llama_cpp', 'quant.ggml', 'torch')))"
    )
    command = [sys.executable, "-c", script, "show", str(DEMO), "--moe-cache", "12MB"]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, check=False)
    assert done.returncode == 0 and b"Expert cache" in done.stdout


@pytest.mark.parametrize(("device", "status"), [("auto", 1), ("cpu", 0)])
def test_where_ggml_cannot_be_used_a_plan_for_a_gpu_says_why(
    tmp_path: Path, device: str, status: int
) -> None:
    script = "import sys; from runner.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "show", str(DEMO), "--moe-cache", "12MB"]
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(tmp_path), "BUDDYRUN_DEVICE": device}
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == status and b"Traceback" not in done.stderr
    assert (b"Expert cache" in done.stdout) == (status == 0)
    assert (b"buddyrun: no ggml-base library in" in done.stderr) == (status == 1)
