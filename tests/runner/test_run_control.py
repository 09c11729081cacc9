"""What an owner changes while a run goes on, with the real engine."""

from collections.abc import Iterator

import numpy as np
import pytest

from runner.config import EngineConfig
from runner.engine import Engine
from runner.errors import OptionError
from runner.protocol import ChangeFields
from runner.run_control import RunControl
from tests.paths import DEMO

TOKENS = list(range(300, 330))
FEW_SLOTS = EngineConfig(
    n_ctx=256, moe_cache_slots=3, buddy="router", buddy_budget=1.0, n_threads=1
)


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(DEMO, FEW_SLOTS)
    yield engine
    engine.close()


def decode(engine: Engine, n: int = 20) -> tuple[int, np.ndarray]:
    """How many pairs were given away in so many tokens, and the last logits."""
    before = engine.snapshot()
    for token in range(400, 400 + n):
        logits = engine.decode(token)
    counted = engine.snapshot().counted_since(before)
    return sum(counted.substituted) + sum(counted.dropped), logits.copy()


def test_exact_takes_hold_at_once_and_can_be_taken_back(engine: Engine) -> None:
    control = RunControl(engine)
    assert (control.settings.is_exact, control.settings.buddy) == (False, "router")
    engine.prefill(TOKENS)
    assert decode(engine)[0] > 0
    now = control.change(ChangeFields(is_exact=True))
    assert (now.is_exact, now.buddy, now.buddy_budget) == (True, "router", 1.0)
    assert decode(engine)[0] == 0
    assert engine.snapshot().buddy == ""
    assert not control.change(ChangeFields(is_exact=False)).is_exact
    assert decode(engine)[0] > 0
    assert engine.snapshot().buddy == "router"


def test_a_run_made_exact_computes_what_an_exact_run_computes(engine: Engine) -> None:
    RunControl(engine).change(ChangeFields(is_exact=True))
    exact = Engine(DEMO, EngineConfig(n_ctx=256, n_threads=1))
    try:
        for each in (engine, exact):
            each.prefill(TOKENS)
        assert np.array_equal(decode(engine)[1], decode(exact)[1])
    finally:
        exact.close()


def test_an_answer_after_the_change_uses_nothing_that_stand_ins_computed(engine: Engine) -> None:
    control = RunControl(engine)
    engine.prefill(TOKENS)
    decode(engine)
    control.change(ChangeFields(is_exact=True))
    prompt = [*TOKENS, *range(400, 420), 500, 501]
    after = engine.prefill(prompt).copy()
    exact = Engine(DEMO, EngineConfig(n_ctx=256, n_threads=1))
    try:
        assert np.array_equal(after, exact.prefill(prompt))
    finally:
        exact.close()
    n_cached: list[int] = []
    engine.prefill([*prompt, 502], on_prompt=lambda done, total, cached: n_cached.append(cached))
    assert n_cached[0] == len(prompt), "what is exact is kept"


def test_policy_and_budget_are_changed_between_tokens(engine: Engine) -> None:
    control = RunControl(engine)
    engine.prefill(TOKENS)
    now = control.change(ChangeFields(buddy="blend", buddy_budget=0.1))
    assert (now.buddy, now.buddy_budget) == ("blend", 0.1)
    decode(engine, 60)
    snapshot = engine.snapshot()
    assert (snapshot.buddy, snapshot.buddy_budget) == ("blend", 0.1)
    assert 0.0 < snapshot.standin_share <= 0.1, "the new budget holds"


def test_what_is_changed_in_an_exact_run_waits_until_it_is_no_longer_exact(engine: Engine) -> None:
    control = RunControl(engine)
    engine.prefill(TOKENS)
    control.change(ChangeFields(is_exact=True))
    now = control.change(ChangeFields(buddy="resident", buddy_budget=0.5))
    assert now.is_exact and now.buddy == "resident"
    assert decode(engine)[0] == 0
    control.change(ChangeFields(is_exact=False))
    assert engine.snapshot().buddy == "resident"


def test_a_run_that_began_exact_gets_the_policy_it_would_have_had() -> None:
    engine = Engine(DEMO, EngineConfig(n_ctx=64, moe_cache_slots=3, buddy="off", n_threads=1))
    try:
        control = RunControl(engine)
        assert (control.settings.is_exact, control.settings.buddy) == (True, "auto")
        now = control.change(ChangeFields(is_exact=False))
        assert (now.buddy, now.buddy_budget) == ("blend", 0.08)
    finally:
        engine.close()


@pytest.mark.parametrize(
    "wanted",
    [
        ChangeFields(buddy="nobody"),
        ChangeFields(buddy="off"),
        ChangeFields(buddy_budget=0.0),
        ChangeFields(buddy_budget=1.5),
        ChangeFields(buddy_budget=float("nan")),
        ChangeFields(is_exact=True, is_paused=True, buddy="nobody"),
    ],
)
def test_what_cannot_be_changes_nothing(engine: Engine, wanted: ChangeFields) -> None:
    control = RunControl(engine)
    before, policy = control.settings, engine.buddies
    with pytest.raises(OptionError):
        control.change(wanted)
    assert control.settings == before
    assert engine.buddies is policy


def test_where_every_expert_is_resident_there_is_nothing_to_change_but_a_pause() -> None:
    engine = Engine(DEMO, EngineConfig(n_ctx=64, n_threads=1))
    try:
        control = RunControl(engine)
        assert control.settings.buddy == ""
        for wanted in (ChangeFields(is_exact=False), ChangeFields(buddy="router")):
            with pytest.raises(OptionError, match="every expert is in memory"):
                control.change(wanted)
        assert control.change(ChangeFields(is_paused=True)).is_paused
    finally:
        engine.close()


def test_verifying_goes_on_with_another_policy() -> None:
    config = EngineConfig(
        n_ctx=256, moe_cache_slots=3, buddy="router", buddy_budget=1.0, n_threads=1, verify_every=2
    )
    engine = Engine(DEMO, config)
    try:
        control = RunControl(engine)

        def n_verified() -> int:
            list(engine.generate(TOKENS, lambda logits: 400, 12, lambda token: False))
            return engine.snapshot().n_verified

        assert (first := n_verified()) > 0
        control.change(ChangeFields(buddy="resident"))
        assert (second := n_verified()) > first
        control.change(ChangeFields(is_exact=True))
        assert n_verified() == second, "an exact run has nothing to compare"
    finally:
        engine.close()
