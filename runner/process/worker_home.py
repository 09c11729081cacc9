"""Where a worker lives: its private directory and socket, how it is found, how it leaves."""

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from pathlib import Path

from runner.process import meeting_place


class Home:
    """The worker's private directory, which holds its socket, and the ways to leave."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._for_viewers: Path | None = None  # a second socket, elsewhere

    def listen(self, authkey: bytes) -> Listener:
        """Listen where only this user can call: a socket in the directory, or a named pipe."""
        if sys.platform == "win32":
            return Listener(family="AF_PIPE", authkey=authkey)
        return Listener(str(self.directory / "s"), "AF_UNIX", authkey=authkey)

    def listen_to_viewers(self, environment: Mapping[str, str]) -> socket.socket | None:
        """Listen where this user's other programs look for engines; None where that cannot be."""
        if not meeting_place.HAS_MEETING_PLACE:
            return None
        place = meeting_place.directory(environment)
        try:
            listener = meeting_place.open_socket(place, os.getpid())
        except OSError as error:
            print(f"nobody can watch this run: {place}: {error}", file=sys.stderr)
            return None
        self._for_viewers = meeting_place.path_of(place, os.getpid())
        return listener

    def close(self, listener: Listener) -> None:
        """Take no more calls and leave no file behind."""
        listener.close()
        self._remove()

    def leave(self, status: int) -> None:
        """End the process now, whatever native code computes, and leave no file behind."""
        self._remove()
        if self._for_viewers is not None:
            with suppress(OSError):
                self._for_viewers.unlink(missing_ok=True)
        os._exit(status)

    def _remove(self) -> None:
        try:
            (self.directory / "s").unlink(missing_ok=True)
            self.directory.rmdir()
        except OSError:
            pass  # the parent was faster, or the directory has something that is not ours

    def leave_after_stdin(self) -> None:
        """Leave when the parent, which holds the other end of stdin, is gone."""
        try:
            while os.read(0, 4096):
                pass
        except OSError:
            pass
        self.leave(0)

    def leave_on_sigterm(self) -> None:
        """Obey SIGTERM even in native code, where Python's own handlers wait; ignore Ctrl-C,
        which goes to all processes of a terminal: what it means is the parent's decision."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: None)
        woken, wakes = socket.socketpair()
        wakes.setblocking(False)
        signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)

        def watch(keep: socket.socket) -> None:
            while signal.SIGTERM not in woken.recv(64):
                pass
            self.leave(128 + signal.SIGTERM)

        threading.Thread(target=watch, args=(wakes,), daemon=True).start()


def announce(listener: Listener, authkey: bytes) -> None:
    """Tell the parent where to call. From then on stdout is stderr: native code may print."""
    sys.stdout.write(json.dumps({"address": listener.address, "authkey": authkey.hex()}) + "\n")
    sys.stdout.flush()
    os.dup2(2, 1)


def accept(listener: Listener) -> Connection:
    """The first caller that has the key."""
    while True:
        try:
            return listener.accept()
        except (AuthenticationError, AssertionError, EOFError, OSError):
            continue  # no client of ours; Python 3.11 asserts where later ones raise
