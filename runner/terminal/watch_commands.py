"""The commands `top` and `ps` as click sees them; `top_command` carries them out."""

from typing import Any

import click

from runner.terminal import cli_options as options
from runner.terminal.command_group import FlagCommand


def _top(**params: Any) -> None:
    from runner.terminal.top_command import watch_engine

    if params["follow"] and not params["as_json"]:
        raise click.UsageError("--follow: only with --json.")
    if params["once"] and params["as_json"]:
        raise click.UsageError("Give either --once or --json, not both.")
    prints_once = params["once"] or (params["as_json"] and not params["follow"])
    if params["record"] is not None and prints_once:
        raise click.UsageError("--record: with the screen, or with --json --follow.")
    if params["replay"] is not None and params["pid"] is not None:
        raise click.UsageError("Give either PID or --replay, not both.")
    watch_engine(params, click.get_current_context().obj)


def _ps(as_json: bool) -> None:
    from runner.terminal.top_command import list_engines

    list_engines(as_json)


_TOP_PARAMS = (
    click.Argument(["pid"], required=False, metavar="[PID]", type=int),
    options.switch("--once", help="Print one text and exit."),
    options.switch("--json", "as_json", help="Print one JSON object and exit.", has_twin=False),
    options.switch("--follow", help="With --json: one line of JSON for each moment, to the end."),
    click.Option(
        ["--record"],
        metavar="FILE",
        type=options.FILE,
        help="Keep every moment in a new file; with the screen, or with --json --follow.",
    ),
    click.Option(
        ["--replay"],
        metavar="FILE",
        type=options.FILE,
        help="Play such a file instead of watching an engine.",
    ),
    options.switch("--ascii", help="Draw with plain characters only."),
)

WATCH_COMMANDS = (
    FlagCommand(
        "top",
        params=[*_TOP_PARAMS],
        callback=_top,
        short_help="Watch a running buddyrun: cache, buddies, speed",
        help="Watch a running buddyrun of yours, from another terminal: which experts are in"
        " memory, what is missing, who stands in for whom, and how fast it is. PID is the"
        " process number as `buddyrun ps` shows it; without it you choose.",
    ),
    FlagCommand(
        "ps",
        params=[options.switch("--json", "as_json", help="Print JSON.", has_twin=False)],
        callback=_ps,
        short_help="List the running buddyruns",
        help="List your running buddyruns: the model, what each does, how its cache does.",
    ),
)
