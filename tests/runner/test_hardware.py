"""Cores and memory as the system tells them."""

import os
from pathlib import Path

import psutil
import pytest

from quant.gguf_file import GGUFFile
from runner import hardware
from runner.errors import CancelledError
from runner.page_in import page_in


def test_cores_are_at_most_the_processors_of_this_process() -> None:
    assert 1 <= hardware.n_cores() <= len(os.sched_getaffinity(0))


def test_hyper_threads_count_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings)
    monkeypatch.setattr(hardware, "_CPUS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert hardware.n_cores() == 2


def test_available_memory_is_what_the_system_says() -> None:
    available = hardware.available_memory_bytes()
    assert available is not None
    assert available <= 1.2 * psutil.virtual_memory().available


def test_the_tightest_control_group_decides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inner = tmp_path / "user" / "chat"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (tmp_path / "user" / "memory.max").write_text("123456\n")
    monkeypatch.setattr(hardware, "_CGROUPS", tmp_path)
    monkeypatch.setattr(hardware, "_MEMBERSHIP", tmp_path / "membership")
    (tmp_path / "membership").write_text("0::/user/chat\n")
    assert hardware.available_memory_bytes() == 123456


def test_a_model_larger_than_memory_is_not_read_ahead(
    demo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    with GGUFFile.open(demo_path) as file:
        monkeypatch.setattr("runner.page_in.available_memory_bytes", lambda: 1 << 20)
        assert not page_in(file, lambda *progress: seen.append(progress), lambda: False)
        assert seen == [] and not file.is_mapped


def test_reading_ahead_reports_its_way_and_can_be_stopped(demo_path: Path) -> None:
    seen = []
    with GGUFFile.open(demo_path) as file:
        assert page_in(file, lambda stage, done, total: seen.append((done, total)), lambda: False)
        assert seen[-1] == (file.size_bytes, file.size_bytes)
        with pytest.raises(CancelledError):
            page_in(file, lambda *_: None, lambda: True)


def test_a_containers_share_of_the_processor_limits_the_threads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "box").mkdir()
    (tmp_path / "box" / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "membership").write_text("0::/box\n")
    monkeypatch.setattr(hardware, "_CGROUPS", tmp_path)
    monkeypatch.setattr(hardware, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(hardware, "_CPUS", tmp_path / "none")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert hardware.n_cores() == 2
