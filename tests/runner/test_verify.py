"""Steps of an answer are compared with the exact ones, and nothing notices but residency."""

import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from quant.ggml import Tensor
from runner.batch_graph import BatchGraph
from runner.config import MOE_CACHE_OFF, EngineConfig, GenerateRequest, SamplingConfig
from runner.engine import Engine
from runner.errors import BackendError, BuddyrunError, CancelledError, ModelError
from runner.experts.expert_cache import ExpertCache
from runner.protocol import GenerateResult, PromptProgress, TextPiece
from runner.session import Session
from runner.stats import StatsSnapshot
from tests.paths import DEMO

EXACTLY = EngineConfig(n_threads=1, n_ctx=512, n_batch=32, moe_cache_slots=3, moe_miss="load")
BUDDIES = replace(EXACTLY, buddy="router", buddy_profile="off", buddy_budget=0.3)
NOTHING_GIVEN = replace(BUDDIES, buddy_budget=1e-9)
ALL_GIVEN = replace(BUDDIES, buddy="resident", buddy_budget=1.0, buddy_min_rank=1)
VERIFIED = {
    "n_verified", "n_verified_agree", "verified_kl_sum", "verified_kl_max", "verify_s",
}  # fmt: skip
MOVES_ON = {"residency", "n_evicted", "bytes_read", "read_s", "uptime_s"}

PROMPT = [0, *map(int, np.random.default_rng(5).integers(300, 4000, 40))]
NEXT = [777, 1234, 3999, 500, 600, 700]


@pytest.fixture(params=["f16", "q8_0"])
def kv_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextmanager
def engine_of(config: EngineConfig, **changes: Any) -> Iterator[Engine]:
    with closing(Engine(DEMO, replace(config, **changes))) as engine:
        yield engine


def most_likely(logits: np.ndarray) -> int:
    return int(logits.argmax())


def answer(engine: Engine, n: int = 60, prompt: list[int] = PROMPT) -> list[int]:
    steps = engine.generate(prompt, most_likely, n, lambda token: False)
    return [step.token for step in steps]


def decode(engine: Engine, token: int, cancelled: Callable[[], bool] = lambda: False) -> np.ndarray:
    """A step of an answer."""
    return engine._decode_and_verify(token, cancelled)


def kv_bytes(engine: Engine) -> list[bytes]:
    """K and V as far as attention can see; behind that nothing was ever written."""
    kv = engine._parts.kv

    def content(tensor: Tensor) -> bytes:
        data = np.empty(tensor.strides[1] * kv._n_cleared, np.uint8)
        engine.backend.read(tensor, data)
        return data.tobytes()

    return [content(tensor) for tensor in (*kv.k, *kv.v)]


def copy_kv(source: Engine, target: Engine) -> None:
    for cell in range(source._parts.kv.cells.n_used):
        target._parts.kv.write_cell(cell, source._parts.kv.read_cell(cell))


def bookkeeping(engine: Engine) -> list[Any]:
    """What must not notice that a step is verified, but for the counters."""
    kv, cache, policy = engine._parts.kv, engine._cache, engine.buddies.policy
    assert cache is not None and policy is not None
    table = cache.table
    uses = (table.last_used, table.frequency, table.n_uses, np.array(table._n_tokens))
    return [
        engine.n_past,
        list(engine._context.tokens),
        kv.cells.positions.tolist(),
        (kv.cells.n_used, kv._n_cleared),
        [array.tolist() for array in uses],
        list(policy.budget._history),
        policy.budget.spent_share,
        policy.opening.value,
    ]


def counters(engine: Engine) -> dict[str, Any]:
    return {
        name: value
        for name, value in asdict(engine.snapshot()).items()
        if name not in VERIFIED | MOVES_ON
    }


def kl_by_definition(exact: np.ndarray, step: np.ndarray) -> float:
    def ln_p(logits: np.ndarray) -> np.ndarray:
        shifted = logits.astype(np.float64) - logits.max()
        ln: np.ndarray = shifted - np.log(np.exp(shifted).sum())
        return ln

    p = ln_p(exact)
    return float((np.exp(p) * (p - ln_p(step))).sum())


def half_way(engine: Engine) -> Engine:
    """In an answer, with slots that are filled and stand-ins at work."""
    engine.prefill(PROMPT)
    for token in NEXT:
        engine.decode(token)
    return engine


# what is found


def test_where_nobody_stands_in_a_step_is_the_exact_one_and_the_text_the_same() -> None:
    with engine_of(NOTHING_GIVEN) as plain, engine_of(NOTHING_GIVEN, verify_every=3) as verified:
        assert answer(verified) == answer(plain)
        found = verified.snapshot()
    assert found.n_verified == 19  # of 59 steps behind the prompt
    assert (found.verified_kl_sum, found.verified_kl_max) == (0.0, 0.0)
    assert found.n_verified_agree == 19 and found.verified_agreement == 1.0
    assert not any(found.substituted) and found.verify_s > 0


def test_a_step_that_stand_ins_computed_differs_as_an_engine_without_them_says(
    kv_type: str,
) -> None:
    types = {"cache_type_k": kv_type, "cache_type_v": kv_type}
    exact_config = replace(EXACTLY, moe_cache_slots=0, moe_cache_bytes=MOE_CACHE_OFF)
    with (
        engine_of(ALL_GIVEN, verify_every=1, **types) as engine,
        engine_of(exact_config, **types) as reference,
    ):
        half_way(engine)
        reference.prefill([*PROMPT, *NEXT])
        kls, n_agree = [], 0
        for token in (901, 902, 903):
            copy_kv(engine, reference)
            before = engine.snapshot()
            step = decode(engine, token)
            exact = reference.decode(token)
            kls.append(kl_by_definition(exact, step))
            n_agree += most_likely(exact) == most_likely(step)
            found = engine.snapshot().counted_since(before)
            assert sum(found.substituted) > 0 and sum(found.loaded) == 0
            assert found.n_verified == 1
            assert found.verified_kl == pytest.approx(kls[-1], rel=1e-9, abs=1e-12)
        assert engine.snapshot().verified_kl_max == pytest.approx(max(kls))
        assert engine.snapshot().n_verified_agree == n_agree
        assert min(kls) > 0.001


def test_every_nth_step_is_verified_also_across_answers() -> None:
    with engine_of(BUDDIES, verify_every=10) as engine:
        answer(engine, 9)  # of which the last token is not computed
        assert engine.snapshot().n_verified == 0
        answer(engine, 9)
        assert engine.snapshot().n_verified == 1
        answer(engine, 40)
        assert engine.snapshot().n_verified == 5


def test_the_logits_of_a_verified_step_are_those_of_the_step() -> None:
    with engine_of(ALL_GIVEN) as plain, engine_of(ALL_GIVEN, verify_every=1) as verified:
        half_way(plain), half_way(verified)
        assert decode(verified, 901).tobytes() == plain.decode(901).tobytes()
        assert verified.snapshot().verified_kl > 0


# what must not notice


@pytest.mark.parametrize("config", [BUDDIES, ALL_GIVEN])
def test_a_verified_step_leaves_all_as_a_step_does_that_is_not(
    config: EngineConfig, kv_type: str
) -> None:
    types = {"cache_type_k": kv_type, "cache_type_v": kv_type}
    with (
        engine_of(config, **types) as plain,
        engine_of(config, verify_every=1, **types) as verified,
    ):
        half_way(plain), half_way(verified)
        plain.decode(901)
        decode(verified, 901)
        assert verified.snapshot().n_verified == 1
        assert bookkeeping(verified) == bookkeeping(plain)
        times = {"prompt_s", "generation_s", "compute_s", "wait_s", "python_s"}
        ours, theirs = counters(verified), counters(plain)
        assert {n: v for n, v in ours.items() if n not in times} == {
            n: v for n, v in theirs.items() if n not in times
        }
        assert kv_bytes(verified) == kv_bytes(plain)


@pytest.mark.parametrize("reads", ["buffered", "direct"])
def test_the_exact_step_changes_nothing_while_it_is_compared(
    reads: str, kv_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what is timed, and the row of the step, which the exact step does overwrite."""
    if reads == "direct":  # on a machine with little memory experts are read ahead as well
        monkeypatch.setattr("runner.placement.available_memory_bytes", lambda: 64 << 20)
    with engine_of(ALL_GIVEN, verify_every=1, cache_type_k=kv_type, cache_type_v=kv_type) as engine:
        half_way(engine)
        assert engine._verifier is not None and engine._cache is not None
        if engine._cache.reads_ahead != (reads == "direct"):
            pytest.skip("this file system has no direct reads")
        kv, compare = engine._parts.kv, engine._verifier.compare
        seen: list[list[Any]] = []

        def look(step: np.ndarray, cell: int, compute: Callable[[], np.ndarray]) -> None:
            def compute_and_look() -> np.ndarray:
                logits = compute()
                seen.append([kv.read_cell(cell).tobytes()])
                return logits

            row = kv.read_cell(cell).tobytes()
            before = [kv_bytes(engine), bookkeeping(engine), counters(engine)]
            compare(step, cell, compute_and_look)
            assert [kv_bytes(engine), bookkeeping(engine), counters(engine)] == before
            assert seen.pop() != [row], "the exact step wrote other keys and values"

        monkeypatch.setattr(engine._verifier, "compare", look)
        for token in (901, 902, 903):
            decode(engine, token)
        assert engine.snapshot().n_verified == 3


def test_a_cell_in_a_gap_that_a_context_shift_left_is_put_back_as_well() -> None:
    shifts = {"n_ctx": 64, "context_shift": True}
    with (
        engine_of(ALL_GIVEN, **shifts) as plain,
        engine_of(ALL_GIVEN, **shifts, verify_every=1) as verified,
        engine_of(EXACTLY, **shifts) as reference,
    ):
        prompt = [0, *range(300, 362)]
        for engine in (plain, verified, reference):
            engine.prefill(prompt)
            engine.decode(700)
            assert engine._context.make_room()
        copy_kv(verified, reference)
        cells = verified._parts.kv.cells
        plain.decode(901)
        step, exact = decode(verified, 901), reference.decode(901)
        assert cells.cell_of(verified.n_past - 1) < cells.n_used - 1, "there is a gap"
        assert bookkeeping(verified) == bookkeeping(plain)
        assert kv_bytes(verified) == kv_bytes(plain)
        expected = kl_by_definition(exact, step)
        assert verified.snapshot().verified_kl == pytest.approx(expected, rel=1e-9) and expected > 0


def test_experts_that_the_exact_step_reads_stay_and_the_reads_are_counted() -> None:
    with engine_of(ALL_GIVEN, verify_every=1) as engine:
        half_way(engine)
        before = engine.snapshot()
        decode(engine, 901)
        after = engine.snapshot()
    assert sum(after.bytes_read) > sum(before.bytes_read)
    assert after.residency != before.residency
    assert sum(after.loaded) == sum(before.loaded)


def test_without_stand_ins_or_without_asking_nothing_is_verified() -> None:
    everything = replace(BUDDIES, moe_cache_slots=8, verify_every=1)
    for config in (replace(EXACTLY, verify_every=1), BUDDIES, everything):
        with engine_of(config) as engine:
            answer(engine, 10)
            found = engine.snapshot()
            assert (found.n_verified, found.verify_s) == (0, 0.0), config
    with engine_of(BUDDIES, verify_every=1) as engine:
        half_way(engine)  # decoded for another reason than an answer
        assert engine.snapshot().n_verified == 0


# what goes wrong


@pytest.mark.parametrize("error", [BackendError("failed"), MemoryError(), CancelledError()])
@pytest.mark.parametrize("layer", [0, 5])
def test_an_exact_step_that_fails_leaves_the_step_as_it_was(
    error: BaseException, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine_of(ALL_GIVEN) as plain, engine_of(ALL_GIVEN, verify_every=1) as verified:
        half_way(plain), half_way(verified)
        plain.decode(901)
        real = BatchGraph.route

        def fail(graph: BatchGraph, routed: int) -> np.ndarray:
            assert verified._planner is not None
            if routed == layer and verified._planner.is_exact:
                raise error
            return real(graph, routed)

        with monkeypatch.context() as m, pytest.raises(type(error)):
            m.setattr(BatchGraph, "route", fail)
            decode(verified, 901)
        assert_goes_on(verified, plain)


def test_an_exact_step_is_cancelled_between_two_layers_and_the_answer_ends_there() -> None:
    with engine_of(ALL_GIVEN) as plain, engine_of(ALL_GIVEN, verify_every=3) as verified:
        n_calls = 0

        def cancelled() -> bool:
            nonlocal n_calls
            n_calls += verified._planner.is_exact  # type: ignore[union-attr]
            return n_calls > 4

        steps = list(
            verified.generate(PROMPT, most_likely, 20, lambda token: False, cancelled)
        )  # fmt: skip
        assert [step.stop_reason for step in steps] == [None, None, None, "cancelled"]
        assert answer(plain, 4)[:3] == [step.token for step in steps[:3]]
        assert_goes_on(verified, plain)


def test_a_failed_read_of_the_exact_step_leaves_the_step_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with engine_of(ALL_GIVEN) as plain, engine_of(ALL_GIVEN, verify_every=1) as verified:
        half_way(plain), half_way(verified)
        plain.decode(901)

        def fail(cache: ExpertCache, load: object) -> None:
            raise OSError("the disk is gone")

        with monkeypatch.context() as m, pytest.raises(OSError, match="the disk is gone"):
            m.setattr(ExpertCache, "finish", fail)
            decode(verified, 901)
        assert kv_bytes(verified) == kv_bytes(plain)
        assert bookkeeping(verified) == bookkeeping(plain)
        assert np.isfinite(decode(verified, 902)).all()
        assert verified.snapshot().n_verified == 1


def assert_goes_on(verified: Engine, plain: Engine) -> None:
    """As an engine goes on that did not try; up to here no expert was read that changes that."""
    assert verified.snapshot().n_verified == 0
    assert kv_bytes(verified) == kv_bytes(plain)
    assert bookkeeping(verified) == bookkeeping(plain)
    assert np.isfinite(decode(verified, 902)).all()
    assert verified.n_past == plain.n_past + 1


def test_logits_that_are_no_numbers_end_the_answer_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with engine_of(BUDDIES, verify_every=1) as engine:
        half_way(engine)
        real = BatchGraph.finish

        def finish(graph: BatchGraph) -> np.ndarray:
            logits = real(graph)
            if engine._planner is not None and engine._planner.is_exact:
                logits[7] = np.nan
            return logits

        with monkeypatch.context() as m, pytest.raises(ModelError, match="no numbers"):
            m.setattr(BatchGraph, "finish", finish)
            decode(engine, 901)
        assert engine.snapshot().n_verified == 0 and engine.n_past == len(PROMPT) + len(NEXT) + 1
        assert np.isfinite(decode(engine, 902)).all()


def test_a_number_of_tokens_below_0_is_refused() -> None:
    with pytest.raises(BuddyrunError, match="--verify-every -1: expected 0 to"):
        Engine(DEMO, replace(BUDDIES, verify_every=-1))


# what is told


def test_the_meter_watches_answers_and_not_other_decoding() -> None:
    with engine_of(BUDDIES) as engine:
        half_way(engine)
        assert engine.snapshot().output_entropy == 0.0
        answer(engine, 140)
        now = engine.snapshot()
        assert 0.1 < now.output_entropy < math.log(engine.model_config.n_vocab)
        assert 0.0 < now.standin_share <= 0.3 and now.buddy_budget == 0.3
        assert now.standin_share == engine.buddies.policy.budget.spent_share  # type: ignore[union-attr]
    with engine_of(EXACTLY) as engine:
        answer(engine, 5)
        now = engine.snapshot()
        assert now.output_entropy > 0 and (now.standin_share, now.buddy_budget) == (0.0, 0.0)


def test_states_are_not_subtracted_from_each_other() -> None:
    with engine_of(BUDDIES, verify_every=4) as engine:
        answer(engine, 20)
        now = engine.snapshot()
        nothing: StatsSnapshot = now.counted_since(now)
    for name in ("output_entropy", "repeated_4grams", "standin_share", "buddy_budget"):
        assert getattr(nothing, name) == getattr(now, name)
    assert nothing.verified_kl_max == now.verified_kl_max
    assert (nothing.n_verified, nothing.verified_kl, nothing.verified_agreement) == (0, 0.0, 0.0)
    assert nothing.verify_s == 0.0


def test_an_answers_result_says_what_was_verified_in_it() -> None:
    request = GenerateRequest(prompt="The", n_predict=30, sampling=SamplingConfig(temperature=0))
    emitted: list[TextPiece | PromptProgress] = []

    def result(config: EngineConfig, n_answers: int = 1) -> GenerateResult:
        with closing(Session()) as session:
            session.load(str(DEMO), config, None, lambda *_: None, lambda: False)
            for _ in range(n_answers):
                found = session.generate(request, emitted.append, lambda: False)
        return found

    for n_answers in (1, 2):
        found = result(replace(ALL_GIVEN, verify_every=5), n_answers)
        assert found.has_buddies and found.n_verified in (5, 6)  # of 29 steps
        assert found.verified_kl > 0 and 0 <= found.verified_agreement <= 1
    plain = result(EXACTLY)
    assert (plain.has_buddies, plain.n_verified, plain.verified_kl) == (False, 0, 0.0)
