"""Fetches files of a repository into their place: resumed, locked, checked, then visible.

huggingface-hub 2.x keeps nothing of a transfer that was cut off; this module does. Knows no model.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from huggingface_hub.utils import WeakFileLock

from runner.byte_sizes import bytes_text
from runner.errors import HubError
from runner.hub.hub_errors import PassingError
from runner.hub.partial_file import PartialFile, write_error
from runner.hub.places import Place
from runner.hub.repo_files import Contents, RepoFile
from runner.hub.repository import Hub

SEGMENT_BYTES = 4 << 30  # of one request: addresses expire, and some servers end at 50 GB
_LOCK_PATIENCE_S = 0.5
_LEAST_BYTES = 64 << 10  # what brings fewer brings nothing: some servers trickle for ever


@dataclass(frozen=True)
class Patience:
    """How long to go on when the network or the hub has a problem."""

    n_tries: int = 6  # in a row that brought nothing new
    first_wait_s: float = 1.0  # doubled each time
    longest_wait_s: float = 30.0
    longest_asked_s: float = 120.0  # a server that asks for more is not waited for

    def wait_s(self, n_failures: int, asked_s: float | None) -> float:
        """How long to wait after so many failures in a row."""
        if asked_s is not None:
            return asked_s
        return min(self.longest_wait_s, self.first_wait_s * 2.0 ** (n_failures - 1))


class Watcher(Protocol):
    """What is told of a download while it runs."""

    def begin(self, file: RepoFile, n_there: int) -> None:
        """A file's turn; `n_there` of its bytes came in earlier runs and are checked first."""

    def checked(self, n_bytes: int) -> None:
        """So many more of the bytes that came earlier are read again."""

    def add(self, n_bytes: int) -> None:
        """So many bytes came; fewer than 0 when some were thrown away."""

    def end(self) -> None:
        """The file is in its place."""

    def say(self, text: str) -> None:
        """Something that the user should know."""


class Download:
    """All files of one model on their way to `place`."""

    def __init__(
        self,
        hub: Hub,
        contents: Contents,
        place: Place,
        watcher: Watcher,
        patience: Patience = Patience(),
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self._segment_bytes = segment_bytes
        self._hub, self._contents, self._place = hub, contents, place
        self._watcher, self._patience = watcher, patience

    def fetch(self, files: Sequence[RepoFile]) -> Path:
        """Fetch what is missing; returns the path of the first file. Raises HubError."""
        try:
            for file in files:
                self._fetch_file(file)
            self._place.finish()
        except OSError as error:
            raise write_error(error, self._place.folder) from error
        return self._place.path(files[0])

    def _fetch_file(self, file: RepoFile) -> None:
        if self._place.is_shown(file):
            return
        for path in (self._place.partial(file), self._place.target(file)):
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked(file):
            is_new = not self._place.is_there(file)  # now, after another run had the lock
            if is_new:
                self._complete(file)
            self._place.show(file, is_new)

    def _complete(self, file: RepoFile) -> None:
        with PartialFile(self._place.partial(file), file) as partial:
            self._watcher.begin(file, partial.n_found)
            partial.take_up(self._watcher.checked)
            was_resumed = partial.n_bytes > 0
            self._fill(partial, file)
            if not partial.is_right() and was_resumed:
                self._watcher.say(
                    f"{file.path}: what an earlier run left was damaged; fetching it again"
                )
                self._start_again(partial)
                self._fill(partial, file)
            if not partial.is_right():
                self._start_again(partial)
                raise HubError(
                    f"{self._contents.repo}/{file.path}: what came has not the hash that the hub"
                    f" lists ({file.hash[:12]}...), so it was thrown away. Something on the way"
                    " changes it, or the hub's file is damaged: try again later"
                )
            partial.publish(self._place.target(file))
            self._watcher.end()

    def _start_again(self, partial: PartialFile) -> None:
        self._watcher.add(-partial.n_bytes)
        partial.restart()

    def _fill(self, partial: PartialFile, file: RepoFile) -> None:
        """Fetch until all bytes are there, going on after problems that pass."""
        n_failures = 0
        while partial.n_bytes < file.n_bytes:
            n_before = partial.n_bytes
            try:
                self._fetch_segment(partial, file)
                n_failures = 0
            except PassingError as error:
                has_come = partial.n_bytes - n_before >= _LEAST_BYTES
                n_failures = 1 if has_come else n_failures + 1
                self._wait(error, n_failures)

    def _fetch_segment(self, partial: PartialFile, file: RepoFile) -> None:
        first = partial.n_bytes
        last = min(first + self._segment_bytes, file.n_bytes) - 1
        with self._hub.body(self._contents, file, first, last) as chunks:
            for chunk in chunks:
                partial.append(chunk)
                self._watcher.add(len(chunk))
        n_new = partial.n_bytes - first
        if n_new < _LEAST_BYTES and partial.n_bytes <= last:
            what = f"only {bytes_text(n_new)}" if n_new else "nothing"
            raise PassingError(f"the server sent {what} of {file.path}")

    def _wait(self, error: PassingError, n_failures: int) -> None:
        patience = self._patience
        wait_s = patience.wait_s(n_failures, error.wait_s)
        if n_failures >= patience.n_tries or wait_s > patience.longest_asked_s:
            raise HubError(
                f"{error}. What came is kept: the same command goes on with it"
            ) from error
        self._watcher.say(f"{error}; trying again in {wait_s:.0f} s")
        time.sleep(wait_s)

    @contextmanager
    def _locked(self, file: RepoFile) -> Iterator[None]:
        """Hold the lock that huggingface-hub takes for the same file."""
        path = self._place.lock(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self._is_free(path):
            self._watcher.say(f"another program fetches {file.path}; waiting for it")
        with WeakFileLock(path):
            yield

    def _is_free(self, path: Path) -> bool:
        try:
            with WeakFileLock(path, timeout=_LOCK_PATIENCE_S):
                return True
        except TimeoutError:
            return False
