"""The flags of the command `perplexity`. Knows no command, runs nothing."""

import click

from runner.config import MAX_CTX
from runner.terminal.cli_options import FILE, flag, switch

_N_CTX = 512  # as in llama-perplexity


def texts_flag(help: str) -> click.Option:
    """The texts that a command runs."""
    return click.Option(
        ("-f", "--file", "texts"),
        help=help,
        type=FILE,
        multiple=True,
    )


def max_tokens_flag(default: int) -> click.Option:
    """How much of each text."""
    return flag(
        *("--tokens", "max_tokens"),
        help="Most tokens of each text, from its start; 0 = all.",
        type=click.IntRange(0),
        default=default,
        has_twin=False,
    )


WINDOW_FLAG = flag(
    *("-c", "--ctx-size", "n_ctx"),
    help="Tokens of a window; each begins with an empty context.",
    type=click.IntRange(2, MAX_CTX),
    default=_N_CTX,
    has_twin=False,  # a chat's context is another thing
)

PERPLEXITY_FLAGS = (
    texts_flag("A text to score; may be repeated."),
    WINDOW_FLAG,
    flag(
        *("--chunks", "max_windows"),
        help="Most windows of each text; 0 = all.",
        type=click.IntRange(0),
        default=0,
    ),
    max_tokens_flag(0),
    switch("--json", "as_json", help="Print JSON.", has_twin=False),
    switch("-v", "--verbose", "verbose", help="Show each window's figures, and traces of bugs."),
)
