"""Makes the policy that a run's settings ask for, with the parameters that the profile gives.

Each policy has one parameter that says how readily pairs are given away; it follows the budget as
an opening between 0 and 1. Knows no cache.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from runner import miss_policy
from runner.buddies import BuddyTable
from runner.miss_policy import Choice, Gate, Routing
from runner.standins import buddymoe
from runner.standins.blend import LayerBlend
from runner.standins.buddy_policy import BuddyPolicy, Choose
from runner.standins.buddymoe import BuddyMoEParameters
from runner.standins.budget import Budget, Opening

NEEDS_PROFILE = ("blend", "buddymoe", "similar")
CFT_ALPHA, K_MAX = 0.9, 16  # of BuddyMoE's lists
TAE_PERCENTILE = 15  # of BuddyMoE without a budget; the paper takes 10 to 20
_START = 0.2  # opening where no profile knows a better one
_MOST_STRENGTH = 1.0  # of prior: every resident comes before every other expert


@dataclass(frozen=True)
class PolicySettings:
    """What a policy is made from, besides the profile."""

    name: str  # one of BUDDY_POLICIES
    budget: float  # share of the router's weight
    min_rank: int = 2
    seed: int = 0
    opening: float = _START  # to begin with


def make_policy(settings: PolicySettings, n_layer: int, table: BuddyTable | None) -> BuddyPolicy:
    """A policy with its own budget. Those in NEEDS_PROFILE need a table."""
    choose = _chooser(settings, n_layer, table)
    budget = Budget(settings.budget, n_layer)
    opening = Opening(settings.budget, settings.opening)
    return BuddyPolicy(settings.name, choose, budget, opening, settings.min_rank)


def _chooser(settings: PolicySettings, n_layer: int, table: BuddyTable | None) -> Choose:
    name = settings.name
    if name in NEEDS_PROFILE:
        assert table is not None, f"{name} needs a profile"
        return {"blend": _blend, "buddymoe": _buddymoe, "similar": _similar}[name](table)
    if name == "prior":
        return _prior
    if name == "prior-router":
        return _prior_router
    rng = np.random.default_rng(settings.seed)
    gated: dict[str, Callable[[Routing, Gate], Choice]] = {
        "router": miss_policy.router,
        "resident": miss_policy.resident,
        "drop": miss_policy.drop,
        "random": lambda routing, gate: miss_policy.random(routing, gate, rng),
    }
    choose = gated[name]
    return lambda layer, routing, gate, opening: choose(routing, _up_to(opening, gate))


def _up_to(max_weight: float, gate: Gate) -> Gate:
    """The gate for pairs of at most that weight; `replace` would take longer than the choice."""
    return Gate(max_weight, gate.min_rank, gate.allowance)


def _similar(table: BuddyTable) -> Choose:
    def choose(layer: int, routing: Routing, gate: Gate, opening: float) -> Choice:
        return miss_policy.similar(routing, _up_to(opening, gate), table.error[layer])

    return choose


def _blend(table: BuddyTable) -> Choose:
    """The opening is the weight up to which the worst layer's worst pair is given away."""
    layers = [
        LayerBlend(gram, float(power)) for gram, power in zip(table.gram, table.power, strict=True)
    ]
    worst = max(float(np.diag(layer.gram).max()) / layer.power for layer in layers)

    def choose(layer: int, routing: Routing, gate: Gate, opening: float) -> Choice:
        max_harm = worst * opening * opening if opening < 1.0 else math.inf
        return miss_policy.blend(routing, gate, layers[layer], max_harm)

    return choose


def _buddymoe(table: BuddyTable) -> Choose:
    """The opening is the share of tokens that are open by their entropy.

    Without a budget that is the paper's: all but the TAE_PERCENTILE most confident percent.
    """
    lists = [buddymoe.buddy_lists(counts, CFT_ALPHA, K_MAX) for counts in table.coactivation]
    percents = np.arange(table.tae_percentiles.shape[1])

    def choose(layer: int, routing: Routing, gate: Gate, opening: float) -> Choice:
        percent = max(100.0 * (1.0 - opening), TAE_PERCENTILE)
        tau = float(np.interp(percent, percents, table.tae_percentiles[layer]))
        return miss_policy.buddymoe(routing, gate, lists[layer], BuddyMoEParameters(tau))

    return choose


def _prior(layer: int, routing: Routing, gate: Gate, opening: float) -> Choice:
    return miss_policy.prior(routing, _MOST_STRENGTH * opening, gate)


def _prior_router(layer: int, routing: Routing, gate: Gate, opening: float) -> Choice:
    """The opening is the weight that may be given away behind a prior of half that strength."""

    def second(routing: Routing, gate: Gate) -> Choice:
        return miss_policy.router(routing, _up_to(opening, gate))

    return miss_policy.prior_then(routing, _MOST_STRENGTH * opening / 2, gate, second)
