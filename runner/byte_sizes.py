"""Sizes, counts and ranges as text: what a person reads and what a flag takes. Knows no model."""

import math
import re
from collections.abc import Sequence
from fractions import Fraction

from runner.errors import OptionError

_UNIT_BYTES = {
    "": 1 << 20,  # a bare number, as in llama.cpp's forks
    "K": 1 << 10, "KIB": 1 << 10, "KB": 10**3,
    "M": 1 << 20, "MIB": 1 << 20, "MB": 10**6,
    "G": 1 << 30, "GIB": 1 << 30, "GB": 10**9,
    "T": 1 << 40, "TIB": 1 << 40, "TB": 10**12,
}  # fmt: skip
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?) ?([A-Za-z]{0,3})", re.ASCII)
_SHOWN_IN_KIB = 10 << 20  # below it, rounding up to a MiB would be coarse


def bytes_text(n_bytes: int) -> str:
    """As "26.4 GB" or "107 MB": three digits, powers of 1000."""
    value, units = float(n_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    digits = 0 if value >= 100 or units[0] == "B" else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {units[0]}"


def count_text(n: int) -> str:
    """A number of parameters, as "46.7 B" or "28.9 M"."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= limit:
            return f"{n / limit:.1f} {unit}"
    return str(n)


def range_text(counts: Sequence[int]) -> str:
    """Smallest and largest: "3 to 4", or "3" when all are the same."""
    least, most = min(counts), max(counts)
    return str(least) if least == most else f"{least} to {most}"


def parse_bytes(text: str) -> int:
    """Bytes of "6GiB", "1500M", "1.5GB" or "6144" (MiB), rounded up.

    Raises OptionError that says what a size looks like.
    """
    match = _SIZE.fullmatch(text.strip())
    unit_bytes = _UNIT_BYTES.get(match[2].upper()) if match else None
    if match is None or unit_bytes is None:
        raise OptionError(f"{text!r:.40} is no size: expected one such as 6GiB, 1500M or 1.5GB")
    return math.ceil(Fraction(match[1]) * unit_bytes)


def flag_text(n_bytes: int) -> str:
    """The size for a flag, rounded up: "1233MiB"; `parse_bytes` reads it."""
    if n_bytes < _SHOWN_IN_KIB:
        return f"{-(-n_bytes >> 10)}KiB"
    return f"{-(-n_bytes >> 20)}MiB"
