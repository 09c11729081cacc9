"""How much of the router's weight stand-ins may carry. Knows no policy and no expert.

Every MoE layer gives each token a weight of 1, shared among its experts; but in the last layer
only the last token of a batch goes on to the experts. The share that went to others than the
router chose stays under a budget over every window of the last tokens; how it is best spent is
learnt on the way (`Opening`).
"""

import math
from collections import deque

import numpy as np

WINDOW = 256  # tokens; a longer batch may spend what so many tokens may
_SMALLEST_OPENING = 1e-3
_GAIN = 0.02  # how fast the opening follows the budget, per token


class Budget:
    """Substituted weight of the last tokens; one batch at a time, layer after layer."""

    def __init__(self, share: float, n_layer: int) -> None:
        """share: at most this part of the weight, 0 to 1; n_layer: layers with experts."""
        self.share = share
        self._n_layer = n_layer
        self._history: deque[tuple[int, float]] = deque(maxlen=WINDOW)  # weight and spent of each
        self._spent = np.zeros(0)  # (n_tokens,), of the batch so far
        self._before: np.ndarray | None = None  # (n_tokens,), left by earlier tokens; when asked

    @property
    def spent_share(self) -> float:
        """The part of the last tokens' weight that stand-ins carried."""
        weight = sum(weight for weight, _ in self._history)
        return sum(spent for _, spent in self._history) / weight if weight else 0.0

    def begin(self, n_tokens: int) -> None:
        """A batch comes; what an unfinished one spent is forgotten."""
        self._spent = np.zeros(n_tokens)
        self._before = None

    def _left_before(self) -> np.ndarray:
        """What the tokens before the batch left for each of its tokens, (n_tokens,)."""
        every = self._n_layer - 1  # weight that every token has
        extra = [self.share * (weight - every) - spent for weight, spent in reversed(self._history)]
        # Later tokens, perhaps without a last layer, push out others that had one. So what the
        # last layers allow counts only as far as it will not be missing then.
        least = np.minimum.accumulate(np.cumsum([0.0, *extra]))
        room = np.maximum(0, WINDOW - 1 - np.arange(len(self._spent)))
        n_seen = np.minimum(len(self._history), room)  # tokens before, in each token's window
        left: np.ndarray = self.share * every * n_seen + least[n_seen]
        return left

    def allowance(self, layer: int, n_routed: int) -> np.ndarray:
        """What this layer may substitute of the batch's last n_routed tokens: the first t + 1 of
        them together at most the t-th, (n_routed,).

        Each layer has the same share; what earlier layers left is there for the later ones.
        """
        if self._before is None:
            self._before = self._left_before()
        n_tokens, n_layers = len(self._spent), min(layer + 1, self._n_layer - 1)
        if n_tokens == 1:  # the usual case
            lone: np.ndarray = self._before + self.share * (layer + 1) - self._spent
            return lone
        own = self.share * n_layers * np.minimum(np.arange(1, n_tokens + 1), WINDOW)
        if layer == self._n_layer - 1:
            own[-1] += self.share
        allowed: np.ndarray = self._before + own - np.cumsum(self._spent)
        return allowed[n_tokens - n_routed :]

    def spend(self, weight: np.ndarray) -> None:
        """Count what a layer substituted of each of the batch's last tokens, (n_routed,)."""
        if len(self._spent) == 1:  # the usual case
            self._spent[0] += weight[0]
        else:
            self._spent[len(self._spent) - len(weight) :] += weight

    def end(self) -> None:
        """The batch is finished."""
        last = len(self._spent) - 1
        for token, spent in enumerate(self._spent.tolist()):
            self._history.append((self._n_layer - (token < last), spent))

    def share_of(self, weight: float) -> float:
        """A weight as a part of all that the batch has."""
        return weight / (len(self._spent) * (self._n_layer - 1) + 1)


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
