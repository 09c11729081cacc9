"""A process that has imported everything and forks for each command line or download.

huggingface-hub reads the environment when it is imported, so it cannot be changed in the tests'
own process; and 200 processes that are killed should not import 200 times.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.paths import ROOT


@dataclass(frozen=True)
class Done:
    """How a child ended."""

    returncode: int  # below 0: killed by that signal
    stdout: str
    stderr: str


class ForkServer:
    """The tests' end."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        """folder: for what children print."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        self._folder = folder
        self._n_started = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.runner.hub.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**kept, **environment},
            text=True,
        )
        self._hear()  # that it is ready

    def buddyrun(self, *arguments: str, stdin: str = "") -> Done:
        """Run the command line."""
        self.start({"cli": list(arguments), "stdin": stdin})
        return self.wait()

    def fetch(self, repo: str, local_dir: str = "") -> Done:
        """Fetch a model as `pull` does, without preflight and without waiting between tries."""
        self.start({"fetch": repo, "local_dir": local_dir})
        return self.wait()

    def start(self, request: Mapping[str, Any]) -> int:
        """Start a child; returns its process id. One at a time."""
        self._n_started += 1
        self._tell({**request, "output": str(self._output)})
        return int(self._hear()["pid"])

    def wait(self) -> Done:
        """Wait for the child that was started last."""
        self._tell({"wait": True})
        status = int(self._hear()["status"])
        return Done(status, self._printed("out"), self._printed("err"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()

    @property
    def _output(self) -> Path:
        return self._folder / f"child-{self._process.pid}-{self._n_started}"

    def _printed(self, ending: str) -> str:
        path = self._output.with_suffix(f".{ending}")
        text = path.read_text() if path.exists() else ""  # killed before it printed
        path.unlink(missing_ok=True)
        return text

    def _tell(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found


def serve() -> None:
    """The other end."""
    import runner.cli
    import runner.hub.download
    import runner.hub.local_models
    import runner.hub.preflight
    import runner.hub.remote_header
    import runner.terminal.download_progress
    import runner.terminal.models_command
    import runner.terminal.pull_command
    import runner.terminal.run_command  # noqa: F401

    print(json.dumps({"ready": True}), flush=True)
    pid = 0
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(pid, 0)
            answer = {"status": os.waitstatus_to_exitcode(status)}
        else:
            pid = os.fork()
            if pid == 0:
                os._exit(_child(request))
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


def _child(request: dict[str, Any]) -> int:
    """Run in the forked process; what it prints goes to files."""
    read, write = os.pipe()
    os.write(write, request.get("stdin", "").encode())
    os.close(write)
    os.dup2(read, 0)
    sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115
    for number, name in ((1, "out"), (2, "err")):
        fd = os.open(f"{request['output']}.{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(fd, number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = _fetch(request) if "fetch" in request else _cli(request["cli"])
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        status = 3
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _cli(arguments: list[str]) -> int:
    from runner.cli import main

    return main(arguments)


def _fetch(request: dict[str, Any]) -> int:
    from runner.errors import HubError
    from runner.hub.download import SEGMENT_BYTES, Download, Patience
    from runner.hub.model_name import parse
    from runner.hub.pull import plan_pull
    from runner.hub.repository import Hub
    from runner.terminal.download_progress import QuietWatcher

    hub = Hub()
    folder = Path(request["local_dir"]) if request["local_dir"] else None
    try:
        plan = plan_pull(hub, parse(request["fetch"]), folder)
        patience = Patience(n_tries=3, first_wait_s=0.0, longest_asked_s=0.0)
        watcher = QuietWatcher(sys.stderr)
        n_bytes = request.get("segment_bytes", SEGMENT_BYTES)
        download = Download(hub, plan.contents, plan.place, watcher, patience, n_bytes)
        print(download.fetch(plan.variant.files))
    except HubError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    serve()
