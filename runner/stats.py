"""The counters of a run as a frozen snapshot that leaves the engine. Counts nothing by itself.

A pair is one token and one expert that the router chose for it. Each pair is counted once: hit,
loaded, on_host, substituted or dropped.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from runner.expert_counts import ExpertCounts

CLASSES = ("hit", "loaded", "on_host", "substituted", "dropped")


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
        return sum(sum(getattr(self, f"{name}_weight")) for name in CLASSES)

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
