"""What the monitor says of an expert and of an engine."""

from dataclasses import replace

from runner.expert_counts import ExpertCounts
from runner.frames import RunSettings
from tests.tui.fake_engine import FakeEngine
from tui.words import cell_words, figure, model_name, phase_text, short_percent, shown


def stats_with(counts: ExpertCounts, residency: tuple[tuple[int, ...], ...]):  # type: ignore[no-untyped-def]
    return replace(FakeEngine(1, 4).stats(), experts=counts, residency=residency)


COUNTS = ExpertCounts(
    used=((60, 20, 19, 1),),
    missed=((0, 10, 0, 1),),
    substituted=((0, 4, 0, 1),),
    stood_in=((4, 0, 0, 0),),
    loaded=((1, 6, 0, 0),),
    buddies=((0, 1, 0, 3), (0, 1, 2, 1), (0, 3, -1, 1)),
)


def test_a_missing_expert_says_who_stood_in_for_it() -> None:
    words = cell_words(stats_with(COUNTS, ((0, 2),)), 0, 1)
    assert words.title == "Layer 0, expert 1"
    assert words.sentences == (
        "Not in memory.",
        "Chosen 20 times, 20 % of the layer.",
        "Missing 10 times (50 %), 4 replaced. Read 6 times.",
        "Stand-ins: 0 (3), 2 (1).",
    )


def test_a_resident_expert_says_its_slot_and_for_whom_it_stood_in() -> None:
    words = cell_words(stats_with(COUNTS, ((2, 0),)), 0, 0)
    assert words.sentences == (
        "In slot 1 of 2.",
        "Chosen 60 times, 60 % of the layer.",
        "Never missing, read once.",
        "Stood in 4 times: for 1 (3).",
    )


def test_a_dropped_expert_was_replaced_by_nobody() -> None:
    sentences = cell_words(stats_with(COUNTS, ((2, 0),)), 0, 3).sentences
    assert sentences[-1] == "Stand-ins: nobody (1)." and sentences[1].startswith("Chosen once, 1.0")


def test_what_is_not_counted_is_said_and_not_made_up() -> None:
    words = cell_words(stats_with(replace(COUNTS, used=()), ()), 0, 1)
    assert words.sentences[:2] == (
        "In memory, as all are: no cache.",
        "Choices are not counted in this run.",
    )


def test_a_phase_is_said_with_how_far_it_is() -> None:
    frame = FakeEngine().frame()
    loading = replace(frame, phase="loading", stage="weights", done=5 * 10**8, total=10**9)
    assert phase_text(loading) == "loading weights, 50 %"
    assert phase_text(replace(frame, phase="prompt", done=64, total=512)).endswith(
        "64 of 512 tokens"
    )
    assert phase_text(replace(frame, phase="measuring", stage="pp512")) == "measuring pp512"
    assert phase_text(replace(frame, phase="loading")) == "loading"


def test_a_pause_is_said_whatever_the_engine_does() -> None:
    frame = FakeEngine(settings=RunSettings(False, "router", 0.08, True)).frame()
    phases = ("ready", "paused", "generating", "prompt", "measuring")
    words = [phase_text(replace(frame, phase=phase)) for phase in phases]
    assert words[:3] == ["paused; waits for a message", "paused", "paused"]
    assert all(each.startswith("paused; ") for each in words[3:])


def test_a_name_from_outside_cannot_reach_the_terminal() -> None:
    assert shown("a\x1b[31m\nb", is_ascii=False) == "a␛[31m␊b"
    assert shown("é\x1b", is_ascii=True) == "??"
    info = replace(FakeEngine().model(), name="", path="/models/x.gguf")
    assert model_name(info) == "x.gguf" and model_name(None) == "no model yet"


def test_figures_have_three_digits() -> None:
    assert [figure(v) for v in (0.836, 33.52, 929.4, 1044.6)] == ["0.84", "33.5", "929", "1,045"]
    assert [short_percent(v) for v in (0.0, 0.004, 0.57)] == ["0 %", "0.4 %", "57 %"]
