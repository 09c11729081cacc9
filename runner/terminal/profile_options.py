"""The flags of the command `profile`. Knows no command, runs nothing."""

import click

from runner.terminal.cli_options import ENVIRONMENT_PREFIX, FILE, THREAD_FLAGS, flag, switch

_MIN_TOKENS, _MAX_TOKENS = 64, 1 << 20

PROFILE_FLAGS = (
    click.Option(
        ("--text", "texts"),
        help="A text to profile with, like those that the model will be used for; may be repeated."
        " A packaged one otherwise.",
        type=FILE,
        multiple=True,
        envvar=f"{ENVIRONMENT_PREFIX}_TEXT",
        show_envvar=True,
    ),
    click.Option(  # without a twin: BUDDYRUN_HISTORY is the file that they are read from
        ("--history", "with_history"),
        help="Profile with the lines that you typed in chats as well. They stay on this machine,"
        " and only counts of them go into the profile.",
        is_flag=True,
    ),
    flag(
        *("-o", "--output-file", "output"),
        help="The profile to write; otherwise it lies beside the model, where it is found.",
        type=FILE,
    ),
    flag(
        *("--tokens", "n_tokens"),
        help="Tokens of the texts to run.",
        type=click.IntRange(_MIN_TOKENS, _MAX_TOKENS),
        default=2048,
    ),
    THREAD_FLAGS[0],
    switch("-v", "--verbose", "verbose", help="Show traces of bugs."),
)
