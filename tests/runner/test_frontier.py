"""`buddyrun bench --frontier`: the command, and the job through the worker."""

import json
import os
import signal
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from unittest import mock

import pytest

from runner import frontier as module
from runner.buddies import default_path
from runner.config import BUDDY_POLICIES, EngineConfig
from runner.engine_client import Client
from runner.errors import CancelledError, OptionError
from runner.frontier import FrontierEvent, measure_frontier
from runner.protocol import FrontierFields, NamedText
from runner.quality.evaluation import RunProgress
from runner.quality.frontier import FrontierBase, FrontierPoint, FrontierSetting, settings_of
from runner.terminal.frontier_command import FrontierFiles, FrontierProgress
from runner.terminal.status_line import StatusLine
from tests.paths import DEMO, HELD_OUT
from tests.runner import command_line
from tests.runner.command_line import BUDDYRUN, buddyrun, buddyrun_process
from tests.runner.scripted_client import ScriptedClient

STORY = HELD_OUT / "story.txt"
CACHE = EngineConfig(n_ctx=64, moe_cache_slots=4, moe_miss="load", n_threads=1)
CACHE_FLAGS = ("-c", "64", "--moe-cache-slots", "4", "--moe-miss", "load", "-t", "1")


def wanted_of(*points: FrontierSetting, **fields: object) -> FrontierFields:
    text = NamedText("story.txt", STORY.read_text())
    wanted = FrontierFields(str(DEMO), (text,), points, CACHE, max_tokens=40)
    return replace(wanted, **fields)  # type: ignore[arg-type]


ROUTER = FrontierSetting("router", 0.1, 2)


# the job


def test_every_run_is_judged_by_one_exact_run() -> None:
    events: list[FrontierEvent] = []
    settings = settings_of(["router", "random"], [0.1, None], 2, 2)
    measure_frontier(wanted_of(*settings), lambda *stage: None, events.append, lambda: False)
    base, *points = (event for event in events if not isinstance(event, RunProgress))
    assert isinstance(base, FrontierBase)
    assert (base.model, base.n_tokens, base.n_windows, base.n_ctx) == (DEMO.name, 40, 1, 41)
    assert len(base.model_hash) == 64 and base.texts == ("story.txt",)
    assert base.cost.substituted_share == 0.0 < base.cost.loaded_share
    found = [point for point in points if isinstance(point, FrontierPoint)]
    assert [point.setting for point in found] == settings
    assert all(point.evaluation.base == base.cost for point in found)
    again, router, everything, *random = (point.evaluation for point in found)
    assert again.divergence.kl_max == 0.0 and again.bytes_read_ratio == 1.0
    assert 0.0 < router.run.substituted_weight_share <= 0.1
    assert everything.run.substituted_weight_share > router.run.substituted_weight_share
    assert everything.run.bytes_read < router.run.bytes_read < base.cost.bytes_read
    assert len({evaluation.divergence.kl_mean for evaluation in random}) == 4  # seeds differ
    assert router.texts == ("story.txt",)


def test_problems_of_any_point_are_told_before_the_exact_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "record_base", None)  # it must not come so far
    without = replace(CACHE, buddy_profile="off")
    for wanted, message in [
        (wanted_of(ROUTER, replace(ROUTER, policy="blend"), engine=without), "needs a profile"),
        (wanted_of(ROUTER, replace(ROUTER, budget=7.0)), "expected a share from 0 to 1"),
        (wanted_of(ROUTER, replace(ROUTER, policy="nobody")), "'nobody'"),
        (wanted_of(ROUTER, texts=()), "no text to score"),
    ]:
        with pytest.raises(OptionError, match=message):
            measure_frontier(wanted, lambda *stage: None, lambda event: None, lambda: False)


def test_a_cache_that_misses_nothing_is_told_behind_the_exact_run() -> None:
    wanted = wanted_of(ROUTER, engine=EngineConfig(n_ctx=64, n_threads=1), max_tokens=5)
    events: list[FrontierEvent] = []
    with pytest.raises(OptionError, match="no expert was ever missing.*--moe-cache-slots"):
        measure_frontier(wanted, lambda *stage: None, events.append, lambda: False)
    assert all(isinstance(event, RunProgress) for event in events)


# through the worker


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Client.start() as client:
        yield client


def test_the_worker_answers_with_the_points_and_leaves_no_model(client: Client) -> None:
    stages: list[str] = []
    wanted = wanted_of(ROUTER, replace(ROUTER, policy="random", seed=3))
    events = list(client.frontier(wanted, lambda stage, done, total: stages.append(stage)))
    base, first, second = (event for event in events if not isinstance(event, RunProgress))
    assert isinstance(base, FrontierBase) and stages
    assert isinstance(first, FrontierPoint) and isinstance(second, FrontierPoint)
    assert (first.setting, second.setting) == wanted.points
    assert first.evaluation.policy == "router" and first.evaluation.divergence.n_tokens == 40
    with pytest.raises(OptionError, match="no model is loaded"):
        client.stats()


def test_a_cancelled_frontier_ends_at_once_with_its_points_told(client: Client) -> None:
    settings = [replace(ROUTER, seed=seed) for seed in range(1000)]
    events = client.frontier(wanted_of(*settings, max_tokens=20))
    points = 0
    with pytest.raises(CancelledError):
        for event in events:
            points += isinstance(event, FrontierPoint)
            if points == 2:
                began = time.monotonic()
                client.cancel()
    assert time.monotonic() - began < 2
    assert 2 <= points < 1000
    assert client.load(DEMO, EngineConfig(n_ctx=64, n_threads=1)).n_ctx == 64


# the command, with a scripted client


@pytest.fixture
def model(tmp_path: Path) -> str:
    return made(tmp_path, "model.gguf")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty."""
    path = tmp_path / "work"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


def made(folder: Path, name: str) -> str:
    (folder / name).touch()
    return str(folder / name)


def first_cells(stdout: bytes) -> list[tuple[str, str]]:
    lines = [line for line in stdout.decode().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [(row[0], row[1]) for row in cells[2:]]


def test_the_command_prints_rows_and_writes_figures_and_picture(model: str, folder: Path) -> None:
    done = buddyrun(
        *("bench", model, "--frontier", "--policies", "router,random", "--budgets", "5%,all"),
        *("--seeds", "2", "-f", str(STORY)),
    )
    assert done.returncode == 0, done.stderr
    assert first_cells(done.stdout) == [
        ("exact", "-"), ("exact again", "-"), ("router", "5 %"), ("router", "all"),
        ("random (2x)", "5 %"), ("random (2x)", "all"),
    ]  # fmt: skip
    assert b"what else the machine did" in done.stdout
    assert b"frontier.json and frontier.svg written" in done.stderr
    found = json.loads((folder / "frontier.json").read_text())
    assert (found["format"], found["model"]) == ("buddyrun-frontier", "model.gguf")
    assert [(p["policy"], p["budget"], p["min_rank"], p["seed"]) for p in found["points"]] == [
        ("off", 0.0, 2, 0), ("router", 0.05, 2, 0), ("router", 1.0, 1, 0),
        ("random", 0.05, 2, 0), ("random", 0.05, 2, 1),
        ("random", 1.0, 1, 0), ("random", 1.0, 1, 1),
    ]  # fmt: skip
    settings = found["settings"]
    assert settings["engine"]["n_ctx"] == 512 and settings["max_tokens"] == 512
    assert settings["texts"][0]["name"] == "story.txt" and len(settings["texts"][0]["sha256"]) == 64
    ElementTree.parse(folder / "frontier.svg")
    assert sorted(path.name for path in folder.iterdir()) == ["frontier.json", "frontier.svg"]


def test_the_command_sends_its_settings(model: str, tmp_path: Path) -> None:
    seen: list[FrontierFields] = []

    class Watched(ScriptedClient):
        def frontier(
            self, wanted: FrontierFields, on_progress: object = None
        ) -> Iterator[RunProgress | FrontierBase | FrontierPoint]:
            seen.append(wanted)
            return super().frontier(wanted, on_progress)

    text = tmp_path / "text.txt"
    text.write_text("Words.")
    with mock.patch.object(command_line, "ScriptedClient", Watched):
        buddyrun(
            *("bench", model, "--frontier", "--policies", "prior", "--budgets", "0.25", "-c", "64"),
            *("--buddy-min-rank", "3", "--tokens", "9", "-f", str(text), "-f", str(STORY)),
            *("--moe-cache-slots", "4", "-t", "1"),
        )
        buddyrun("bench", model, "--frontier", "--text", str(text))
        buddyrun("bench", model, "--frontier")
    first, second, third = seen
    assert list(first.points) == settings_of(["prior"], [0.25], 3, 1)
    assert [text.name for text in first.texts] == ["text.txt", "story.txt"]
    assert (first.engine.n_ctx, first.engine.moe_cache_slots, first.engine.n_threads) == (64, 4, 1)
    assert (first.engine.buddy, first.max_tokens) == ("off", 9)
    assert second.texts == (NamedText("text.txt", "Words."),)
    assert third.texts[0].name == "buddyrun's bench.txt"
    labels = [setting.budget_label for setting in third.points if setting.policy == "router"]
    assert labels == ["2 %", "5 %", "10 %", "20 %", "100 %", "all"]


def test_without_a_profile_the_policies_that_need_one_are_left_out_and_told(model: str) -> None:
    done = buddyrun("bench", model, "--frontier", "--budgets", "5%")
    policies = [policy for policy, budget in first_cells(done.stdout) if budget != "-"]
    assert policies == ["router", "prior", "prior-router", "resident", "drop", "random"]
    assert b"note: without a profile of the model blend, buddymoe, similar cannot run" in (
        done.stderr
    )
    default_path(model).touch()
    with_profile = buddyrun("bench", model, "--frontier", "--budgets", "5%")
    found = [policy for policy, budget in first_cells(with_profile.stdout) if budget != "-"]
    assert tuple(found) == BUDDY_POLICIES and b"note" not in with_profile.stderr
    off = buddyrun("bench", model, "--frontier", "--budgets", "5%", "--buddy-profile", "off")
    assert first_cells(off.stdout) == first_cells(done.stdout)


def test_flags_that_mean_nothing_are_told(model: str) -> None:
    done = buddyrun(
        *("bench", model, "--frontier", "--policies", "router", "-p", "64", "-n", "8"),
        *("--buddy", "router"),
    )
    assert done.returncode == 0
    assert b"note: --frontier takes no notice of --n-prompt, --n-gen, --buddy\n" in done.stderr
    refused = buddyrun("bench", model, "--budgets", "5%", "-f", str(STORY))
    assert refused.returncode == 2
    assert b"--budgets, --file: only with --frontier." in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--policies", "router,auto"], 2, b"'auto' is no policy: expected blend, "),
        (["--policies", ""], 2, b"'' is no policy"),
        (["--budgets", "5%,x"], 2, b"'x' is no share like 0.05 or 5%"),
        (["--budgets", "5"], 2, b"'5' is not between 0 and 1"),
        (["--budgets", "0%,5%"], 2, b"a budget of 0 is the exact run"),
        (["--seeds", "0"], 2, b"--seeds"),
        (["-f", "/nowhere"], 1, b"cannot read the text from /nowhere"),
        (["--frontier-out", "no/where"], 1, b"there is no folder no"),
        (["--frontier-out", ".."], 1, b"a name is needed"),
    ],
)
def test_wrong_settings_are_refused(
    arguments: list[str], status: int, message: bytes, model: str
) -> None:
    done = buddyrun("bench", model, "--frontier", *arguments)
    assert (done.returncode, done.stdout) == (status, b"") and message in done.stderr


# its files


def test_a_former_frontier_is_replaced(model: str, folder: Path) -> None:
    arguments = ["bench", model, "--frontier", "--budgets", "5%", "--policies"]
    assert buddyrun(*arguments, "router", "--frontier-out", "a.json").returncode == 0
    assert buddyrun(*arguments, "drop", "--frontier-out", "a.svg").returncode == 0
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "a.svg"]
    assert json.loads((folder / "a.json").read_text())["points"][1]["policy"] == "drop"
    assert "drop, 5 %" in (folder / "a.svg").read_text()


@pytest.mark.parametrize("name", ["frontier.json", "frontier.svg"])
def test_a_file_of_somebody_else_is_not_overwritten(name: str, model: str, folder: Path) -> None:
    path = folder / name
    path.write_text('{"format": "mine"}')
    done = buddyrun("bench", model, "--frontier")
    assert done.returncode == 1 and done.stdout == b""
    assert f"{name} is there and is no former frontier".encode() in done.stderr
    assert path.read_text() == '{"format": "mine"}'
    assert list(folder.iterdir()) == [path]


def test_neither_a_folder_nor_a_dead_link_is_a_former_frontier(folder: Path) -> None:
    (folder / "a.json").mkdir()
    (folder / "b.svg").symlink_to(folder / "nothing")
    for stem in ("a", "b"):
        with pytest.raises(OptionError, match="no former frontier"):
            FrontierFiles(stem)


def test_files_are_whole_or_what_they_were(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = FrontierFiles("x")
    files.write({"format": "buddyrun-frontier"}, "<svg/>")

    def no_room(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_room)
    with pytest.raises(OptionError, match=r"cannot write x\.json: No space left"):
        files.write({"other": 1}, "")
    assert json.loads((folder / "x.json").read_text()) == {"format": "buddyrun-frontier"}
    assert sorted(path.name for path in folder.iterdir()) == ["x.json", "x.svg"]


# a frontier that ends early


def test_ctrl_c_leaves_what_is_known_printed_and_written(tmp_path: Path, folder: Path) -> None:
    done = buddyrun_process(
        *("bench", made(tmp_path, "stop.gguf"), "--frontier", "--policies", "random,router"),
        *("--budgets", "5%", "--seeds", "3", "--frontier-out", str(folder / "f")),
        SHOW_CLOSE="1",
    )
    assert done.returncode == 130
    assert first_cells(done.stdout) == [
        ("exact", "-"), ("exact again", "-"), ("random (2x)", "5 %"),
    ]  # fmt: skip
    assert b"what else the machine did" in done.stdout
    assert b"3 of 5 runs were done\n" in done.stderr and b"closed\n" in done.stderr
    assert len(json.loads((folder / "f.json").read_text())["points"]) == 3
    ElementTree.parse(folder / "f.svg")


def test_a_worker_that_dies_leaves_what_is_known(tmp_path: Path, folder: Path) -> None:
    arguments = ["--frontier", "--policies", "router", "--budgets", "5%,10%,all"]
    done = buddyrun("bench", made(tmp_path, "break.gguf"), *arguments, "-v")
    assert done.returncode == 1 and b"The engine was killed" in done.stderr
    assert b"the last words of the engine" in done.stderr
    assert first_cells(done.stdout)[1:] == [
        ("exact again", "-"), ("router", "5 %"), ("router", "10 %"),
    ]  # fmt: skip
    assert len(json.loads((folder / "frontier.json").read_text())["points"]) == 3


def test_without_an_exact_run_nothing_is_written(tmp_path: Path, folder: Path) -> None:
    done = buddyrun("bench", made(tmp_path, "die.gguf"), "--frontier")
    assert done.returncode == 1 and done.stdout == b""
    assert list(folder.iterdir()) == []


def test_the_line_on_stderr_says_which_run_and_how_long_still() -> None:
    stream = StringIO()
    clock = iter([0.0, 10.0, 30.0])
    with mock.patch.object(time, "monotonic", lambda: next(clock, 31.0)):
        progress = FrontierProgress([ROUTER], StatusLine(stream, is_shown=False))
        shown: list[str] = []
        progress._status.show = shown.append  # type: ignore[method-assign]
        progress.show(RunProgress(True, 50, 100, 2.5))
        progress.end_run()
        progress.show(RunProgress(False, 50, 100, 2.5, 0.1))
    assert shown == [
        "run 1 of 2 (exact): 50 of 100 tokens, 30 s left",
        "run 2 of 2 (router, 10 %): 50 of 100 tokens, 10 s left",
    ]


def test_a_warning_of_the_engine_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    progress = FrontierProgress([ROUTER], StatusLine(StringIO(), is_shown=False))
    progress.show(RunProgress(True, 1, 100, 2.5, warnings=("There is no GPU.",)))
    progress.end_run()
    progress.show(RunProgress(False, 1, 100, 2.5, 0.1, ("There is no GPU.",)))
    assert capsys.readouterr().err == "buddyrun: There is no GPU.\n"


# all of it, with the demo model


def test_the_demo_model_has_a_frontier(folder: Path) -> None:
    done = buddyrun_process(
        *("bench", str(DEMO), "--frontier", "--policies", "router,random", "--budgets", "5%,all"),
        *(*CACHE_FLAGS, "-f", str(STORY), "--tokens", "40", "--frontier-out", str(folder / "f")),
        command=BUDDYRUN,
    )
    assert done.returncode == 0, done.stderr
    assert [row[0] for row in first_cells(done.stdout)] == [
        "exact", "exact again", "router", "router", "random", "random",
    ]  # fmt: skip
    found = json.loads((folder / "f.json").read_text())
    assert len(found["points"]) == 5 and found["base"]["n_tokens"] == 40
    assert found["points"][2]["kl_mean"] > found["points"][0]["kl_mean"] == 0.0
    ElementTree.parse(folder / "f.svg")


@pytest.mark.slow
def test_every_policy_has_a_place_in_the_demo_models_frontier(folder: Path) -> None:
    profile = default_path(DEMO)
    assert profile.exists()
    done = buddyrun_process(
        *("bench", str(DEMO), "--frontier", "--budgets", "10%", *CACHE_FLAGS, "-f", str(STORY)),
        *("--tokens", "60", "--frontier-out", str(folder / "f")),
        command=BUDDYRUN,
    )
    assert done.returncode == 0, done.stderr
    points = json.loads((folder / "f.json").read_text())["points"][1:]
    assert [point["policy"] for point in points] == list(BUDDY_POLICIES)
    for point in points:
        assert 0.0 < point["substituted_weight_share"] <= 0.1, point["policy"]
        assert point["kl_mean"] > 0.0 and point["bytes_read_ratio"] < 1.0, point["policy"]


@pytest.mark.slow
def test_a_signal_reaches_the_command_and_not_only_the_worker(folder: Path) -> None:
    process = subprocess.Popen(
        [
            *(*BUDDYRUN, "bench", str(DEMO), "--frontier", *CACHE_FLAGS, "-f", str(STORY)),
            *("--tokens", "60", "--frontier-out", str(folder / "f")),
        ],
        cwd=command_line.ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    for _ in range(4):  # up to the first point
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err
    assert b"what else the machine did" in out and b"runs were done" in err
    assert json.loads((folder / "f.json").read_text())["points"]
