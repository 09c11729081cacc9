"""The figures of one comparison with the exact run, as frozen values. Computes nothing.

Q is the run that is judged, base the exact run of the same file; logarithms are natural. Names
ending in _error are standard errors. Fields of llama-perplexity's --kl-divergence mean the same.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Divergence:
    """How far Q is from base over the scored tokens."""

    n_tokens: int
    ppl: float
    ppl_error: float
    ppl_base: float
    ppl_base_error: float
    ppl_correlation: float  # of ln(PPL(Q)) and ln(PPL(base)); nan where one of them never changes
    ln_ppl_ratio: float
    ln_ppl_ratio_error: float
    ppl_ratio: float  # exp of the mean of ln p_base - ln p
    ppl_ratio_error: float
    ppl_difference: float
    ppl_difference_error: float
    kl_mean: float  # KL(base || Q) of a token, nats
    kl_mean_error: float
    kl_max: float
    kl_p999: float  # 99.9 % of the tokens have less
    kl_p99: float
    kl_p95: float
    kl_p90: float
    kl_median: float
    kl_p10: float
    kl_p5: float
    kl_p1: float
    kl_p01: float  # 0.1 %
    kl_min: float
    delta_p_mean: float  # probability of the right token, Q minus base
    delta_p_mean_error: float
    delta_p_max: float
    delta_p_p999: float
    delta_p_p99: float
    delta_p_p95: float
    delta_p_p90: float
    delta_p_p75: float
    delta_p_median: float
    delta_p_p25: float
    delta_p_p10: float
    delta_p_p5: float
    delta_p_p1: float
    delta_p_p01: float
    delta_p_min: float
    delta_p_rms: float
    delta_p_rms_error: float
    top1_agreement: float  # share of tokens where both find the same token most likely
    top1_agreement_error: float


@dataclass(frozen=True)
class RunCost:
    """What one run took. Pair shares add up to 1. So do the weight shares without `dropped`,
    because dropped weight is part of the substituted: it did not go where the router wanted it."""

    hit_share: float  # of the (token, expert) pairs, as the next four
    substituted_share: float
    loaded_share: float
    on_host_share: float
    dropped_share: float
    hit_weight_share: float  # of the router's weight, as the next four
    substituted_weight_share: float
    loaded_weight_share: float
    on_host_weight_share: float
    dropped_weight_share: float
    bytes_read: int  # of experts, from the file
    seconds: float  # from tokens to logits
    tokens_per_s: float


@dataclass(frozen=True)
class Evaluation:
    """One run judged by the exact run of the same file."""

    divergence: Divergence
    run: RunCost
    base: RunCost
    policy: str  # that was used, BUDDY_OFF where nobody could stand in
    buddy_budget: float
    buddy_min_rank: int
    moe_cache_slots: int  # of the layer that has the fewest; 0 = no cache
    n_ctx: int  # tokens of a window
    n_windows: int
    texts: tuple[str, ...] = ()  # names

    @property
    def bytes_read_ratio(self) -> float:
        """Bytes that the run read for each that base read; 1.0 where neither read any."""
        if self.base.bytes_read:
            return self.run.bytes_read / self.base.bytes_read
        return 1.0 if not self.run.bytes_read else math.inf

    def as_json(self) -> dict[str, Any]:
        """All figures under one level of names; those of the exact run end in _base. None stands
        for what is no number."""
        values = asdict(self)
        divergence, run, base = (values.pop(name) for name in ("divergence", "run", "base"))
        base = {f"{name}_base": value for name, value in base.items()}
        flat = {**divergence, **run, **base, "bytes_read_ratio": self.bytes_read_ratio, **values}
        return {name: None if _is_no_number(value) else value for name, value in flat.items()}


def _is_no_number(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


@dataclass(frozen=True)
class RunProgress:
    """How far a run is; `ppl` of the tokens scored so far."""

    is_base: bool
    n_done: int  # scored tokens
    n_total: int
    ppl: float
    kl_mean: float = 0.0
    warnings: tuple[str, ...] = ()  # of the engine, with a run's first progress only


@dataclass(frozen=True)
class WindowDone:
    """The figures of the first `number` windows, after each of them."""

    number: int
    divergence: Divergence
