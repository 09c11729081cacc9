"""What policies would cost: known on paper, and by a second simulation that shares no code."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from runner.buddies import BuddyTable, PolicyEstimate
from runner.errors import CancelledError
from runner.profiling import estimates as module
from runner.profiling import statistics
from runner.profiling.estimates import BUDGETS, N_TOKENS, POLICIES, LayerRouting, estimate
from runner.profiling.statistics import LayerRecord
from runner.standins import buddymoe
from tests.runner.standins.routings import softmax

A, B, C, D = range(4)
HALF_LIFE = 64  # tokens


def no_report(done: int, total: int) -> None:
    pass


def table_of(layers: Sequence[LayerRouting], power: Sequence[float]) -> BuddyTable:
    """The profile of these records."""
    n_expert = layers[0].scores.shape[1]
    records = [
        LayerRecord(
            layer.expert_ids[layer.sampled],
            layer.weights[layer.sampled],
            layer.scores[layer.sampled],
            layer.gram,
        )
        for layer in layers
    ]
    standing_in = [statistics.standing_in(record) for record in records]
    return BuddyTable(
        "ab" * 32,
        len(layers[0].expert_ids),
        np.stack([statistics.uses(layer.expert_ids, n_expert) for layer in layers]),
        np.stack([buddymoe.coactivation(layer.expert_ids, n_expert) for layer in layers]),
        np.stack([scale for scale, _ in standing_in]),
        np.stack([error for _, error in standing_in]),
        np.stack([statistics.tae_percentiles(x.scores, x.expert_ids) for x in layers]),
        np.stack([statistics.mean_gram(record) for record in records]),
        np.array(power, np.float32),
    )


def found_of(
    estimates: Sequence[PolicyEstimate], policy: str, n_slots: int, budget: float = 1.0
) -> PolicyEstimate:
    key = policy, n_slots, budget
    (found,) = [e for e in estimates if (e.policy, e.n_slots, e.budget) == key]
    return found


# on paper


def routing_of(
    tokens: Sequence[Sequence[float]], gram: Sequence[Sequence[float]], sampled: Sequence[int]
) -> LayerRouting:
    """Tokens by what their scores' softmax is proportional to, of which the best two are used;
    the experts' outputs have the same products in every sampled token."""
    scores = np.log(np.array(tokens)).astype(np.float32)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :2].astype(np.int32)
    weights = softmax(np.take_along_axis(scores, ids, axis=1)).astype(np.float32)
    grams = np.stack([np.array(gram, np.float32)] * len(sampled))
    return LayerRouting(ids, weights, scores, np.array(sampled), grams)


USES_B, USES_C = (6, 4, 2, 1), (6, 3, 4, 1)  # both use A
GRAM = [[1, 0, 0, 0], [0, 1, 0.5, 0], [0, 0.5, 4, 0], [0, 0, 0, 1]]


def two_of_four(n: int = 40, every: int = 1) -> tuple[PolicyEstimate, ...]:
    """Tokens that use A and in turn B and C."""
    layer = routing_of([USES_B, USES_C] * (n // 2), GRAM, range(0, n, every))
    return estimate([layer], table_of([layer], [2.0]), no_report)


def test_the_harm_of_a_stand_in_is_the_change_of_the_layers_output() -> None:
    """With two slots A and B stay: C's weight of .4 goes to B, every second token.

    The output changes by .4 C - .4 B, of which the square is .16 * (4 + 1 - 2 * .5) = .64; of a
    residual stream of power 2 that is .32.
    """
    found = found_of(two_of_four(), "router", 2)
    assert found.harm == pytest.approx(0.32 / 2)
    assert found.miss_share == 0.0 and found.opening == 1.0


def test_a_selection_made_anew_changes_all_weights() -> None:
    """A and B have 6 / 9 and 3 / 9 then, so .0667 more of A, .3333 of B and .4 less of C."""
    change = np.array([0.6 - 6 / 9, -3 / 9, 0.4, 0])
    harm = change @ np.array(GRAM) @ change / 2.0
    assert found_of(two_of_four(), "prior", 2).harm == pytest.approx(harm / 2)


def test_where_everything_that_is_used_has_a_slot_nothing_is_missing() -> None:
    estimates = [e for e in two_of_four() if e.n_slots == 3]
    assert len(estimates) == len(POLICIES) * len(BUDGETS)
    assert {(e.harm, e.miss_share) for e in estimates} == {(0.0, 0.0)}


def test_the_harm_is_a_mean_over_the_sampled_tokens() -> None:
    assert found_of(two_of_four(every=3), "router", 2).harm == pytest.approx(0.32 / 2, rel=0.15)
    only_c = routing_of([USES_B, USES_C] * 20, GRAM, range(1, 40, 2))
    harm = found_of(estimate([only_c], table_of([only_c], [2.0]), no_report), "router", 2).harm
    assert harm == pytest.approx(0.32)
    early = routing_of([USES_B, USES_C] * 20, GRAM, range(20))  # before slots are settled
    harm = found_of(estimate([early], table_of([early], [2.0]), no_report), "router", 2).harm
    assert harm == 0.0


def test_the_harms_of_layers_add_up() -> None:
    layers = [routing_of([USES_B, USES_C] * 20, GRAM, range(40))] * 2
    found = found_of(estimate(layers, table_of(layers, [2.0, 0.5]), no_report), "router", 2)
    assert found.harm == pytest.approx((0.32 + 1.28) / 2)


def test_a_protected_first_choice_that_is_missing_is_read() -> None:
    """A and C are used, then B and D. C stands in for D and stays; A and B push out each other."""
    layer = routing_of([(6, 1, 3, 1.5), (1, 6, 1.5, 3)] * 20, GRAM, range(40))
    found = estimate([layer], table_of([layer], [1.0]), no_report)
    assert found_of(found, "router", 2).miss_share == 0.5


@pytest.mark.parametrize("n_used", [2, 4])
def test_the_slots_are_quarters_of_the_experts_but_for_what_a_token_needs(n_used: int) -> None:
    layers = random_layers(n_layer=1, n_tokens=20, n_used=n_used)
    estimates = estimate(layers, table_of(layers, [1.0]), no_report)
    slots = {2: [2, 4, 6], 4: [4, 6]}[n_used]
    keys = [(n, policy, budget) for n in slots for policy in POLICIES for budget in BUDGETS]
    assert [(e.n_slots, e.policy, e.budget) for e in estimates] == keys


def test_where_a_token_uses_all_experts_nothing_is_estimated() -> None:
    layers = random_layers(n_layer=1, n_tokens=20, n_used=8)
    assert estimate(layers, table_of(layers, [1.0]), no_report) == ()


# random routing


def random_layers(
    n_layer: int = 2, n_tokens: int = 200, n_used: int = 2, n_expert: int = 8, seed: int = 1
) -> list[LayerRouting]:
    """Tokens with likings that change slowly, so that a cache helps."""
    rng = np.random.default_rng(seed)
    sampled = np.arange(0, n_tokens, 3)
    layers = []
    for _ in range(n_layer):
        likings = [rng.standard_normal(n_expert)]
        while len(likings) < n_tokens:
            likings.append(0.95 * likings[-1] + 0.3 * rng.standard_normal(n_expert))
        scores = (likings + rng.standard_normal((n_tokens, n_expert))).astype(np.float32)
        ids = np.argsort(-scores, axis=1, kind="stable")[:, :n_used].astype(np.int32)
        weights = softmax(np.take_along_axis(scores, ids, axis=1)).astype(np.float32)
        common = rng.standard_normal((len(sampled), 1, 12))
        outputs = common + rng.standard_normal((len(sampled), n_expert, 12))
        gram = np.einsum("tid,tjd->tij", outputs, outputs).astype(np.float32)
        layers.append(LayerRouting(ids, weights, scores, sampled, gram))
    return layers


def simulate_router(
    layers: Sequence[LayerRouting], power: Sequence[float], n_slots: int, min_rank: int = 2
) -> tuple[float, float]:
    """Harm and share of misses of the policy `router` without a limit, told plainly."""
    n_tokens = len(layers[0].expert_ids)
    settled = min(128, n_tokens // 2)
    slots: list[dict[int, float]] = [{} for _ in layers]  # expert -> nothing, but in order
    uses: list[dict[int, float]] = [{} for _ in layers]
    harm, n_missed, n_pairs, n_judged = 0.0, 0, 0, 0
    for token in range(n_tokens):
        places = np.flatnonzero(layers[0].sampled == token)
        is_judged = token >= settled and len(places) > 0
        n_judged += is_judged
        for i, layer in enumerate(layers):
            chosen, there = layer.expert_ids[token].tolist(), slots[i]
            for expert in chosen:
                uses[i][expert] = uses[i].get(expert, 0.0) + 2 ** (token / HALF_LIFE)
            change = dict.fromkeys(range(8), 0.0)
            used = []
            for rank, expert in enumerate(chosen, start=1):
                weight = float(layer.weights[token, rank - 1])
                free = [e for e in there if e not in chosen and e not in used]
                if expert in there or rank < min_rank or len(there) < n_slots or not free:
                    used.append(expert)
                    continue
                stand_in = max(free, key=lambda e: layer.scores[token, e])
                used.append(stand_in)
                change[expert] += weight
                change[stand_in] -= weight
            for expert in used:
                if expert not in there:
                    n_missed += token >= settled
                    if len(there) == n_slots:
                        able = [e for e in there if e not in used]
                        del there[min(able, key=lambda e: uses[i].get(e, 0.0))]
                    there[expert] = 0.0
            n_pairs += len(chosen) * (token >= settled)
            if is_judged:
                c = np.array(list(change.values()))
                harm += float(c @ layer.gram[places[0]] @ c) / power[i]
    return harm / n_judged, n_missed / n_pairs


@pytest.fixture(scope="module")
def layers() -> list[LayerRouting]:
    return random_layers()


@pytest.fixture(scope="module")
def estimates(layers: list[LayerRouting]) -> tuple[PolicyEstimate, ...]:
    return estimate(layers, table_of(layers, [30.0, 50.0]), no_report)


@pytest.mark.parametrize("n_slots", [2, 4, 6])
def test_a_simulation_of_its_own_finds_the_same(
    n_slots: int, layers: list[LayerRouting], estimates: tuple[PolicyEstimate, ...]
) -> None:
    found = found_of(estimates, "router", n_slots)
    harm, miss_share = simulate_router(layers, [30.0, 50.0], n_slots)
    assert found.miss_share == pytest.approx(miss_share)
    assert found.harm == pytest.approx(harm, rel=1e-5) and harm > 0


def test_openings_are_as_wide_as_the_budget_lets_them(
    estimates: tuple[PolicyEstimate, ...],
) -> None:
    for e in estimates:
        assert 0.001 <= e.opening <= 1.0
        assert e.opening == 1.0 or e.budget < 1.0
        assert e.harm >= 0 and 0 <= e.miss_share <= 1 and math.isfinite(e.harm)
    for policy in POLICIES:
        for n_slots in (2, 4, 6):
            openings = [found_of(estimates, policy, n_slots, b).opening for b in BUDGETS]
            assert openings == sorted(openings)
            assert openings[0] < openings[1] and len(set(openings)) >= 3


def test_a_larger_budget_saves_misses_and_does_more_harm(
    estimates: tuple[PolicyEstimate, ...],
) -> None:
    for policy in POLICIES:
        for n_slots in (2, 4):
            little, much = (found_of(estimates, policy, n_slots, b) for b in (0.02, 1.0))
            assert little.harm < much.harm and little.miss_share > much.miss_share


def test_experts_with_much_in_common_do_less_harm_and_twins_none_at_all() -> None:
    """`similar` and `blend` find twins; the router's scores do not know of them."""
    (layer,) = random_layers(n_layer=1, n_tokens=100)
    rng = np.random.default_rng(2)
    outputs = np.repeat(rng.standard_normal((len(layer.sampled), 4, 12)), 2, axis=1)  # pairs
    twins = replace(layer, gram=np.einsum("tid,tjd->tij", outputs, outputs).astype(np.float32))
    found = estimate([twins], table_of([twins], [30.0]), no_report)
    for n_slots in (4, 6):
        for policy in ("similar", "blend"):
            assert (
                found_of(found, policy, n_slots).harm
                < 0.7 * found_of(found, "router", n_slots).harm
            )


def test_only_the_first_tokens_are_served_again() -> None:
    (long,) = random_layers(n_layer=1, n_tokens=N_TOKENS + 50)
    sampled = long.sampled < N_TOKENS
    short = LayerRouting(
        long.expert_ids[:N_TOKENS],
        long.weights[:N_TOKENS],
        long.scores[:N_TOKENS],
        long.sampled[sampled],
        long.gram[sampled],
    )
    table = table_of([short], [30.0])
    assert first_estimate(long, table) == first_estimate(short, table)


def first_estimate(layer: LayerRouting, table: BuddyTable) -> PolicyEstimate:
    """The others are not made."""

    def stop(done: int, total: int) -> None:
        if done == 1:
            raise CancelledError

    found: list[PolicyEstimate] = []
    with pytest.MonkeyPatch.context() as m, pytest.raises(CancelledError):
        real = module._Simulation.run

        def keep(simulation: object) -> PolicyEstimate:
            found.append(real(simulation))  # type: ignore[arg-type]
            return found[-1]

        m.setattr(module._Simulation, "run", keep)
        module.estimate([layer], table, stop)
    return found[0]


# progress


def test_progress_is_told_before_each_and_an_error_ends_it_at_once() -> None:
    layers = random_layers(n_layer=1, n_tokens=20)
    table = table_of(layers, [1.0])
    told: list[tuple[int, int]] = []
    found = estimate(layers, table, lambda *done: told.append(done))
    assert told == [(number, len(found)) for number in range(len(found))]

    def cancel(done: int, total: int) -> None:
        told.append((done, total))
        if done == 5:
            raise CancelledError

    told.clear()
    with pytest.raises(CancelledError):
        estimate(layers, table, cancel)
    assert [done for done, _ in told] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("n_tokens", [1, 2, 3])
def test_a_text_of_a_few_tokens_has_estimates_too(n_tokens: int) -> None:
    layers = random_layers(n_layer=2, n_tokens=n_tokens)
    for e in estimate(layers, table_of(layers, [1.0, 1.0]), no_report):
        assert math.isfinite(e.harm) and 0 <= e.miss_share <= 1 and 0 < e.opening <= 1
