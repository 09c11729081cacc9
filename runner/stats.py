"""Counters of a run and the frozen snapshot that leaves the engine. Counts nothing by itself."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from runner.miss_policy import RoutingPlan


@dataclass(frozen=True)
class StatsSnapshot:
    """Cumulative counters since the model was loaded; rates are for the reader to compute."""

    n_tokens_prompt: int  # tokens computed in prompt batches, cached ones not counted
    n_tokens_generated: int
    n_past: int
    n_ctx: int
    prompt_s: float
    generation_s: float
    compute_s: float  # inside ggml
    python_s: float  # everything else between a batch's start and its logits
    n_routings: int  # MoE layers passed, one per layer and batch
    hit: tuple[int, ...]  # per MoE layer: (token, expert) pairs served by the resident expert
    uptime_s: float


class StatsRecorder:
    """Written by the engine's thread only; any thread may take a snapshot."""

    def __init__(self, n_layer: int) -> None:
        self._started = time.monotonic()
        self._hit = [0] * n_layer
        self._n_routings = 0
        self._n_tokens = {True: 0, False: 0}
        self._batch_ns = {True: 0, False: 0}
        self._compute_ns = 0

    def record_batch(
        self,
        n_tokens: int,
        plans: Sequence[RoutingPlan],
        total_ns: int,
        compute_ns: int,
        is_prompt: bool,
    ) -> None:
        """Count one finished batch, from its tokens to its logits; plans in the layers' order."""
        for layer, plan in enumerate(plans):
            self._hit[layer] += plan.n_hit
        self._n_routings += len(plans)
        self._n_tokens[is_prompt] += n_tokens
        self._batch_ns[is_prompt] += total_ns
        self._compute_ns += compute_ns

    def snapshot(self, n_past: int, n_ctx: int) -> StatsSnapshot:
        total_ns = self._batch_ns[True] + self._batch_ns[False]
        return StatsSnapshot(
            n_tokens_prompt=self._n_tokens[True],
            n_tokens_generated=self._n_tokens[False],
            n_past=n_past,
            n_ctx=n_ctx,
            prompt_s=self._batch_ns[True] / 1e9,
            generation_s=self._batch_ns[False] / 1e9,
            compute_s=self._compute_ns / 1e9,
            python_s=max(0, total_ns - self._compute_ns) / 1e9,
            n_routings=self._n_routings,
            hit=tuple(self._hit),
            uptime_s=time.monotonic() - self._started,
        )
