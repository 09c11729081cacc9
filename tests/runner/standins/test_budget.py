"""The share of the router's weight that stand-ins carry stays under the budget, and is used."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from runner.standins.budget import WINDOW, Budget, Opening

Wants = Callable[[int, int], np.ndarray]
"""layer, n_routed -> the weight that each of these tokens would give away, (n_routed,), 0 to 1."""


class Ledger:
    """Drives a budget as a model does, spends all that is allowed, and keeps its own books."""

    def __init__(self, share: float, n_layer: int) -> None:
        self.budget = Budget(share, n_layer)
        self.n_layer = n_layer
        self.weight: list[int] = []  # of each token that was finished
        self.spent: list[float] = []
        self.wanted: list[float] = []

    def batch(self, n_tokens: int, wants: Wants, is_finished: bool = True) -> None:
        spent, wanted, weight = np.zeros(n_tokens), np.zeros(n_tokens), np.zeros(n_tokens, int)
        self.budget.begin(n_tokens)
        for layer in range(self.n_layer):
            n_routed = n_tokens if layer < self.n_layer - 1 else 1
            want = wants(layer, n_routed)
            weight[n_tokens - n_routed :] += 1
            wanted[n_tokens - n_routed :] += want
            if want.any():
                taken = affordable(want, self.budget.allowance(layer, n_routed))
                self.budget.spend(taken)
                spent[n_tokens - n_routed :] += taken
        if is_finished:
            self.budget.end()
            self.weight += weight.tolist()
            self.spent += spent.tolist()
            self.wanted += wanted.tolist()

    def windows(self) -> tuple[np.ndarray, np.ndarray]:
        """Substituted and all weight of every token's window, the latest 256 up to it."""
        starts = np.maximum(0, np.arange(1, len(self.spent) + 1) - WINDOW)
        totals = [
            np.concatenate([[0.0], np.cumsum(values)]) for values in (self.spent, self.weight)
        ]
        spent, weight = (total[1:] - total[starts] for total in totals)
        return spent, weight

    def keeps(self, share: float) -> bool:
        """Whether no window has spent more."""
        spent, weight = self.windows()
        return bool((spent <= share * weight + 1e-9).all())


def affordable(want: np.ndarray, allowance: np.ndarray) -> np.ndarray:
    """As much as is allowed of what each token wants, in the tokens' order."""
    assert allowance.shape == want.shape
    bounds = np.minimum.accumulate(allowance[::-1])[::-1]
    taken, spent = np.zeros(len(want)), 0.0
    for token, (most, bound) in enumerate(zip(want.tolist(), bounds.tolist(), strict=True)):
        taken[token] = min(most, max(0.0, bound - spent))
        spent += taken[token]
    return taken


def everything(layer: int, n_routed: int) -> np.ndarray:
    return np.ones(n_routed)


def nothing(layer: int, n_routed: int) -> np.ndarray:
    return np.zeros(n_routed)


# on paper


def allowed(budget: Budget, layer: int, n_routed: int = 1) -> list[float]:
    return [round(float(a), 9) for a in budget.allowance(layer, n_routed)]


def test_each_layer_of_a_token_has_the_same_share_and_what_the_ones_before_left() -> None:
    budget = Budget(0.1, n_layer=4)
    budget.begin(1)
    assert allowed(budget, 0) == [0.1]
    budget.spend(np.array([0.04]))
    assert allowed(budget, 1) == [0.16]
    assert allowed(budget, 3) == [0.36]
    budget.spend(np.array([0.36]))
    assert allowed(budget, 3) == [0.0]


def test_a_token_has_what_the_tokens_before_it_left_but_for_their_last_layers() -> None:
    budget = Budget(0.1, n_layer=4)
    for spent in (0.0, 0.2):
        budget.begin(1)
        budget.spend(np.array([spent]))
        budget.end()
    budget.begin(1)
    # .3 of the first one, which did not spend its last layer's .1, .4 - .2 of the second, own .1
    assert allowed(budget, 0) == [0.6]


def test_tokens_of_a_batch_share_what_there_is() -> None:
    budget = Budget(0.1, n_layer=3)
    budget.begin(3)
    assert allowed(budget, 0, 3) == [0.1, 0.2, 0.3]
    budget.spend(np.array([0.0, 0.15, 0.0]))
    assert allowed(budget, 1, 3) == [0.2, 0.25, 0.45]


def test_in_the_last_layer_only_the_last_token_of_a_batch_spends() -> None:
    budget = Budget(0.1, n_layer=3)
    budget.begin(3)
    budget.spend(np.array([0.0, 0.15, 0.0]))
    assert allowed(budget, 2, 1) == [0.55]  # 3 * 2 * .1 and .1 for itself, less .15
    budget.spend(np.array([0.5]))
    budget.end()
    assert budget.spent_share == pytest.approx(0.65 / 7)  # two layers, two and three
    assert Budget(0.1, n_layer=3).spent_share == 0.0


def test_of_a_batch_longer_than_the_window_only_so_much_may_be_spent() -> None:
    budget = Budget(0.01, n_layer=2)
    budget.begin(WINDOW + 100)
    assert budget.allowance(0, WINDOW + 100)[[0, WINDOW - 1, -1]] == pytest.approx(
        [0.01, 2.56, 2.56]
    )


def test_what_left_the_window_is_forgotten() -> None:
    ledger = Ledger(0.1, n_layer=2)
    for _ in range(WINDOW):
        ledger.batch(1, everything)
    assert ledger.budget.spent_share == pytest.approx(0.1)
    for _ in range(WINDOW - 1):
        ledger.batch(1, nothing)
    assert ledger.budget.spent_share == pytest.approx(ledger.spent[WINDOW - 1] / WINDOW / 2)
    ledger.batch(1, nothing)
    assert ledger.budget.spent_share == 0.0


def test_a_part_of_a_batchs_weight() -> None:
    budget = Budget(0.1, n_layer=4)
    budget.begin(1)
    assert budget.share_of(1.0) == 0.25
    budget.begin(3)
    assert budget.share_of(1.0) == 0.1  # of three layers of three tokens and the last one's


def test_a_batch_that_was_not_finished_is_forgotten() -> None:
    ledger, other = Ledger(0.1, n_layer=3), Ledger(0.1, n_layer=3)
    for n_tokens in (1, 7, 300):
        ledger.batch(n_tokens, everything, is_finished=False)
        for n_next in (5, 1):
            ledger.batch(n_next, everything)
            other.batch(n_next, everything)
        assert ledger.spent == other.spent and sum(ledger.spent) > 0
        assert ledger.budget.spent_share == other.budget.spent_share


# over every window


def some_wants(rng: np.random.Generator) -> Wants:
    """Of a batch: nothing, everything, or something by chance."""
    how_much = rng.choice([0.0, 0.0, 0.03, 0.2, 1.0, 9.0])
    return lambda layer, n: np.minimum(1.0, how_much * rng.random(n))


@pytest.mark.parametrize("share", [0.01, 0.08, 0.5, 1.0])
@pytest.mark.parametrize("n_layer", [1, 2, 5])
def test_no_window_ever_spends_more_than_the_budget(share: float, n_layer: int) -> None:
    rng = np.random.default_rng(round(1000 * share) + n_layer)
    for longest in (3, 40, 300 if share < 1.0 else WINDOW):
        ledger = Ledger(share, n_layer)
        while len(ledger.spent) < 700:
            wants, n_tokens = some_wants(rng), int(rng.integers(1, longest + 1))
            for _ in range(int(rng.integers(1, 150)) if n_tokens < 4 else 1):
                ledger.batch(n_tokens, wants, is_finished=bool(rng.random() < 0.9))
            spent, weight = ledger.windows()
            if ledger.weight and weight[-1]:
                assert ledger.budget.spent_share == pytest.approx(spent[-1] / weight[-1])
        assert sum(ledger.spent) > 0
        assert ledger.keeps(share)
        if share == 1.0:
            assert ledger.spent == pytest.approx(ledger.wanted), "a budget of 1 limits nothing"


@pytest.mark.parametrize("n_layer", [1, 2, 8])
def test_a_prompt_after_late_spending_does_not_break_the_budget(n_layer: int) -> None:
    """All that a window may spend goes to its latest 56 tokens; then a prompt's tokens, which have
    no last layer, push out the 200 that had one."""
    ledger = Ledger(0.05, n_layer)
    for n, wants in ((200, nothing), (56, everything)):
        for _ in range(n):
            ledger.batch(1, wants)
    spent, _ = ledger.windows()
    assert spent[-1] == pytest.approx(0.05 * ((n_layer - 1) * WINDOW + 56))
    for n_tokens in (150, 1, 1, 80):
        ledger.batch(n_tokens, nothing)
    assert ledger.keeps(0.05)


@pytest.mark.parametrize("n_tokens", [1, 32, WINDOW])
@pytest.mark.parametrize("share", [0.02, 0.3])
def test_who_wants_everything_gets_the_whole_budget(share: float, n_tokens: int) -> None:
    ledger = Ledger(share, n_layer=8)
    while len(ledger.spent) < 3 * WINDOW:
        ledger.batch(n_tokens, everything)
    spent, weight = ledger.windows()
    assert (spent / weight)[WINDOW - 1 :: n_tokens].min() >= 0.99 * share
    assert ledger.keeps(share)


# the opening


Demand = Callable[[float], float]
DEMANDS: dict[str, Demand] = {
    "proportional": lambda opening: 0.6 * opening,
    "square": lambda opening: opening**2,
    "late": lambda opening: 1 / (1 + math.exp(-20 * (opening - 0.7))),
    "steep": lambda opening: min(1.0, 8 * opening**4),
}


def settled(opening: Opening, demand: Demand, n_batches: int, n_tokens: int = 1) -> float:
    """The mean of what was wanted in the second half."""
    wanted = []
    for _ in range(n_batches):
        wanted.append(demand(opening.value))
        opening.follow(wanted[-1], n_tokens)
    return float(np.mean(wanted[n_batches // 2 :]))


@pytest.mark.parametrize("start", [0.0, 0.001, 0.2, 1.0])
@pytest.mark.parametrize("share", [0.01, 0.08, 0.5])
@pytest.mark.parametrize("name", DEMANDS)
def test_the_opening_finds_where_the_budget_is_just_used(
    name: str, share: float, start: float
) -> None:
    opening = Opening(share, start)
    assert settled(opening, DEMANDS[name], 1500) == pytest.approx(share, rel=0.02)
    assert 0.001 <= opening.value <= 1.0


def test_a_noisy_demand_is_met_on_average() -> None:
    rng = np.random.default_rng(4)
    opening = Opening(0.05, 1.0)
    assert settled(opening, lambda value: rng.choice([0.0, 2 * value**2]), 6000) == pytest.approx(
        0.05, rel=0.1
    )


def test_the_opening_follows_a_text_that_changes() -> None:
    opening = Opening(0.05, 0.2)
    for factor in (0.3, 3.0, 0.06):
        demand = lambda value, factor=factor: factor * value  # noqa: E731
        assert settled(opening, demand, 800) == pytest.approx(0.05, rel=0.02)


def test_a_demand_that_is_below_or_above_the_budget_anyhow_opens_and_closes_it() -> None:
    opening = Opening(0.5, 0.1)
    settled(opening, lambda value: 0.4, 2000)
    assert opening.value == 1.0
    settled(opening, lambda value: 0.6, 4000)
    assert opening.value == 0.001


def test_a_long_batch_counts_for_a_few_tokens() -> None:
    lone, batch, longer = (Opening(0.1, 0.3) for _ in range(3))
    for _ in range(8):
        lone.follow(0.05, 1)
    batch.follow(0.05, 8)
    longer.follow(0.05, 512)
    assert lone.value == pytest.approx(batch.value) and longer.value == batch.value > 0.3


def test_one_token_that_wants_far_too_much_does_not_close_it() -> None:
    opening = Opening(0.01, 0.5)
    opening.follow(1.0, 1)
    assert 0.4 < opening.value < 0.5


@pytest.mark.parametrize("start", [0.0, 0.3])
def test_without_a_limit_it_is_open(start: float) -> None:
    opening = Opening(1.0, start)
    opening.follow(1.0, 100)
    opening.follow(0.0, 100)
    assert opening.value == 1.0
