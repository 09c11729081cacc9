"""The flags about stand-ins, and what a loaded model tells of them."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from runner.config import BUDDY_POLICIES, DEFAULT_BUDDY_BUDGET, EngineConfig
from runner.protocol import ModelInfo
from runner.session import Session
from tests.paths import DEMO
from tests.runner.chat_fakes import INFO
from tests.runner.command_line import buddyrun
from tests.runner.terminal.test_banner import banner
from tests.runner.test_cli import engines_asked_for


def asked_for(*flags: str, **twins: str) -> EngineConfig:
    """The settings that these flags load a model with."""
    (config,) = engines_asked_for(["run", "-m", str(DEMO), "-p", "hi", *flags], twins)
    return config


def refusal(*flags: str, **twins: str) -> str:
    done = buddyrun("run", "-m", str(DEMO), "-p", "hi", *flags, **twins)
    assert done.returncode == 2 and done.stdout == b""
    return done.stderr.decode()


# the budget


SHARES = {
    "5%": 0.05, "0.05": 0.05, "1": 1.0, "0": 0.0, "100%": 1.0, "0%": 0.0, " 8 % ": 0.08,
    "1e-2": 0.01, ".5": 0.5, "2.5%": 0.025, "0.05%": 0.0005,
}  # fmt: skip


@pytest.mark.parametrize("text", SHARES)
def test_a_budget_is_a_share_or_a_percentage(text: str) -> None:
    assert asked_for("--buddy-budget", text).buddy_budget == pytest.approx(SHARES[text])
    assert asked_for(f"--buddy-budget={text}").buddy_budget == pytest.approx(SHARES[text])
    assert asked_for(BUDDYRUN_BUDDY_BUDGET=text).buddy_budget == pytest.approx(SHARES[text])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("5", "'5' is not between 0 and 1, or 0% and 100%"),
        ("101%", "'101%' is not between"),
        ("-0.1", "'-0.1' is not between"),
        ("nan", "'nan' is not between"),
        ("inf", "'inf' is not between"),
        ("1e400", "'1e400' is not between"),
        ("much", "'much' is no share like 0.05 or 5%"),
        ("%", "'%' is no share"),
        ("5%%", "'5%%' is no share"),
        ("0,05", "'0,05' is no share"),
        ("\x1b[31m" + "9" * 300, "is no share"),
    ],
)
def test_what_is_no_share_is_refused_where_it_was_said(text: str, words: str) -> None:
    flag = refusal("--buddy-budget", text)
    assert words in flag and "--buddy-budget" in flag
    assert words in refusal(BUDDYRUN_BUDDY_BUDGET=text)
    assert "\x1b" not in flag and len(flag) < 400


def test_without_a_budget_the_engine_decides() -> None:
    assert asked_for().buddy_budget is None
    assert asked_for(BUDDYRUN_BUDDY_BUDGET="").buddy_budget is None
    assert "no share" in refusal("--buddy-budget", "")


# the others, and their twins


@pytest.mark.parametrize("name", [*BUDDY_POLICIES, "auto", "off"])
def test_every_policy_can_be_asked_for(name: str) -> None:
    assert asked_for("--buddy", name).buddy == name
    assert asked_for(BUDDYRUN_BUDDY=name).buddy == name


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--buddy", "best"], "'best' is not one of 'auto', 'off', 'blend'"),
        (["--buddy-min-rank", "0"], "0 is not in the range"),
        (["--buddy-min-rank", "first"], "'first' is not a valid integer"),
        (["--exact=yes"], "--exact"),
    ],
)
def test_what_means_nothing_is_refused(flags: list[str], words: str) -> None:
    assert words in refusal(*flags)


def test_twins_mean_the_same_and_flags_beat_them() -> None:
    twins = {
        "BUDDYRUN_BUDDY": "prior", "BUDDYRUN_BUDDY_BUDGET": "20%", "BUDDYRUN_BUDDY_MIN_RANK": "3",
        "BUDDYRUN_BUDDY_PROFILE": "off",
    }  # fmt: skip
    config = asked_for(**twins)
    assert (config.buddy, config.buddy_budget) == ("prior", 0.2)
    assert (config.buddy_min_rank, config.buddy_profile) == (3, "off")
    flags = ["--buddy", "drop", "--buddy-budget", "0", "--buddy-min-rank", "1"]
    config = asked_for(*flags, "--buddy-profile", "/x.npz", **twins)
    assert (config.buddy, config.buddy_budget) == ("drop", 0.0)
    assert (config.buddy_min_rank, config.buddy_profile) == (1, "/x.npz")


def test_a_profile_is_a_path_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine runs somewhere else."""
    monkeypatch.chdir(tmp_path)
    assert asked_for("--buddy-profile", "some.npz").buddy_profile == str(tmp_path / "some.npz")
    assert asked_for(BUDDYRUN_BUDDY_PROFILE="some.npz").buddy_profile == str(tmp_path / "some.npz")
    assert asked_for("--buddy-profile", "off").buddy_profile == "off"
    assert asked_for("--buddy-profile", "./off").buddy_profile == str(tmp_path / "off")
    assert asked_for().buddy_profile == ""


@pytest.mark.parametrize(
    ("flags", "twins", "expected"),
    [
        (["--exact", "--buddy", "blend"], {}, "off"),
        (["--buddy", "blend", "--exact", "--buddy-budget", "1"], {}, "off"),
        (["--exact"], {"BUDDYRUN_BUDDY": "router"}, "off"),
        (["--buddy", "router"], {"BUDDYRUN_EXACT": "1"}, "off"),
        ([], {"BUDDYRUN_BUDDY": "router", "BUDDYRUN_EXACT": "yes"}, "off"),
        (["--buddy", "router"], {"BUDDYRUN_EXACT": "0"}, "router"),
        ([], {"BUDDYRUN_BUDDY": "router", "BUDDYRUN_EXACT": ""}, "router"),
    ],
)
def test_exact_beats_a_policy_wherever_both_are_said(
    flags: list[str], twins: dict[str, str], expected: str
) -> None:
    assert asked_for(*flags, **twins).buddy == expected


# completion


def completed(typed: str, number: int) -> list[str]:
    done = buddyrun(
        _BUDDYRUN_COMPLETE="bash_complete", COMP_WORDS=typed, COMP_CWORD=str(number)
    )  # fmt: skip
    return [line.partition(",")[2] for line in done.stdout.decode().splitlines()]


def test_a_shell_completes_flags_policies_and_the_profiles_path() -> None:
    flags = ["--buddy", "--buddy-budget", "--buddy-min-rank", "--buddy-profile"]
    assert completed("buddyrun run --buddy", 2) == flags
    assert completed("buddyrun run --ex", 2) == ["--exact"]
    assert completed("buddyrun run --buddy ", 3) == ["auto", "off", *BUDDY_POLICIES]
    assert completed("buddyrun run --buddy pri", 3) == ["prior", "prior-router"]
    done = buddyrun(
        _BUDDYRUN_COMPLETE="bash_complete", COMP_WORDS="buddyrun run --buddy-profile ",
        COMP_CWORD="3",
    )  # fmt: skip
    assert done.stdout.startswith(b"file,")


# what a loaded model tells


def told(info: ModelInfo) -> list[str]:
    return [line for line in banner(info) if line.startswith("buddies")]


WITH_CACHE = replace(INFO, moe_cache_bytes=10**9, moe_cache_slots=(4,) * 32, moe_cache_policy="lfu")


def test_the_banner_says_who_stands_in_and_how_much_that_may_touch() -> None:
    info = replace(WITH_CACHE, buddy="router", buddy_budget=0.05)
    assert told(info) == [
        "buddies  router, at most 5.0 % of the router's weight; --exact lets nobody stand in"
    ]
    info = replace(
        info, buddy="blend", buddy_budget=0.08, buddy_profile="/models/a \x1b[31mb.buddies.npz"
    )
    (line,) = told(info)
    assert line.startswith("buddies  blend by a ") and "\x1b" not in line
    assert line.endswith("at most 8.0 % of the router's weight; --exact lets nobody stand in")
    assert told(replace(info, buddy_profile="", buddy_budget=1.0)) == [
        "buddies  blend, without a limit; --exact lets nobody stand in"
    ]


def test_where_nobody_stands_in_the_banner_says_nothing_of_it() -> None:
    assert told(INFO) == told(WITH_CACHE) == []


def loaded(path: Path, **settings: object) -> ModelInfo:
    config = EngineConfig(n_threads=1, n_ctx=64, moe_cache_slots=3, **settings)  # type: ignore[arg-type]
    with closing(Session()) as session:
        return session.load(str(path), config, None, lambda *_: None, lambda: False)


def test_a_loaded_model_names_its_policy_budget_and_profile(demo_path: Path) -> None:
    info = loaded(demo_path, buddy="similar")
    assert (info.buddy, info.buddy_budget) == ("similar", DEFAULT_BUDDY_BUDGET)
    assert info.buddy_profile == str(demo_path.with_name("buddy-demo-q8_0.buddies.npz"))
    info = loaded(demo_path, buddy="auto", buddy_budget=0.3, buddy_profile="off")
    assert (info.buddy, info.buddy_budget, info.buddy_profile) == ("router", 0.3, "")
    assert any("`buddyrun profile MODEL`" in note for note in info.notes)
    for settings in ({"buddy": "off"}, {"buddy": "auto", "buddy_budget": 0.0}):
        info = loaded(demo_path, **settings)
        assert (info.buddy, info.buddy_budget, info.buddy_profile) == ("", 0.0, "")
        assert not any("buddyrun profile" in note for note in info.notes)
