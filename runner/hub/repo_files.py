"""Which files of a repository are a model: quantizations, split files, safe names. Asks no hub.

The choice is llama.cpp's (`common/download.cpp`): the quantization is looked for in the file's
path, whatever its case; without one Q4_K_M is taken, else Q8_0, else the first.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from runner.byte_sizes import bytes_text
from runner.errors import HubError
from runner.hub.model_name import ModelName

PREFERRED = ("Q4_K_M", "Q8_0")
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})", re.IGNORECASE | re.ASCII)
_TAG = re.compile(r"[-.]([A-Z0-9_]+)$", re.IGNORECASE | re.ASCII)
_OTHER_PARTS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")  # of some models
_MAX_FILES = 512  # of one model; a GGUFFile opens no more
_DRIVE = re.compile(r"[A-Za-z]:")
_MAX_PATH_BYTES, _MAX_PART_BYTES = 1024, 200


@dataclass(frozen=True)
class RepoFile:
    """A file of a repository, as the hub lists it."""

    path: str  # from the repository's root, "/" between folders
    n_bytes: int
    hash: str = ""  # hex: SHA-256, or git's SHA-1 for a small file; "" = not asked


@dataclass(frozen=True)
class Contents:
    """The files of a repository at one commit."""

    repo: str
    revision: str  # as it was asked for
    commit: str
    files: tuple[RepoFile, ...]


@dataclass(frozen=True)
class Split:
    """What a file's name says of its place in a split model; 1 of 1 for a whole one."""

    prefix: str
    number: int  # from 1
    n_files: int

    @property
    def quant(self) -> str:
        """The quantization in the name, "" without one."""
        found = _TAG.search(self.prefix)
        return found[1].upper() if found else ""


@dataclass(frozen=True)
class Variant:
    """One model of a repository: all files that belong together, in order."""

    files: tuple[RepoFile, ...]

    @property
    def quant(self) -> str:
        return split_of(self.files[0].path).quant

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)


def is_safe_path(path: str) -> bool:
    """Whether a name from a server stays inside the folder it is put in, on any system."""
    parts = path.split("/")
    return (
        bool(path)
        and len(path.encode(errors="replace")) <= _MAX_PATH_BYTES
        and not any(part in ("", ".", "..") for part in parts)
        and not any(len(part.encode(errors="replace")) > _MAX_PART_BYTES for part in parts)
        and "\\" not in path
        and not any(_DRIVE.match(part) for part in parts)
        and not any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in path)
    )


def is_model(path: str) -> bool:
    """Whether a file is (a part of) a language model, by its name as llama.cpp has it."""
    name = PurePosixPath(path).name
    return path.endswith(".gguf") and not any(part in name for part in _OTHER_PARTS)


def split_of(path: str) -> Split:
    """The place of a file in its set, from its name."""
    prefix = path.removesuffix(".gguf")
    found = _SPLIT.fullmatch(prefix)
    if found is None or int(found[3]) <= 1:
        return Split(prefix, 1, 1)
    return Split(found[1], int(found[2]), int(found[3]))


def variants(files: Sequence[RepoFile]) -> list[Variant]:
    """The models of a repository whose files are all there, in the hub's order."""
    found = []
    for file in files:
        if is_model(file.path) and split_of(file.path).number == 1:
            shards = _all_of(files, file)
            if shards is not None:
                found.append(Variant(shards))
    return found


def choose(name: ModelName, files: Sequence[RepoFile]) -> Variant:
    """The model that `name` means. Raises HubError that lists what there is."""
    first = _named(name, files) if name.file else _first_of(name.quant, files)
    if first is None:
        raise HubError(_nothing_found(name, files))
    if not is_safe_path(first.path):
        raise HubError(f"{name.repo}: refused to fetch {first.path!r}: that is no path of a file")
    shards = _all_of(files, first)
    if shards is None:
        n_files = split_of(first.path).n_files
        raise HubError(
            f"{name.repo}: {first.path} is one of {n_files} files, and the repository lacks"
            " others of them; choose another quantization or tell its author"
        )
    return Variant(shards)


def exact_quant(quant: str, files: Sequence[RepoFile]) -> RepoFile | None:
    """The first file of the model whose name has this quantization."""
    pattern = re.compile(re.escape(quant) + "[.-]", re.IGNORECASE)
    return next((file for file in _beginnings(files) if pattern.search(file.path)), None)


def _first_of(quant: str, files: Sequence[RepoFile]) -> RepoFile | None:
    for wanted in (quant,) if quant else PREFERRED:
        found = exact_quant(wanted, files)
        if found is not None:
            return found
    return None if quant else next(_beginnings(files), None)


def _beginnings(files: Sequence[RepoFile]) -> Iterator[RepoFile]:
    return (file for file in files if is_model(file.path) and split_of(file.path).number == 1)


def _named(name: ModelName, files: Sequence[RepoFile]) -> RepoFile | None:
    """A file by its path, whatever its case; of a split model the first one."""
    found = next((file for file in files if file.path.lower() == name.file.lower()), None)
    if found is None:
        return None
    if not found.path.lower().endswith(".gguf"):
        raise HubError(f"{name.repo}: {found.path} is no .gguf file, and buddyrun runs no other")
    split = split_of(found.path)
    first = replace(split, number=1)
    return next((file for file in files if split_of(file.path) == first), found)


def _all_of(files: Sequence[RepoFile], first: RepoFile) -> tuple[RepoFile, ...] | None:
    """All files of the set that begins with `first`, in order; None when some are missing."""
    split = split_of(first.path)
    if split.n_files == 1:
        return (first,)
    found = {}
    for file in files:
        other = split_of(file.path)
        if (other.prefix, other.n_files) == (split.prefix, split.n_files):
            found[other.number] = file
    numbers = range(1, min(split.n_files, _MAX_FILES + 1) + 1)
    if len(numbers) > _MAX_FILES or any(number not in found for number in numbers):
        return None
    return tuple(found[number] for number in numbers)


def _nothing_found(name: ModelName, files: Sequence[RepoFile]) -> str:
    what = f"no file {name.file}" if name.file else "no model"
    if name.quant:
        what = f"no quantization {name.quant}"
    there = variants(files)
    if not there:
        return f"{name.repo} has {what}: no .gguf file is in it; look for a repository with GGUF"
    rows = [
        f"\n  {variant.quant or '-':<12} {bytes_text(variant.n_bytes):>8}  {_names(variant)}"
        for variant in there
    ]
    return f"{name.repo} has {what}. It has:{''.join(rows)}"


def _names(variant: Variant) -> str:
    more = f" and {len(variant.files) - 1} more" if len(variant.files) > 1 else ""
    return variant.files[0].path + more
