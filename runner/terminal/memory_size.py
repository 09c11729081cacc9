"""A size of memory on the command line."""

from collections.abc import Mapping
from typing import Any

import click

from runner.byte_sizes import parse_bytes
from runner.config import MAX_MOE_CACHE_BYTES
from runner.errors import OptionError


class MemorySize(click.ParamType):  # type: ignore[type-arg]
    """A size in bytes, or one of a few words."""

    name = "size"

    def __init__(self, words: Mapping[str, int] | None = None) -> None:
        """words: what stands for a number."""
        self._words = words or {}

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """As it stands in the help."""
        return "|".join([*self._words, "SIZE"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Raises click.BadParameter for anything else."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        if value.lower() in self._words:
            return self._words[value.lower()]
        try:
            n_bytes = parse_bytes(value)
        except OptionError as error:
            self.fail(f"{error}{self._or_words()}", param, ctx)
        if n_bytes > MAX_MOE_CACHE_BYTES:
            self.fail(f"{value!r} is more than {MAX_MOE_CACHE_BYTES >> 40}TiB", param, ctx)
        return n_bytes

    def _or_words(self) -> str:
        return f"; or {' or '.join(self._words)}" if self._words else ""
