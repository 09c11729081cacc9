"""What the worker finds of ggml and measures: on the CPU, and on a GPU where there is one."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quant.errors import BackendError
from quant.ggml import Backend, Context
from quant.ggml_library import library_folder, load_ggml
from runner import bandwidth
from runner.doctor import examine
from runner.doctor_report import Bandwidth
from runner.errors import CancelledError
from tests.paths import ROOT

MIB = 1 << 20
EXAMINE = (
    "import dataclasses, json; from runner.doctor import examine;"
    "report = examine({measure}, lambda *_: None, lambda: False);"
    "print(json.dumps(dataclasses.asdict(report)))"
)


def silent(stage: str, done: int, total: int) -> None:
    pass


def examined_elsewhere(before: str = "", measure: bool = False, **environment: str) -> Any:
    """The report of a process of its own, in which `before` ran first."""
    done = subprocess.run(
        [sys.executable, "-c", before + EXAMINE.format(measure=measure)],
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def assert_plausible(found: Bandwidth) -> None:
    assert found.gb_per_s is not None, found.how
    assert math.isfinite(found.gb_per_s) and 0.01 < found.gb_per_s < 10_000
    assert "MiB" in found.how


@pytest.mark.slow
def test_the_cpu_is_listed_with_the_libraries_and_measured_in_time() -> None:
    stages: list[str] = []
    began_s = time.monotonic()
    report = examine(True, lambda stage, done, total: stages.append(stage), lambda: False)
    assert time.monotonic() - began_s < 3 * (len(report.devices) + 1)
    assert report.problem == "" and report.library_folder == str(library_folder())
    assert report.ggml_version == load_ggml().version_text
    assert "CPU" in report.backends and any(name.startswith("cpu") for name in report.libraries)
    cpu = report.devices[-1]
    assert (cpu.name, cpu.backend, cpu.kind) == ("cpu", "CPU", "cpu")
    assert cpu.description and cpu.free_bytes is not None
    assert cpu.free_bytes > 0 and cpu.total_bytes > 0
    assert_plausible(cpu.own_memory)
    assert_plausible(report.host_read)
    assert cpu.from_host == Bandwidth(None, "nothing is copied: it computes in the host's memory")
    assert "measuring cpu" in stages and stages[-1] == "measuring the host's memory"
    assert report.auto_device in [device.name for device in report.devices]


def test_nothing_is_measured_unasked() -> None:
    report = examine(False, silent, lambda: False)
    figures = [(device.from_host, device.own_memory) for device in report.devices]
    assert {figure for pair in figures for figure in pair} == {report.host_read}
    assert report.host_read == Bandwidth(None, "not measured (--no-measure)")


def test_a_cancelled_examination_ends() -> None:
    with pytest.raises(CancelledError):
        examine(True, silent, lambda: True)


def test_little_free_memory_makes_the_pieces_small_and_too_little_makes_no_figure() -> None:
    with Backend.cpu(1) as backend:
        found = bandwidth.own_memory(backend, 5 * MIB)
        assert_plausible(found)
        assert "copies 4 MiB of F32" in found.how
        found = bandwidth.own_memory(backend, 3 * MIB)
    assert found == Bandwidth(None, "not enough free memory: 3.15 MB for this")
    assert bandwidth.host_read(1, 0).gb_per_s is None
    assert "of 4 MiB (F32) by a vector on the CPU, 1 thread" in bandwidth.host_read(1, 4 * MIB).how


def test_a_device_that_does_nothing_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backend, "compute_later", lambda backend, graph: None)
    with Backend.cpu(1) as backend:
        found = bandwidth.own_memory(backend, 64 * MIB)
    wrong = "CPU did not compute what measures this: wrong values came back"
    assert found == bandwidth.host_read(1, 64 * MIB) == Bandwidth(None, wrong)


def test_an_operation_that_the_device_lacks_is_told_and_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Backend, "supports", lambda backend, tensor: False)
    with Backend.cpu(1) as backend:
        found = bandwidth.own_memory(backend, 64 * MIB)
    assert found == Bandwidth(None, "CPU has no kernel for what measures this")


def test_a_size_that_the_device_refuses_leaves_the_figure_of_the_last_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allocate = Context.allocate

    def refuse_much(context: Context, backend: Backend) -> Any:
        buffer = allocate(context, backend)
        if buffer.n_bytes > 100 * MIB:
            buffer.close()
            raise BackendError("out of memory")
        return buffer

    monkeypatch.setattr(Context, "allocate", refuse_much)
    with Backend.cpu(1) as backend:
        found = bandwidth.own_memory(backend, 1024 * MIB)
    assert_plausible(found)
    assert "copies 32 MiB" in found.how


def test_the_figure_is_bytes_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0

    def run() -> None:
        nonlocal now_s
        now_s += 0.2

    monkeypatch.setattr(bandwidth.time, "perf_counter", lambda: now_s)
    assert np.isclose(bandwidth._rate(lambda: None, run, 50 * MIB), 250 * MIB)
    began_s, now_s = now_s, 0.0
    assert 0.2 <= began_s <= 2.0


def test_an_empty_library_folder_is_a_problem_and_no_trace(tmp_path: Path) -> None:
    report = examined_elsewhere(measure=True, LLAMA_CPP_LIB_PATH=str(tmp_path))
    assert report["problem"] == (
        f"no ggml-base library in {tmp_path}: found no llama-cpp-python there"
    )
    assert (report["library_folder"], report["devices"]) == (str(tmp_path), [])


def test_a_missing_llama_cpp_python_is_a_problem_and_no_trace() -> None:
    missing = "import sys; sys.modules['llama_cpp'] = None;"
    report = examined_elsewhere(missing, measure=True, LLAMA_CPP_LIB_PATH="")
    assert report["problem"].startswith("llama-cpp-python is not installed: pip install")
    assert report["library_folder"] == ""


def test_another_version_of_ggml_is_a_problem_and_no_trace() -> None:
    newer = "import quant.ggml_library as g; g.SUPPORTED_GGML = ((0, 98), (0, 99));"
    report = examined_elsewhere(newer, measure=True)
    assert "buddyrun is tested with ggml >=0.98,<0.99" in report["problem"]
    assert "cpu" in report["libraries"] and report["devices"] == []


def test_a_library_that_is_none_is_a_problem_and_no_trace(tmp_path: Path) -> None:
    for name in ("libggml-base.so", "libggml-cpu.so", "libggml.so", "libggml-cuda.so"):
        (tmp_path / name).write_text("a text file")
    report = examined_elsewhere(measure=True, LLAMA_CPP_LIB_PATH=str(tmp_path))
    assert report["problem"].startswith(f"a ggml library in {tmp_path} cannot be loaded")
    assert report["libraries"] == ["cpu", "cuda"]


HAS_VULKAN = any(Path(os.environ.get("LLAMA_CPP_LIB_PATH") or "/none").glob("libggml-vulkan.*"))


@pytest.mark.skipif(not HAS_VULKAN, reason="LLAMA_CPP_LIB_PATH names no libraries with Vulkan")
def test_a_vulkan_device_is_listed_and_measured() -> None:
    shown = os.environ.get("GGML_VK_VISIBLE_DEVICES", "0")  # software devices are hidden without
    report = examined_elsewhere(measure=True, GGML_VK_VISIBLE_DEVICES=shown)
    device = report["devices"][0]
    assert report["backends"][0] == "Vulkan" and "vulkan" in report["libraries"]
    assert device["name"] == "vulkan0" and device["kind"] in ("gpu", "igpu")
    assert 0 < device["free_bytes"] <= device["total_bytes"]
    assert_plausible(Bandwidth(**device["from_host"]))
    assert_plausible(Bandwidth(**device["own_memory"]))
    assert device["from_host"]["how"].endswith("pinned host memory")
    assert report["devices"][-1]["name"] == "cpu"
