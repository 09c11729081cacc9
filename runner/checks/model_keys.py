"""ModelKeys: metadata read with the type and range that a model needs. Knows no tensor."""

import math
import struct
from collections.abc import Sequence

from quant.gguf_cursor import shown
from quant.gguf_file import GGUFFile, LongString, MetadataArray
from runner.errors import ModelError


class ModelKeys:
    """Typed access to the metadata; each problem is a ModelError that names the key.

    The types are as strict as llama.cpp's, which reads the same keys after us.
    """

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self._path = file.paths[0]

    def __contains__(self, key: str) -> bool:
        return key in self._file.metadata

    def error(self, key: str, found: str, expected: str) -> ModelError:
        """The one message form: file, key, what was found, what was expected."""
        return ModelError(f"{self._path}: {key}: found {found}; expected {expected}")

    def unsigned(
        self, key: str, low: int = 0, high: int = 2**31 - 1, default: int | None = None
    ) -> int:
        """A u32 within `low` to `high`."""
        if default is not None and key not in self:
            return default
        value = self._typed(key, "u32")
        assert isinstance(value, int)
        return self._in_range(key, value, low, high)

    def uniform(self, key: str, n: int, low: int, high: int, default: int | None = None) -> int:
        """A u32, or an array of `n` equal ones: one value per layer."""
        if not isinstance(self._file.metadata.get(key), MetadataArray):
            return self.unsigned(key, low, high, default)
        array = self.array(key, ("u32", "i32"), at_least=n)
        if array.n != n:
            raise self.error(key, f"{array.n} values", f"{n}, one per layer")
        values = array.numbers()
        if (values != values[0]).any():
            found = f"values from {values.min()} to {values.max()}"
            raise self.error(key, found, "one value for all layers; mixtures are not supported")
        return self._in_range(key, int(values[0]), low, high)

    def positive_float(self, key: str, default: float | None = None) -> float:
        """A finite f32 above zero."""
        value = self.finite_float(key, default)
        if value <= 0:
            raise self.error(key, repr(value), "a number above 0")
        return value

    def finite_float(self, key: str, default: float | None = None) -> float:
        """A finite f32."""
        if default is not None and key not in self:
            return default
        value = self._typed(key, "f32")
        assert isinstance(value, float)
        if not math.isfinite(value):
            raise self.error(key, repr(value), "a finite number")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        if key not in self:
            return default
        value = self._typed(key, "bool")
        assert isinstance(value, bool)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string of ordinary length."""
        if default is not None and key not in self:
            return default
        value = self._typed(key, "str")
        if isinstance(value, LongString):
            raise self.error(key, f"a string of {value.n_bytes} bytes", "a short string")
        assert isinstance(value, str)
        return value

    def array(self, key: str, element_types: Sequence[str], at_least: int) -> MetadataArray:
        """An array of at least so many elements of one of the types; still unread."""
        value = self._typed(key, "array")
        assert isinstance(value, MetadataArray)
        if value.element_type not in element_types:
            expected = f"an array of {' or '.join(element_types)}"
            raise self.error(key, f"an array of {value.element_type}", expected)
        if value.n < at_least:
            raise self.error(key, f"{value.n} values", f"at least {at_least}")
        return value

    def _typed(self, key: str, type_name: str) -> object:
        if key not in self:
            raise self.error(key, "no such metadata key", f"one of type {type_name}")
        found = self._file.metadata_types[key]
        if found != type_name:
            raise self.error(key, f"type {found}", type_name)
        return self._file.metadata[key]

    def _in_range(self, key: str, value: int, low: int, high: int) -> int:
        if low <= value <= high:
            return value
        raise self.error(key, str(value), f"{low} to {high}")


def as_f32(value: float) -> float:
    """`value` rounded to the single precision in which llama.cpp computes."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


__all__ = ["ModelKeys", "as_f32", "shown"]
