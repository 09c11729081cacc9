"""Watching real worker processes from outside: found, read, ended, killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.config import EngineConfig, GenerateRequest
from runner.engine_client import Client
from runner.errors import OptionError
from runner.frames import Frame
from runner.process import meeting_place, worker_process
from runner.watch import Watch, find, running

pytestmark = pytest.mark.skipif(not meeting_place.HAS_MEETING_PLACE, reason="no Unix sockets")
FAKE = (
    f"sys.path.insert(0, {str(Path(__file__).parent)!r}); from fake_session import FakeSession;"
    " from runner.worker import main; main(FakeSession)"
)
CONFIG = EngineConfig(n_ctx=64)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory in which only this test's engines are."""
    place = tmp_path_factory.mktemp("r")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    monkeypatch.setattr(worker_process, "PROGRAM", FAKE)
    return place


@pytest.fixture
def client(environment: Path, tmp_path: Path) -> Iterator[Client]:
    model = tmp_path / "model.gguf"
    model.write_bytes(bytes(64 << 10))
    with Client.start() as client:
        client.load(model, CONFIG)
        yield client


def test_a_running_engine_is_found_with_its_model(client: Client) -> None:
    (found,) = running()
    assert (found.pid, found.name, found.frame.phase) == (client.pid, "Fake", "ready")
    assert found.frame.owner_pid == os.getpid()


def test_it_is_found_by_its_own_number_and_by_that_of_its_program(client: Client) -> None:
    for number in (client.pid, os.getpid(), None):
        assert [each.pid for each in find(number)] == [client.pid]
    with pytest.raises(OptionError, match=f"no buddyrun has the process number 1; .*{os.getpid()}"):
        find(1)


def test_without_any_engine_it_is_said_how_to_start_one(environment: Path) -> None:
    assert running() == []
    with pytest.raises(OptionError, match="start one"):
        find(None)
    with pytest.raises(OptionError, match="process number 12"):
        Watch(12)


def test_several_viewers_see_an_answer_being_made_and_its_end(client: Client) -> None:
    answer = client.generate(GenerateRequest(prompt="forever"))
    next(answer)
    for _ in range(5):
        with Watch(client.pid) as watch:
            first, second = (frame for frame, _ in zip(watch.frames(), range(2), strict=False))
        assert first.phase in ("prompt", "generating") and second.phase == "generating"
        assert first.stats is not None and second.stats is not None
        assert second.stats.n_tokens_generated > first.stats.n_tokens_generated
        assert second.time_s > first.time_s
    answer.close()


def test_frames_end_when_the_engine_ends(client: Client, environment: Path) -> None:
    watch = Watch(client.pid)
    frames = watch.frames()
    next(frames)
    client.close()
    assert all(isinstance(frame, Frame) for frame in frames)
    assert not list(environment.glob("buddyrun/*.sock")), "no socket is left"
    watch.close()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_killed_engine_ends_the_frames_and_is_not_found_again(client: Client) -> None:
    with Watch(client.pid) as watch:
        frames = watch.frames()
        next(frames)
        os.kill(client.pid, signal.SIGKILL)
        for _ in frames:
            pass
    client.close()
    assert running() == []


def test_engines_that_do_not_answer_cost_a_moment_together(client: Client) -> None:
    place = meeting_place.directory(os.environ)
    stuck = [subprocess.Popen(["sleep", "60"]) for _ in range(3)]
    listeners = [meeting_place.open_socket(place, each.pid) for each in stuck]
    full = [meeting_place.call(place, stuck[0].pid) for _ in range(17)]
    began_s = time.monotonic()
    try:
        assert [each.pid for each in running()] == [client.pid]
        assert time.monotonic() - began_s < 3.0
        with pytest.raises(OptionError, match=f"the engine {stuck[0].pid} takes no viewer"):
            Watch(stuck[0].pid)
        assert all(meeting_place.path_of(place, each.pid).exists() for each in stuck)
    finally:
        for process in stuck:
            process.kill()
            process.wait()
        for each in (*listeners, *full):
            each.close()


def test_a_process_that_listens_no_more_is_not_listed(environment: Path) -> None:
    place = meeting_place.directory(os.environ)
    meeting_place.open_socket(place, os.getpid()).close()
    assert running() == []
    assert meeting_place.path_of(place, os.getpid()).exists()


def test_watching_can_be_ended_from_another_thread(client: Client) -> None:
    watch = Watch(client.pid)
    frames = watch.frames()
    next(frames)
    closer = threading.Timer(0.05, watch.close)
    closer.start()
    for _ in frames:
        pass
    closer.join()
    watch.close()


def test_viewers_that_come_and_go_do_not_stop_an_answer(client: Client) -> None:
    answer = client.generate(GenerateRequest(prompt="forever"))
    next(answer)
    for _ in range(20):
        Watch(client.pid).close()
    before = client.stats()["n_tokens_generated"]
    while client.stats()["n_tokens_generated"] == before:
        pass
    assert len(running()) == 1
    answer.close()


def test_a_run_that_nobody_can_watch_is_a_run_all_the_same(
    environment: Path, tmp_path: Path
) -> None:
    (environment / "buddyrun").write_text("in the way")
    model = tmp_path / "model.gguf"
    model.write_bytes(bytes(64 << 10))
    with Client.start() as client:
        client.load(model, CONFIG)
        assert list(client.generate(GenerateRequest(prompt="count 2")))
        assert "nobody can watch this run" in client.log
