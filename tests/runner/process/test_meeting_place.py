"""Where engines are found: real sockets and directories, also those of others and of the dead."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner.errors import OptionError
from runner.process import meeting_place

pytestmark = pytest.mark.skipif(not meeting_place.HAS_MEETING_PLACE, reason="no Unix sockets")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "buddyrun"


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_an_engine_that_listens_is_found_and_can_be_called(place: Path) -> None:
    with meeting_place.open_socket(place, os.getpid()) as listener:
        assert place.stat().st_mode & 0o777 == 0o700
        assert meeting_place.pids(place) == [os.getpid()]
        with meeting_place.call(place, os.getpid()) as caller:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"hello")
                assert caller.recv(9) == b"hello"


def test_without_a_directory_nobody_is_running(place: Path) -> None:
    assert meeting_place.pids(place) == []
    assert not place.exists()


def test_what_a_killed_engine_left_is_removed_and_a_full_queue_is_not(place: Path) -> None:
    gone = dead_pid()
    meeting_place.open_socket(place, gone).close()
    with meeting_place.open_socket(place, os.getpid()):
        callers = []
        for _ in range(40):  # more than the queue of a listener that is busy
            caller = socket.socket(socket.AF_UNIX)
            caller.setblocking(False)
            caller.connect_ex(str(meeting_place.path_of(place, os.getpid())))
            callers.append(caller)
        assert meeting_place.pids(place) == [os.getpid()]
        assert not meeting_place.path_of(place, gone).exists()
        for caller in callers:
            caller.close()


def test_an_engine_whose_process_cannot_be_seen_is_found_while_it_listens(place: Path) -> None:
    unseen = dead_pid()
    with meeting_place.open_socket(place, unseen):
        assert meeting_place.pids(place) == [unseen]
        callers = []
        for _ in range(40):  # more than its queue takes
            caller = socket.socket(socket.AF_UNIX)
            caller.setblocking(False)
            caller.connect_ex(str(meeting_place.path_of(place, unseen)))
            callers.append(caller)
        assert meeting_place.pids(place) == [unseen]
        for caller in callers:
            caller.close()
    assert meeting_place.pids(place) == []
    assert not meeting_place.path_of(place, unseen).exists()


def test_who_does_not_accept_is_not_waited_for(place: Path) -> None:
    with meeting_place.open_socket(place, os.getpid()), contextlib.ExitStack() as callers:
        began_s = time.monotonic()
        with pytest.raises(OSError):
            for _ in range(40):
                callers.enter_context(meeting_place.call(place, os.getpid()))
        assert time.monotonic() - began_s < 5.0


def test_a_socket_of_an_earlier_process_of_the_same_number_is_replaced(place: Path) -> None:
    meeting_place.open_socket(place, os.getpid()).close()
    with meeting_place.open_socket(place, os.getpid()):
        meeting_place.call(place, os.getpid()).close()


def test_other_files_are_left_alone(place: Path) -> None:
    place.mkdir(mode=0o700)
    for name in ("notes.txt", "x.sock", "-1.sock", "٣.sock", f"{2**80}.sock"):
        (place / name).write_text("")
    assert meeting_place.pids(place) == []
    assert (place / "notes.txt").exists() and (place / "x.sock").exists()


def test_a_directory_that_others_can_open_is_not_used(place: Path) -> None:
    place.mkdir(mode=0o755)
    with pytest.raises(OSError, match="not of this user alone"):
        meeting_place.open_socket(place, 1)
    with pytest.raises(OptionError, match="not of this user alone"):
        meeting_place.pids(place)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_somebody_else_is_not_used(place: Path) -> None:
    place.mkdir(mode=0o700)
    os.chown(place, 12345, 12345)
    with pytest.raises(OptionError, match="not of this user alone"):
        meeting_place.pids(place)


def test_a_link_to_a_directory_is_not_used(place: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir(mode=0o700)
    place.symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="no directory"):
        meeting_place.open_socket(place, 1)


def test_the_user_s_run_directory_is_used_where_it_is_and_a_socket_s_path_fits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(meeting_place, "_RUNTIME_DIRS", str(tmp_path / "none"))
    assert meeting_place.directory({"XDG_RUNTIME_DIR": "/usr"}) == Path("/usr/buddyrun")
    temporary = Path(f"/tmp/buddyrun-{os.getuid()}")
    for useless in ("", "relative", "/run/user/of nobody", "/" + "./" * 45):
        assert meeting_place.directory({"XDG_RUNTIME_DIR": useless}) == temporary


def test_the_user_s_run_directory_is_found_where_nothing_names_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(meeting_place, "_RUNTIME_DIRS", str(tmp_path))
    mine = tmp_path / str(os.getuid())
    mine.mkdir()
    assert meeting_place.directory({}) == mine / "buddyrun"
