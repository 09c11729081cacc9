"""Which policy a run gets: what the settings name, or what the model's profile recommends.

Reads the profile. Knows no engine and no cache.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from quant.gguf_file import GGUFFile
from runner.buddies import BuddyTable, PolicyEstimate, default_path
from runner.config import (
    BUDDY_AUTO,
    BUDDY_OFF,
    BUDDY_POLICIES,
    BUDGET_WITHOUT_PROFILE,
    DEFAULT_BUDDY_BUDGET,
    EngineConfig,
)
from runner.errors import OptionError
from runner.model_config import ModelConfig
from runner.model_hash import model_hash
from runner.standins.buddy_policy import BuddyPolicy
from runner.standins.make_policy import NEEDS_PROFILE, PolicySettings, make_policy

_WITHOUT_PROFILE = "router"


@dataclass(frozen=True, eq=False)
class ChosenPolicy:
    """The policy of a run, and what the user should know of it."""

    policy: BuddyPolicy | None  # None: nobody stands in
    profile: str = ""  # the file that it was made with
    notes: tuple[str, ...] = ()
    uses: np.ndarray | None = None  # (n_layer, n_expert) of experts, by the profile

    @property
    def name(self) -> str:
        """Of the policy; "" where nobody stands in."""
        return self.policy.name if self.policy is not None else ""

    @property
    def budget(self) -> float:
        """The most of the router's weight that stand-ins may carry."""
        return self.policy.budget.share if self.policy is not None else 0.0


def check_settings(config: EngineConfig) -> None:
    """Raise OptionError for settings that mean nothing."""
    if config.buddy not in (BUDDY_OFF, BUDDY_AUTO, *BUDDY_POLICIES):
        raise OptionError(
            f"--buddy {config.buddy!r:.40}: expected off, auto, {', '.join(BUDDY_POLICIES)}"
        )
    budget = config.buddy_budget
    if budget is not None and not 0.0 <= budget <= 1.0:
        raise OptionError(f"--buddy-budget {budget}: expected a share from 0 to 1")
    if config.buddy_min_rank < 1:
        raise OptionError(f"--buddy-min-rank {config.buddy_min_rank}: ranks count from 1")


def choose_policy(
    config: EngineConfig, file: GGUFFile, model: ModelConfig, n_slots: tuple[int, ...]
) -> ChosenPolicy:
    """The policy for a cache of n_slots slots per layer; () = no cache, where nothing is missing.

    Raises OptionError, or ProfileError when the profile cannot be used.
    """
    check_settings(config)
    has_misses = bool(n_slots) and min(n_slots) < model.n_expert
    if config.buddy == BUDDY_OFF or config.buddy_budget == 0.0 or not has_misses:
        return ChosenPolicy(None)
    path = profile_path(config, file.paths[0])
    table = None
    if path is not None:
        table = BuddyTable.load(path, model_hash(file), model.n_layer, model.n_expert)
    if config.buddy in NEEDS_PROFILE and table is None:
        raise OptionError(
            f"--buddy {config.buddy} needs a profile of the model: `buddyrun profile MODEL` makes "
            f"{default_path(file.paths[0])}"
        )
    settings, notes = _settings(config, table, n_slots)
    policy = make_policy(settings, model.n_layer, table)
    uses = table.uses if table is not None else None
    return ChosenPolicy(policy, str(path) if path is not None else "", notes, uses)


def profile_path(config: EngineConfig, model: str | Path) -> Path | None:
    """The profile that a run of the model reads; None when there is none."""
    if config.buddy_profile == BUDDY_OFF:
        return None
    if config.buddy_profile:
        return Path(config.buddy_profile)
    path = default_path(model)
    return path if path.exists() else None


def _settings(
    config: EngineConfig, table: BuddyTable | None, n_slots: tuple[int, ...]
) -> tuple[PolicySettings, tuple[str, ...]]:
    notes: tuple[str, ...] = ()
    budget = config.buddy_budget
    if budget is None:
        budget = DEFAULT_BUDDY_BUDGET if table is not None else BUDGET_WITHOUT_PROFILE
    estimates = table.estimates if table is not None else ()
    estimates = tuple(e for e in estimates if e.policy in BUDDY_POLICIES)  # a later one has others
    if config.buddy == BUDDY_AUTO:
        if table is None:
            notes = (
                "Stand-ins are chosen by the router's scores alone: `buddyrun profile MODEL`"
                " measures who can stand in for whom, so that they cost less quality.",
            )
        name = _best_of(estimates, n_slots, budget)
    else:
        name = config.buddy
    settings = PolicySettings(name, budget, config.buddy_min_rank, config.buddy_seed)
    known = _nearest([e for e in estimates if e.policy == name], n_slots, budget)
    if known:
        settings = replace(settings, opening=known[0].opening)
    return settings, notes


def _best_of(estimates: tuple[PolicyEstimate, ...], n_slots: tuple[int, ...], budget: float) -> str:
    """The policy that does the least harm with such a cache and budget."""
    nearest = _nearest(list(estimates), n_slots, budget)
    return min(nearest, key=lambda e: e.harm).policy if nearest else _WITHOUT_PROFILE


def _nearest(
    estimates: list[PolicyEstimate], n_slots: tuple[int, ...], budget: float
) -> list[PolicyEstimate]:
    """The estimates for the most similar cache, and of these for the most similar budget."""
    mean = sum(n_slots) / len(n_slots)

    def distance(estimate: PolicyEstimate) -> tuple[float, float]:
        ratio = abs(math.log(max(budget, 1e-6) / estimate.budget))
        return abs(estimate.n_slots - mean), ratio

    if not estimates:
        return []
    least = min(map(distance, estimates))
    return [estimate for estimate in estimates if distance(estimate) == least]
