"""The parent's side of the process boundary, with real worker processes and a fake session."""

import os
import signal
import stat
import tempfile
import threading
from dataclasses import replace
from itertools import islice

import pytest

from runner.config import EngineConfig, GenerateRequest
from runner.engine_client import Client
from runner.errors import (
    BackendError,
    CancelledError,
    ContextFullError,
    InternalError,
    ModelError,
    OptionError,
    WorkerDiedError,
)
from runner.process import worker_process
from runner.protocol import (
    MAX_MESSAGE_BYTES,
    BenchSample,
    BenchTest,
    GenerateResult,
    PromptProgress,
    TextPiece,
)
from tests.runner.engine_client.fake_worker import CONFIG, POSIX_ONLY, PROGRAM, answer_stop, ask


def test_load_returns_what_the_worker_knows_of_the_model(client, model):
    stages = []
    info = client.load(model, CONFIG, on_progress=lambda *stage: stages.append(stage))
    assert (info.path, info.n_ctx, info.notes) == (str(model), 64, ("a note",))
    assert stages == [("weights", 1, 2), ("weights", 2, 2)]
    assert client.load(model, chat_template="{{ x }}").chat_template == "{{ x }}"


def test_a_relative_path_means_the_callers_directory(client, model, monkeypatch):
    monkeypatch.chdir(model.parent)
    assert client.load(model.name, CONFIG).path == str(model)


def test_an_answer_comes_as_pieces_and_ends_with_its_result(loaded):
    *pieces, result = ask(loaded, "count 3")
    assert pieces == [TextPiece("0 ", 1), TextPiece("1 ", 2), TextPiece("2 ", 3)]
    assert result == GenerateResult("length", 3, 1, 3, 0.25, 0.5, 6, 64, 7)


def test_messages_of_any_text_reach_the_worker_unchanged(loaded):
    text = 'é 漢字 \U0001f600 \x00 \x1b[31m "quotes" \udcff \u2028\r\n'
    request = GenerateRequest(messages=({"role": "user", "content": text},), prompt="messages")
    assert next(iter(loaded.generate(request))) == TextPiece(text, 1)


def test_bench_yields_one_sample_per_test(loaded):
    samples = list(loaded.bench([BenchTest(8, 0), BenchTest(0, 4)], 2, "text"))
    counts = {"n_loaded": 3, "load_bytes": 9}
    assert samples == [BenchSample(8, 0, (4, 5), **counts), BenchSample(0, 4, (4, 5), **counts)]


def test_stats_are_answered_while_an_answer_is_made(loaded):
    answer = loaded.generate(GenerateRequest(prompt="forever"))
    next(answer)
    assert loaded.stats()["n_tokens_generated"] > 0
    assert next(answer) == TextPiece("1 ", 2)


def test_cancel_in_the_middle_of_an_answer_ends_it_with_its_result(loaded):
    answer = loaded.generate(GenerateRequest(prompt="forever"))
    assert len(list(islice(answer, 5))) == 5
    loaded.cancel()
    *_, result = answer
    assert result.stop_reason == "cancelled"
    assert answer_stop(loaded, "count 2") == "length"


def test_cancel_works_during_the_prompt(loaded):
    answer = loaded.generate(GenerateRequest(prompt="read"))
    assert next(answer) == PromptProgress(512, 4096, 0)
    loaded.cancel()
    assert next(answer).stop_reason == "cancelled"


def test_cancel_ends_a_load(client):
    with pytest.raises(CancelledError):
        client.load("hang", CONFIG, on_progress=lambda *_: client.cancel())


def test_cancel_without_a_running_request_changes_nothing(loaded):
    loaded.cancel()
    assert answer_stop(loaded, "count 2") == "length"
    loaded.cancel()
    assert answer_stop(loaded, "count 2") == "length"


def test_an_answer_dropped_before_its_end_is_cancelled_and_its_rest_is_skipped(loaded):
    for _ in range(20):
        answer = loaded.generate(GenerateRequest(prompt="forever"))
        next(answer)
        answer.close()
        assert ask(loaded, "count 1")[0] == TextPiece("0 ", 1)


def test_an_answer_dropped_after_an_error_leaves_the_client_usable(loaded):
    answer = loaded.generate(GenerateRequest(prompt="read"))
    next(answer)
    del answer
    with pytest.raises(ContextFullError):
        ask(loaded, "full")
    assert answer_stop(loaded, "count 1") == "length"


@POSIX_ONLY
def test_ctrl_c_that_interrupts_the_caller_does_not_spoil_the_stream(loaded):
    for _ in range(20):
        answer = loaded.generate(GenerateRequest(prompt="read"))
        next(answer)
        timer = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            next(answer)
        timer.join()
        assert ask(loaded, "count 1")[0] == TextPiece("0 ", 1)


@POSIX_ONLY
def test_cancel_can_be_called_from_a_signal_handler(loaded):
    before = signal.signal(signal.SIGALRM, lambda *_: loaded.cancel())
    try:
        for _ in range(50):
            signal.setitimer(signal.ITIMER_REAL, 0.003, 0.0005)
            assert answer_stop(loaded, "forever") == "cancelled"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert answer_stop(loaded, "count 1") == "length"


@pytest.mark.parametrize(
    ("prompt", "kind", "text"),
    [
        ("full", ContextFullError, "9000 tokens do not fit 8192"),
        ("memory", BackendError, "not enough memory"),
        ("bug", InternalError, "KeyError: 'blk.0'"),
    ],
)
def test_an_error_of_the_worker_is_raised_here_and_the_worker_lives(loaded, prompt, kind, text):
    with pytest.raises(kind, match=text):
        ask(loaded, prompt)
    assert answer_stop(loaded, "count 1") == "length"


def test_the_log_has_the_trace_of_a_mistake_in_buddyrun(loaded):
    with pytest.raises(InternalError):
        ask(loaded, "bug")
    ask(loaded, "count 1")
    loaded.close()
    assert "Traceback" in loaded.log
    assert "raise KeyError" in loaded.log


def test_what_native_code_prints_neither_blocks_nor_enters_the_stream(loaded):
    assert answer_stop(loaded, "print") == "eos"
    loaded.close()
    assert loaded.log.endswith("native code prints to stdout\n")
    assert len(loaded.log) <= worker_process.LOG_BYTES


def test_a_model_that_is_not_there_is_an_error_of_load(client, tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        client.load(tmp_path / "gone.gguf", CONFIG)


def test_a_text_too_long_for_a_message_is_refused_before_it_is_sent(loaded):
    with pytest.raises(OptionError, match="too long"):
        ask(loaded, "x" * (MAX_MESSAGE_BYTES + 1))
    assert answer_stop(loaded, "count 1") == "length"


def test_two_clients_have_two_workers(loaded, model):
    with Client.start() as other:
        other.load(model, EngineConfig(n_ctx=32))
        assert other.pid != loaded.pid
        first = loaded.generate(GenerateRequest(prompt="count 2"))
        second = other.generate(GenerateRequest(prompt="count 2"))
        assert next(first) == next(second) == TextPiece("0 ", 1)
        assert list(first)[-1] == list(second)[-1]


def test_packages_of_the_same_names_in_the_current_directory_are_not_imported(
    tmp_path, monkeypatch, model
):
    for name in ("runner", "quant", "json", "multiprocessing", "fake_session"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong package')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worker_process, "PROGRAM", PROGRAM)
    with Client.start() as client:
        assert client.load(model, CONFIG).name == "Fake"


def test_the_worker_runs_the_very_packages_of_its_parent(tmp_path, monkeypatch, model):
    (tmp_path / "runner").mkdir()
    (tmp_path / "runner" / "__init__.py").write_text("raise SystemExit('the wrong package')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(worker_process, "PROGRAM", PROGRAM)
    with Client.start() as client:
        assert client.load(model, CONFIG).name == "Fake"


@POSIX_ONLY
def test_the_private_directory_is_open_to_this_user_only_and_has_a_short_path(
    tmp_path, monkeypatch
):
    long_folder = tmp_path / ("x" * 100)
    long_folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long_folder))
    directory = worker_process.make_private_directory()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert len(str(directory)) <= worker_process.MAX_SOCKET_DIRECTORY
    worker_process.remove_private_directory(directory)
    assert not directory.exists()
    assert list(long_folder.iterdir()) == []


def test_what_a_sitecustomize_prints_does_not_disturb_the_start(tmp_path, monkeypatch, model):
    (tmp_path / "sitecustomize.py").write_text("print('welcome\\n{}')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(worker_process, "PROGRAM", PROGRAM)
    with Client.start() as client:
        assert client.load(model, CONFIG).name == "Fake"


# what the owner sees and changes meanwhile


def test_a_frame_tells_the_phase_the_settings_and_the_counters(client, model):
    assert client.frame().phase == "starting"
    info = client.load(model, CONFIG)
    now = client.frame()
    assert (now.phase, now.pid, now.owner_pid, now.model) == (
        "ready",
        client.pid,
        os.getpid(),
        info,
    )
    assert now.settings.buddy == "router"
    assert now.stats.experts.used == ((0,) * 4,) * 3


def test_frames_are_answered_while_an_answer_is_made(loaded):
    answer = loaded.generate(GenerateRequest(prompt="forever"))
    next(answer)
    assert loaded.frame().phase in ("prompt", "generating")
    assert loaded.frame().phase == "generating"
    answer.close()
    ask(loaded, "count 1")
    assert loaded.frame().phase == "ready"


def test_while_a_prompt_is_read_a_frame_tells_how_far_it_is(loaded):
    answer = loaded.generate(GenerateRequest(prompt="read"))
    next(answer)
    now = loaded.frame()
    assert (now.phase, now.done, now.total) == ("prompt", 512, 4096)
    answer.close()


def test_settings_are_changed_while_an_answer_is_made_and_between_two(loaded):
    assert loaded.change(is_exact=True).is_exact
    answer = loaded.generate(GenerateRequest(prompt="forever"))
    next(answer)
    assert loaded.change(buddy="blend", buddy_budget=0.25).buddy_budget == 0.25
    with pytest.raises(OptionError, match="nobody is no policy"):
        loaded.change(buddy="nobody")
    now = loaded.frame().settings
    assert (now.is_exact, now.buddy, now.buddy_budget) == (True, "blend", 0.25)
    answer.close()
    assert not loaded.change(is_exact=False).is_exact


def test_a_paused_answer_waits_and_goes_on(loaded):
    answer = loaded.generate(GenerateRequest(prompt="forever"))
    next(answer)
    loaded.change(is_paused=True)
    before = loaded.stats()["n_tokens_generated"]
    assert loaded.change(buddy="blend").is_paused, "other changes do not end the pause"
    assert loaded.frame().phase == "paused"
    assert loaded.stats()["n_tokens_generated"] == before
    loaded.change(is_paused=False)
    while loaded.stats()["n_tokens_generated"] == before:
        pass
    answer.close()


def test_a_paused_answer_can_be_stopped_and_the_next_one_is_not_paused(loaded):
    answer = loaded.generate(GenerateRequest(prompt="forever"))
    next(answer)
    loaded.change(is_paused=True)
    loaded.cancel()
    assert list(answer)[-1].stop_reason == "cancelled"
    assert not loaded.frame().settings.is_paused
    assert answer_stop(loaded, "count 3") == "length"


def test_a_load_that_failed_leaves_no_model_to_show(loaded, tmp_path):
    with pytest.raises(ModelError):
        loaded.load(tmp_path / "missing.gguf", CONFIG)
    now = loaded.frame()
    assert (now.phase, now.model, now.stats) == ("empty", None, None)


def test_changes_and_frames_from_many_threads_are_all_answered(loaded):
    answer = loaded.generate(GenerateRequest(prompt="forever"))
    next(answer)
    failures = []

    def work(number):
        try:
            for _ in range(20):
                assert loaded.change(buddy_budget=0.01 * (number + 1)).buddy_budget > 0
                assert loaded.frame().settings is not None
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    answer.close()


def test_what_was_changed_holds_after_a_restart(loaded):
    loaded.change(is_exact=True, is_paused=True)
    loaded.change(buddy="blend")
    loaded.restart()
    now = loaded.frame().settings
    assert (now.is_exact, now.buddy, now.buddy_budget) == (True, "blend", 0.05)
    assert not now.is_paused, "a pause ends with its engine"
    loaded.change(is_exact=False)
    loaded.restart()
    assert not loaded.frame().settings.is_exact


def test_exact_holds_after_a_restart_even_where_the_policy_cannot_be_had_any_more(loaded):
    loaded.change(is_exact=True, buddy="blend")
    loaded._changed = replace(loaded._changed, buddy="nobody")
    loaded.restart()
    assert loaded.frame().settings.is_exact


def test_another_model_starts_as_it_was_asked_for(loaded, model):
    loaded.change(is_exact=True)
    loaded.load(model, CONFIG)
    loaded.restart()
    assert not loaded.frame().settings.is_exact


def test_a_change_is_answered_when_the_worker_dies(loaded):
    answer = loaded.generate(GenerateRequest(prompt="forever"))
    next(answer)
    os.kill(loaded.pid, signal.SIGKILL)
    with pytest.raises(WorkerDiedError):
        loaded.change(is_exact=True)
    with pytest.raises(WorkerDiedError):
        loaded.frame()


def test_frames_that_are_asked_for_while_the_worker_is_replaced_are_answered_or_refused(loaded):
    stopped = threading.Event()
    failures = []

    def watch():
        while not stopped.is_set():
            try:
                loaded.frame()
            except WorkerDiedError:
                continue
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=watch, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        pid = loaded.pid
        loaded.restart()
        assert loaded.pid != pid
        assert loaded.frame().phase == "ready"
    stopped.set()
    for thread in threads:
        thread.join(20)
    assert failures == []
    assert not any(thread.is_alive() for thread in threads)  # nobody waits for an old worker
