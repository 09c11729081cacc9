"""What the parent says and does when a worker dies, and what is left when the parent dies."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import psutil
import pytest

from runner.config import EngineConfig, GenerateRequest
from runner.engine_client import Client
from runner.errors import WorkerDiedError
from runner.process import worker_process
from tests.paths import ROOT
from tests.runner.engine_client.fake_worker import CONFIG, POSIX_ONLY, PROGRAM, answer_stop, ask


@POSIX_ONLY
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, "killed"),
        (signal.SIGTERM, "ended from outside"),
        (signal.SIGSEGV, "wrong memory access"),
        (signal.SIGILL, "instructions that this processor lacks"),
        (signal.SIGHUP, "SIGHUP"),
    ],
)
def test_a_signal_that_ends_the_worker_is_explained(loaded, number, words):
    answer = loaded.generate(GenerateRequest(prompt="read"))
    next(answer)
    os.kill(loaded.pid, number)
    with pytest.raises(WorkerDiedError, match=words):
        next(answer)


@POSIX_ONLY
@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("abort", r"ggml\.c:42: GGML_ASSERT\(ne0 == 64\) failed$"),
        ("bad_alloc", r"ran out of memory \(what\(\):  std::bad_alloc\)"),
        ("truncate", r"model\.gguf \(SIGBUS\): it has 0 bytes now and had 65536"),
        ("exit", "exit status 3: the last line on stderr"),
    ],
)
def test_a_worker_that_ends_itself_says_why(loaded, prompt, words):
    with pytest.raises(WorkerDiedError, match=words):
        ask(loaded, prompt)


@POSIX_ONLY
def test_sigbus_after_the_model_was_deleted_says_so(loaded, model):
    model.unlink()
    worker = psutil.Process(loaded.pid)
    os.kill(worker.pid, signal.SIGBUS)
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with pytest.raises(WorkerDiedError, match=r"model\.gguf .* no longer there"):
        ask(loaded, "count 1")


@POSIX_ONLY
def test_an_abort_while_loading_is_explained(client):
    with pytest.raises(WorkerDiedError, match="n_loaded == 1"):
        client.load("abort", CONFIG)


def test_a_missing_package_is_named(monkeypatch, private_directories):
    monkeypatch.setattr(worker_process, "PROGRAM", "import llama_cpp_missing")
    with Client.start() as client, pytest.raises(WorkerDiedError, match="llama_cpp_missing is not"):
        client.load("model.gguf", CONFIG)


def test_all_requests_to_a_dead_worker_say_why_it_died(loaded):
    psutil.Process(loaded.pid).kill()
    for request in (loaded.stats, lambda: ask(loaded, "count 1"), loaded.stats):
        with pytest.raises(WorkerDiedError, match="killed"):
            request()
    loaded.cancel()


def test_restart_after_a_death_loads_the_same_model_with_the_same_settings(loaded, model):
    loaded.load(model, EngineConfig(n_ctx=48), chat_template="mine")
    for _ in range(3):
        dead = loaded.pid
        psutil.Process(dead).kill()
        with pytest.raises(WorkerDiedError):
            ask(loaded, "count 1")
        info = loaded.restart()
        assert (info.path, info.n_ctx, info.chat_template) == (str(model), 48, "mine")
        assert loaded.pid != dead
        assert answer_stop(loaded, "count 2") == "length"


@POSIX_ONLY
def test_where_a_gpus_memory_runs_out_at_load_it_is_tried_again_with_a_wider_margin(
    client, crowded
):
    dead = client.pid
    info = client.load(crowded, CONFIG)
    assert client.pid != dead
    (warning,) = info.warnings
    assert "ran out while the model was loaded" in warning and "--fit-margin 2048MiB" in warning
    assert answer_stop(client, "count 2") == "length"
    with pytest.raises(WorkerDiedError, match="GPU"):
        client.load(crowded, replace(CONFIG, fit_margin_bytes=1 << 20))  # 1 GiB is too little


@POSIX_ONLY
def test_where_there_is_no_less_the_death_is_told_and_not_the_margin(client, crowded):
    with pytest.raises(WorkerDiedError, match="GPU"):
        client.load(crowded, replace(CONFIG, fit_margin_bytes=(2 << 30) - 1))


@POSIX_ONLY
def test_slots_that_were_named_and_are_too_many_become_fewer_at_load(client, crowded):
    info = client.load(crowded, replace(CONFIG, moe_cache_slots=7))
    assert info.moe_cache_slots == (5, 5, 5)
    (warning,) = info.warnings
    assert "5 slots per layer now instead of 7" in warning


@POSIX_ONLY
def test_a_death_of_an_earlier_job_is_no_reason_to_load_with_less(client, crowded):
    client.load(crowded, replace(CONFIG, moe_cache_slots=6))
    dead = client.pid
    with pytest.raises(WorkerDiedError, match="GPU"):
        ask(client, "gpu-full")
    with pytest.raises(WorkerDiedError, match="GPU"):
        client.load(crowded, CONFIG)
    assert client.pid == dead


@POSIX_ONLY
def test_where_a_gpus_memory_runs_out_later_the_restart_has_fewer_slots(client, crowded):
    client.load(crowded, replace(CONFIG, moe_cache_slots=6))
    for n_slots in (5, 4, 3):
        with pytest.raises(WorkerDiedError, match="GPU"):
            ask(client, "gpu-full")
        info = client.restart()
        assert info.moe_cache_slots == (n_slots,) * 3
        (warning,) = info.warnings
        assert f"{n_slots} slots per layer now instead of" in warning
    psutil.Process(client.pid).kill()
    with pytest.raises(WorkerDiedError):
        ask(client, "count 1")
    info = client.restart()
    assert info.moe_cache_slots == (3, 3, 3) and info.warnings == (), "only where memory ran out"


def test_restart_replaces_a_worker_that_does_not_react_to_cancel(loaded):
    answer = loaded.generate(GenerateRequest(prompt="native"))
    waiting = threading.Thread(target=lambda: pytest.raises(WorkerDiedError, next, answer))
    waiting.start()
    loaded.cancel()
    stuck = psutil.Process(loaded.pid)
    loaded.restart()
    waiting.join(5)
    assert not stuck.is_running()
    assert answer_stop(loaded, "count 2") == "length"


def test_an_answer_of_a_replaced_worker_can_be_dropped_late(loaded):
    answer = loaded.generate(GenerateRequest(prompt="read"))
    next(answer)
    loaded.restart()
    answer.close()
    assert answer_stop(loaded, "count 2") == "length"


def test_close_ends_a_worker_in_native_code_and_can_be_repeated(loaded):
    answer = loaded.generate(GenerateRequest(prompt="native"))
    waiting = threading.Thread(target=lambda: pytest.raises(WorkerDiedError, next, answer))
    waiting.start()
    worker = psutil.Process(loaded.pid)
    loaded.close()
    loaded.close()
    waiting.join(5)
    assert not worker.is_running()


def test_close_right_after_start_leaves_nothing(private_directories):
    for _ in range(3):
        client = Client.start()
        worker = psutil.Process(client.pid)
        client.close()
        assert not worker.is_running()
    assert list(private_directories.iterdir()) == []


@POSIX_ONLY
def test_ctrl_c_right_after_the_start_does_not_end_the_worker(client, model):
    os.kill(client.pid, signal.SIGINT)
    assert client.load(model, CONFIG).path == str(model)


@POSIX_ONLY
def test_ctrl_c_during_the_start_is_raised_and_leaves_nothing(monkeypatch, private_directories):
    started = []

    def popen(*arguments, **settings):
        process = subprocess_popen(*arguments, **settings)
        started.append(psutil.Process(process.pid))
        signal.raise_signal(signal.SIGINT)
        return process

    subprocess_popen = subprocess.Popen
    monkeypatch.setattr(worker_process.subprocess, "Popen", popen)
    with pytest.raises(KeyboardInterrupt):
        Client.start()
    assert_ends(started[0])
    assert list(private_directories.iterdir()) == []
    with pytest.raises(KeyboardInterrupt):  # and the next one comes at once again
        signal.raise_signal(signal.SIGINT)


def test_a_worker_that_cannot_be_started_leaves_nothing(monkeypatch, private_directories):
    monkeypatch.setattr(worker_process.sys, "executable", "/no/python")
    with pytest.raises(OSError, match="/no/python"):
        Client.start()
    assert list(private_directories.iterdir()) == []


def assert_ends(worker, seconds=2):
    """Like Process.wait, but an ended process that nobody has collected yet counts as ended."""
    deadline = time.monotonic() + seconds
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the worker lives on"
        threading.Event().wait(0.01)


PARENT = """
import sys
sys.path.insert(0, {root!r})
from runner.process import worker_process
from runner.engine_client import Client
from runner.config import GenerateRequest
worker_process.PROGRAM = {program!r}
{before}
client = Client.start()
print(client.pid, flush=True)
{after}
sys.stdin.read()
"""
NEVER_CONNECT = """
import threading
worker_process.WorkerProcess._connect = lambda self: threading.Event().wait()
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ""),
        (NEVER_CONNECT, ""),
        ("", "next(client.generate(GenerateRequest(prompt='read'))); print('ready', flush=True)"),
        ("", "client._line._worker.send(b'x'); print('ready', flush=True)"),
    ],
    ids=["at any time", "before it connected", "while it answers", "after garbage"],
)
def test_a_parent_killed_with_kill_9_leaves_no_worker_and_no_files(before, after, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t")
    script = PARENT.format(root=str(ROOT), program=PROGRAM, before=before, after=after)
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    with parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        if "ready" in after:
            assert parent.stdout.readline() == b"ready\n"
        parent.kill()
    assert_ends(worker)
    assert list(folder.iterdir()) == []


def test_a_parent_killed_while_its_worker_computes_in_native_code_leaves_no_worker():
    after = "next(client.generate(GenerateRequest(prompt='native')))"
    script = PARENT.format(root=str(ROOT), program=PROGRAM, before="", after=after)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        while worker.cpu_times().user < 0.5:  # start-up takes less
            worker.cpu_percent(0.05)
        parent.kill()
    assert_ends(worker)
