"""What `buddyrun list` says of the models on this machine, and how they are removed from the cache.

Reads headers only, and asks no hub.
"""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import scan_cache_dir

from quant.errors import GGUFError
from quant.gguf_file import GGUFFile
from runner.buddies import default_path
from runner.checks.model_keys import ModelKeys
from runner.checks.read_model import read_shape
from runner.errors import HubError, ModelError
from runner.hub.cached_models import CachedModel, cached_models, unfinished
from runner.hub.places import repo_folder
from runner.hub.repo_files import is_model, split_of


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
    n_bytes: int


def local_models(folders: Iterable[Path]) -> list[LocalModel]:
    """The models in the cache, then those in the folders and below. Raises HubError."""
    found = [
        _describe(str(model.name), model.path, model.variant.quant) for model in cached_models()
    ]
    for folder in folders:
        found += [
            _describe(str(path), path, split_of(path.name).quant) for path in _models_in(folder)
        ]
    return found


def plan_removal(models: list[CachedModel], repo: str, is_whole: bool) -> Removal:
    """What removing these models of one repository deletes; `is_whole` = unfinished ones too."""
    paths = [model.snapshot.folder / file.path for model in models for file in model.variant.files]
    paths += [path for path in (default_path(model.path) for model in models) if path.is_file()]
    if is_whole:
        paths += [path for owner, path in unfinished() if owner == repo]
    folder = repo_folder(repo)
    parts = tuple(path.relative_to(folder).as_posix() for path in paths)
    names = tuple(str(model.name) for model in models)
    return Removal(repo, names, parts, sum(path.stat().st_size for path in paths))


def remove(removal: Removal) -> None:
    """Delete, with the blobs that nothing else links to.

    Raises HubError when huggingface-hub, which knows what else links to them, cannot read the
    folder.
    """
    folder = repo_folder(removal.repo).resolve()
    wanted = {folder / part for part in removal.parts}
    cache = scan_cache_dir()
    chosen = [
        file
        for repo in cache.repos
        if repo.repo_path == folder
        for revision in repo.revisions
        for file in revision.files
        if file.file_path in wanted
    ]
    partials = wanted - {file.file_path for file in chosen}
    if any(path.parent.name != "blobs" for path in partials):
        reasons = "; ".join(str(warning) for warning in cache.warnings)
        raise HubError(f"{folder} is no sound part of the cache: {reasons or 'it changed'}")
    for path in partials:
        path.unlink(missing_ok=True)
    cache.delete_files(*chosen).execute()
    left = (path for part in ("blobs", "snapshots") for path in (folder / part).rglob("*"))
    if all(path.is_dir() for path in left):
        shutil.rmtree(folder)


def _models_in(folder: Path) -> Iterator[Path]:
    """First files of models, in order. Raises HubError when it is no folder."""
    if not folder.is_dir():
        raise HubError(f"{folder} is no folder; give folders with .gguf files")
    for path in sorted(folder.rglob("*.gguf")):
        if path.is_file() and is_model(path.name) and split_of(path.name).number == 1:
            yield path


def _describe(name: str, path: Path, quant: str) -> LocalModel:
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
        size, architecture, reason = path.stat().st_size, "?", str(error)
        n_layer = n_expert = n_used = 0
    return LocalModel(
        name, str(path), quant, size, architecture, n_layer, n_expert, n_used,
        not reason, reason, has_profile,
    )  # fmt: skip
