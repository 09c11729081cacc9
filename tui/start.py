"""The program's doorway: the command line, with the screens handed in. Imports no screen."""

from runner.cli import main as run_command_line
from runner.client import ChatRequest, MonitorRequest, Screens


def main() -> int:
    """Run the command line; returns the exit code."""
    return run_command_line(screens=Screens(monitor=show_monitor, chat=show_chat))


def show_monitor(request: MonitorRequest) -> None:
    """Watch engines until the person leaves."""
    from tui.top_app import TopApp

    TopApp(request).run()


def show_chat(request: ChatRequest) -> None:
    """Chat until the person leaves."""
    from tui.chat_app import open_chat

    open_chat(request)
