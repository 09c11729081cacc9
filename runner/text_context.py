"""What the context holds: its tokens in order, and the cells of the KV cache that belong to them.

Knows no graph of a batch and no expert; `context_shift` does the arithmetic of a shift.
"""

from collections.abc import Sequence

import numpy as np

from runner import context_shift
from runner.device_state import EngineParts
from runner.errors import ContextFullError, OptionError


class TextContext:
    """The tokens whose keys and values are cached."""

    def __init__(self, parts: EngineParts, n_ctx: int, n_keep: int, can_shift: bool) -> None:
        """n_ctx: tokens that fit. can_shift: the oldest half may go when it is full, but for the
        first token and n_keep more."""
        self.tokens: list[int] = []
        self._first_inexact: int | None = None  # the first token that stand-ins computed, if any
        self._parts = parts
        self._n_ctx = n_ctx
        self._can_shift = can_shift
        self._n_keep = min(1 + n_keep, n_ctx - 2)  # attention leans on the first token

    @property
    def is_full(self) -> bool:
        return len(self.tokens) >= self._n_ctx

    def fit(self, tokens: list[int]) -> list[int]:
        """The prompt as it can be computed: itself, or without its oldest part if shifting.

        Raises OptionError for an empty one, ContextFullError for one that is too long.
        """
        if not tokens:
            raise OptionError("the prompt is empty: there is nothing to continue")
        if len(tokens) < self._n_ctx:
            return tokens
        if self._can_shift:
            return context_shift.without_oldest(tokens, self._n_ctx, self._n_keep)
        raise ContextFullError(
            f"the prompt has {len(tokens)} tokens and the context holds {self._n_ctx}, one of them "
            "for the answer: a larger -c makes more room"
        )

    def reuse(self, tokens: Sequence[int], is_exact: bool = False) -> int:
        """Keep the common beginning, at least one token less than all; returns its length.

        is_exact: nothing is kept from the first token on that stand-ins computed.
        """
        if is_exact and self._first_inexact is not None:
            self.truncate(self._first_inexact)
        n = 0
        for mine, wanted in zip(self.tokens, tokens[:-1], strict=False):
            if mine != wanted:
                break
            n += 1
        self.truncate(n)
        return n

    def take(self, n_tokens: int) -> np.ndarray:
        """Cells for the next tokens, (n_tokens,) int64; `append` or `truncate` follows."""
        cells = self._parts.kv.cells.take(len(self.tokens), n_tokens)
        self._parts.kv.clear_visible()
        return cells

    def append(self, tokens: Sequence[int], is_exact: bool = True) -> None:
        """These tokens are computed, in the cells that were taken; is_exact: without stand-ins."""
        if not is_exact and self._first_inexact is None:
            self._first_inexact = len(self.tokens)
        self.tokens += tokens

    def truncate(self, n_past: int) -> None:
        """Forget every token from n_past on."""
        self._parts.kv.truncate(n_past)
        del self.tokens[n_past:]
        if self._first_inexact is not None and n_past <= self._first_inexact:
            self._first_inexact = None

    def make_room(self) -> bool:
        """Drop the oldest half if the user allows it."""
        if not self._can_shift:
            return False
        n_discard = (self._n_ctx - self._n_keep) // 2
        moves = self._parts.kv.cells.shift(self._n_keep, n_discard)
        try:
            context_shift.rotate_keys(self._parts, moves)
        except BaseException:
            self.truncate(0)  # keys and positions no longer agree
            raise
        del self.tokens[self._n_keep : self._n_keep + n_discard]
        if self._first_inexact is not None:
            self._first_inexact = min(self._first_inexact, self._n_keep)
        return True
