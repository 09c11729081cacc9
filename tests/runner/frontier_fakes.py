"""Points of a frontier that no model has made."""

from dataclasses import fields, replace
from typing import Any

from runner.quality.evaluation import Divergence, RunCost
from runner.quality.frontier import FrontierBase, FrontierPoint, FrontierSetting
from tests.runner import evaluation_fakes
from tests.runner.evaluation_fakes import EVALUATION

FRONTIER_BASE = FrontierBase(
    "some.gguf", "ab12", evaluation_fakes.BASE, 1234, 512, 3, ("a.txt", "b.txt")
)


def point_of(
    policy: str, budget: float = 0.05, min_rank: int = 2, seed: int = 0, **figures: Any
) -> FrontierPoint:
    """A point; figures of the divergence or of the run as they are named there."""
    divergence = {f.name: figures.pop(f.name) for f in fields(Divergence) if f.name in figures}
    run = {f.name: figures.pop(f.name) for f in fields(RunCost) if f.name in figures}
    assert not figures
    evaluation = replace(
        EVALUATION,
        policy=policy,
        divergence=replace(EVALUATION.divergence, **divergence),
        run=replace(EVALUATION.run, **run),
    )
    return FrontierPoint(FrontierSetting(policy, budget, min_rank, seed), evaluation)
