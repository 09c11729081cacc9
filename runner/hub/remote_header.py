"""RemoteFile: a file on a hub read by ranges, so that a model's header can be checked from afar.

Knows no model. What was read is kept, since a header is read twice; at most MAX_BYTES of a file.
"""

from pathlib import Path

from quant.gguf_file import GGUFFile
from quant.read_only_file import ReadOnlyFile, WritableBuffer, bytes_of
from runner.errors import HubError
from runner.hub.repo_files import Contents, RepoFile, Variant
from runner.hub.repository import Hub

MAX_BYTES = 64 << 20  # the largest known headers have 30 MB
_FIRST_BYTES = 1 << 20  # then twice as many each time
_MAX_RANGE_BYTES = 16 << 20


class RemoteFile(ReadOnlyFile):
    """The beginning of a file on a hub; reading beyond it raises HubError. Cannot be mapped."""

    def __init__(self, hub: Hub, contents: Contents, file: RepoFile) -> None:
        self.path = Path(contents.repo) / file.path
        self.size_bytes = file.n_bytes
        self._hub, self._contents, self._file = hub, contents, file
        self._start = bytearray()

    def read_into(self, offset: int, into: WritableBuffer) -> None:
        """Fill `into` from the byte `offset` on. Raises HubError."""
        view = bytes_of(into)
        end = offset + len(view)
        assert end <= self.size_bytes, f"{end} of {self.size_bytes} bytes"
        if end > MAX_BYTES:
            raise HubError(
                f"{self.path}: the header has no end within {MAX_BYTES >> 20} MiB; expected at"
                " most 30 MB: this is no model that buddyrun runs"
            )
        while len(self._start) < end:
            self._extend(end)
        view[:] = self._start[offset:end]

    def close(self) -> None:
        self._start = bytearray()

    def _extend(self, end: int) -> None:
        first = len(self._start)
        n_more = min(max(_FIRST_BYTES, first), _MAX_RANGE_BYTES)
        last = min(max(end, first + n_more), self.size_bytes) - 1
        with self._hub.body(self._contents, self._file, first, last) as chunks:
            for chunk in chunks:
                self._start += chunk
                if len(self._start) > last:  # the server may send all of the file
                    break
        if len(self._start) <= last:
            raise HubError(f"{self.path}: the connection broke while the header came; try again")


def open_remote(hub: Hub, contents: Contents, variant: Variant) -> GGUFFile:
    """The header of a model on a hub, checked as that of a file here. Its weights cannot be read.

    Raises GGUFError, HubError.
    """
    return GGUFFile.of_files([RemoteFile(hub, contents, file) for file in variant.files])
