"""The commands `top` and `ps`: which engines of this user run, and what they do."""

import json
import sys
from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from runner.errors import OptionError
from runner.frames import Frame, FrameWriter
from runner.message_values import fields_of
from runner.recording import Recorder, Replay
from runner.screens import MonitorRequest, Screens
from runner.terminal.cli_options import Params
from runner.terminal.frame_text import PS_HEADER, frame_text, ps_row, table
from runner.terminal.terminal_text import visible
from runner.watch import Running, Watch, find, running


def watch_engine(params: Params, screens: Screens | None) -> None:
    """Show what an engine does, or did in a recording: on the screen, as text or as JSON.

    Raises BuddyrunError.
    """
    replay = Replay(params["replay"]) if params["replay"] is not None else None
    found = find(params["pid"]) if replay is None else []
    is_shown = not (params["follow"] or params["once"] or params["as_json"])
    with _recorder(params["record"]) as recorder:
        if is_shown:
            request = MonitorRequest(tuple(found), replay, recorder, params["ascii"])
            _of_terminal(screens).monitor(request)
        elif params["follow"]:
            _follow(replay, found, recorder)
        else:
            _print_once(_last(replay) if replay else _only(found).frame, params["as_json"])


def list_engines(as_json: bool) -> None:
    """Print all engines of this user. Raises BuddyrunError."""
    frames = [each.frame for each in running()]
    if as_json:
        print(json.dumps(frames, default=fields_of))
    else:
        print(_shown(table([PS_HEADER, *map(ps_row, frames)])))


def _of_terminal(screens: Screens | None) -> Screens:
    if screens is None:
        raise OptionError("this way of starting buddyrun has no screens; --once prints text")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise OptionError(
            "this is no terminal: --once prints text, --json JSON, --json --follow a stream of it"
        )
    return screens


def _recorder(path: str | None) -> AbstractContextManager[Recorder | None]:
    return Recorder(path) if path is not None else nullcontext()


def _only(found: list[Running]) -> Running:
    if len(found) == 1:
        return found[0]
    numbers = ", ".join(f"{each.frame.owner_pid} ({visible(each.name)})" for each in found)
    raise OptionError(f"several are running, give the process number of one: {numbers}")


def _last(replay: Replay) -> Frame:
    last = deque(replay.all(), maxlen=1)
    if not last:
        raise OptionError(f"there is nothing in the recording {replay.path}")
    return last[0]


def _print_once(frame: Frame, as_json: bool) -> None:
    print(json.dumps(frame, default=fields_of) if as_json else _shown(frame_text(frame)))


def _follow(replay: Replay | None, found: list[Running], recorder: Recorder | None) -> None:
    """Print frames as they come until the engine ends; as in a recording, one object a line."""
    if replay is not None:
        _print_stream(replay.frames(), recorder)
        return
    with Watch(_only(found).pid) as watch:
        _print_stream(watch.frames(), recorder)


def _print_stream(frames: Iterable[Frame], recorder: Recorder | None) -> None:
    writer = FrameWriter()
    for frame in frames:
        for line in writer.lines(frame):
            print(line)
        sys.stdout.flush()
        if recorder is not None:
            recorder.write(frame)


def _shown(text: str) -> str:
    return visible(text) if sys.stdout.isatty() else text
