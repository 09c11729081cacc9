"""Where a repository's files are kept: the standard Hugging Face cache, or a folder. Fetches none.

The cache is laid out as huggingface-hub does it, so that it and llama.cpp find what we put there:
`models--user--repo/blobs/HASH`, `snapshots/COMMIT/FILE` (a link to the blob), `refs/REVISION`.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from huggingface_hub import constants

from runner.errors import HubError
from runner.hub.partial_file import has_right_bytes
from runner.hub.repo_files import Contents, RepoFile, is_safe_path

REPO_PREFIX, SEPARATOR = "models--", "--"  # of a repository's folder
PARTIAL_ENDING = ".incomplete"
_CACHE_TAG = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# This file says that the folder is a cache, so that backups can leave it out.\n"
)


class Place(Protocol):
    """Where the files of one repository go."""

    @property
    def folder(self) -> Path:
        """Whose disk must have room; it may not exist yet."""

    def path(self, file: RepoFile) -> Path:
        """What a user opens."""

    def target(self, file: RepoFile) -> Path:
        """Where the bytes end up."""

    def partial(self, file: RepoFile) -> Path:
        """Where they are until they are right."""

    def lock(self, file: RepoFile) -> Path:
        """What one process at a time may hold."""

    def is_there(self, file: RepoFile) -> bool:
        """Whether the bytes are in their place."""

    def is_shown(self, file: RepoFile) -> bool:
        """Whether the bytes are visible at `path`."""

    def show(self, file: RepoFile, is_new: bool) -> None:
        """Make the bytes, which are in their place, visible at `path`; the caller has the lock.

        `is_new`: this run has put them there, so that nothing else can need them there.
        """

    def finish(self) -> None:
        """Every file is visible."""


def cache_folder() -> Path:
    """The standard cache: HF_HUB_CACHE, else below HF_HOME, else below ~/.cache."""
    return Path(constants.HF_HUB_CACHE)


def repo_folder(repo: str) -> Path:
    """A repository's folder in the cache."""
    return cache_folder() / (REPO_PREFIX + repo.replace("/", SEPARATOR))


def locks_folder(repo: str) -> Path:
    """Where the locks of its files are."""
    return cache_folder() / ".locks" / repo_folder(repo).name


class CachePlace:
    """The standard cache."""

    def __init__(self, contents: Contents) -> None:
        """Raises HubError for a revision that is no name for a file."""
        if not is_safe_path(contents.revision):
            raise HubError(f"--revision {contents.revision!r:.80} is no branch, tag or commit")
        self._contents = contents
        self.folder = repo_folder(contents.repo)

    def path(self, file: RepoFile) -> Path:
        return self.folder / "snapshots" / self._contents.commit / file.path

    def target(self, file: RepoFile) -> Path:
        return self.folder / "blobs" / file.hash

    def partial(self, file: RepoFile) -> Path:
        return self.folder / "blobs" / (file.hash + PARTIAL_ENDING)

    def lock(self, file: RepoFile) -> Path:
        return locks_folder(self._contents.repo) / f"{file.hash}.lock"

    def is_there(self, file: RepoFile) -> bool:
        return (
            file_size(self.target(file)) == file.n_bytes
            or file_size(self.path(file)) == file.n_bytes
        )

    def is_shown(self, file: RepoFile) -> bool:
        return file_size(self.path(file)) == file.n_bytes

    def show(self, file: RepoFile, is_new: bool) -> None:
        """Link to the blob; where links cannot be, the file itself goes there, as the hub does.

        A blob that was here before stays: other commits may link to it.
        """
        if self.is_shown(file):
            return
        blob, path = self.target(file), self.path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._draft(file.hash)
        if _can_link(blob, draft, path.parent):
            os.replace(draft, path)
        elif is_new and not blob.is_symlink():
            os.replace(blob, path)
        else:
            _copy(blob, draft)
            os.replace(draft, path)

    def finish(self) -> None:
        """Let the revision's name stand for the commit, and tell backups what this folder is."""
        _tag_cache(self.folder.parent)
        revision, commit = self._contents.revision, self._contents.commit
        if revision == commit:
            return
        ref = self.folder / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        draft = self._draft(f"ref.{os.getpid()}")
        draft.write_text(commit)
        os.replace(draft, ref)

    def _draft(self, name: str) -> Path:
        """A free name where huggingface-hub does not mind what a run that was killed left."""
        draft = self.folder / f".{name}.draft"
        draft.unlink(missing_ok=True)
        return draft


class FolderPlace:
    """A folder of the user's own; what is unfinished lies in its `.cache/huggingface`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found_right: set[RepoFile] = set()  # reading a large file again takes minutes
        self._hidden = hidden_folder(folder)

    def path(self, file: RepoFile) -> Path:
        return self.folder / file.path

    def target(self, file: RepoFile) -> Path:
        return self.path(file)

    def partial(self, file: RepoFile) -> Path:
        return self._hidden / (file.hash + PARTIAL_ENDING)

    def lock(self, file: RepoFile) -> Path:
        return self._hidden / f"{file.hash}.lock"

    def is_there(self, file: RepoFile) -> bool:
        """Raises HubError when another file has the name."""
        path = self.path(file)
        size = file_size(path)
        if size is None or file in self._found_right:
            return size is not None
        if size != file.n_bytes:
            found = f"with {size} bytes instead of {file.n_bytes}"
        elif not _is_right(path, file):
            found = "with other bytes than the hub lists"
        else:
            self._found_right.add(file)
            return True
        raise HubError(
            f"{path} is there already, {found}: move it away, or choose another --local-dir"
        )

    def is_shown(self, file: RepoFile) -> bool:
        return self.is_there(file)

    def show(self, file: RepoFile, is_new: bool) -> None:
        """It is."""

    def finish(self) -> None:
        """Nothing is left to do; the locks stay, since others may wait for them."""


def hidden_folder(folder: Path) -> Path:
    """What is unfinished in a folder of the user's own, with the locks."""
    return folder / ".cache" / "huggingface" / "download"


def free_bytes(folder: Path) -> int | None:
    """Room on the disk of a folder that need not exist; None where the system does not say."""
    for place in (folder, *folder.absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(place).free
    return None


def _can_link(blob: Path, link: Path, folder: Path) -> bool:
    """Make a link that leads from `folder` to a blob; False where none can be or is wanted."""
    if constants.HF_HUB_DISABLE_SYMLINKS:
        return False
    try:
        os.symlink(os.path.relpath(blob, folder), link)
    except OSError:
        return False
    return True


def _is_right(path: Path, file: RepoFile) -> bool:
    try:
        return has_right_bytes(path, file)
    except OSError as error:
        raise HubError(
            f"{path} is there already and cannot be read: {error.strerror or error}; move it away,"
            " or choose another --local-dir"
        ) from error


def _copy(blob: Path, draft: Path) -> None:
    """The same bytes under another name, at no cost where the disk can do that."""
    try:
        os.link(blob.resolve(), draft)
    except OSError:
        shutil.copyfile(blob, draft)


def file_size(path: Path) -> int | None:
    """None when it is not there (any more)."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _tag_cache(folder: Path) -> None:
    tag = folder / "CACHEDIR.TAG"
    if not tag.exists():
        with suppress(OSError):
            tag.write_text(_CACHE_TAG)
