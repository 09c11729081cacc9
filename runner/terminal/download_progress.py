"""What a person sees of a download: a line for each file and one for all. Fetches nothing."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from runner.hub.download import Watcher
from runner.hub.repo_files import RepoFile
from runner.terminal.terminal_text import visible_line

_MAX_NAME = 40  # characters of a file's name


class QuietWatcher:
    """Only what the user should know, on stderr."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def begin(self, file: RepoFile, n_there: int) -> None:
        """Not shown."""

    def checked(self, n_bytes: int) -> None:
        """Not shown."""

    def add(self, n_bytes: int) -> None:
        """Not shown."""

    def end(self) -> None:
        """Not shown."""

    def say(self, text: str) -> None:
        print(f"buddyrun: {visible_line(text)}", file=self._stream, flush=True)


class ProgressWatcher:
    """Bars with the rate and the time left."""

    def __init__(self, progress: Progress, files: Sequence[RepoFile], missing_bytes: int) -> None:
        self._progress = progress
        self._total: TaskID | None = None
        if len(files) > 1:
            self._total = progress.add_task("all files", total=missing_bytes)
        self._file: RepoFile | None = None
        self._task: TaskID | None = None
        self._check: TaskID | None = None

    def begin(self, file: RepoFile, n_there: int) -> None:
        name = _short(file.path)
        self._file = file
        self._check = self._task = None
        if n_there:
            self._check = self._progress.add_task(f"checking {name}", total=n_there)
        else:
            self._start(n_there)

    def checked(self, n_bytes: int) -> None:
        if self._check is not None:
            self._progress.advance(self._check, n_bytes)
            task = self._progress.tasks[self._progress.task_ids.index(self._check)]
            if task.finished:
                self._progress.remove_task(self._check)
                self._start(int(task.completed))

    def add(self, n_bytes: int) -> None:
        for task in (self._task, self._total):
            if task is not None:
                self._progress.advance(task, n_bytes)

    def end(self) -> None:
        self._progress.refresh()

    def say(self, text: str) -> None:
        self._progress.console.print(
            f"buddyrun: {visible_line(text)}", markup=False, highlight=False, soft_wrap=True
        )

    def _start(self, n_there: int) -> None:
        assert self._file is not None
        name, size = _short(self._file.path), self._file.n_bytes
        self._task = self._progress.add_task(name, total=size, completed=n_there)


@contextmanager
def watching(files: Sequence[RepoFile], missing_bytes: int) -> Iterator[Watcher]:
    """Bars on stderr while the block runs; nothing but remarks when nobody looks on."""
    if not sys.stderr.isatty():
        yield QuietWatcher(sys.stderr)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        yield ProgressWatcher(progress, files, missing_bytes)


def _short(path: str) -> str:
    name = visible_line(path.rpartition("/")[2])
    return name if len(name) <= _MAX_NAME else f"{name[:12]}...{name[15 - _MAX_NAME :]}"
