"""Compares steps of a run with the same steps computed exactly. Knows no graph and no policy."""

import math
import time
from collections.abc import Callable

import numpy as np

from runner.errors import ModelError
from runner.kv_cache import KVCache
from runner.quality.divergence import Softmax, kl_divergence
from runner.stats_recorder import StatsRecorder


class Verifier:
    """Decides which steps are compared, sees that K and V stay as they were, and judges."""

    def __init__(self, every: int, kv: KVCache, stats: StatsRecorder) -> None:
        """every: steps from one that is compared to the next, at least 1."""
        self._every = every
        self._n_steps = 0
        self._kv = kv
        self._stats = stats

    def is_due(self) -> bool:
        """Count a step; whether it is to be compared."""
        self._n_steps += 1
        return self._n_steps % self._every == 0

    def compare(
        self, approximate: np.ndarray, cell: int, compute_exactly: Callable[[], np.ndarray]
    ) -> None:
        """Judge the logits (n_vocab,) of the step that wrote K and V of `cell`.

        compute_exactly makes the step's exact logits and may overwrite that cell: what it held is
        put back, whatever is raised. Raises that, and ModelError for logits that are no numbers.
        """
        started = time.perf_counter_ns()
        rows = self._kv.read_cell(cell)
        try:
            exact = compute_exactly()
        finally:
            self._kv.write_cell(cell, rows)
        kl = _divergence(exact, approximate)
        is_same_top = bool(exact.argmax() == approximate.argmax())
        self._stats.record_verified(kl, is_same_top, time.perf_counter_ns() - started)


def _divergence(exact: np.ndarray, approximate: np.ndarray) -> float:
    """KL(exact || approximate) in nats."""
    p, q = Softmax(len(exact)), Softmax(len(exact))
    p.take(exact)
    q.take(approximate)
    kl = kl_divergence(p, q)
    if not math.isfinite(kl):
        raise ModelError(
            "the model's answer has values that are no numbers: the file may be damaged"
        )
    return kl
