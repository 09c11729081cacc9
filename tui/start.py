"""The program's doorway: the command line, with the screens handed in. Loads no screen by itself."""

import sys

from runner.cli import main as run_command_line
from runner.client import ChatRequest, MonitorRequest, Screens


def main() -> int:
    """Run the command line; returns the exit code."""
    return run_command_line(screens=Screens(monitor=show_monitor, chat=show_chat))


def show_monitor(request: MonitorRequest) -> None:
    """Watch engines until the person leaves."""
    from tui.top_app import TopApp

    TopApp(request).run()


if __name__ == "__main__":
    sys.exit(main())
