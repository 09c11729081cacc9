"""The flags of the command `top`."""

import click

from runner.terminal import cli_options as options

TOP_FLAGS = (
    options.switch("--once", help="Print one text and exit."),
    options.switch("--json", "as_json", help="Print one JSON object and exit."),
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
