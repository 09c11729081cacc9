"""Makes the policy that a run's settings ask for. Chooses nothing itself."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from runner import miss_policy
from runner.config import BUDDY_AUTO, BUDDY_OFF, EngineConfig
from runner.miss_policy import Choice, Gate, Routing
from runner.model_config import ModelConfig
from runner.standins.buddy_policy import BuddyPolicy, Choose
from runner.standins.budget import Budget, Opening

_START = 0.2


def make_policy(config: EngineConfig, model: ModelConfig) -> BuddyPolicy | None:
    """None where nobody may stand in."""
    if config.buddy == BUDDY_OFF or config.buddy_budget <= 0.0:
        return None
    name = "router" if config.buddy == BUDDY_AUTO else config.buddy
    budget = Budget(config.buddy_budget, model.n_layer)
    opening = Opening(config.buddy_budget, _START)
    return BuddyPolicy(name, _chooser(name, config), budget, opening, config.buddy_min_rank)


def _chooser(name: str, config: EngineConfig) -> Choose:
    rng = np.random.default_rng(config.buddy_seed)
    gated: dict[str, Callable[[Routing, Gate], Choice]] = {
        "router": miss_policy.router,
        "resident": miss_policy.resident,
        "drop": miss_policy.drop,
        "random": lambda routing, gate: miss_policy.random(routing, gate, rng),
    }
    if name in gated:
        choose = gated[name]
        return lambda layer, routing, gate, opening: choose(
            routing, replace(gate, max_weight=opening)
        )
    assert name == "prior"
    return lambda layer, routing, gate, opening: miss_policy.prior(routing, opening, gate)
