"""The chat with the real engine, over pipes: what happens to it when the model file changes."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runner.command_line import BUDDYRUN, ROOT

Process = subprocess.Popen[str]


@pytest.fixture
def model(demo_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(demo_path, tmp_path / "model.gguf"))


@pytest.fixture
def chat(model: Path) -> Iterator[Process]:
    command = [*BUDDYRUN, str(model), "-cnv", "-n", "8", "-s", "1"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    with process:
        yield process
        process.kill()


def say(chat: Process, line: str) -> None:
    assert chat.stdin is not None
    chat.stdin.write(line + "\n")


def first_answer(chat: Process) -> str:
    say(chat, "hi")
    assert chat.stdout is not None
    return chat.stdout.readline()


def test_a_model_deleted_while_chatting_goes_on_answering(chat: Process, model: Path) -> None:
    assert first_answer(chat).strip()
    model.unlink()
    say(chat, "Tell me a story.")
    out, err = chat.communicate(timeout=120)
    assert out.strip()
    assert (chat.returncode, err) == (0, "")


def test_a_model_truncated_while_chatting_is_told_and_the_chat_can_be_saved(
    chat: Process, model: Path, tmp_path: Path
) -> None:
    assert first_answer(chat).strip()
    with model.open("r+b") as file:
        file.truncate(200_000)
    say(chat, "Tell me a story.")
    say(chat, f"/save {tmp_path / 'chat.json'}")
    _, err = chat.communicate(timeout=120)
    # Seen before the answer, or by the signal that reading the lost part brings.
    assert str(model) in err
    assert "was truncated from" in err or "could no longer read the model file" in err
    assert "Saved 2 messages" in err
    assert "Traceback" not in err
    assert chat.returncode == 0
