"""Counters of a run and the frozen snapshot that leaves the engine. Counts nothing by itself.

A pair is one token and one expert that the router chose for it. Each pair is counted once: hit,
loaded, on_host, substituted or dropped.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from threading import Lock
from typing import TYPE_CHECKING, Any

from runner.expert_counts import ExpertCounter, ExpertCounts

if TYPE_CHECKING:  # the terminal reads snapshots, and needs no numpy for that
    from runner.miss_policy import RoutingPlan


_CLASSES = ("hit", "loaded", "on_host", "substituted", "dropped")


@dataclass(frozen=True)
class StatsRates:
    """What happened between two snapshots; 0.0 where there was nothing to divide."""

    prompt_tokens_per_s: float
    generation_tokens_per_s: float
    hit_share: float  # of the pairs, as the next four
    loaded_share: float
    on_host_share: float
    substituted_share: float
    dropped_share: float
    compute_share: float  # of the batches' time, as the next two
    wait_share: float
    python_share: float
    read_gb_per_s: float  # while reading


@dataclass(frozen=True)
class StatsSnapshot:
    """Cumulative counters since the model was loaded; `since` makes rates of two of them.

    Tuples have one item per MoE layer; `n_slots` and `residency` are () without a cache, where
    every pair is a hit.
    """

    n_tokens_prompt: int  # tokens computed in prompt batches, cached ones not counted
    n_tokens_generated: int
    n_past: int
    n_ctx: int
    prompt_s: float
    generation_s: float
    compute_s: float  # inside ggml
    wait_s: float  # the engine waiting for reads
    python_s: float  # everything else between a batch's start and its logits
    n_routings: int  # MoE layers passed, one per layer and batch
    hit: tuple[int, ...]  # pairs computed by the chosen expert, which was in a slot
    loaded: tuple[int, ...]  # pairs computed by the chosen expert, read into a slot for them
    on_host: tuple[int, ...]  # pairs computed by the chosen expert where the file is mapped
    substituted: tuple[int, ...]  # pairs computed by another expert
    dropped: tuple[int, ...]  # pairs computed by none
    hit_weight: tuple[float, ...]  # of the router, given to these pairs; 0 where it is not counted
    loaded_weight: tuple[float, ...]
    on_host_weight: tuple[float, ...]
    substituted_weight: tuple[float, ...]
    dropped_weight: tuple[float, ...]
    bytes_read: tuple[int, ...]
    n_evicted: tuple[int, ...]
    n_slots: tuple[int, ...]
    residency: tuple[tuple[int, ...], ...]  # the expert in each slot, -1 in an empty one
    read_s: float  # time of all reads together; those at the same time count each
    prefetch_used: int  # experts read ahead that were then chosen
    prefetch_wasted: int
    standin_share: float  # of the router's weight in the last 256 tokens, what stand-ins carried
    buddy: str  # the policy by which others stand in for missing experts; "" = none
    buddy_budget: float  # the most that they may; 0 where nobody stands in
    output_entropy: float  # nats, of the latest answer's last 64 tokens: see `QualityMeter`
    repeated_4grams: float  # share, of its last 256 tokens
    n_verified: int  # steps of answers computed a second time, exactly, after the same K and V
    n_verified_agree: int  # of these, steps where both find the same token most likely
    verified_kl_sum: float  # of KL(exact || step) in nats
    verified_kl_max: float
    verify_s: float  # what that took; in no other time, and its pairs count nowhere
    uptime_s: float
    experts: ExpertCounts | None = None  # where asked for

    @property
    def n_pairs(self) -> int:
        return sum(self.pairs_per_layer)

    @property
    def pairs_per_layer(self) -> tuple[int, ...]:
        classes = (self.hit, self.loaded, self.on_host, self.substituted, self.dropped)
        return tuple(map(sum, zip(*classes, strict=True)))

    @property
    def hit_share(self) -> float:
        return share(sum(self.hit), self.n_pairs)

    @property
    def loaded_share(self) -> float:
        return share(sum(self.loaded), self.n_pairs)

    @property
    def on_host_share(self) -> float:
        return share(sum(self.on_host), self.n_pairs)

    @property
    def substituted_share(self) -> float:
        return share(sum(self.substituted), self.n_pairs)

    @property
    def dropped_share(self) -> float:
        return share(sum(self.dropped), self.n_pairs)

    @property
    def weight(self) -> float:
        """Router weight of all pairs; 0.0 where it is not counted."""
        return sum(sum(getattr(self, f"{name}_weight")) for name in _CLASSES)

    @property
    def substituted_weight_share(self) -> float:
        """The part of the router's weight that went to others than it chose, dropped included."""
        return share(sum(self.substituted_weight) + sum(self.dropped_weight), self.weight)

    @property
    def read_gb_per_s(self) -> float:
        """Speed of the reads while they ran, in 10^9 bytes."""
        return share(sum(self.bytes_read) / 1e9, self.read_s)

    @property
    def verified_kl(self) -> float:
        """Mean of the verified steps, nats."""
        return share(self.verified_kl_sum, self.n_verified)

    @property
    def verified_agreement(self) -> float:
        """The share of verified steps where both find the same token most likely."""
        return share(self.n_verified_agree, self.n_verified)

    def counted_since(self, earlier: "StatsSnapshot") -> "StatsSnapshot":
        """This snapshot with what was counted up to `earlier` taken away."""
        return replace(self, **{name: _minus(self, earlier, name) for name in _COUNTERS})

    def since(self, earlier: "StatsSnapshot") -> StatsRates:
        """The rates of the time between `earlier` and this snapshot."""
        spent = self.counted_since(earlier)
        batches_s = spent.prompt_s + spent.generation_s
        return StatsRates(
            prompt_tokens_per_s=share(spent.n_tokens_prompt, spent.prompt_s),
            generation_tokens_per_s=share(spent.n_tokens_generated, spent.generation_s),
            hit_share=spent.hit_share,
            loaded_share=spent.loaded_share,
            on_host_share=spent.on_host_share,
            substituted_share=spent.substituted_share,
            dropped_share=spent.dropped_share,
            compute_share=share(spent.compute_s, batches_s),
            wait_share=share(spent.wait_s, batches_s),
            python_share=share(spent.python_s, batches_s),
            read_gb_per_s=spent.read_gb_per_s,
        )


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
        self._weight = {name: [0.0] * n_layer for name in _CLASSES}
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
                    for name in _CLASSES:
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


def share(part: float, whole: float) -> float:
    """part / whole; of nothing 0.0."""
    return part / whole if whole else 0.0


_STATES = (  # as they are now, not counted
    "n_past",
    "n_ctx",
    "n_slots",
    "residency",
    "standin_share",
    "buddy",
    "buddy_budget",
    "output_entropy",
    "repeated_4grams",
    "verified_kl_max",
    "experts",
)
_COUNTERS = tuple(field.name for field in fields(StatsSnapshot) if field.name not in _STATES)


def _minus(now: StatsSnapshot, earlier: StatsSnapshot, name: str) -> Any:
    after, before = getattr(now, name), getattr(earlier, name)
    if isinstance(after, tuple):
        return tuple(a - b for a, b in zip(after, before, strict=True))
    return after - before
