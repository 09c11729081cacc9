"""The command as a process: start-up time and imports, pipes, signals, the real engine."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.paths import DEMO
from tests.runner.command_line import BUDDYRUN, ROOT, SCRIPTED, buddyrun_process


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "model.gguf"
    path.touch()
    return str(path)


def test_help_is_immediate_and_imports_nothing_heavy() -> None:
    script = (
        "import sys; from runner.cli import main; status = main(['--help']);"
        "print(sorted(sys.modules), file=sys.stderr); sys.exit(status)"
    )
    times = []
    for _ in range(5):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, cwd=ROOT, check=True
        )
        times.append(time.perf_counter() - began)
    assert min(times) < 0.3
    modules = done.stderr.decode()
    for name in ("numpy", "llama_cpp", "quant.ggml", "torch", "prompt_toolkit", "textual", "rich",
                 "importlib.metadata", "multiprocessing", "asyncio"):  # fmt: skip
        assert f"'{name}'" not in modules


def test_a_chat_keeps_native_code_and_numpy_out_of_this_process(model: str) -> None:
    assert buddyrun_process(model, "-p", "modules").stdout == b"light\n"
    assert buddyrun_process("-m", model, "-cnv", stdin=b"modules\n").stdout == b"light\n"


def test_show_keeps_native_code_out_of_this_process() -> None:
    script = (
        "import sys; from runner.cli import main; main(sys.argv[1:]);"
        "sys.exit(any(name in sys.modules for name in ('llama_cpp', 'quant.ggml', 'torch')))"
    )
    command = [sys.executable, "-c", script, "show", str(DEMO)]
    assert subprocess.run(command, capture_output=True, cwd=ROOT, check=False).returncode == 0


def test_invalid_utf8_on_the_command_line_is_replaced(model: str) -> None:
    command = [*(part.encode() for part in SCRIPTED), model.encode(), b"-p", b"a\xffb"]
    done = subprocess.run(
        command, capture_output=True, cwd=ROOT, stdin=subprocess.DEVNULL, check=False
    )
    assert done.stdout == b"You said 'a\\ufffdb'\n"


@pytest.mark.skipif(sys.platform != "linux", reason="macOS and Windows allow no such name")
@pytest.mark.parametrize(
    "arguments",
    [
        ["show"],
        pytest.param(["bench", "-t1", "-p", "4", "-n", "0"], marks=pytest.mark.slow),
        pytest.param(["run", "-t1", "-n1", "-p", "hi"], marks=pytest.mark.slow),
    ],
)
def test_a_model_whose_name_is_not_utf8_can_be_used(arguments: list[str], tmp_path: Path) -> None:
    model = bytes(tmp_path) + b"/m\xff.gguf"
    shutil.copy(DEMO, model)
    command = [*(part.encode() for part in [*BUDDYRUN, *arguments]), b"-m", model]
    done = subprocess.run(
        command, capture_output=True, cwd=ROOT, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0 and done.stdout, done.stderr


def test_a_chat_with_closed_stdin_just_ends(model: str) -> None:
    command = shlex.join([*SCRIPTED, model, "-cnv"]) + " <&-"
    done = subprocess.run(command, shell=True, capture_output=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_file_called_like_a_command_can_be_reached(tmp_path: Path) -> None:
    (tmp_path / "show").touch()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for model in (["./show"], ["-m", "show"]):
        done = subprocess.run(
            [*SCRIPTED, *model, "-p", "hi"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd=tmp_path,
            env=environment,
            check=False,
        )
        assert done.stdout == b"You said 'hi'\n"


def test_a_reader_that_leaves_ends_it_quietly(model: str) -> None:
    process = subprocess.Popen(
        [*SCRIPTED, model, "-p", "flood"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(10) == b"0123456789"
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (141, b"")
    process.stderr.close()


@pytest.mark.parametrize("arguments", [["--help"], ["show", str(DEMO), "--template"]])
def test_help_and_show_into_a_closed_pipe_are_quiet(arguments: list[str]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [*BUDDYRUN, *arguments], stdout=write_end, stderr=subprocess.PIPE, cwd=ROOT, check=False
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_answer_into_a_full_disk_is_one_message(model: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*SCRIPTED, model, "-p", "hi"],
            stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE, cwd=ROOT, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == b"buddyrun: cannot write or read: No space left on device\n"


def test_closed_standard_streams_are_no_problem(model: str) -> None:
    script = '"$@" <&- >&- 2>&-'
    command = ["sh", "-c", script, "sh", *SCRIPTED, model, "-p", "hi"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_one_answer_with_the_worker_closed(
    number: signal.Signals, status: int, model: str
) -> None:
    process = subprocess.Popen(
        [*SCRIPTED, model, "-p", "stuck"],
        cwd=ROOT,
        env={**os.environ, "SHOW_CLOSE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(5) == b"stuck"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (status, b"closed\n")


def test_ctrl_c_while_loading_ends_with_the_worker_closed(tmp_path: Path) -> None:
    path = tmp_path / "interrupt"
    path.touch()
    done = buddyrun_process(str(path), "-p", "hi", SHOW_CLOSE="1")
    assert (done.returncode, done.stderr) == (130, b"closed\n")


def test_the_demo_answers_within_three_seconds() -> None:
    began = time.perf_counter()
    process = subprocess.Popen(
        [*BUDDYRUN, "demo", "-p", "hi", "-s", "1"],
        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(1)
    first_s = time.perf_counter() - began
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert first_s < 3


@pytest.mark.slow
def test_a_seed_gives_the_same_answer_again() -> None:
    command = ("demo", "-p", "Tell me a short story.", "-n", "12", "-s", "7")
    first = buddyrun_process(*command, command=BUDDYRUN)
    assert first.returncode == 0 and len(first.stdout) > 10
    assert buddyrun_process(*command, command=BUDDYRUN).stdout == first.stdout
