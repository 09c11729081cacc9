"""The command `profile` with a scripted engine: its texts, its words, and how it is left."""

import io
import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from runner.buddies import default_path
from runner.errors import WorkerDiedError
from runner.profiling.workspace import folder_for
from runner.protocol import ProfileFields, ProfileResult
from runner.terminal import profile_command
from runner.terminal.profile_command import ProgressLine, duration_text, format_result
from runner.terminal.status_line import StatusLine
from tests.paths import ROOT
from tests.runner import command_line
from tests.runner.command_line import Done, buddyrun
from tests.runner.scripted_client import ScriptedClient

RESULT = ProfileResult(
    output="/m/x.buddies.npz", n_bytes=8169, n_tokens=2048, n_compared=1024, n_layer=8, n_expert=8,
    device="CPU, 2 threads", n_kept=0, trace_s=1.64, compare_s=75.4,
    estimate_s=3.0,
    best_errors=(0.4, 0.6, 0.62, 0.6, 0.62, 0.59, 0.64, 0.42), notes=("A note.",),
)  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.touch()
    return path


def profile(model: Path, *arguments: str, **environment: str) -> tuple[Done, ProfileFields | None]:
    """What the command prints, and what it asks the engine for."""
    asked: list[ProfileFields] = []

    class Profiling(ScriptedClient):
        def profile(self, wanted: ProfileFields, on_progress: object) -> ProfileResult:
            asked.append(wanted)
            return replace(RESULT, output=wanted.output)

    with mock.patch.object(command_line, "ScriptedClient", Profiling):
        done = buddyrun("profile", str(model), *arguments, **environment)
    return done, asked[0] if asked else None


def test_the_profile_lies_beside_the_model_and_is_made_from_the_packaged_text(model: Path) -> None:
    done, wanted = profile(model)
    assert done.returncode == 0 and wanted is not None
    assert (wanted.model, wanted.output) == (str(model), str(default_path(model)))
    packaged = (ROOT / "runner" / "demo" / "calibration.txt").read_text()
    assert wanted.texts == (packaged,) and wanted.n_tokens == 2048
    assert done.stderr == b"note: A note.\n"
    assert done.stdout.decode() == (
        f"{default_path(model)} written (8.17 kB): 8 layers of 8 experts.\n"
        "2048 tokens of buddyrun's calibration.txt were run in 1.6 s, and all experts compared on "
        "1024 of them in 75 s (CPU, 2 threads).\n"
        "The best buddy leaves 40-64 % of an expert's output unexplained (layers 1-2: 50 %, 3-4:"
        " 61 %, 5-6: 60 %, 7-8: 53 %).\n"
    )


def test_the_packaged_text_is_in_the_package() -> None:
    text = (ROOT / "runner" / "demo" / "calibration.txt").read_text()
    assert 200_000 < len(text.encode()) < 300_000


def test_flags_reach_the_engine(model: Path, tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    done, wanted = profile(
        model, "--text", str(tmp_path / "a.txt"), "--text", str(tmp_path / "b.txt"),
        "-o", str(tmp_path / "out.npz"), "--tokens", "4096", "-t", "3", "--moe-cache", "2GiB",
    )  # fmt: skip
    assert wanted is not None
    assert wanted.texts == ("text of a.txt", "text of b.txt")
    assert (wanted.output, wanted.n_tokens) == (str(tmp_path / "out.npz"), 4096)
    assert (wanted.engine.n_threads, wanted.engine.moe_cache_bytes) == (3, 2 << 30)
    assert b"2048 tokens of a.txt and b.txt were run" in done.stdout


def test_two_texts_of_one_name_are_both_used(model: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(name)
    texts = [f"--text={tmp_path / name / 'x.txt'}" for name in ("one", "two")]
    _, wanted = profile(model, *texts)
    assert wanted is not None and wanted.texts == ("one", "two")


def test_a_text_that_cannot_be_read_is_named(model: Path) -> None:
    done, wanted = profile(model, "--text", "/nowhere")
    assert done.returncode == 1 and wanted is None
    assert b"cannot read the text from /nowhere: No such file" in done.stderr


def test_the_lines_of_chats_are_used_when_asked_for_and_counted(
    model: Path, tmp_path: Path
) -> None:
    history = tmp_path / "history"
    history.write_text("".join(json.dumps(line) + "\n" for line in ("Tell me a story", "Why?")))
    for environment in ({"BUDDYRUN_HISTORY": str(history)}, {"XDG_STATE_HOME": str(tmp_path)}):
        if "XDG_STATE_HOME" in environment:
            (tmp_path / "buddyrun").mkdir()
            history.rename(tmp_path / "buddyrun" / "history")
        else:
            assert len(profile(model, **environment)[1].texts) == 1  # type: ignore[union-attr]
        done, wanted = profile(model, "--history", **environment)
        assert wanted is not None and wanted.texts[1:] == ("Tell me a story\nWhy?",)
        assert b"of buddyrun's calibration.txt and 2 lines of your chats were run" in done.stdout


@pytest.mark.parametrize("history", ["", "/nowhere"])
def test_no_lines_of_chats_are_told(model: Path, history: str) -> None:
    done, wanted = profile(model, "--history", BUDDYRUN_HISTORY=history)
    assert done.returncode == 1 and wanted is None
    assert b"--history: no lines of chats are kept; leave it out" in done.stderr


def test_too_few_tokens_are_a_wrong_use(model: Path) -> None:
    assert profile(model, "--tokens", "63")[0].returncode == 2


@pytest.mark.parametrize(("how", "status"), [("Ctrl-C", 130), ("death", 1)])
def test_whoever_leaves_early_is_told_how_to_go_on(model: Path, how: str, status: int) -> None:
    class Leaving(ScriptedClient):
        def profile(self, wanted: ProfileFields, on_progress: object) -> ProfileResult:
            folder_for(Path(wanted.output)).mkdir()
            if how == "death":
                raise WorkerDiedError("The engine was killed (SIGKILL).")
            raise KeyboardInterrupt

    with mock.patch.object(command_line, "ScriptedClient", Leaving):
        done = buddyrun("profile", str(model))
    kept = f"buddyrun: what is finished is kept in {default_path(model)}.partial; the same command"
    assert done.returncode == status and kept in done.stderr.decode()


def test_an_interrupted_profile_says_what_it_found() -> None:
    assert "Parts of it were there" not in format_result(RESULT, ["a"])
    text = format_result(replace(RESULT, n_kept=3), ["a", "b", "c"])
    assert "tokens of a, b and c were run" in text
    assert text.splitlines()[1].endswith("Parts of it were there from an interrupted run.")


def test_a_model_of_one_layer_has_no_ranges() -> None:
    text = format_result(replace(RESULT, n_layer=1, best_errors=(0.5,)), ["a"])
    assert text.endswith("The best buddy leaves 50 % of an expert's output unexplained.")
    two = format_result(replace(RESULT, best_errors=(0.5, 0.25)), ["a"])
    assert two.endswith(
        "leaves 25-50 % of an expert's output unexplained (layers 1: 50 %, 2: 25 %)."
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.9, "9.9 s"), (9.96, "10 s"), (99, "99 s"), (100, "2 min"),
     (3570, "1 h 0 min"), (3540, "59 min"), (7800, "2 h 10 min")],
)  # fmt: skip
def test_durations_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_the_time_left_is_told_from_what_this_run_did(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 20.0, 21.0])
    monkeypatch.setattr(profile_command.time, "monotonic", lambda: next(clock))
    shown: list[str] = []

    class Line(StatusLine):
        def show_progress(self, label: str, done: int, total: int) -> None:
            shown.append(label)

    line = ProgressLine(Line(io.StringIO()))
    line.show("layer 4", 40, 100)  # an earlier run did 40
    line.show("layer 5", 50, 100)
    line.show("layer 6", 60, 100)
    line.show("another stage", 0, 8)
    assert shown == ["layer 4", "layer 5, 50 s left", "layer 6, 40 s left", "another stage"]
