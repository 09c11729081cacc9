"""The exact run that others are judged by: its logits in a temporary file, its cost. Runs nothing.

A file that is written and read, and no memory map: a full disk is an error then, not a signal.
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from runner.byte_sizes import bytes_text
from runner.errors import OptionError
from runner.quality.evaluation import RunCost

_SPARE_BYTES = 64 << 20  # of the disk, left for others

Window = Sequence[int]


class BaseRun:
    """An exact run over windows, made by `record_base`: what it cost, and its logits in a file
    that goes when this is closed or the process ends. Serves one comparison at a time."""

    def __init__(self, path: Path, windows: Sequence[Window]) -> None:
        """Raises OptionError when there is no folder for temporary files."""
        self.path = path
        self.windows = tuple(tuple(window) for window in windows)
        self.n_tokens = sum(len(window) - 1 for window in windows)  # scored ones
        self.n_ctx = max(len(window) for window in windows)
        self.cost: RunCost | None = None  # None until the run is over
        self._n_vocab = 0
        try:
            self._file = tempfile.TemporaryFile(prefix="buddyrun-", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise OptionError(f"cannot keep logits in a temporary file: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the file. Can be called twice."""
        self._file.close()

    def write(self, logits: np.ndarray) -> None:
        """Append the logits (n_vocab,) float32 in front of the next scored token.

        Raises OptionError when the disk has no room for all of them.
        """
        if not self._n_vocab:
            self._n_vocab = len(logits)
            check_room(self.n_tokens, self._n_vocab)
        try:
            n_written = self._file.write(np.ascontiguousarray(logits, np.float32).data)
        except OSError as error:
            raise OptionError(f"cannot write logits to {_folder()}: {error.strerror}") from error
        if n_written != logits.nbytes:
            raise OptionError(f"cannot write logits to {_folder()}: it is full")

    def rows(self) -> Iterator[np.ndarray]:
        """The logits (n_vocab,) float32 in front of every scored token; overwritten by the next."""
        self._file.seek(0)
        row = np.empty(self._n_vocab, np.float32)
        for _ in range(self.n_tokens):
            n_read = self._file.readinto(row.data)
            assert n_read == row.nbytes
            yield row


def check_room(n_tokens: int, n_vocab: int) -> None:
    """Raise OptionError when the logits of so many tokens do not fit where temporary files go."""
    n_bytes = n_tokens * n_vocab * np.dtype(np.float32).itemsize
    free = shutil.disk_usage(_folder()).free
    if n_bytes + _SPARE_BYTES > free:
        raise OptionError(
            f"the logits of {n_tokens} tokens take {bytes_text(n_bytes)} in {_folder()} and"
            f" {bytes_text(free)} are free there: take fewer tokens (--tokens, --chunks) or set"
            " TMPDIR to a folder with more room"
        )


def _folder() -> str:
    return tempfile.gettempdir()
