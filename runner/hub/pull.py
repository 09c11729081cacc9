"""From a model's name to its files on this machine: what is chosen and what is still missing."""

from dataclasses import dataclass
from pathlib import Path

from runner.hub.model_name import ModelName
from runner.hub.places import CachePlace, FolderPlace, Place
from runner.hub.repo_files import Contents, RepoFile, Variant, choose
from runner.hub.repository import Hub


@dataclass(frozen=True)
class PullPlan:
    """One model of a repository and where it goes."""

    name: ModelName
    contents: Contents
    variant: Variant
    place: Place
    missing_bytes: int  # what came in earlier runs is not missing

    @property
    def path(self) -> Path:
        """What to give to the engine, once it is there."""
        return self.place.path(self.variant.files[0])


def plan_pull(hub: Hub, name: ModelName, local_dir: Path | None = None) -> PullPlan:
    """Ask the hub what `name` means. Raises HubError."""
    contents = hub.contents(name)
    place = FolderPlace(local_dir) if local_dir is not None else CachePlace(contents)
    variant = choose(name, contents.files)
    return PullPlan(name, contents, variant, place, _missing_bytes(place, variant))


def _missing_bytes(place: Place, variant: Variant) -> int:
    """How much is to come; files with the same bytes come once."""
    missing = {file.hash: file for file in variant.files if not place.is_there(file)}
    return sum(_bytes_to_come(place, file) for file in missing.values())


def _bytes_to_come(place: Place, file: RepoFile) -> int:
    try:
        return max(0, file.n_bytes - place.partial(file).stat().st_size)
    except OSError:
        return file.n_bytes
