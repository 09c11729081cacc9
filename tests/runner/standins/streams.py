"""Random routing, token after token, and a profile that was measured on such."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from runner.buddies import BuddyTable, PolicyEstimate
from runner.miss_policy import Routing
from runner.profiling import statistics
from runner.standins.buddymoe import coactivation
from tests.runner.standins.routings import routed
from tests.runner.test_buddies import make_table

N_LAYER, N_EXPERT, N_USED = 3, 12, 3


def random_routing(
    rng: np.random.Generator, n_tokens: int = 1, n_resident: int = 6, n_expert: int = N_EXPERT
) -> Routing:
    """Each token with other scores, all with the same residents."""
    scores = 1.5 * rng.standard_normal((n_tokens, n_expert))
    residents = tuple(rng.choice(n_expert, n_resident, replace=False).tolist())
    return routed(scores, residents, N_USED)


def measured_table(estimates: Sequence[PolicyEstimate] = ()) -> BuddyTable:
    """A table whose counts and entropies are those of `random_routing`."""
    table = make_table(N_LAYER, N_EXPERT)
    routing = random_routing(np.random.default_rng(8), 4000)
    counts = coactivation(routing.expert_ids, N_EXPERT)
    entropy = statistics.tae_percentiles(routing.scores, routing.expert_ids)
    return replace(
        table,
        coactivation=np.stack([counts] * N_LAYER),
        tae_percentiles=np.stack([entropy] * N_LAYER),
        estimates=tuple(estimates),
    )
