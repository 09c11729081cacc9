"""The header of one GGUF file, read with a bound on every count. Knows no model, no split files.

Layout (little-endian): magic, version, tensor count, key count; then the metadata, one
(key, type, value) after the other; then the tensors' names, shapes, types and offsets; then
padding to `general.alignment` and the tensors' bytes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from quant.ggml_types import GGML_TYPES, REMOVED_TYPES, GGMLType
from quant.gguf_cursor import Cursor, HeaderBudget, shown
from quant.gguf_values import Value, read_value
from quant.read_only_file import ReadOnlyFile

DEFAULT_ALIGNMENT = 32  # bytes
MIN_ALIGNMENT, MAX_ALIGNMENT = 8, 1 << 20  # the format asks for multiples of 8
MAX_NAME_BYTES = 63  # of a tensor; ggml keeps names in 64 bytes with a final NUL
MAX_KEY_BYTES = 65535
MAX_DIMS = 4
SUPPORTED_VERSIONS = (2, 3)


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A run of bytes in one shard."""

    shard: int
    offset: int  # from the start of the shard's file
    n_bytes: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header says of one tensor, checked against the file's size."""

    name: str
    shape: tuple[int, ...]  # ggml's order: ne0, the length of a row, first
    type: GGMLType
    shard: int
    offset: int  # from the start of the shard's file
    n_bytes: int

    @property
    def range(self) -> ByteRange:
        return ByteRange(self.shard, self.offset, self.n_bytes)

    @property
    def n_elements(self) -> int:
        n = 1
        for length in self.shape:
            n *= length
        return n


@dataclass(frozen=True, slots=True)
class Header:
    """One file's header."""

    version: int
    alignment: int  # bytes
    metadata: Mapping[str, Value]
    types: Mapping[str, str]  # of the metadata: "u32", "str", "array"
    tensors: Mapping[str, TensorInfo]  # in file order


def read_header(file: ReadOnlyFile, shard: int, budget: HeaderBudget) -> Header:
    """Read and check the header of `file`. Raises GGUFError; allocates no more than `budget`."""
    cursor = Cursor(file, budget)
    version = _read_version(cursor)
    n_tensors = cursor.u64("the number of tensors")
    n_keys = cursor.u64("the number of metadata keys")
    budget.charge_tensors(cursor, n_tensors)
    budget.charge_keys(cursor, n_keys)
    metadata, types = _read_metadata(cursor, n_keys)
    alignment = _alignment(cursor, metadata, types)
    infos = [_read_tensor_info(cursor) for _ in range(n_tensors)]
    tensors = dict(_place(cursor, infos, alignment, shard))
    return Header(
        version,
        alignment,
        MappingProxyType(metadata),
        MappingProxyType(types),
        MappingProxyType(tensors),
    )


def _read_version(cursor: Cursor) -> int:
    magic = cursor.take(4, "the magic")
    if magic != b"GGUF":
        raise cursor.error(0, "the magic", repr(magic)[1:], "'GGUF': this is no GGUF file")
    version = cursor.u32("the version")
    if version & 0xFFFF == 0 and version:
        raise cursor.error(
            4, "the version", f"{version:#010x}", "a little-endian file; this one is big-endian"
        )
    if version == 1:
        raise cursor.error(
            4, "the version", "1", "2 or 3; version 1 was given up in 2023: convert the model again"
        )
    if version not in SUPPORTED_VERSIONS:
        raise cursor.error(4, "the version", str(version), "2 or 3")
    return version


def _read_metadata(cursor: Cursor, n_keys: int) -> tuple[dict[str, Value], dict[str, str]]:
    metadata: dict[str, Value] = {}
    types: dict[str, str] = {}
    for i in range(n_keys):
        at = cursor.position
        what = f"the name of metadata key {i}"
        key = cursor.text(what, max_bytes=MAX_KEY_BYTES)
        if not key:
            raise cursor.error(at, what, "an empty name", "at least one character")
        if key in metadata:
            raise cursor.error(at, what, f"{shown(key)} a second time", "each key once")
        types[key], metadata[key] = read_value(cursor, key)
    return metadata, types


def _alignment(cursor: Cursor, metadata: Mapping[str, Value], types: Mapping[str, str]) -> int:
    key = "general.alignment"
    if key not in metadata:
        return DEFAULT_ALIGNMENT
    value = metadata[key]
    if types[key] != "u32" or not isinstance(value, int):
        raise cursor.error(None, key, f"a value of type {types[key]}", "u32")
    if value == 0 or value & (value - 1):
        raise cursor.error(None, key, str(value), "a power of two")
    if not MIN_ALIGNMENT <= value <= MAX_ALIGNMENT:
        expected = f"{MIN_ALIGNMENT} to {MAX_ALIGNMENT} bytes"
        raise cursor.error(None, key, str(value), expected)
    return value


@dataclass(frozen=True, slots=True)
class _RawTensor:
    """A tensor's entry as it stands in the file, its offset still relative to the data."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    relative_offset: int
    entry_at: int  # byte at which the entry starts


def _read_tensor_info(cursor: Cursor) -> _RawTensor:
    at = cursor.position
    name = cursor.text("a tensor's name", max_bytes=MAX_NAME_BYTES)
    what = f"tensor {shown(name)}"
    if not name:
        raise cursor.error(at, "a tensor's name", "an empty name", "at least one character")
    n_dims = cursor.u32(what)
    if not 1 <= n_dims <= MAX_DIMS:
        raise cursor.error(at, what, f"{n_dims} dimensions", f"1 to {MAX_DIMS}")
    shape = cursor.u64s(n_dims, what)
    if 0 in shape:
        raise cursor.error(at, what, f"shape {_shape_text(shape)}", "no dimension of length 0")
    type_ = _tensor_type(cursor, at, what, cursor.u32(what))
    if shape[0] % type_.block_size:
        expected = f"a multiple of {type_.block_size}, the block size of {type_.name}"
        raise cursor.error(at, what, f"rows of {shape[0]} elements", expected)
    return _RawTensor(name, shape, type_, cursor.u64(what), at)


def _tensor_type(cursor: Cursor, at: int, what: str, type_id: int) -> GGMLType:
    type_ = GGML_TYPES.get(type_id)
    if type_ is not None:
        return type_
    if type_id in REMOVED_TYPES:
        expected = "a current type: ggml no longer reads this one, get the model again"
        raise cursor.error(at, what, f"type {type_id} ({REMOVED_TYPES[type_id]})", expected)
    raise cursor.error(
        at, what, f"type {type_id}", f"a known ggml type, 0 to {max(GGML_TYPES)}; is it newer?"
    )


def _place(
    cursor: Cursor, infos: list[_RawTensor], alignment: int, shard: int
) -> Iterator[tuple[str, TensorInfo]]:
    """Check that the tensors lie one after the other, each padded, and inside the file."""
    start = _pad(cursor.position, alignment)
    expected = 0
    seen: set[str] = set()
    for raw in infos:
        if raw.name in seen:
            found = f"tensor {shown(raw.name)} a second time"
            raise cursor.error(raw.entry_at, "the tensors", found, "each name once")
        seen.add(raw.name)
        _check_offset(cursor, raw, expected, alignment)
        n_bytes = _tensor_bytes(raw)
        offset = start + raw.relative_offset
        if offset + n_bytes > cursor.size:
            found = f"{n_bytes} bytes at byte {offset} of the file"
            limit = f"an end within the file's {cursor.size} bytes: the file is incomplete"
            raise cursor.error(raw.entry_at, f"tensor {shown(raw.name)}", found, limit)
        expected += _pad(n_bytes, alignment)
        yield raw.name, TensorInfo(raw.name, raw.shape, raw.type, shard, offset, n_bytes)


def _check_offset(cursor: Cursor, raw: _RawTensor, expected: int, alignment: int) -> None:
    """llama.cpp accepts no gaps either, so a file that passes here passes there."""
    offset, what = raw.relative_offset, f"tensor {shown(raw.name)}"
    found = f"offset {offset}"
    if offset % alignment:
        raise cursor.error(raw.entry_at, what, found, f"a multiple of the alignment {alignment}")
    if offset < expected:
        wanted = f"{expected}: it overlaps the tensor before it"
        raise cursor.error(raw.entry_at, what, found, wanted)
    if offset > expected:
        wanted = f"{expected}, where the tensor before it ends"
        raise cursor.error(raw.entry_at, what, found, wanted)


def _tensor_bytes(raw: _RawTensor) -> int:
    n_bytes = raw.type.row_bytes(raw.shape[0])
    for length in raw.shape[1:]:
        n_bytes *= length
    return n_bytes


def _pad(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


def _shape_text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
