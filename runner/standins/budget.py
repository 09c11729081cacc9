"""How much of the router's weight stand-ins may carry. Knows no policy and no expert.

Every MoE layer gives each token a weight of 1, shared among its experts. The share that went to
others than the router chose stays under a budget over every window of the last tokens; how it is
best spent is learnt on the way (`Opening`).
"""

import math
from collections import deque

import numpy as np

WINDOW = 256  # tokens; of a longer batch the window is the batch
_SMALLEST_OPENING = 1e-3
_GAIN = 0.02  # how fast the opening follows the budget, per token


class Budget:
    """Substituted weight of the last tokens; one batch at a time, layer after layer."""

    def __init__(self, share: float, n_layer: int) -> None:
        """share: at most this part of the weight, 0 to 1; n_layer: layers with experts."""
        self.share = share
        self._n_layer = n_layer
        self._history: deque[float] = deque(maxlen=WINDOW)  # per token, oldest first
        self._spent = np.zeros(0)  # (n_tokens,), of the batch so far
        self._before = np.zeros(0)  # (n_tokens,), left by the tokens before the batch

    @property
    def spent_share(self) -> float:
        """The part of the last tokens' weight that stand-ins carried."""
        n = len(self._history)
        return sum(self._history) / (n * self._n_layer) if n else 0.0

    def begin(self, n_tokens: int) -> None:
        """A batch comes; what an unfinished one spent is forgotten."""
        self._spent = np.zeros(n_tokens)
        if n_tokens == 1:  # the usual case, without numpy's cost per call
            seen = list(self._history)[-(WINDOW - 1) :]
            self._before = np.array([self.share * self._n_layer * len(seen) - sum(seen)])
            return
        room = np.maximum(0, WINDOW - 1 - np.arange(n_tokens))
        n_seen = np.minimum(len(self._history), room)  # tokens before, in each token's window
        totals = np.concatenate([[0.0], np.cumsum(list(reversed(self._history)))])
        self._before = self.share * self._n_layer * n_seen - totals[n_seen]

    def allowance(self, layer: int) -> np.ndarray:
        """What this layer may substitute: tokens 0 to t together at most the t-th, (n_tokens,).

        Each layer has the same share; what earlier layers left is there for the later ones.
        """
        own, n_tokens = self.share * (layer + 1), len(self._spent)
        allowed: np.ndarray
        if n_tokens == 1:
            allowed = self._before + own - self._spent
        else:
            allowed = self._before + own * np.arange(1, n_tokens + 1) - np.cumsum(self._spent)
        return allowed

    def spend(self, weight: np.ndarray) -> None:
        """Count what a layer substituted of each token, (n_tokens,)."""
        self._spent += weight

    def end(self) -> None:
        """The batch is finished."""
        self._history.extend(self._spent.tolist())

    def share_of(self, weight: float, n_tokens: int) -> float:
        """A weight in all layers as a part of all that these tokens have."""
        return weight / (n_tokens * self._n_layer)


class Opening:
    """How readily pairs are given away, 0 to 1, so that the budget lasts and is used.

    A policy that gives away whatever comes first spends its budget on whatever comes first. The
    opening shrinks while a policy wants to give away more than the budget has and grows while it
    wants less, so that the cheapest pairs are given away all the time.
    """

    def __init__(self, share: float, start: float) -> None:
        self._share = share
        self.value = 1.0 if share >= 1.0 else max(_SMALLEST_OPENING, min(1.0, start))

    def follow(self, wanted_share: float, n_tokens: int) -> None:
        """Learn from a batch whose policy wanted to give away this share of its weight."""
        if not 0.0 < self._share < 1.0:
            return
        error = max(-4.0, 1.0 - wanted_share / self._share)
        self.value *= math.exp(_GAIN * error * min(n_tokens, 8))
        self.value = max(_SMALLEST_OPENING, min(1.0, self.value))
