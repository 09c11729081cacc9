"""`python -m tests.tui.run_chat ARGUMENTS`: the command line with the chat screen; with
SCRIPTED=1 with a scripted engine."""

import os
import sys

from runner import engine_client
from runner.cli import main
from runner.screens import ChatRequest, MonitorRequest, Screens


def open_chat(request: ChatRequest) -> None:
    from tui.chat_app import open_chat as opened

    opened(request)


def open_monitor(request: MonitorRequest) -> None:
    raise AssertionError("nobody asks for it")


if __name__ == "__main__":
    if os.environ.get("SCRIPTED"):
        from tests.tui.scripted_engine import ScriptedEngine

        engine_client.Client = ScriptedEngine  # type: ignore[misc, assignment]
    sys.exit(main(screens=Screens(open_monitor, open_chat)))
