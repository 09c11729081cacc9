"""`buddyrun top` and `ps` as commands, with a real chat of the demo model in another process."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from runner.frames import FrameReader
from runner.process import meeting_place
from runner.recording import Recorder
from runner.terminal.frame_text import PS_HEADER, frame_text, ps_row
from tests.runner.chat_fakes import INFO
from tests.runner.command_line import BUDDYRUN, ROOT, buddyrun
from tests.runner.test_frames import frame

pytestmark = pytest.mark.skipif(not meeting_place.HAS_MEETING_PLACE, reason="no Unix sockets")
FLAGS = ["--moe-cache-slots", "4", "-t", "1", "-c", "512", "--ignore-eos", "-s", "1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("r")


@pytest.fixture(scope="module")
def chat(place: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A chat that has answered once and waits."""
    process = subprocess.Popen(
        [*BUDDYRUN, "demo", "-cnv", "-n", "40", *FLAGS],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT,
        env={**os.environ, "XDG_RUNTIME_DIR": str(place)},
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"Tell me a story about a fox.\n")
    process.stdin.flush()
    assert process.stdout.read1(1)  # type: ignore[attr-defined]
    wait_until_ready(place)
    yield process
    process.kill()
    process.communicate()


def wait_until_ready(place: Path) -> None:
    for _ in range(300):
        done = top("--json", place=place)
        if done.returncode == 0 and json.loads(done.stdout)["phase"] == "ready":
            return
        time.sleep(0.05)
    raise AssertionError("the chat did not finish its answer")


def top(*arguments: str, place: Path) -> subprocess.CompletedProcess[bytes]:
    return buddyrun("top", *arguments, XDG_RUNTIME_DIR=str(place))


def test_ps_lists_what_runs(chat: subprocess.Popen[bytes], place: Path) -> None:
    done = buddyrun("ps", XDG_RUNTIME_DIR=str(place))
    header, row = done.stdout.decode().splitlines()
    assert tuple(header.split()) == PS_HEADER
    assert row.startswith(str(chat.pid)) and "Buddy Demo 29M MoE" in row and "32/64" in row
    (values,) = json.loads(buddyrun("ps", "--json", XDG_RUNTIME_DIR=str(place)).stdout)
    assert values["owner_pid"] == chat.pid and values["stats"]["n_tokens_generated"] >= 39


def test_ps_of_nothing_is_a_header(tmp_path: Path) -> None:
    done = buddyrun("ps", XDG_RUNTIME_DIR=str(tmp_path))
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 1)
    assert buddyrun("ps", "--json", XDG_RUNTIME_DIR=str(tmp_path)).stdout == b"[]\n"


def test_once_prints_one_text(chat: subprocess.Popen[bytes], place: Path) -> None:
    done = top("--once", str(chat.pid), place=place)
    text = done.stdout.decode()
    assert done.returncode == 0
    for words in (f"process     {chat.pid} (engine ", "doing       ready", "slots       4 of 8",
                  "buddies     blend", "layer 7 "):  # fmt: skip
        assert words in text
    usage = [line for line in text.splitlines() if line.startswith("layer ")]
    assert [line.count("[") for line in usage] == [4] * 8, "four residents in every layer"


def test_json_is_one_object_and_follow_a_stream_that_can_be_replayed(
    chat: subprocess.Popen[bytes], place: Path, tmp_path: Path
) -> None:
    assert json.loads(top("--json", place=place).stdout)["model"]["n_expert"] == 8
    recording = tmp_path / "r.jsonl"
    process = subprocess.Popen(
        [*BUDDYRUN, "top", "--json", "--follow", "--record", str(recording)],
        stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, "XDG_RUNTIME_DIR": str(place)},
    )  # fmt: skip
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    reader = FrameReader()
    assert [reader.read(line) is None for line in lines] == [True, False, False]
    shown = buddyrun("top", "--once", "--replay", str(recording)).stdout.decode()
    assert f"process     {chat.pid}" in shown


def test_a_stream_ends_with_the_engine(place: Path, tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [*BUDDYRUN, "demo", "-cnv", *FLAGS], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, cwd=ROOT, env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
    )  # fmt: skip
    wait_until_ready(tmp_path)
    process = subprocess.Popen(
        [*BUDDYRUN, "top", "--json", "--follow"], stdout=subprocess.PIPE, cwd=ROOT,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline()
    owner.kill()
    owner.communicate()
    process.communicate(timeout=20)
    assert process.returncode == 0


def test_several_engines_want_a_choice(
    chat: subprocess.Popen[bytes], place: Path, tmp_path: Path
) -> None:
    other = subprocess.Popen(
        [*BUDDYRUN, "demo", "-cnv", *FLAGS], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, cwd=ROOT, env={**os.environ, "XDG_RUNTIME_DIR": str(place)},
    )  # fmt: skip
    try:
        for _ in range(300):
            done = top("--once", place=place)
            if done.returncode:
                break
            time.sleep(0.05)
        assert b"several are running" in done.stderr and str(chat.pid).encode() in done.stderr
        assert top("--once", str(chat.pid), place=place).returncode == 0
    finally:
        other.kill()
        other.communicate()


def test_a_recording_is_shown_as_text_and_json(tmp_path: Path) -> None:
    path = tmp_path / "r"
    with Recorder(path) as recorder:
        recorder.write(frame(time_s=1.0))
        recorder.write(frame(time_s=1.01, phase="paused"))
    assert "doing       paused" in buddyrun("top", "--once", "--replay", str(path)).stdout.decode()
    assert json.loads(buddyrun("top", "--json", "--replay", str(path)).stdout)["phase"] == "paused"
    stream = buddyrun("top", "--json", "--follow", "--replay", str(path)).stdout
    assert len(stream.splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--follow",), "only with --json"),
        (("--once", "--json"), "not both"),
        (("7", "--replay", "x"), "not both"),
        (("--once", "--record", "f"), "--json --follow"),
        (("--json", "--record", "f"), "--json --follow"),
        (("x",), "is not a valid integer"),
    ],
)
def test_flags_that_contradict_each_other_are_wrong_usage(
    arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    done = top(*arguments, place=tmp_path)
    assert done.returncode == 2 and said in done.stderr.decode()


def test_what_is_not_there_is_told_in_a_sentence(tmp_path: Path) -> None:
    done = top("--once", place=tmp_path)
    assert done.returncode == 1 and b"start one: buddyrun MODEL" in done.stderr
    (tmp_path / "empty").write_text("")
    done = buddyrun("top", "--once", "--replay", str(tmp_path / "empty"))
    assert done.returncode == 1 and b"there is nothing in the recording" in done.stderr


def test_hostile_names_are_made_visible_in_a_list(tmp_path: Path) -> None:
    hostile = frame(model=replace(INFO, name="\x1b]0;x\x07\n[red]\u202e"))
    for text in (frame_text(hostile), "".join(ps_row(hostile))):
        assert "\x1b" not in text and "\u202e" not in text and "[red]" in text
