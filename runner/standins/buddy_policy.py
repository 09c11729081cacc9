"""The policy of one run: who stands in for missing experts, within the budget. Owns the budget.

Which pairs are given away is a pure function in `miss_policy`; here it gets its parameters, which
follow the budget. Knows no cache and no ggml.
"""

from collections.abc import Callable

import numpy as np

from runner.miss_policy import Choice, Gate, Routing
from runner.standins.budget import Budget, Opening

Choose = Callable[[int, Routing, Gate, float], Choice]  # layer, routing, gate, opening


class BuddyPolicy:
    """Chooses for one batch after the other, layer by layer; an engine's thread drives it."""

    def __init__(
        self, name: str, choose: Choose, budget: Budget, opening: Opening, min_rank: int
    ) -> None:
        """min_rank: the best rank, counted from 1, that may be given away."""
        self.name = name
        self.budget = budget
        self.opening = opening
        self._choose = choose
        self._min_rank = min_rank
        self._gate = Gate(min_rank=min_rank)  # without a budget
        self._n_tokens = 0
        self._wanted = 0.0  # router weight that the last choice would give away without a budget
        self._priced: tuple[Choice, np.ndarray] | None = None  # the last choice and its cost
        self._demand = 0.0  # the same of the batch so far

    @property
    def is_bounded(self) -> bool:
        """Whether misses may have to be exact because the budget is used up."""
        return self.budget.share < 1.0

    @property
    def takes_every_miss(self) -> bool:
        """Whether any pair may be given away, whatever its rank and what was spent."""
        return not self.is_bounded and self._min_rank == 1

    @property
    def is_restriction(self) -> bool:
        """Whether it does nothing but restrict the router to residents, always."""
        return self.name == "resident" and self.takes_every_miss

    def begin(self, n_tokens: int) -> None:
        """A batch comes."""
        self._n_tokens = n_tokens
        self._demand = 0.0
        self.budget.begin(n_tokens)

    def choose(self, layer: int, routing: Routing) -> Choice:
        """Who computes the layer's pairs; counts nothing."""
        choice = self._choose(layer, routing, self._gate, self.opening.value)
        cost = _given_weight(routing, choice)
        if cost is None:
            self._wanted = 0.0
            return choice
        self._wanted = float(cost[0]) if len(cost) == 1 else float(cost.sum())
        self._priced = choice, cost
        if not self.is_bounded:
            return choice
        allowance = self.budget.allowance(layer, len(cost))
        if (cost.cumsum() <= allowance).all():
            return choice
        gate = Gate(min_rank=self._min_rank, allowance=allowance)
        return self._choose(layer, routing, gate, self.opening.value)

    def spend(self, routing: Routing, choice: Choice) -> None:
        """Count what was chosen; once for every layer of the batch that misses something."""
        self._demand += self._wanted
        if self._priced is not None and self._priced[0] is choice:
            cost: np.ndarray | None = self._priced[1]
        else:
            cost = _given_weight(routing, choice)
        if cost is not None:
            self.budget.spend(cost)

    def end(self) -> None:
        """The batch is finished."""
        self.budget.end()
        self.opening.follow(self.budget.share_of(self._demand), self._n_tokens)


def _given_weight(routing: Routing, choice: Choice) -> np.ndarray | None:
    """The router's weight that others than it chose got, of each token; None = none at all."""
    if choice.experts is routing.expert_ids:
        return None
    if len(choice.experts) == 1:  # the usual case, without numpy's cost per call
        lone = 0.0
        chosen, weights = routing.expert_ids[0].tolist(), routing.weights[0].tolist()
        for rank, expert in enumerate(choice.experts[0].tolist()):
            if expert != chosen[rank]:
                lone += weights[rank]
        return np.array([lone])
    given = choice.experts != routing.expert_ids
    weight: np.ndarray = (routing.weights * given).sum(axis=1, dtype=np.float64)
    return weight
