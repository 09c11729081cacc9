"""Cores and memory as the system tells them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from quant.gguf_file import GGUFFile
from runner import hardware
from runner.errors import CancelledError
from runner.page_in import page_in
from tests.paths import ROOT


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


def write_group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(text)


def test_a_group_can_still_get_its_limit_without_what_is_in_use_for_good(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pages = "anon 500000\ninactive_file 30000\nactive_file 20000\nfile 90000\n"
    write_group(tmp_path / "box" / "chat", max="1000000\n", current="600000\n", stat=pages)
    write_group(tmp_path / "box", max="max\n", current="900000\n", stat=pages)
    (tmp_path / "membership").write_text("0::/box/chat\n")
    monkeypatch.setattr(hardware, "_CGROUPS", tmp_path)
    monkeypatch.setattr(hardware, "_MEMBERSHIP", tmp_path / "membership")
    assert hardware.available_memory_bytes() == 1000000 - 600000 + 50000
    write_group(tmp_path / "box", max="950000\n")  # its other groups leave less
    assert hardware.available_memory_bytes() == 950000 - 900000 + 50000
    write_group(tmp_path / "box", max="800000\n")
    assert hardware.available_memory_bytes() == 0
    write_group(tmp_path / "box", max="max\n")
    write_group(tmp_path / "box" / "chat", current="40000\n")  # file pages may be another group's
    assert hardware.available_memory_bytes() == 1000000


def test_a_group_of_version_1_counts_the_groups_below_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    group = tmp_path / "memory" / "box"
    write_group(
        group,
        limit_in_bytes="1000000\n",
        usage_in_bytes="600000\n",
        stat="inactive_file 7\nactive_file 7\ntotal_inactive_file 30000\ntotal_active_file 20000\n",
    )
    write_group(tmp_path / "memory", limit_in_bytes="9223372036854771712\n")
    (tmp_path / "membership").write_text("4:cpu,memory:/box\n0::/\n")
    monkeypatch.setattr(hardware, "_CGROUPS", tmp_path)
    monkeypatch.setattr(hardware, "_MEMBERSHIP", tmp_path / "membership")
    assert hardware.available_memory_bytes() == 450000
    (group / "memory.stat").unlink()
    assert hardware.available_memory_bytes() == 400000
    (group / "memory.usage_in_bytes").unlink()
    assert hardware.available_memory_bytes() == 1000000


@pytest.fixture
def capped_group() -> Iterator[Path]:
    """A real control group (v1) of 600 MB; skips where none can be made."""
    group = Path(f"/sys/fs/cgroup/memory/buddyrun_test.{os.getpid()}")
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(600_000_000))
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    yield group
    group.rmdir()


def test_a_process_in_a_group_sees_what_the_group_leaves_it(
    capped_group: Path, tmp_path: Path
) -> None:
    script = """
import sys
from pathlib import Path
from runner.hardware import available_memory_bytes
Path(sys.argv[1], "cgroup.procs").write_text("0")
print(available_memory_bytes())
held = bytearray(b"x" * 100_000_000)
print(available_memory_bytes())
Path(sys.argv[2]).write_bytes(held)
print(available_memory_bytes())
"""
    command = [sys.executable, "-c", script, str(capped_group), str(tmp_path / "pages")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    at_first, after_data, after_pages = map(int, done.stdout.split())
    assert 500_000_000 < at_first <= 600_000_000
    assert 80_000_000 < at_first - after_data < 120_000_000
    assert abs(after_data - after_pages) < 30_000_000, "file pages can be dropped"


def test_a_model_larger_than_memory_is_not_read_ahead(
    demo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    with GGUFFile.open(demo_path) as file:
        monkeypatch.setattr("runner.page_in.available_memory_bytes", lambda: 1 << 20)
        parts = [tensor.range for tensor in file.tensors.values()]
        assert not page_in(file, parts, lambda *progress: seen.append(progress), lambda: False)
        assert seen == [] and not file.is_mapped


def test_reading_ahead_reports_its_way_and_can_be_stopped(demo_path: Path) -> None:
    seen = []
    with GGUFFile.open(demo_path) as file:
        parts = [tensor.range for tensor in file.tensors.values()]
        total = sum(part.n_bytes for part in parts)
        assert page_in(file, parts, lambda stage, *done: seen.append(done), lambda: False)
        assert seen[-1] == (total, total)
        with pytest.raises(CancelledError):
            page_in(file, parts, lambda *_: None, lambda: True)


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
