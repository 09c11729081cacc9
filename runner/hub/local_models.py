"""What `buddyrun list` says of the models on this machine, and how they are removed from the cache.

Reads headers only, and asks no hub.
"""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import DeleteCacheStrategy, scan_cache_dir
from huggingface_hub.utils import WeakFileLock

from quant.errors import GGUFError
from quant.gguf_file import GGUFFile
from runner.buddies import default_path
from runner.checks.model_keys import ModelKeys
from runner.checks.read_model import read_shape
from runner.errors import HubError, ModelError
from runner.hub.cached_models import CachedModel, cached_models, models_of, snapshots, unfinished
from runner.hub.model_name import DEFAULT_REVISION, ModelName
from runner.hub.places import file_size, locks_folder, repo_folder
from runner.hub.repo_files import is_model, split_of

_LOCK_PATIENCE_S = 0.1


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine."""

    name: str  # what the commands take
    path: str
    quant: str
    size_bytes: int
    architecture: str
    n_layer: int
    n_expert: int
    n_expert_used: int
    can_run: bool
    reason: str  # why it cannot
    has_profile: bool


@dataclass(frozen=True)
class Removal:
    """What would be deleted."""

    repo: str
    names: tuple[str, ...]
    parts: tuple[str, ...]  # of the repository's folder in the cache
    n_bytes: int  # that this frees: what other commits link to stays


def local_models(folders: Iterable[Path]) -> list[LocalModel]:
    """The models in the cache, then those in the folders and below. Raises HubError."""
    found = [
        _describe(str(model.name), model.path, model.variant.quant) for model in cached_models()
    ]
    for folder in folders:
        found += [
            _describe(str(path), path, split_of(path.name).quant) for path in _models_in(folder)
        ]
    return [model for model in found if model is not None]


def plan_removal(name: ModelName) -> Removal:
    """What removing `name` deletes; no `parts` when it is not here. Raises HubError.

    A repository's name alone means all its commits, with what is unfinished; with a revision it
    means the models of that commit.
    """
    is_whole = not (name.quant or name.file)
    is_any_commit = is_whole and name.revision == DEFAULT_REVISION
    found = list(snapshots(name.repo, name.revision, is_any_commit))
    models = [
        m for snapshot in found for m in models_of(snapshot) if is_whole or _is_meant(name, m)
    ]
    paths = [model.snapshot.folder / file.path for model in models for file in model.variant.files]
    if is_whole:  # parts of split models and what goes with models, too
        paths = [snapshot.folder / file.path for snapshot in found for file in snapshot.files]
    paths += [path for path in (default_path(model.path) for model in models) if path.is_file()]
    if is_any_commit:
        paths += [part.path for part in unfinished() if part.repo == name.repo]
    folder = repo_folder(name.repo)
    parts = tuple(path.relative_to(folder).as_posix() for path in paths)
    if not parts:
        return Removal(name.repo, (), (), 0)
    strategy, partials = _deletion(name.repo, parts)
    n_bytes = strategy.expected_freed_size + sum(file_size(path) or 0 for path in partials)
    return Removal(name.repo, tuple(str(model.name) for model in models), parts, n_bytes)


def remove(removal: Removal) -> None:
    """Delete, with the blobs that nothing else links to. Raises HubError."""
    with _nobody_fetching(removal.repo):
        strategy, partials = _deletion(removal.repo, removal.parts)
        for path in partials:
            path.unlink(missing_ok=True)
        strategy.execute()
        folder = repo_folder(removal.repo).resolve()
        left = (path for part in ("blobs", "snapshots") for path in (folder / part).rglob("*"))
        if all(path.is_dir() for path in left):
            shutil.rmtree(folder)


def _is_meant(name: ModelName, model: CachedModel) -> bool:
    if name.file:
        return name.file.lower() == model.variant.files[0].path.lower()
    return name.quant.lower() == model.name.quant.lower()


def _deletion(repo: str, parts: tuple[str, ...]) -> tuple[DeleteCacheStrategy, set[Path]]:
    """How to delete: what huggingface-hub does, and the unfinished files that it does not know.

    Raises HubError when huggingface-hub, which knows what else links to them, cannot read the
    folder.
    """
    folder = repo_folder(repo).resolve()
    wanted = {folder / part for part in parts}
    cache = scan_cache_dir()
    chosen = [
        file
        for found in cache.repos
        if found.repo_path == folder
        for revision in found.revisions
        for file in revision.files
        if file.file_path in wanted
    ]
    partials = wanted - {file.file_path for file in chosen}
    if any(path.parent.name != "blobs" for path in partials):
        reasons = "; ".join(str(warning) for warning in cache.warnings)
        raise HubError(f"{folder} is no sound part of the cache: {reasons or 'it changed'}")
    return cache.delete_files(*chosen), partials


@contextmanager
def _nobody_fetching(repo: str) -> Iterator[None]:
    """Hold all locks of a repository. Raises HubError when a download has one."""
    with ExitStack() as held:
        for path in sorted(locks_folder(repo).glob("*.lock")):
            try:
                held.enter_context(WeakFileLock(path, timeout=_LOCK_PATIENCE_S))
            except TimeoutError as error:
                raise HubError(
                    f"{repo} is being fetched: wait until that ends, or stop it first"
                ) from error
        yield


def _models_in(folder: Path) -> Iterator[Path]:
    """First files of models, in order. Raises HubError when it is no folder."""
    if not folder.is_dir():
        raise HubError(f"{folder} is no folder; give folders with .gguf files")
    for path in sorted(folder.rglob("*.gguf")):
        if path.is_file() and is_model(path.name) and split_of(path.name).number == 1:
            yield path


def _describe(name: str, path: Path, quant: str) -> LocalModel | None:
    """None when the file vanished meanwhile."""
    has_profile = default_path(path).is_file()
    try:
        with GGUFFile.open(path) as file:
            keys, size = ModelKeys(file), file.size_bytes
            architecture, reason = keys.text("general.architecture", default="?"), ""
            n_layer = n_expert = n_used = 0
            try:
                shape = read_shape(file)
                n_layer, n_expert, n_used = shape.n_layer, shape.n_expert, shape.n_expert_used
            except ModelError as error:
                reason = str(error)
    except (GGUFError, ModelError) as error:
        n_bytes = file_size(path)
        if n_bytes is None:
            return None
        size, architecture, reason = n_bytes, "?", str(error)
        n_layer = n_expert = n_used = 0
    return LocalModel(
        name, str(path), quant, size, architecture, n_layer, n_expert, n_used,
        not reason, reason, has_profile,
    )  # fmt: skip
