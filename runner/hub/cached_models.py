"""Which models the standard cache holds, found by their names alone. Asks no hub, reads no file."""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from runner.errors import HubError
from runner.hub.model_name import DEFAULT_REVISION, ModelName
from runner.hub.places import (
    PARTIAL_ENDING,
    REPO_PREFIX,
    SEPARATOR,
    cache_folder,
    file_size,
    hidden_folder,
    repo_folder,
)
from runner.hub.repo_files import (
    PREFERRED,
    RepoFile,
    Variant,
    choose,
    exact_quant,
    is_safe_path,
    variants,
)

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Snapshot:
    """The files of a repository's commit that are on this machine."""

    repo: str
    revision: str  # the name that stands for the commit, else the commit
    folder: Path
    files: tuple[RepoFile, ...]

    def path(self, variant: Variant) -> Path:
        """The file to open."""
        return self.folder / variant.files[0].path


@dataclass(frozen=True)
class CachedModel:
    """A model in the cache with all its files."""

    name: ModelName
    snapshot: Snapshot
    variant: Variant

    @property
    def path(self) -> Path:
        return self.snapshot.path(self.variant)


@dataclass(frozen=True)
class Unfinished:
    """What came of a file before its download was cut off."""

    repo: str
    path: Path
    n_bytes: int


def find_cached(name: ModelName, is_any_good: bool = False) -> Path | None:
    """The file of the model that `name` means, if it is there and no other can be meant.

    Without a quantization that is Q4_K_M, which every repository is first asked for; with
    `is_any_good` (no hub can be asked) the best of those that are there, of the usual revision
    also what older commits had.
    """
    is_any_commit = is_any_good and name.revision == DEFAULT_REVISION
    for snapshot in snapshots(name.repo, name.revision, is_any_commit):
        is_named = name.quant or name.file or exact_quant(PREFERRED[0], snapshot.files)
        if not is_named and not is_any_good:
            continue
        try:
            return snapshot.path(choose(name, snapshot.files))
        except HubError:
            continue
    return None


def cached_models() -> list[CachedModel]:
    """All models in the cache; one that several commits have counts once, as the newest has it."""
    found: dict[tuple[str, str], CachedModel] = {}
    for repo in _repos():
        for snapshot in snapshots(repo, is_any_commit=True):
            for model in models_of(snapshot):
                found.setdefault((repo, model.variant.files[0].path), model)
    return sorted(found.values(), key=lambda model: str(model.name).lower())


def models_of(snapshot: Snapshot) -> list[CachedModel]:
    """The models that a commit has."""
    return [
        CachedModel(_name(snapshot, variant), snapshot, variant)
        for variant in variants(snapshot.files)
    ]


def unfinished() -> list[Unfinished]:
    """What cut-off downloads left."""
    found = []
    for repo in _repos():
        for path in sorted((repo_folder(repo) / "blobs").glob(f"*{PARTIAL_ENDING}")):
            n_bytes = file_size(path)
            if n_bytes is not None:
                found.append(Unfinished(repo, path, n_bytes))
    return found


def unfinished_bytes(folder: Path) -> int:
    """What cut-off downloads left in a folder of the user's own."""
    parts = hidden_folder(folder).glob(f"*{PARTIAL_ENDING}")
    return sum(file_size(path) or 0 for path in parts)


def _name(snapshot: Snapshot, variant: Variant) -> ModelName:
    """The shortest name that means this model."""
    first = variant.files[0]
    if variant.quant and exact_quant(variant.quant, snapshot.files) == first:
        return ModelName(snapshot.repo, variant.quant, revision=snapshot.revision)
    return ModelName(snapshot.repo, file=first.path, revision=snapshot.revision)


def _repos() -> list[str]:
    try:
        folders = sorted(path.name for path in cache_folder().iterdir())
    except OSError:
        return []
    names = (name[len(REPO_PREFIX) :] for name in folders if name.startswith(REPO_PREFIX))
    return [name.replace(SEPARATOR, "/") for name in names]


def snapshots(
    repo: str, revision: str = DEFAULT_REVISION, is_any_commit: bool = False
) -> Iterator[Snapshot]:
    """The commit that `revision` stands for; with `is_any_commit` then all, newer before older."""
    folder = repo_folder(repo)
    commit = _commit(folder, revision)
    names = _names(folder)
    others = _by_age(folder / "snapshots") if is_any_commit else []
    for found in dict.fromkeys([*([commit] if commit else []), *others]):
        snapshot = folder / "snapshots" / found
        files = tuple(_files(snapshot))
        if files:
            yield Snapshot(repo, names.get(found, found), snapshot, files)


def _commit(folder: Path, revision: str) -> str:
    """The commit that a revision stands for; "" when it is unknown or no revision at all."""
    if not is_safe_path(revision):
        return ""
    if _COMMIT.fullmatch(revision):
        return revision
    return _commit_in(folder / "refs" / revision)


def _commit_in(ref: Path) -> str:
    try:
        commit = ref.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
    return commit if _COMMIT.fullmatch(commit) else ""


def _names(folder: Path) -> dict[str, str]:
    """What commits are called: the usual revision before all others."""
    refs = folder / "refs"
    found: dict[str, str] = {}
    for ref in [refs / DEFAULT_REVISION, *sorted(refs.rglob("*"))]:
        found.setdefault(_commit_in(ref), ref.relative_to(refs).as_posix())
    return found


def _by_age(folder: Path) -> list[str]:
    """The commits in a folder, the newest first."""
    ages: dict[str, int] = {}
    with suppress(OSError):
        for path in folder.iterdir():
            if _COMMIT.fullmatch(path.name):
                with suppress(OSError):  # it vanished
                    ages[path.name] = -path.stat().st_mtime_ns
    return sorted(ages, key=ages.__getitem__)


def _files(snapshot: Path) -> Iterator[RepoFile]:
    for path in sorted(snapshot.rglob("*.gguf")):
        n_bytes = file_size(path) if path.is_file() else None
        if n_bytes is not None:
            yield RepoFile(path.relative_to(snapshot).as_posix(), n_bytes)
