"""The worker's side of the process boundary, spoken to as any program could."""

import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client as connect
from pathlib import Path

import psutil
import pytest

from runner import protocol

ROOT = Path(__file__).resolve().parents[2]
FAKE = (
    f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}];"
    " from fake_session import FakeSession; from runner.worker import main; main(FakeSession)"
)
GENERATE = {"type": "generate", "id": 1}
DEEP = pytest.param(b"[" * 200_000, id="deep")  # an id of its own: it goes into the environment


class RawWorker:
    """A worker process with a fake session, and a connection to it."""

    def __init__(self, directory):
        self.directory = directory
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", FAKE, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        announced = json.loads(self.process.stdout.readline())
        self.address = announced["address"]
        self.authkey = bytes.fromhex(announced["authkey"])
        self.connection = None

    def call(self):
        self.connection = connect(self.address, authkey=self.authkey)

    def ask(self, message):
        protocol.send(self.connection, message)
        return protocol.receive(self.connection)

    def close(self):
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            pipe.close()
        if self.connection is not None:
            self.connection.close()


@pytest.fixture
def silent_worker(tmp_path_factory):
    directory = tmp_path_factory.mktemp("w")
    directory.chmod(0o700)
    worker = RawWorker(directory)
    yield worker
    worker.close()


@pytest.fixture
def worker(silent_worker):
    silent_worker.call()
    return silent_worker


def raw_socket(worker):
    caller = socket.socket(socket.AF_UNIX)
    caller.connect(worker.address)
    return caller


def assert_alive(worker):
    reply = worker.ask({"type": "generate", "id": 99, "request": {"prompt": "count 1"}})
    assert reply == {"id": 99, "type": "text", "text": "0 ", "n_tokens": 1}
    assert protocol.receive(worker.connection)["type"] == "done"


def test_garbage_from_a_stranger_does_not_end_the_worker(silent_worker):
    for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", struct.pack("!i", -1), os.urandom(4096)):
        with raw_socket(silent_worker) as caller:
            caller.sendall(garbage)
    silent_worker.call()
    assert_alive(silent_worker)


def test_a_caller_with_a_wrong_key_is_refused_and_the_right_one_served(silent_worker):
    with pytest.raises(AuthenticationError):
        connect(silent_worker.address, authkey=b"wrong")
    silent_worker.call()
    assert_alive(silent_worker)


def test_once_the_client_is_there_no_socket_is_left_to_call(worker):
    assert_alive(worker)
    assert not worker.directory.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has a named pipe instead")
def test_the_socket_lies_in_a_directory_of_this_user_only(silent_worker):
    assert Path(silent_worker.address).parent == silent_worker.directory
    assert stat.S_IMODE(silent_worker.directory.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\xfe\x00", b"[]", b"7", b'"text"', b"{}", b'{"type": 3}', DEEP, b"{" * 9],
)
def test_bytes_that_are_no_message_are_answered_with_an_error(worker, data):
    worker.connection.send_bytes(data)
    reply = protocol.receive(worker.connection)
    assert (reply["type"], reply["id"], reply["kind"]) == ("error", None, "OptionError")
    assert_alive(worker)


def test_a_pickle_is_not_loaded(worker):
    worker.connection.send({"type": "stats"})
    assert protocol.receive(worker.connection)["kind"] == "OptionError"
    assert_alive(worker)


def test_a_message_of_a_gigabyte_is_refused_without_reading_it(worker):
    os.write(worker.connection.fileno(), struct.pack("!i", 1 << 30))
    reply = protocol.receive(worker.connection)
    assert (reply["type"], reply["id"]) == ("error", None)
    assert worker.process.wait(2) == 0


def test_an_unknown_request_is_answered_with_an_error(worker):
    reply = worker.ask({"type": "format_disk", "id": 5})
    assert (reply["id"], reply["kind"]) == (5, "OptionError")
    assert "format_disk" in reply["message"]
    assert_alive(worker)


@pytest.mark.parametrize(
    ("request_body", "named"),
    [
        ({}, "request"),
        ({"request": None}, "GenerateRequest"),
        ({"request": {"prompt": 7}}, "prompt"),
        ({"request": {"n_predict": True}}, "n_predict"),
        ({"request": {"n_predict": "9"}}, "n_predict"),
        ({"request": {"colour": "red"}}, "colour"),
        ({"request": {"messages": [{"role": 1}]}}, "messages"),
        ({"request": {"sampling": {"temperature": "hot"}}}, "temperature"),
        ({"request": {}, "extra": 1}, "extra"),
    ],
)
def test_a_wrong_field_is_named(worker, request_body, named):
    reply = worker.ask(GENERATE | request_body)
    assert (reply["type"], reply["kind"]) == ("error", "OptionError")
    assert named in reply["message"]
    assert_alive(worker)


def test_stats_without_a_model_is_an_error(worker):
    assert worker.ask({"type": "stats", "id": 2})["type"] == "error"


def test_a_second_job_is_refused_and_the_first_goes_on(worker):
    worker.ask(GENERATE | {"request": {"prompt": "read"}})
    reply = worker.ask(GENERATE | {"id": 2, "request": {"prompt": "count 1"}})
    assert (reply["id"], reply["kind"]) == (2, "OptionError")
    assert "busy" in reply["message"]
    assert worker.ask({"type": "cancel", "target": 1})["result"]["stop_reason"] == "cancelled"


def test_a_cancel_that_comes_before_its_request_still_counts(worker):
    protocol.send(worker.connection, {"type": "cancel", "target": 1})
    reply = worker.ask(GENERATE | {"request": {"prompt": "forever"}})
    assert reply["result"]["stop_reason"] == "cancelled"


def test_a_cancel_for_another_request_changes_nothing(worker):
    protocol.send(worker.connection, {"type": "cancel", "target": 8})
    worker.ask(GENERATE | {"request": {"prompt": "count 2"}})
    assert protocol.receive(worker.connection)["type"] == "text"
    assert protocol.receive(worker.connection)["result"]["stop_reason"] == "length"


def start_native_code(worker):
    protocol.send(worker.connection, GENERATE | {"request": {"prompt": "native"}})


def test_shutdown_ends_the_worker_with_status_0(worker):
    protocol.send(worker.connection, {"type": "shutdown"})
    assert worker.process.wait(2) == 0


def test_shutdown_works_while_native_code_computes(worker):
    start_native_code(worker)
    protocol.send(worker.connection, {"type": "shutdown"})
    assert worker.process.wait(2) == 0


def test_a_worker_whose_client_hangs_up_ends_while_native_code_computes(worker):
    start_native_code(worker)
    worker.connection.close()
    assert worker.process.wait(2) == 0


def test_a_worker_that_nobody_called_ends_with_its_parents_pipe(silent_worker):
    silent_worker.process.stdin.close()
    assert silent_worker.process.wait(2) == 0
    assert not silent_worker.directory.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM there")
def test_sigterm_ends_a_worker_in_native_code_and_its_socket(silent_worker):
    silent_worker.call()
    start_native_code(silent_worker)
    silent_worker.process.terminate()
    assert silent_worker.process.wait(2) == 128 + signal.SIGTERM
    assert not silent_worker.directory.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="a new process group does this there")
def test_ctrl_c_does_not_reach_the_worker(worker):
    worker.process.send_signal(signal.SIGINT)
    assert_alive(worker)


def test_a_directory_with_other_files_is_not_removed(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    worker = RawWorker(tmp_path)
    worker.process.stdin.close()
    worker.process.wait(2)
    worker.close()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_worker_has_no_children(worker):
    assert_alive(worker)
    assert psutil.Process(worker.process.pid).children() == []
