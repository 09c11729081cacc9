"""GGUFFile: a model's GGUF file, or all shards of a split one, opened as one. Knows no model."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from quant.errors import GGUFError
from quant.gguf_cursor import HeaderBudget, shown
from quant.gguf_header import ByteRange, Header, TensorInfo, read_header
from quant.gguf_values import LongString, MetadataArray, Value
from quant.read_only_file import FileChange, ReadOnlyFile, WritableBuffer, bytes_of

__all__ = [
    "ByteRange",
    "FileChange",
    "GGUFFile",
    "LongString",
    "MetadataArray",
    "TensorInfo",
    "Value",
]

MAX_SHARDS = 512


class GGUFFile:
    """The checked header and the bytes of a GGUF file. Nothing is mapped before it is asked for.

    Reading is safe from several threads; opening, mapping and closing belong to one.
    """

    def __init__(self, shards: list[tuple[ReadOnlyFile, Header]]) -> None:
        """Use `GGUFFile.open`."""
        self._files = [file for file, _ in shards]
        first = shards[0][1]
        self.version = first.version
        self.alignment = first.alignment  # bytes
        self.metadata: Mapping[str, Value] = first.metadata
        self.metadata_types: Mapping[str, str] = first.types  # "u32", "str", "array", ...
        self.tensors: Mapping[str, TensorInfo] = _merge_tensors(shards)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a GGUF file, or the whole set when `path` is any shard of a split file.

        Raises GGUFError: not a regular file, malformed, a shard missing or not of the same set.
        """
        named = Path(path)
        with ExitStack() as stack:
            file = stack.enter_context(ReadOnlyFile(named))
            header = read_header(file, 0, HeaderBudget())
            paths = _shard_paths(named, header)
            if len(paths) == 1:
                opened = cls([(file, header)])
            else:
                file.close()
                opened = cls(_read_shards(_open_shards(paths, stack)))
            stack.pop_all()
        return opened

    @classmethod
    def of_files(cls, files: Sequence[ReadOnlyFile]) -> Self:
        """A model whose files are open already: a whole one, or all shards in order.

        Raises GGUFError: malformed, a shard missing or not of the same set.
        """
        if len(files) > 1:
            return cls(_read_shards(files))
        header = read_header(files[0], 0, HeaderBudget())
        n_shards = len(_shard_paths(files[0].path, header))
        if n_shards > 1:
            raise GGUFError(f"{files[0].path}: found one of {n_shards} shards; expected all")
        return cls([(files[0], header)])

    @property
    def paths(self) -> tuple[Path, ...]:
        """The shards' files, in order; the first is the one to give to llama.cpp."""
        return tuple(file.path for file in self._files)

    @property
    def size_bytes(self) -> int:
        """Of all shards, headers included."""
        return sum(file.size_bytes for file in self._files)

    @property
    def is_mapped(self) -> bool:
        return any(file.is_mapped for file in self._files)

    def mapping(self, shard: int) -> NDArray[np.uint8]:
        """A shard's bytes, mapped read-only: (size of the shard,). Raises GGUFError.

        Reading pages of a file that somebody truncates kills the process with SIGBUS; `read` does
        not, and `find_change` tells.
        """
        return self._files[shard].mapping()

    def will_need(self, shard: int, offset: int, n_bytes: int) -> None:
        """Ask the system to read a part of a mapped shard ahead of its use."""
        self._files[shard].will_need(offset, n_bytes)

    def read(self, range: ByteRange, into: WritableBuffer) -> None:
        """Fill `into`, `range.n_bytes` long, with the bytes of `range`.

        Raises GGUFError naming the file when it no longer has them.
        """
        view = bytes_of(into)
        assert len(view) == range.n_bytes, f"a buffer of {len(view)} for {range.n_bytes} bytes"
        self._files[range.shard].read_into(range.offset, view)

    def open_direct(self) -> bool:
        """Make `read_direct` possible; False where the system or the file system cannot."""
        return all(file.open_direct() for file in self._files)

    def read_direct(self, shard: int, offset: int, into: memoryview) -> None:
        """Fill `into` past the system's page cache: see `ReadOnlyFile.read_direct`."""
        self._files[shard].read_direct(offset, into)

    def is_cached(self, part: ByteRange, n_probes: int = 4) -> bool:
        """Whether evenly spaced pages of `part`, both ends included, are all in memory."""
        file, last = self._files[part.shard], part.n_bytes - 1
        steps = max(1, n_probes - 1)
        return all(file.is_cached(part.offset + last * i // steps) for i in range(steps + 1))

    def forget(self, part: ByteRange) -> None:
        """Tell the system that the pages of `part` need not stay in memory."""
        self._files[part.shard].forget(part.offset, part.n_bytes)

    def find_change(self) -> FileChange | None:
        """The first shard that was truncated, written to, deleted or replaced since opening."""
        changes = (file.find_change() for file in self._files)
        return next((change for change in changes if change is not None), None)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_shards(paths: list[Path], stack: ExitStack) -> list[ReadOnlyFile]:
    files = []
    for i, path in enumerate(paths):
        if not path.exists():
            raise GGUFError(
                f"{path}: this shard, number {i + 1} of {len(paths)}, is missing; "
                "a split model needs all of its files in one folder"
            )
        files.append(stack.enter_context(ReadOnlyFile(path)))
    return files


def _read_shards(files: Sequence[ReadOnlyFile]) -> list[tuple[ReadOnlyFile, Header]]:
    """The headers of a split model's files, which must be one set and in order."""
    budget = HeaderBudget()
    shards = []
    for i, file in enumerate(files):
        shards.append((file, read_header(file, i, budget)))
        _check_shard(file.path, shards[i][1], i, len(files))
    _check_total(files[0].path, shards)
    return shards


def _shard_paths(path: Path, header: Header) -> list[Path]:
    """All files of the set that `path` belongs to, in order; only `path` when it is whole."""
    n_shards = _split_key(path, header, "split.count", "u16", default=0)
    if n_shards <= 1:
        return [path]
    if n_shards > MAX_SHARDS:
        raise GGUFError(f"{path}: found {n_shards} shards; expected at most {MAX_SHARDS}")
    number = _split_key(path, header, "split.no", "u16")
    if number >= n_shards:
        raise GGUFError(f"{path}: found shard number {number} of {n_shards}, counted from 0")
    ending = _shard_ending(number, n_shards)
    if not path.name.endswith(ending) or path.name == ending:
        raise GGUFError(
            f"{path}: found shard {number + 1} of {n_shards} of a split model; expected a file "
            f"name ending in {ending!r}: give the files their original names"
        )
    prefix = path.name.removesuffix(ending)
    return [path.with_name(prefix + _shard_ending(i, n_shards)) for i in range(n_shards)]


def _shard_ending(number: int, n_shards: int) -> str:
    return f"-{number + 1:05d}-of-{n_shards:05d}.gguf"


def _check_shard(path: Path, header: Header, number: int, n_shards: int) -> None:
    found_number = _split_key(path, header, "split.no", "u16")
    found_count = _split_key(path, header, "split.count", "u16", default=n_shards)
    if (found_number, found_count) != (number, n_shards):
        raise GGUFError(
            f"{path}: found shard {found_number + 1} of {found_count}; "
            f"expected shard {number + 1} of {n_shards}: the files are not of one set"
        )


def _check_total(path: Path, shards: list[tuple[ReadOnlyFile, Header]]) -> None:
    expected = _split_key(path, shards[0][1], "split.tensors.count", "i32")
    found = sum(len(header.tensors) for _, header in shards)
    if found != expected:
        raise GGUFError(
            f"{path}: found {found} tensors in {len(shards)} shards; expected {expected}, "
            "as the first shard says: the files are not of one set"
        )


def _split_key(
    path: Path, header: Header, key: str, type_name: str, default: int | None = None
) -> int:
    value: Any = header.metadata.get(key, default)
    if value is None:
        raise GGUFError(f"{path}: found no metadata key {key!r}; expected it in a split model")
    found_type = header.types.get(key, type_name)
    if found_type != type_name:
        raise GGUFError(f"{path}: {key!r}: found type {found_type}; expected {type_name}")
    return int(value)


def _merge_tensors(shards: list[tuple[ReadOnlyFile, Header]]) -> Mapping[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file, header in shards:
        for name, info in header.tensors.items():
            if name in tensors:
                other = shards[tensors[name].shard][0].path
                raise GGUFError(
                    f"{file.path}: found tensor {shown(name)} a second time; it is in {other} too"
                )
            tensors[name] = info
    return MappingProxyType(tensors)
