"""Cursor: reads a header forward through a small window, within the file and within a budget."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from quant.errors import GGUFError
from quant.read_only_file import ReadOnlyFile

WINDOW_BYTES = 1 << 17
MAX_HEADER_BYTES = 256 << 20  # the largest known headers have 30 MB
MAX_KEPT_BYTES = 8 << 20  # of keys, names and short strings, together
MAX_TENSORS = 32_768  # Mixtral 8x22B with one tensor per expert has 1,859
MAX_KEYS = 16_384
MAX_ARRAY_STRINGS = 3 << 19  # the largest known vocabulary with its merges has 0.9 million

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass
class HeaderBudget:
    """What reading the headers of one model may still use; shared by the shards of a split file.

    A file may be sparse and as large as its author likes, so its size alone bounds nothing.
    """

    header_bytes: int = MAX_HEADER_BYTES
    kept_bytes: int = MAX_KEPT_BYTES
    tensors: int = MAX_TENSORS
    keys: int = MAX_KEYS
    strings: int = MAX_ARRAY_STRINGS

    def charge_tensors(self, cursor: "Cursor", n: int) -> None:
        self.tensors -= n
        if self.tensors < 0:
            raise cursor.error(8, "the number of tensors", str(n), f"at most {MAX_TENSORS}")

    def charge_keys(self, cursor: "Cursor", n: int) -> None:
        self.keys -= n
        if self.keys < 0:
            raise cursor.error(16, "the number of metadata keys", str(n), f"at most {MAX_KEYS}")

    def charge_strings(self, cursor: "Cursor", n: int, what: str) -> None:
        self.strings -= n
        if self.strings < 0:
            expected = f"at most {MAX_ARRAY_STRINGS} strings in all arrays"
            raise cursor.error(cursor.position, what, f"an array of {n} strings", expected)

    def charge_kept(self, cursor: "Cursor", n_bytes: int, what: str) -> None:
        self.kept_bytes -= n_bytes
        if self.kept_bytes < 0:
            expected = f"at most {MAX_KEPT_BYTES} bytes of names and strings"
            raise cursor.error(cursor.position, what, "too much text", expected)


class Cursor:
    """A position in a header. Every step checks the file's end first, then the budget."""

    def __init__(self, file: ReadOnlyFile, budget: HeaderBudget) -> None:
        self.file = file
        self.budget = budget
        self.size = file.size_bytes
        self.position = 0
        self._window = b""
        self._window_at = 0

    def error(self, at: int | None, what: str, found: str, expected: str) -> GGUFError:
        """The one message form: file, what, where, what was found, what was expected."""
        where = "" if at is None else f" at byte {at}"
        return GGUFError(f"{self.file.path}: {what}{where}: found {found}; expected {expected}")

    def take(self, n: int, what: str) -> bytes:
        """The next `n` bytes; `n` is bounded by the caller."""
        at = self.position - self._window_at
        if at < 0 or at + n > len(self._window):
            self._move_window(n, what)
            at = 0
        self.position += n
        return self._window[at : at + n]

    def u32(self, what: str) -> int:
        value: int = _U32.unpack(self.take(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = _U64.unpack(self.take(8, what))[0]
        return value

    def u64s(self, n: int, what: str) -> tuple[int, ...]:
        return struct.unpack(f"<{n}Q", self.take(8 * n, what))

    def length(self, what: str) -> int:
        """A string's length, checked against the file's end."""
        at = self.position
        n = self.u64(what)
        if n > self.size - self.position:
            left = self.size - self.position
            raise self.error(at, what, f"a string of {n} bytes", f"at most the {left} bytes left")
        return n

    def text(self, what: str, max_bytes: int) -> str:
        """A name or a key. Raises GGUFError when too long or not UTF-8."""
        at = self.position
        n = self.length(what)
        if n > max_bytes:
            raise self.error(at, what, f"{n} bytes", f"at most {max_bytes}")
        self.budget.charge_kept(self, n, what)
        raw = self.take(n, what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            found = repr(raw[:40])[1:]
            raise self.error(at, what, f"the bytes {found}", "UTF-8 text") from None

    def skip(self, n: int, what: str) -> None:
        """Pass over `n` bytes without reading them."""
        if n > self.size - self.position:
            left = self.size - self.position
            raise self.error(self.position, what, f"{n} bytes", f"at most the {left} bytes left")
        self.position += n
        self._check_budget(what)

    def skip_strings(self, n: int, what: str) -> None:
        """Pass over `n` strings, checking that each ends within the file."""
        unpack, window, start = _U64.unpack_from, self._window, self._window_at
        at, last = self.position - start, len(window) - 8
        while n:
            if at > last:
                self.position = start + at
                self._move_window(8, what)
                window, start = self._window, self._window_at
                at, last = 0, len(window) - 8
            at += 8 + unpack(window, at)[0]
            n -= 1
        self.position = start + at
        if self.position > self.size:
            raise self._ended_early(self.position, what)

    def strings(self, n: int, what: str, max_bytes: int) -> Iterator[bytes]:
        """Yield the next `n` strings. Raises GGUFError for one longer than `max_bytes`."""
        unpack = _U64.unpack_from
        at, last = self.position - self._window_at, -1
        for _ in range(n):
            if not 0 <= at <= last:
                self.position = self._window_at + at
                self._move_window(8, what)
                at, last = 0, len(self._window) - 8
            end = at + 8 + unpack(self._window, at)[0]
            if end > len(self._window):
                self.position = self._window_at + at
                if end - at - 8 > max_bytes:
                    found = f"a string of {end - at - 8} bytes"
                    raise self.error(self.position, what, found, f"at most {max_bytes}")
                self._move_window(end - at, what)
                at, end, last = 0, end - at, len(self._window) - 8
            yield self._window[at + 8 : end]
            at = end

    def _move_window(self, n: int, what: str) -> None:
        if self.position + n > self.size:
            raise self._ended_early(self.position, what)
        self._check_budget(what)
        n_bytes = min(max(n, WINDOW_BYTES), self.size - self.position)
        self._window = self.file.read(self.position, n_bytes)
        self._window_at = self.position

    def _ended_early(self, at: int, what: str) -> GGUFError:
        return self.error(
            min(at, self.size), what, "the end of the file", "more bytes: the file is cut short"
        )

    def _check_budget(self, what: str) -> None:
        if self.position > self.budget.header_bytes:
            expected = f"headers of at most {MAX_HEADER_BYTES} bytes"
            raise self.error(self.position, what, "no end of the header", expected)


def shown(text: str) -> str:
    """`text` from a file as it may stand in a message: quoted, escaped, at most 80 characters."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
