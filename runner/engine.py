"""The engine: turns tokens into logits with a model in memory, layer by layer. Knows no text.

One thread drives it. Per MoE layer the router's choice is read back, the miss policy makes a plan,
and the experts run by that plan.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from runner import miss_policy
from runner.batch_graph import BatchGraph
from runner.checks.file_check import check_unchanged
from runner.config import EngineConfig
from runner.device_memory import DeviceMemory
from runner.device_state import BatchShape
from runner.errors import CancelledError
from runner.layer_trace import LayerTrace, trace_of
from runner.miss_policy import RoutingPlan
from runner.placement import open_model, place
from runner.quality.quality_meter import QualityMeter
from runner.quality.verifier import Verifier
from runner.standins.budget import Budget
from runner.standins.choose_policy import ChosenPolicy, choose_policy
from runner.stats import StatsSnapshot
from runner.text_context import TextContext

Progress = Callable[[str, int, int], None]
Cancelled = Callable[[], bool]


@dataclass(frozen=True)
class Step:
    """One generated token, or the end."""

    token: int  # -1 when `stop_reason` is "cancelled" or "context"
    stop_reason: str | None = None  # "eos" (token is not text), "length", "context", "cancelled"


class Engine:
    """A loaded model with its context."""

    def __init__(
        self,
        path: str | Path,
        config: EngineConfig,
        on_progress: Progress | None = None,
        cancelled: Cancelled = lambda: False,
    ) -> None:
        """Load a model.

        Raises GGUFError, ModelError, BackendError or OptionError; CancelledError when `cancelled`.
        """
        report = on_progress or (lambda stage, done, total: None)
        self.config = config
        with ExitStack() as owned:
            opened = open_model(path, config, owned)
            self._placed = placed = place(opened, report, cancelled, owned)
            self._owned = owned.pop_all()
        self.file, self.model_config, self.backend = opened.file, opened.model, opened.backend
        self.cache_plan, self.buddies = placed.plan, placed.standins
        self.warnings, self.notes = opened.warnings, opened.notes + placed.notes
        self._host, self._limits = opened.host, opened.limits
        self._parts, self._cache, self._usage = placed.parts, placed.cache, placed.usage
        self._graphs, self._stats = placed.graphs, placed.stats
        self._planner, self._experts = placed.planner, placed.experts
        self._context = TextContext(
            self._parts, self._limits.n_ctx, config.n_keep, config.context_shift
        )
        self._meter = QualityMeter()
        self._budget = _budget_of(self.buddies)
        self._verifier = self._make_verifier()

    def _make_verifier(self) -> Verifier | None:
        if self._budget is None or not self.config.verify_every:
            return None
        return Verifier(self.config.verify_every, self._parts.kv, self._stats)

    def close(self) -> None:
        self._owned.close()

    # who stands in

    @property
    def can_miss(self) -> bool:
        """Whether an expert can be missing, so that another might stand in."""
        n_slots = self.cache_plan.n_slots
        return bool(n_slots) and min(n_slots) < self.model_config.n_expert

    def choose_standins(self, buddy: str, budget: float | None) -> ChosenPolicy:
        """A policy by its name, as `EngineConfig.buddy` has it, and the share of the router's
        weight that it may give away; changes nothing. Raises OptionError, ProfileError."""
        config = replace(self.config, buddy=buddy, buddy_budget=budget)
        return choose_policy(config, self.file, self.model_config, self.cache_plan.n_slots)

    def use_standins(self, chosen: ChosenPolicy) -> None:
        """From the next token on this policy, with a budget of which nothing is spent yet. Where
        nobody stands in any more, the next prompt computes anew what stand-ins had computed."""
        self.buddies = chosen
        self._budget = _budget_of(chosen)
        self._stats.set_buddies(chosen.name, chosen.budget)
        if self._planner is not None:
            self._planner.set_buddies(chosen.policy)
        self._verifier = self._make_verifier()

    @property
    def n_ctx(self) -> int:
        """Tokens that the context holds."""
        return self._limits.n_ctx

    @property
    def n_threads(self) -> int:
        return self._limits.n_threads

    @property
    def n_past(self) -> int:
        """Tokens in the context."""
        return len(self._context.tokens)

    @property
    def device_name(self) -> str:
        return self.backend.description

    def device_memory(self) -> DeviceMemory | None:
        """Where a GPU's memory went at load; None on the CPU."""
        return self._placed.device_memory()

    @property
    def ggml_version(self) -> str:
        return self.backend.ggml.version_text

    def snapshot(self, with_experts: bool = False) -> StatsSnapshot:
        """The counters so far; from any thread. with_experts: those of every expert too."""
        if self._cache is None:
            return self._stats.snapshot(self.n_past, self.n_ctx, with_experts=with_experts)
        table = self._cache.table
        residency = tuple(
            tuple(row[:n].tolist()) for row, n in zip(table.expert_in, table.n_slots, strict=True)
        )
        n_evicted = tuple(table.n_evicted)
        return self._stats.snapshot(self.n_past, self.n_ctx, residency, n_evicted, with_experts)

    # generating

    def generate(
        self,
        tokens: Sequence[int],
        sample: Callable[[np.ndarray], int],
        n_predict: int,
        is_stop: Callable[[int], bool],
        cancelled: Cancelled = lambda: False,
        on_prompt: Callable[[int, int, int], None] = lambda done, total, cached: None,
    ) -> Iterator[Step]:
        """Continue `tokens`, the whole context so far; what the cache holds is not recomputed.

        `sample` picks a token from logits (n_vocab,). At most n_predict tokens, -1 = no limit. The
        last step carries the reason for the stop. Raises ContextFullError when the prompt does not
        fit, before anything is computed; ModelError when the file was overwritten meanwhile.
        """
        check_unchanged(self.file)
        try:
            logits = self.prefill(self._context.fit(list(tokens)), cancelled, on_prompt)
            self._meter.begin()
            n_made = 0
            while n_predict < 0 or n_made < n_predict:
                token = sample(logits)
                n_made += 1
                if is_stop(token):
                    yield Step(token, "eos")
                    return
                self._meter.observe(logits, token)
                self._stats.record_output(self._meter.output_entropy, self._meter.repeated_4grams)
                yield Step(token, "length" if n_made == n_predict else None)
                if n_made == n_predict:
                    return
                if cancelled():
                    raise CancelledError
                if self._context.is_full and not self._context.make_room():
                    yield Step(-1, "context")
                    return
                logits = self._decode_and_verify(token, cancelled)
        except CancelledError:
            yield Step(-1, "cancelled")

    def prefill(
        self,
        tokens: Sequence[int],
        cancelled: Cancelled = lambda: False,
        on_prompt: Callable[[int, int, int], None] = lambda done, total, cached: None,
    ) -> np.ndarray:
        """Make `tokens` the context; returns the last token's logits (n_vocab,).

        on_prompt(done, total, n_cached) after every batch. Raises CancelledError; what was
        computed until then stays in the cache.
        """
        n_cached = self._context.reuse(tokens, is_exact=self._budget is None)
        logits = np.empty(0, np.float32)
        on_prompt(n_cached, len(tokens), n_cached)
        self._host.set_n_threads(self._limits.n_threads_batch)
        try:
            for start in range(n_cached, len(tokens), self._limits.n_batch):
                batch = tokens[start : start + self._limits.n_batch]
                logits = self._run(batch, is_prompt=True, cancelled=cancelled)
                on_prompt(start + len(batch), len(tokens), n_cached)
        finally:
            self._host.set_n_threads(self.n_threads)
        return logits

    def decode(self, token: int) -> np.ndarray:
        """Append one token; returns its logits (n_vocab,), overwritten by the next call."""
        return self._run([token], is_prompt=False)

    def _decode_and_verify(self, token: int, cancelled: Cancelled) -> np.ndarray:
        """Decode; with stand-ins, compare every `verify_every`-th step with the exact one.

        The logits are those of the step as it was made, so verifying does not change what is
        picked from them. K and V, positions, the budget, the experts' uses and all counters but
        the verifier's stay as they were. What moves on is residency: experts that the exact step
        reads stay in slots, where later steps find them; the reads, and what had to leave for
        them, are counted. Raises CancelledError.
        """
        logits = self.decode(token)
        if self._verifier is None or not self._verifier.is_due():
            return logits
        step = logits.copy()  # the exact step overwrites them
        position = self.n_past - 1
        cell = self._parts.kv.cells.cell_of(position)

        def compute_exactly() -> np.ndarray:
            cells = np.array([cell])
            return self._compute([token], position, cells, cancelled, is_exact=True)[0]

        self._verifier.compare(step, cell, compute_exactly)
        return step

    def trace(
        self,
        tokens: Sequence[int],
        on_layer: Callable[[int, LayerTrace], None],
        cancelled: Cancelled = lambda: False,
    ) -> None:
        """Append tokens and show what every layer's router does with each of them; no logits.

        Raises CancelledError.
        """
        for start in range(0, len(tokens), self._limits.n_batch):
            batch = tokens[start : start + self._limits.n_batch]
            self._run(batch, is_prompt=True, cancelled=cancelled, on_layer=on_layer)

    def save_usage(self) -> None:
        """Bring the profile of the experts' uses up to date, if any. Raises OptionError."""
        if self._usage is not None and self._cache is not None:
            self._usage.save(self._cache.table.n_uses)

    def reset(self) -> None:
        """Empty the context."""
        self._context.truncate(0)

    def _run(
        self,
        tokens: Sequence[int],
        is_prompt: bool,
        cancelled: Cancelled = lambda: False,
        on_layer: Callable[[int, LayerTrace], None] | None = None,
    ) -> np.ndarray:
        """Append a batch; returns the last token's logits, none where `on_layer` traces it."""
        start_ns = time.perf_counter_ns()
        position = self.n_past
        passes_ns, wait_ns = self._passes_and_wait_ns()
        try:
            cells = self._context.take(len(tokens))
            logits, plans, compute_ns = self._compute(tokens, position, cells, cancelled, on_layer)
        except BaseException:
            self._context.truncate(position)  # what was not finished was not read
            raise
        is_exact = not any(plan.n_substituted or plan.n_dropped for plan in plans)
        self._context.append(tokens, is_exact)
        total_ns = time.perf_counter_ns() - start_ns
        passes_after_ns, wait_after_ns = self._passes_and_wait_ns()
        compute_ns += passes_after_ns - passes_ns
        self._stats.record_batch(
            len(tokens), plans, total_ns, compute_ns, wait_after_ns - wait_ns, is_prompt
        )
        if self._budget is not None:
            self._stats.record_standins(self._budget.spent_share)
        return logits

    def _compute(
        self,
        tokens: Sequence[int],
        position: int,
        cells: np.ndarray,
        cancelled: Cancelled,
        on_layer: Callable[[int, LayerTrace], None] | None = None,
        is_exact: bool = False,
    ) -> tuple[np.ndarray, list[RoutingPlan], int]:
        """Compute a batch into these cells; also each layer's plan and the nanoseconds in graphs.

        is_exact: nobody stands in, and neither the budget nor the experts' uses notice.
        """
        shape = BatchShape(len(tokens), self._parts.kv.cells.n_visible, on_layer is not None)
        graph = self._graphs.get(shape)
        graph.begin(np.asarray(tokens, np.int32), position, cells)
        if self._planner is not None:
            self._planner.begin(len(tokens), is_exact)
        plans = self._run_layers(graph, cancelled, on_layer)
        logits = graph.finish() if on_layer is None else np.empty(0, np.float32)
        if self._planner is not None:
            self._planner.end()
        check_unchanged(self.file)  # else some of it may come from other weights
        return logits, plans, graph.compute_ns

    def _run_layers(
        self,
        graph: BatchGraph,
        cancelled: Cancelled,
        on_layer: Callable[[int, LayerTrace], None] | None = None,
    ) -> list[RoutingPlan]:
        """All layers of one batch; returns the plan of each layer with experts."""
        experts, n_tokens = self._experts, graph.shape.n_tokens
        n_layer = self.model_config.n_layer
        if experts is not None and not experts.is_needed(n_tokens):
            experts = None
        if cancelled():
            raise CancelledError
        if n_tokens == 1 and on_layer is None and self.model_config.is_moe:
            residency = self._parts.residency
            if experts is None:
                graph.run_whole(is_restricted=False)
                chosen = graph.chosen()
                return [miss_policy.all_resident(chosen[i : i + 1]) for i in range(n_layer)]
            if residency is not None and experts.can_run_whole(n_tokens):
                return experts.run_whole(graph, residency)
        plans = []
        for layer in range(n_layer):
            if cancelled():
                raise CancelledError
            if not self.model_config.is_moe:
                graph.pass_dense(layer)
                continue
            expert_ids = graph.route(layer)
            if on_layer is not None:
                on_layer(layer, trace_of(graph, expert_ids))
                if layer == n_layer - 1:
                    break  # a trace ends with the last router
            if experts is None:  # every expert's slot has its number, as the router wrote it
                plans.append(miss_policy.all_resident(expert_ids))
            else:
                plans.append(experts.serve(graph, layer, expert_ids))
        return plans

    def _passes_and_wait_ns(self) -> tuple[int, int]:
        wait_ns = self._experts.wait_ns if self._experts is not None else 0
        return self._graphs.passes.compute_ns, wait_ns


def _budget_of(chosen: ChosenPolicy) -> Budget | None:
    return chosen.policy.budget if chosen.policy is not None else None
