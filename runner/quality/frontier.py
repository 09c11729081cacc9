"""What policies and budgets cost and bring, as values: points, rows of them, their JSON.

Knows no engine and computes no divergence.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from runner.config import BUDDY_OFF
from runner.quality.evaluation import Evaluation, RunCost

FORMAT, VERSION = "buddyrun-frontier", 1
ALL = "all"  # the budget without a bound where the router's first choice may be replaced too
_REACHED = 0.9  # share of its budget that a run must have used to have used it up


@dataclass(frozen=True)
class FrontierSetting:
    """What one run of a frontier is done with; the policy BUDDY_OFF is the exact run again."""

    policy: str
    budget: float  # share of the router's weight
    min_rank: int
    seed: int = 0

    @property
    def budget_label(self) -> str:
        """As "5 %" or "all"; "" for the exact run."""
        if self.policy == BUDDY_OFF:
            return ""
        return ALL if self.budget >= 1.0 and self.min_rank == 1 else f"{100 * self.budget:g} %"

    @property
    def label(self) -> str:
        """As "router, 5 %"."""
        return f"{self.policy}, {self.budget_label}" if self.budget_label else "exact again"


@dataclass(frozen=True)
class FrontierBase:
    """The exact run that all points are compared with."""

    model: str  # name of the file
    model_hash: str  # as in a profile
    cost: RunCost
    n_tokens: int  # that were scored
    n_ctx: int  # tokens of a window
    n_windows: int
    texts: tuple[str, ...]  # names


@dataclass(frozen=True)
class FrontierPoint:
    """One run and what it cost."""

    setting: FrontierSetting
    evaluation: Evaluation


@dataclass(frozen=True)
class FrontierRow:
    """The points that differ in nothing but their seed; every figure is the mean of theirs."""

    setting: FrontierSetting  # of the first
    points: tuple[FrontierPoint, ...]

    @property
    def is_exact(self) -> bool:
        return self.setting.policy == BUDDY_OFF

    @property
    def n_seeds(self) -> int:
        return len(self.points)

    @property
    def substituted_weight(self) -> float:
        """Share of the router's weight that did not go where it should, dropped weight included."""
        return self._mean(lambda e: e.run.substituted_weight_share)

    @property
    def substituted_pairs(self) -> float:
        """Share of the pairs that somebody else computed, or nobody."""
        return self._mean(lambda e: e.run.substituted_share + e.run.dropped_share)

    @property
    def bytes_per_token(self) -> float:
        """Read from the file for experts."""
        return self._mean(lambda e: e.run.bytes_read / e.divergence.n_tokens)

    @property
    def bytes_ratio(self) -> float:
        """Bytes read for each that the exact run read."""
        return self._mean(lambda e: e.bytes_read_ratio)

    @property
    def tokens_per_s(self) -> float:
        return self._mean(lambda e: e.run.tokens_per_s)

    @property
    def speed_ratio(self) -> float:
        """How many times as fast as the exact run."""
        return self._mean(speed_ratio)

    @property
    def kl(self) -> float:
        """Mean KL divergence of a token, nats."""
        return self._mean(lambda e: e.divergence.kl_mean)

    @property
    def kl_error(self) -> float:
        """Standard deviation among the seeds; of one seed the standard error of the mean."""
        return self._error(lambda e: e.divergence.kl_mean, lambda e: e.divergence.kl_mean_error)

    @property
    def kl_p99(self) -> float:
        """99 % of the tokens have less."""
        return self._mean(lambda e: e.divergence.kl_p99)

    @property
    def ppl_ratio(self) -> float:
        return self._mean(lambda e: e.divergence.ppl_ratio)

    @property
    def ppl_ratio_error(self) -> float:
        """As `kl_error`."""
        return self._error(lambda e: e.divergence.ppl_ratio, lambda e: e.divergence.ppl_ratio_error)

    @property
    def same_top(self) -> float:
        """Share of the tokens where both runs find the same token most likely."""
        return self._mean(lambda e: e.divergence.top1_agreement)

    @property
    def stayed_below(self) -> bool:
        """Whether a good part of a bounded budget was left over."""
        budget = self.setting.budget
        return budget < 1.0 and self.substituted_weight < _REACHED * budget

    def _mean(self, figure: Callable[[Evaluation], float]) -> float:
        return statistics.fmean(figure(point.evaluation) for point in self.points)

    def _error(
        self, figure: Callable[[Evaluation], float], error: Callable[[Evaluation], float]
    ) -> float:
        if self.n_seeds == 1:
            return error(self.points[0].evaluation)
        values = [figure(point.evaluation) for point in self.points]
        return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def speed_ratio(evaluation: Evaluation) -> float:
    """How many times as fast as the exact run; 0.0 where that took no time."""
    base = evaluation.base.tokens_per_s
    return evaluation.run.tokens_per_s / base if base else 0.0


def rows_of(points: Sequence[FrontierPoint]) -> list[FrontierRow]:
    """The points without regard to their seeds, in the order in which they came first."""
    groups: dict[tuple[str, float, int], list[FrontierPoint]] = {}
    for point in points:
        setting = point.setting
        key = (setting.policy, setting.budget, setting.min_rank)
        groups.setdefault(key, []).append(point)
    return [FrontierRow(group[0].setting, tuple(group)) for group in groups.values()]


def settings_of(
    policies: Sequence[str], budgets: Sequence[float | None], min_rank: int, n_seeds: int
) -> list[FrontierSetting]:
    """The runs of a frontier: the exact one again, then budget by budget for each policy.

    The budget None is everything: no bound, and the router's first choice may be replaced too.
    Only the policy `random` has more than one seed.
    """
    wanted = dict.fromkeys((1.0, 1) if share is None else (share, min_rank) for share in budgets)
    settings = [FrontierSetting(BUDDY_OFF, 0.0, min_rank)]
    for policy in dict.fromkeys(policies):
        for budget, rank in wanted:
            seeds = range(n_seeds if policy == "random" else 1)
            settings += [FrontierSetting(policy, budget, rank, seed) for seed in seeds]
    return settings


def frontier_json(
    base: FrontierBase, points: Sequence[FrontierPoint], settings: dict[str, Any]
) -> dict[str, Any]:
    """Everything that is known, for a file. `settings` are those of all runs."""
    values = asdict(base)
    cost = values.pop("cost")
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": values.pop("model"),
        "model_hash": values.pop("model_hash"),
        "settings": settings,
        "base": {**values, **cost},
        "points": [{**point.evaluation.as_json(), **asdict(point.setting)} for point in points],
    }
