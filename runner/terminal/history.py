"""The lines typed in chats, kept in a file of this user only. Knows no terminal.

One JSON string per line, oldest first. A file that cannot be read or written is no reason to stop
a chat: the history is then simply not kept.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

MAX_LINES = 1000
_MAX_READ_BYTES = 8 << 20


class LineHistory:
    """Remembers lines in `path`; nowhere when that is None or keeping is off."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.has_file = path is not None
        self._is_on = True

    @property
    def is_kept(self) -> bool:
        """Whether lines are written."""
        return self.has_file and self._is_on

    def keep(self, is_on: bool) -> None:
        """Write lines from now on, or write none. There must be a file."""
        assert self.has_file, "there is no file to keep lines in"
        self._is_on = is_on

    def load(self) -> list[str]:
        """The lines of earlier chats, oldest first; a long file is cut to its newest lines."""
        if self._path is None:
            return []
        try:
            with self._path.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _MAX_READ_BYTES))
                lines = _parse(file.read(_MAX_READ_BYTES))
        except OSError:
            return []
        if len(lines) > 2 * MAX_LINES:
            lines = lines[-MAX_LINES:]
            self._rewrite(lines)
        return lines

    def add(self, line: str) -> None:
        """Append one line."""
        if self._path is None or not self._is_on or not line.strip():
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write(self._path, os.O_APPEND, [line])

    def _rewrite(self, lines: list[str]) -> None:
        assert self._path is not None
        shorter = self._path.with_name(self._path.name + ".new")
        with contextlib.suppress(OSError):
            _write(shorter, os.O_TRUNC, lines)
            os.replace(shorter, self._path)


def default_history_path(environment: Mapping[str, str], is_windows: bool) -> Path | None:
    """Where the history lies without any setting; None when no home directory is known."""
    state = environment.get("LOCALAPPDATA" if is_windows else "XDG_STATE_HOME", "")
    if state and Path(state).is_absolute():
        return Path(state) / "buddyrun" / "history"
    home = environment.get("USERPROFILE" if is_windows else "HOME", "")
    if not home:
        return None
    return Path(home, ".local", "state", "buddyrun", "history")


def _write(path: Path, mode: int, lines: list[str]) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | mode, 0o600)
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def _parse(data: bytes) -> list[str]:
    lines = []
    for raw in data.splitlines():
        with contextlib.suppress(ValueError):
            line = json.loads(raw)
            if isinstance(line, str):
                lines.append(line)
    return lines
