"""Watches an engine whose missing experts may be stood in for: what was planned, what was computed.

Every pair must be computed once, by a slot that holds the planned expert at that moment, with the
planned weight. What the engine counts can be compared with what is written down here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from runner.batch_graph import BatchGraph
from runner.engine import Engine
from runner.expert_pass import Numbers
from runner.miss_policy import DROPPED, RoutingPlan
from runner.residency import Residency
from runner.stats import StatsSnapshot

WAYS = ("hit", "loaded", "on_host", "substituted", "dropped")


@dataclass
class Served:
    """One layer's pairs of one batch."""

    layer: int
    chosen: np.ndarray  # (n, n_expert_used), by the router
    router_weights: np.ndarray
    is_resident: np.ndarray  # (n_expert,), before anything was read
    plan: RoutingPlan  # experts may be DROPPED
    n_computed: np.ndarray  # (n, n_expert_used), how often each pair was

    @property
    def given(self) -> np.ndarray:
        """The pairs of which others than the chosen experts, or nobody, took care."""
        given: np.ndarray = self.plan.experts != self.chosen
        return given

    @property
    def weights(self) -> np.ndarray:
        return self.router_weights if self.plan.weights is None else self.plan.weights

    def ways(self) -> dict[str, np.ndarray]:
        """Which pairs are served how."""
        kept, is_there = ~self.given, self.is_resident[self.chosen]
        is_hosted = np.isin(self.chosen, self.plan.on_host)
        return {
            "hit": kept & is_there,
            "loaded": kept & ~is_there & ~is_hosted,
            "on_host": kept & ~is_there & is_hosted,
            "substituted": self.given & (self.plan.experts != DROPPED),
            "dropped": self.given & (self.plan.experts == DROPPED),
        }


@dataclass
class Books:
    """The batches that were finished: their tokens, and what each layer did."""

    engine: Engine
    batches: list[tuple[int, list[Served]]] = field(default_factory=list)
    open: list[Served] = field(default_factory=list)
    n_tokens: int = 0  # of the open batch

    @property
    def served(self) -> list[Served]:
        return [served for _, layers in self.batches for served in layers]

    def spent_and_weight(self) -> tuple[np.ndarray, np.ndarray]:
        """Of every token: the router's weight that was given away, and all of it."""
        rows: list[np.ndarray] = []
        for n_tokens, layers in self.batches:
            batch = np.zeros((2, n_tokens))
            for served in layers:
                weight = served.router_weights.astype(np.float64)
                own = batch[:, n_tokens - len(weight) :]
                own += [np.where(served.given, weight, 0).sum(axis=1), weight.sum(axis=1)]
            rows.append(batch)
        spent, weight = np.concatenate(rows, axis=1)
        return spent, weight

    def expert_in(self, layer: int) -> np.ndarray:
        assert self.engine._cache is not None
        return self.engine._cache.table.expert_in[layer]

    # what the engine does

    def look_at_plan(self, graph: BatchGraph, layer: int, chosen: np.ndarray, plan: Any) -> None:
        assert self.engine._cache is not None
        weights = graph.router_weights().copy()
        is_resident = self.engine._cache.table.slot_of[layer] >= 0
        n_computed = np.zeros(chosen.shape, int)
        self.open.append(Served(layer, chosen, weights, is_resident, plan, n_computed))

    def look_at_apply(self, slots: np.ndarray, weights: np.ndarray | None) -> None:
        served = self.open[-1]
        experts = self.expert_in(served.layer)[slots]
        assert (slots >= 0).all() and (experts >= 0).all(), "computed by an empty slot"
        computing = served.plan.experts != DROPPED
        assert np.array_equal(experts[computing], served.plan.experts[computing])
        served.n_computed += 1
        self.look_at_weights(weights)

    def look_at_weights(self, weights: np.ndarray | None) -> None:
        served = self.open[-1]
        assert (weights is None) == (served.plan.weights is None)
        assert weights is None or np.array_equal(weights, served.weights)
        assert (served.weights[served.plan.experts == DROPPED] == 0).all()

    def look_at_pass(self, layer: int, on_host: bool, pairs: Numbers, slots: Numbers) -> None:
        served, slots = self.open[-1], np.asarray(slots)
        assert layer == served.layer
        served.n_computed.ravel()[pairs] += 1
        planned = served.plan.experts.ravel()[pairs]
        if on_host:
            assert np.array_equal(slots, planned)
            return
        assert (slots >= 0).all() and (slots < len(self.expert_in(layer))).all()
        experts = self.expert_in(layer)[slots]
        assert (experts >= 0).all(), "computed by an empty slot"
        assert np.array_equal(experts[planned != DROPPED], planned[planned != DROPPED])

    def look_at_whole(self, residency: Residency, plans: list[RoutingPlan]) -> None:
        """A token that needed no decision: what the device says of every layer, afterwards."""
        assert self.engine._cache is not None
        chosen, weights, _ = (array.copy() for array in residency.routed())
        for layer, plan in enumerate(plans):
            is_resident = self.engine._cache.table.slot_of[layer] >= 0
            rows = slice(layer, layer + 1)
            computed = np.ones((1, chosen.shape[1]), int)
            self.open.append(
                Served(layer, chosen[rows], weights[rows], is_resident, plan, computed)
            )


@contextmanager
def watched(engine: Engine) -> Iterator[Books]:
    """Write down what the engine does."""
    books, planner, runner = Books(engine), engine._planner, engine._experts
    assert planner is not None and runner is not None
    passes = engine._graphs.passes
    begin, plan, end = planner.begin, planner.plan, planner.end
    serve, run_whole = runner.serve, runner.run_whole
    run, run_beside = passes.run, passes.run_beside
    apply, apply_passes = BatchGraph.apply, BatchGraph.apply_passes

    def look_begin(n_tokens: int, is_exact: bool = False) -> None:
        books.open, books.n_tokens = [], n_tokens
        begin(n_tokens, is_exact)

    def look_plan(graph: BatchGraph, layer: int, expert_ids: np.ndarray) -> RoutingPlan:
        chosen, made = expert_ids.copy(), plan(graph, layer, expert_ids)
        books.look_at_plan(graph, layer, chosen, made)
        return made

    def look_serve(graph: BatchGraph, layer: int, expert_ids: np.ndarray) -> RoutingPlan:
        chosen, n_before = expert_ids.copy(), len(books.open)
        made = serve(graph, layer, expert_ids)
        if len(books.open) == n_before:  # the layer has a slot for every expert
            books.look_at_plan(graph, layer, chosen, made)
            assert np.array_equal(graph._routing.slot_ids.array, chosen)
            books.open[-1].n_computed += 1
        assert (books.open[-1].n_computed == 1).all(), "a pair was not computed once"
        return made

    def look_end() -> None:
        end()
        books.batches.append((books.n_tokens, books.open))

    def look_apply(graph: BatchGraph, slots: np.ndarray, weights: Any = None) -> None:
        books.look_at_apply(slots, weights)
        apply(graph, slots, weights)

    def look_apply_passes(graph: BatchGraph, weights: Any = None) -> None:
        books.look_at_weights(weights)
        apply_passes(graph, weights)

    def look_run(layer: int, on_host: bool, pairs: Numbers, slots: Numbers, n_tokens: int) -> int:
        books.look_at_pass(layer, on_host, pairs, slots)
        return run(layer, on_host, pairs, slots, n_tokens)

    def look_run_beside(
        layer: int,
        pairs: Numbers,
        slots: Numbers,
        host_pairs: Numbers,
        experts: Numbers,
        n_tokens: int,
    ) -> int:
        books.look_at_pass(layer, False, pairs, slots)
        books.look_at_pass(layer, True, host_pairs, experts)
        return run_beside(layer, pairs, slots, host_pairs, experts, n_tokens)

    def look_run_whole(graph: BatchGraph, residency: Residency) -> list[RoutingPlan]:
        made = run_whole(graph, residency)
        books.look_at_whole(residency, made)
        return made

    with pytest.MonkeyPatch.context() as m:
        m.setattr(planner, "begin", look_begin)
        m.setattr(planner, "plan", look_plan)
        m.setattr(planner, "end", look_end)
        m.setattr(runner, "serve", look_serve)
        m.setattr(runner, "run_whole", look_run_whole)
        m.setattr(passes, "run", look_run)
        m.setattr(passes, "run_beside", look_run_beside)
        m.setattr(BatchGraph, "apply", look_apply)
        m.setattr(BatchGraph, "apply_passes", look_apply_passes)
        yield books


def assert_counted(books: Books, counted: StatsSnapshot) -> None:
    """Every pair and every weight once, in its class: as the counters say, and in sum."""
    n_layer, n_used = books.engine.model_config.n_layer, books.engine.model_config.n_expert_used
    for way in WAYS:
        pairs, weights = np.zeros(n_layer, int), np.zeros(n_layer)
        for served in books.served:
            mask = served.ways()[way]
            pairs[served.layer] += mask.sum()
            weights[served.layer] += served.router_weights[mask].sum(dtype=np.float64)
        assert getattr(counted, way) == tuple(pairs.tolist()), way
        assert getattr(counted, f"{way}_weight") == pytest.approx(weights, abs=1e-3), way
    n_tokens = sum(n for n, _ in books.batches)
    n_routed = (n_layer - 1) * n_tokens + len(books.batches)  # the last layer: one of each batch
    assert counted.n_tokens_prompt + counted.n_tokens_generated == n_tokens
    assert counted.n_pairs == n_used * n_routed
    assert counted.weight == pytest.approx(n_routed, abs=1e-3)


def assert_within_budget(books: Books, share: float, window: int = 256) -> None:
    """In every window of the last tokens."""
    spent, weight = books.spent_and_weight()
    for end in range(1, len(spent) + 1):
        last = slice(max(0, end - window), end)
        assert spent[last].sum() <= share * weight[last].sum() + 1e-4, f"tokens to {end}"


def assert_stand_ins_are_there(books: Books) -> None:
    """A stand-in is resident or read for a token that the router sent to it."""
    for served in books.served:
        kept = set(served.plan.experts[~served.given].tolist())
        there = {*np.flatnonzero(served.is_resident).tolist(), *kept}
        stand_ins = set(served.plan.experts[served.given].tolist()) - {DROPPED}
        assert stand_ins <= there
        assert not served.is_resident[served.chosen[served.given]].any()
        missing = kept - set(np.flatnonzero(served.is_resident).tolist())
        assert {*served.plan.loads, *served.plan.on_host} == missing
        assert not missing & set(served.chosen[served.given].tolist())
