"""Figures that no model has made, for tests of what is shown and sent."""

from dataclasses import fields

from runner.quality.evaluation import Divergence, Evaluation, RunCost

_FIGURES = {
    field.name: (number + 1) / 64 for number, field in enumerate(fields(Divergence))
} | {"n_tokens": 1234}  # fmt: skip

DIVERGENCE = Divergence(**_FIGURES)  # type: ignore[arg-type]
BASE = RunCost(0.65, 0, 0.25, 0.1, 0, 0.7, 0, 0.2, 0.1, 0, 12_000_000_000, 20.0, 61.7)
RUN = RunCost(0.6, 0.2, 0.1, 0.05, 0.05, 0.7, 0.15, 0.1, 0.05, 0.05, 6_000_000_000, 10.0, 123.4)
EVALUATION = Evaluation(DIVERGENCE, RUN, BASE, "router", 0.05, 2, 4, 512, 3, ("a.txt",))
