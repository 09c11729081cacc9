"""Watches the quality of an answer without a reference. Knows no engine, no text and no stand-ins.

A model that is led astray becomes unsure, or repeats itself: the entropy of its choices and the
share of repeated 4-grams say so.
"""

import math
from collections import Counter, deque

import numpy as np

from runner.quality.divergence import Softmax

N_ENTROPY = 64  # tokens that the entropy is a mean of
N_REPEATS = 256  # tokens among which repeats are looked for
_N = 4  # tokens of a 4-gram

_Gram = tuple[int, ...]


class QualityMeter:
    """Figures of the latest answer's last tokens; the engine's thread writes and reads them."""

    def __init__(self) -> None:
        self._softmax: Softmax | None = None
        self._entropies: deque[float] = deque(maxlen=N_ENTROPY)
        self._last: deque[int] = deque(maxlen=_N)
        self._grams: deque[_Gram] = deque()  # oldest first
        self._counts: Counter[_Gram] = Counter()  # of these

    @property
    def output_entropy(self) -> float:
        """Of the distributions that the last tokens were picked from, mean in nats; at first 0."""
        return sum(self._entropies) / len(self._entropies) if self._entropies else 0.0

    @property
    def repeated_4grams(self) -> float:
        """The share of the last tokens' 4-grams that had occurred before among them."""
        n = len(self._grams)
        return 1.0 - len(self._counts) / n if n else 0.0

    def begin(self) -> None:
        """A new answer comes."""
        self._entropies.clear()
        self._last.clear()
        self._grams.clear()
        self._counts.clear()

    def observe(self, logits: np.ndarray, token: int) -> None:
        """`token` was picked by these logits (n_vocab,) float32, which are not changed."""
        if self._softmax is None:
            self._softmax = Softmax(len(logits), np.float32)  # half the time of float64
        self._softmax.take(logits)
        entropy = self._softmax.entropy()
        if math.isfinite(entropy):  # numbers that overflowed have none
            self._entropies.append(entropy)
        self._last.append(token)
        if len(self._last) == _N:
            self._add(tuple(self._last))

    def _add(self, gram: _Gram) -> None:
        self._grams.append(gram)
        self._counts[gram] += 1
        if len(self._grams) > N_REPEATS - _N + 1:
            oldest = self._grams.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]
