"""What happened to every expert of every layer: counted by the engine, frozen for a snapshot.

Knows neither cache nor policy: it is told which experts a router chose and who computed the pairs.
"""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the terminal reads counts, and needs no numpy for that
    from runner.miss_policy import RoutingPlan

N_BUDDIES = 3  # of each missing expert, the most frequent: what a snapshot names
_MANY_EXPERTS = 1024  # of all layers; of so many only the most frequent one is named
_DROPPED = -1

Grid = tuple[tuple[int, ...], ...]  # (n_layer, n_expert)


@dataclass(frozen=True)
class ExpertCounts:
    """Counts since the model was loaded, (n_layer, n_expert); all layers with experts."""

    used: Grid  # pairs that the router chose the expert for
    missed: Grid  # of these, pairs that it did not compute from a slot it was in already
    substituted: Grid  # of these, pairs that another expert computed, or none
    stood_in: Grid  # pairs that it computed for another
    loaded: Grid  # reads of it into a slot
    buddies: tuple[tuple[int, int, int, int], ...]
    """(layer, missing expert, its stand-in or -1 for none, pairs): of every missing expert the
    N_BUDDIES most frequent, or the first of a model with very many experts; in the order of layers,
    experts and falling counts."""


class ExpertCounter:
    """Counts; one thread at a time writes and reads."""

    def __init__(self, n_layer: int, n_expert: int) -> None:
        self._n_buddies = N_BUDDIES if n_layer * n_expert <= _MANY_EXPERTS else 1
        self._used = _zeros(n_layer, n_expert)
        self._missed = _zeros(n_layer, n_expert)
        self._substituted = _zeros(n_layer, n_expert)
        self._stood_in = _zeros(n_layer, n_expert)
        self._loaded = _zeros(n_layer, n_expert)
        self._standins: dict[tuple[int, int], Counter[int]] = {}  # by layer and missing expert
        self._named: dict[tuple[int, int], tuple[tuple[int, int, int, int], ...]] = {}
        self._changed: set[tuple[int, int]] = set()  # of these, not up to date

    def record_plan(self, layer: int, plan: "RoutingPlan") -> None:
        """Count a layer's pairs, those of a finished batch."""
        if len(plan.experts) == 1:
            self._record_token(layer, plan)
            return
        chosen = plan.experts if plan.chosen is None else plan.chosen
        pairs = zip(chosen.ravel().tolist(), plan.experts.ravel().tolist(), strict=True)
        missing = {*plan.loads, *plan.on_host}
        for (expert, by), n in Counter(pairs).items():
            self._used[layer][expert] += n
            if by != expert:
                self._record_standin(layer, expert, by, n)
            elif expert in missing:
                self._missed[layer][expert] += n

    def _record_token(self, layer: int, plan: "RoutingPlan") -> None:
        """The same, without what only many pairs are worth: every token of an answer passes."""
        used, experts = self._used[layer], plan.experts[0].tolist()
        chosen = experts
        if plan.chosen is not None and plan.chosen is not plan.experts:
            chosen = plan.chosen[0].tolist()
        for expert in chosen:
            used[expert] += 1
        if plan.chosen is None:  # every pair was a hit
            return
        for rank, expert in enumerate(chosen):
            if experts[rank] != expert:
                self._record_standin(layer, expert, experts[rank], 1)
            elif expert in plan.loads or expert in plan.on_host:
                self._missed[layer][expert] += 1

    def record_load(self, layer: int, expert: int) -> None:
        """Count a read of an expert into a slot."""
        self._loaded[layer][expert] += 1

    def counts(self) -> ExpertCounts:
        """What was counted so far."""
        for cell in self._changed:
            self._named[cell] = tuple(
                (*cell, by, n) for by, n in self._standins[cell].most_common(self._n_buddies)
            )
        self._changed.clear()
        return ExpertCounts(
            used=_frozen(self._used),
            missed=_frozen(self._missed),
            substituted=_frozen(self._substituted),
            stood_in=_frozen(self._stood_in),
            loaded=_frozen(self._loaded),
            buddies=tuple(row for cell in sorted(self._named) for row in self._named[cell]),
        )

    def _record_standin(self, layer: int, expert: int, by: int, n: int) -> None:
        self._missed[layer][expert] += n
        self._substituted[layer][expert] += n
        if by != _DROPPED:
            self._stood_in[layer][by] += n
        cell = layer, expert
        standins = self._standins.get(cell)
        if standins is None:
            standins = self._standins[cell] = Counter()
        standins[by] += n
        self._changed.add(cell)


def _zeros(n_layer: int, n_expert: int) -> list[list[int]]:
    return [[0] * n_expert for _ in range(n_layer)]


def _frozen(grid: list[list[int]]) -> Grid:
    return tuple(map(tuple, grid))
