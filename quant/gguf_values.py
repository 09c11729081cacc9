"""The values of GGUF metadata: scalars and short strings at once, arrays and long texts lazily."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.errors import GGUFError
from quant.gguf_cursor import Cursor, HeaderBudget, shown
from quant.read_only_file import ReadOnlyFile

MAX_SHORT_STRING_BYTES = 1 << 18  # longer ones (a whole tokenizer.json) stay in the file

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: ("u8", struct.Struct("<B")),
    1: ("i8", struct.Struct("<b")),
    2: ("u16", struct.Struct("<H")),
    3: ("i16", struct.Struct("<h")),
    4: ("u32", struct.Struct("<I")),
    5: ("i32", struct.Struct("<i")),
    6: ("f32", struct.Struct("<f")),
    7: ("bool", struct.Struct("<B")),
    10: ("u64", struct.Struct("<Q")),
    11: ("i64", struct.Struct("<q")),
    12: ("f64", struct.Struct("<d")),
}
_DTYPES = {
    "u8": "<u1",
    "i8": "<i1",
    "u16": "<u2",
    "i16": "<i2",
    "u32": "<u4",
    "i32": "<i4",
    "f32": "<f4",
    "bool": "<u1",
    "u64": "<u8",
    "i64": "<i8",
    "f64": "<f8",
}


@dataclass(frozen=True)
class MetadataArray:
    """An array that stays in the file until it is asked for; its length is already checked."""

    element_type: str  # "u8" ... "f64", "bool", "str"
    n: int
    offset: int  # of the first element, from the start of the file
    n_bytes: int
    _file: ReadOnlyFile = field(repr=False, compare=False)

    def numbers(self, n: int | None = None) -> NDArray[Any]:
        """The first `n` elements, or all: (n,), of the array's own type.

        Raises GGUFError when it holds strings.
        """
        if self.element_type == "str":
            raise GGUFError(f"{self._file.path}: found an array of strings; expected numbers")
        dtype = np.dtype(_DTYPES[self.element_type])
        n = self.n if n is None else min(n, self.n)
        values = np.frombuffer(self._file.read(self.offset, n * dtype.itemsize), dtype)
        return values != 0 if self.element_type == "bool" else values

    def strings(self, max_bytes: int = MAX_SHORT_STRING_BYTES) -> Iterator[bytes]:
        """All elements one by one. Raises GGUFError for numbers and for a string too long."""
        if self.element_type != "str":
            found = f"an array of {self.element_type}"
            raise GGUFError(f"{self._file.path}: found {found}; expected strings")
        cursor = Cursor(self._file, HeaderBudget())
        cursor.position = self.offset
        return cursor.strings(self.n, "an array of strings", max_bytes)


@dataclass(frozen=True)
class LongString:
    """A string too long to be read without being asked for."""

    n_bytes: int
    offset: int  # from the start of the file
    _file: ReadOnlyFile = field(repr=False, compare=False)

    def read(self) -> str:
        """The text; bytes that are no UTF-8 become replacement characters."""
        return self._file.read(self.offset, self.n_bytes).decode(errors="replace")


Value = bool | int | float | str | LongString | MetadataArray


def read_value(cursor: Cursor, key: str) -> tuple[str, Value]:
    """The type and the value of the metadata key whose name has just been read."""
    what = f"metadata key {shown(key)}"
    at = cursor.position
    type_id = cursor.u32(what)
    if type_id == _STRING:
        return "str", _read_string(cursor, what)
    if type_id == _ARRAY:
        return "array", _read_array(cursor, what)
    if type_id not in _SCALARS:
        raise cursor.error(at, what, f"value type {type_id}", "0 to 12")
    name, code = _SCALARS[type_id]
    value = code.unpack(cursor.take(code.size, what))[0]
    return name, bool(value) if name == "bool" else value


def _read_string(cursor: Cursor, what: str) -> str | LongString:
    n = cursor.length(what)
    if n > MAX_SHORT_STRING_BYTES:
        text = LongString(n, cursor.position, cursor.file)
        cursor.skip(n, what)
        return text
    cursor.budget.charge_kept(cursor, n, what)
    return cursor.take(n, what).decode(errors="replace")


def _read_array(cursor: Cursor, what: str) -> MetadataArray:
    at = cursor.position
    type_id = cursor.u32(what)
    n = cursor.u64(what)
    start = cursor.position
    if type_id == _STRING:
        cursor.budget.charge_strings(cursor, n, what)
        cursor.skip_strings(n, what)
        return MetadataArray("str", n, start, cursor.position - start, cursor.file)
    if type_id == _ARRAY:
        raise cursor.error(at, what, "an array of arrays", "an array of numbers or strings")
    if type_id not in _SCALARS:
        raise cursor.error(at, what, f"element type {type_id}", "0 to 12")
    name, code = _SCALARS[type_id]
    cursor.skip(n * code.size, f"{what}, an array of {n} elements")
    return MetadataArray(name, n, start, n * code.size, cursor.file)
