"""Malformed files through the real programs: every one through the worker's socket, and files of
every kind through the command line, which only prints what the worker answers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.config import EngineConfig
from runner.engine_client import Client
from runner.errors import BuddyrunError, InternalError
from tests.gguf_writer import write_small_mixtral
from tests.malformed_files import BUILDERS

pytestmark = pytest.mark.slow


def buddyrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "runner", *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip


@pytest.mark.parametrize("name", list(BUILDERS)[::5])
def test_the_command_line_refuses_it_with_one_line_and_status_1(name: str, tmp_path: Path) -> None:
    path = BUILDERS[name](tmp_path / "model.gguf")
    done = buddyrun(str(path), "-p", "hi", "-n", "4")
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("buddyrun: ") and done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr and "InternalError" not in done.stderr


def test_one_worker_refuses_them_all_and_lives(tmp_path: Path) -> None:
    good = write_small_mixtral(tmp_path / "good.gguf")
    with Client.start() as client:
        for name, build in BUILDERS.items():
            path = build(tmp_path / f"{name.replace(' ', '-').replace('/', '_')}.gguf")
            with pytest.raises(BuddyrunError) as caught:
                client.load(path, EngineConfig(n_threads=1))
            assert not isinstance(caught.value, InternalError), name
            assert str(caught.value).isprintable() and "Traceback" not in str(caught.value), name
            pid = client.pid
            path.unlink(missing_ok=True)
        assert client.load(good, EngineConfig(n_threads=1)).n_expert == 4
        assert client.pid == pid


def test_show_refuses_them_too(tmp_path: Path) -> None:
    for name in list(BUILDERS)[::20]:
        done = buddyrun("show", str(BUILDERS[name](tmp_path / "model.gguf")))
        assert done.returncode == 1 and done.stderr.startswith("buddyrun: "), (name, done.stderr)
