"""Which tokens a profile is made from: contexts spread evenly over texts. Runs no model."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runner.errors import OptionError

CONTEXT_TOKENS = 256  # long enough to be like real text, short enough for many places of it
MIN_TOKENS = 64


@dataclass(frozen=True)
class Calibration:
    """The contexts; their counted tokens, one context after the other, are numbered from 0."""

    contexts: tuple[tuple[int, ...], ...]  # tokens
    sampled: np.ndarray  # (n_sampled,) int64, rising: the tokens whose experts are compared

    @property
    def n_tokens(self) -> int:
        """Tokens that count.

        The first of a context does not: attention leans on it whatever it is, and its activations
        are far larger than those of all others.
        """
        return sum(len(context) - 1 for context in self.contexts)

    def sampled_in(self, context: int) -> np.ndarray:
        """The sampled ones of a context, counted from its first counted token."""
        start = sum(len(other) - 1 for other in self.contexts[:context])
        end = start + len(self.contexts[context]) - 1
        return self.sampled[(self.sampled >= start) & (self.sampled < end)] - start

    @property
    def digest(self) -> str:
        """A name for exactly these tokens, hex."""
        text = repr((self.contexts, self.sampled.tolist()))
        return hashlib.sha256(text.encode()).hexdigest()


def calibrate(
    texts: Sequence[Sequence[int]], bos: int | None, n_tokens: int, n_sampled: int
) -> Calibration:
    """Choose about n_tokens tokens of the texts, and n_sampled of these; all if there are fewer.

    Every text gets the same share, or as much as it has; `bos` begins each context if it is not
    None. Raises OptionError when the texts have less than MIN_TOKENS.
    """
    n_used = 0 if bos is not None else 1  # of the text, by the first token of a context
    rooms = [len(text) - n_used * -(-len(text) // CONTEXT_TOKENS) for text in texts]
    shares = _shares(rooms, n_tokens)
    if sum(shares) < MIN_TOKENS:
        raise OptionError(
            f"the text has {sum(map(len, texts))} tokens; a profile needs at least {MIN_TOKENS}, "
            "and some thousands to be worth something"
        )
    lead = () if bos is None else (bos,)
    contexts = tuple(
        lead + piece
        for text, share in zip(texts, shares, strict=True)
        for piece in _pieces(text, share, n_used)
    )
    n = sum(shares)
    sampled = np.linspace(0, n - 1, min(n, n_sampled)).round().astype(np.int64)
    return Calibration(contexts, sampled)


def _shares(rooms: Sequence[int], n_tokens: int) -> list[int]:
    """How many tokens each text gives: all the same, and what a short one lacks the others."""
    shares, left = [0] * len(rooms), n_tokens
    by_size = sorted(range(len(rooms)), key=lambda i: rooms[i])
    for n_done, i in enumerate(by_size):
        shares[i] = min(rooms[i], left // (len(rooms) - n_done))
        left -= shares[i]
    return shares


def _pieces(text: Sequence[int], n_counted: int, n_used: int) -> list[tuple[int, ...]]:
    """n_counted tokens of a text in pieces as even as can be, with even gaps around them.

    Each piece has n_used tokens more, which do not count.
    """
    n_pieces = -(-n_counted // (CONTEXT_TOKENS - 1))
    sizes = [n_counted // n_pieces + (i < n_counted % n_pieces) for i in range(n_pieces)]
    n_gap = len(text) - n_counted - n_used * n_pieces
    pieces, position = [], 0
    for i, size in enumerate(sizes):
        start = position + n_gap * (2 * i + 1) // (2 * n_pieces)
        pieces.append(tuple(text[start : start + n_used + size]))
        position += n_used + size
    return pieces
