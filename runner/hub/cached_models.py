"""Which models the standard cache holds, found by their names alone. Asks no hub, reads no file."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runner.errors import HubError
from runner.hub.model_name import DEFAULT_REVISION, ModelName
from runner.hub.places import PARTIAL_ENDING, REPO_PREFIX, SEPARATOR, cache_folder, repo_folder
from runner.hub.repo_files import PREFERRED, RepoFile, Variant, choose, exact_quant, variants


@dataclass(frozen=True)
class Snapshot:
    """The files of a repository's commit that are on this machine."""

    repo: str
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


def find_cached(name: ModelName, is_any_good: bool = False) -> Path | None:
    """The file of the model that `name` means, if it is there and no other can be meant.

    Without a quantization that is Q4_K_M, which every repository is first asked for; with
    `is_any_good` (no hub can be asked) the best of those that are there.
    """
    for snapshot in _snapshots(name.repo, name.revision):
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
        for snapshot in _snapshots(repo, DEFAULT_REVISION):
            for variant in variants(snapshot.files):
                name = _name(repo, variant, snapshot.files)
                key = (repo, variant.files[0].path)
                found.setdefault(key, CachedModel(name, snapshot, variant))
    return sorted(found.values(), key=lambda model: str(model.name).lower())


def unfinished() -> list[tuple[str, Path]]:
    """What cut-off downloads left: repositories and files."""
    return [
        (repo, path)
        for repo in _repos()
        for path in sorted((repo_folder(repo) / "blobs").glob(f"*{PARTIAL_ENDING}"))
    ]


def _name(repo: str, variant: Variant, files: tuple[RepoFile, ...]) -> ModelName:
    """The shortest name that means this model."""
    first = variant.files[0]
    if variant.quant and exact_quant(variant.quant, files) == first:
        return ModelName(repo, variant.quant)
    return ModelName(repo, file=first.path)


def _repos() -> list[str]:
    try:
        folders = sorted(path.name for path in cache_folder().iterdir())
    except OSError:
        return []
    names = (name[len(REPO_PREFIX) :] for name in folders if name.startswith(REPO_PREFIX))
    return [name.replace(SEPARATOR, "/") for name in names]


def _snapshots(repo: str, revision: str) -> Iterator[Snapshot]:
    """The commit that `revision` stands for, then, when it is the usual one, newer before older."""
    folder = repo_folder(repo)
    commit = _commit(folder, revision)
    others = [] if revision != DEFAULT_REVISION else _by_age(folder / "snapshots")
    for name in dict.fromkeys([*([commit] if commit else []), *others]):
        snapshot = folder / "snapshots" / name
        files = tuple(_files(snapshot))
        if files:
            yield Snapshot(repo, snapshot, files)


def _commit(folder: Path, revision: str) -> str:
    try:
        return (folder / "refs" / revision).read_text().strip()
    except (OSError, ValueError):
        return revision if (folder / "snapshots" / revision).is_dir() else ""


def _by_age(folder: Path) -> list[str]:
    try:
        found = sorted(folder.iterdir(), key=lambda path: -path.stat().st_mtime_ns)
    except OSError:
        return []
    return [path.name for path in found]


def _files(snapshot: Path) -> Iterator[RepoFile]:
    for path in sorted(snapshot.rglob("*.gguf")):
        if path.is_file():
            yield RepoFile(path.relative_to(snapshot).as_posix(), path.stat().st_size)
