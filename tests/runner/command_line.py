"""Runs the command line in tests: in this process, which is quick, or as a process of its own."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

from runner import engine_client
from runner.cli import main
from tests.runner.scripted_client import ScriptedClient

ROOT = Path(__file__).parent.parent.parent
SCRIPTED = [sys.executable, "-m", "tests.runner.scripted_client"]
BUDDYRUN = [sys.executable, "-m", "runner"]
Done = subprocess.CompletedProcess[bytes]


def buddyrun(*arguments: str, stdin: bytes = b"", **environment: str) -> Done:
    """Run a command line here with the scripted engine and pipes for standard streams."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for name in ("out", "err")}
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    with (
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin))),
        mock.patch.object(sys, "stdout", streams["out"]),
        mock.patch.object(sys, "stderr", streams["err"]),
        mock.patch.dict(os.environ, environment),
        mock.patch.object(engine_client, "Client", ScriptedClient),
    ):
        try:
            status = main(list(arguments))
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)
    out, err = (_written(stream) for stream in streams.values())
    assert b"Traceback" not in err or "--verbose" in arguments
    return Done(arguments, status, out, err)


def buddyrun_process(
    *arguments: str, stdin: bytes = b"", command: list[str] = SCRIPTED, **environment: str
) -> Done:
    """Run a command line as a process of its own."""
    done = subprocess.run(
        [*command, *arguments],
        input=stdin,
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=60,
        check=False,
    )
    assert b"Traceback" not in done.stderr
    return done


def _written(stream: io.TextIOWrapper) -> bytes:
    stream.flush()
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue()
