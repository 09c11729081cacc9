"""Counts what a run does; the engine's thread writes, and any thread may take a snapshot."""

import time
from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING

from runner.expert_counts import ExpertCounter
from runner.stats import CLASSES, StatsSnapshot

if TYPE_CHECKING:  # whoever counts nothing needs no numpy for that
    from runner.miss_policy import RoutingPlan


class StatsRecorder:
    """Written by the engine's thread only; any thread may take a snapshot."""

    def __init__(
        self,
        n_layer: int,
        n_slots: tuple[int, ...] = (),
        buddy: str = "",
        buddy_budget: float = 0.0,
        n_expert: int = 0,
    ) -> None:
        """n_slots: of each layer's cache, () without one; buddy: the policy, "" and 0 without;
        n_expert: of a layer, 0 = nothing is counted per expert."""
        self._started = time.monotonic()
        self._lock = Lock()
        self._n_slots = n_slots
        self._hit = [0] * n_layer
        self._loaded = [0] * n_layer
        self._on_host = [0] * n_layer
        self._substituted = [0] * n_layer
        self._dropped = [0] * n_layer
        self._weight = {name: [0.0] * n_layer for name in CLASSES}
        self._bytes_read = [0] * n_layer
        self._n_routings = 0
        self._n_tokens = {True: 0, False: 0}
        self._batch_ns = {True: 0, False: 0}
        self._compute_ns = 0
        self._wait_ns = 0
        self._read_ns = 0
        self._n_prefetch_used = 0
        self._n_prefetch_wasted = 0
        self._experts = ExpertCounter(n_layer, n_expert) if n_expert else None
        self._buddy, self._buddy_budget = buddy, buddy_budget
        self._standin_share = 0.0
        self._output_entropy = 0.0
        self._repeated_4grams = 0.0
        self._n_verified = 0
        self._n_verified_agree = 0
        self._verified_kl_sum = 0.0
        self._verified_kl_max = 0.0
        self._verify_ns = 0

    def record_batch(
        self,
        n_tokens: int,
        plans: "Sequence[RoutingPlan]",
        total_ns: int,
        compute_ns: int,
        wait_ns: int,
        is_prompt: bool,
    ) -> None:
        """Count one finished batch, from its tokens to its logits; plans in the layers' order."""
        with self._lock:
            for layer, plan in enumerate(plans):
                self._hit[layer] += plan.n_hit
                self._loaded[layer] += plan.n_loaded
                self._on_host[layer] += plan.n_on_host
                self._substituted[layer] += plan.n_substituted
                self._dropped[layer] += plan.n_dropped
                if plan.weight is not None:
                    for name in CLASSES:
                        self._weight[name][layer] += getattr(plan.weight, name)
                if self._experts is not None:
                    self._experts.record_plan(layer, plan)
            self._n_routings += len(plans)
            self._n_tokens[is_prompt] += n_tokens
            self._batch_ns[is_prompt] += total_ns
            self._compute_ns += compute_ns
            self._wait_ns += wait_ns

    def record_read(
        self, layer: int, n_bytes: int, duration_ns: int, expert: int | None = None
    ) -> None:
        """Count one finished read; `layer` counts the MoE layers, from 0. expert: who is in a slot
        now because of it."""
        with self._lock:
            self._bytes_read[layer] += n_bytes
            self._read_ns += duration_ns
            if expert is not None and self._experts is not None:
                self._experts.record_load(layer, expert)

    def record_prefetch(self, n_used: int, n_wasted: int) -> None:
        """Count experts read ahead: those that were then chosen, and the others."""
        with self._lock:
            self._n_prefetch_used += n_used
            self._n_prefetch_wasted += n_wasted

    def set_buddies(self, buddy: str, buddy_budget: float) -> None:
        """From now on this policy, "" for none, has this budget."""
        with self._lock:
            self._buddy, self._buddy_budget = buddy, buddy_budget
            self._standin_share = 0.0

    def record_standins(self, share: float) -> None:
        """The part of the last tokens' router weight that stand-ins carried."""
        with self._lock:
            self._standin_share = share

    def record_output(self, entropy: float, repeated_4grams: float) -> None:
        """How the latest answer looks."""
        with self._lock:
            self._output_entropy = entropy
            self._repeated_4grams = repeated_4grams

    def record_verified(self, kl: float, is_same_top: bool, duration_ns: int) -> None:
        """Count one step that was compared with the exact one; kl in nats."""
        with self._lock:
            self._n_verified += 1
            self._n_verified_agree += is_same_top
            self._verified_kl_sum += kl
            self._verified_kl_max = max(self._verified_kl_max, kl)
            self._verify_ns += duration_ns

    def snapshot(
        self,
        n_past: int,
        n_ctx: int,
        residency: tuple[tuple[int, ...], ...] = (),
        n_evicted: tuple[int, ...] = (),
        with_experts: bool = False,
    ) -> StatsSnapshot:
        """The counters now: always of whole batches. with_experts: those of every expert too."""
        with self._lock:
            total_ns = self._batch_ns[True] + self._batch_ns[False]
            return StatsSnapshot(
                n_tokens_prompt=self._n_tokens[True],
                n_tokens_generated=self._n_tokens[False],
                n_past=n_past,
                n_ctx=n_ctx,
                prompt_s=self._batch_ns[True] / 1e9,
                generation_s=self._batch_ns[False] / 1e9,
                compute_s=self._compute_ns / 1e9,
                wait_s=self._wait_ns / 1e9,
                python_s=max(0, total_ns - self._compute_ns - self._wait_ns) / 1e9,
                n_routings=self._n_routings,
                hit=tuple(self._hit),
                loaded=tuple(self._loaded),
                on_host=tuple(self._on_host),
                substituted=tuple(self._substituted),
                dropped=tuple(self._dropped),
                hit_weight=tuple(self._weight["hit"]),
                loaded_weight=tuple(self._weight["loaded"]),
                on_host_weight=tuple(self._weight["on_host"]),
                substituted_weight=tuple(self._weight["substituted"]),
                dropped_weight=tuple(self._weight["dropped"]),
                bytes_read=tuple(self._bytes_read),
                n_evicted=n_evicted or (0,) * len(self._hit),
                n_slots=self._n_slots,
                residency=residency,
                read_s=self._read_ns / 1e9,
                prefetch_used=self._n_prefetch_used,
                prefetch_wasted=self._n_prefetch_wasted,
                standin_share=self._standin_share,
                buddy=self._buddy,
                buddy_budget=self._buddy_budget,
                output_entropy=self._output_entropy,
                repeated_4grams=self._repeated_4grams,
                n_verified=self._n_verified,
                n_verified_agree=self._n_verified_agree,
                verified_kl_sum=self._verified_kl_sum,
                verified_kl_max=self._verified_kl_max,
                verify_s=self._verify_ns / 1e9,
                uptime_s=time.monotonic() - self._started,
                experts=self._experts.counts() if with_experts and self._experts else None,
            )
