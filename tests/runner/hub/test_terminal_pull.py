"""What a person sees and types in a real terminal: progress, Ctrl-C, completion in bash."""

import re
import sys
from pathlib import Path

import pytest

from tests.paths import DEMO
from tests.runner.hub.local_hub import Fault, LocalHub
from tests.runner.tmux import Pane

pytestmark = pytest.mark.terminal
BUDDYRUN = [sys.executable, "-m", "runner"]
NAME = "test/demo-moe:Q8_0"


@pytest.fixture(autouse=True)
def repo(hub: LocalHub) -> None:
    hub.add("test/demo-moe", {"demo-moe-Q8_0.gguf": DEMO, "demo-moe-Q6_K.gguf": b"GGUF" * 9})


def pane(hub: LocalHub, folder: Path, *arguments: str) -> Pane:
    return Pane([*BUDDYRUN, *arguments], folder, **hub.environment(folder / "home"))


def test_progress_shows_the_rate_and_the_time_left(hub: LocalHub, tmp_path: Path) -> None:
    hub.bytes_per_s = 15e6
    with pane(hub, tmp_path, "pull", NAME) as terminal:
        screen = terminal.wait_for("MB/s")
        assert "demo-moe-Q8_0.gguf" in screen and "/30.9 MB" in screen
        assert "8 layers x 8 experts" in screen and "fast: all of it fits" in screen
        terminal.wait_for("0:00:0")
        assert terminal.wait_for_end() == "0"
        assert "/snapshots/" in terminal.screen()


def test_ctrl_c_keeps_what_came_and_the_next_run_checks_it(hub: LocalHub, tmp_path: Path) -> None:
    hub.bytes_per_s = 15e6
    with pane(hub, tmp_path, "pull", NAME) as terminal:
        terminal.wait_for("MB/s")
        terminal.press("C-c")
        assert terminal.wait_for_end() == "130"
        assert "What came is kept" in terminal.screen()
    with pane(hub, tmp_path, "pull", NAME) as terminal:
        assert terminal.wait_for_end() == "0"
        assert " to come" in terminal.screen()
    first = re.fullmatch(r"bytes=(\d+)-\d+", hub.to("cdn")[-1].range or "")
    assert first is not None and int(first[1]) > 0


def test_words_of_a_server_do_not_write_on_the_terminal(hub: LocalHub, tmp_path: Path) -> None:
    evil = (("X-Error-Message", "\x1b[2J\x1b[31mred"), ("X-HF-Warning", "a; \x1b[2Jwarned"))
    hub.always.append(Fault("status", where="api", status=418, headers=evil))
    with pane(hub, tmp_path, "pull", NAME) as terminal:
        assert terminal.wait_for_end() == "1"
        screen = terminal.screen()
        assert "answers 418" in screen and "red" in screen and "warned" not in screen


def test_bash_completes_a_quantization_behind_the_colon(hub: LocalHub, tmp_path: Path) -> None:
    script = tmp_path / "bin" / "buddyrun"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m runner "$@"\n')
    script.chmod(0o755)
    settings = hub.environment(tmp_path / "home") | {"PATH": f"{script.parent}:/usr/bin:/bin"}
    with Pane(["bash", "--norc", "-i"], tmp_path, **settings, PS1="ready> ") as terminal:
        terminal.wait_for("ready> ")
        terminal.type(f"buddyrun pull {NAME} && buddyrun pull {NAME[:-4]}Q6_K --force", "Enter")
        terminal.wait_for("/snapshots/", 2)
        terminal.type('eval "$(_BUDDYRUN_COMPLETE=bash_source buddyrun)"; clear', "Enter")
        terminal.wait_for("ready> ")
        terminal.type("echo buddyrun; buddyrun show te", "Tab")
        terminal.wait_for("show test/demo-moe:Q")
        terminal.type("8", "Tab")
        terminal.wait_for(f"show {NAME} ")
        terminal.type(" --json", "Enter")
        terminal.wait_for('"n_expert": 8')
        terminal.type("exit", "Enter")
