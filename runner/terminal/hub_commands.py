"""The commands `pull`, `list` (`ls`) and `rm` as click sees them; each is carried out elsewhere."""

from typing import Any

import click

from runner.terminal.cli_options import is_on_command_line
from runner.terminal.command_group import FlagCommand
from runner.terminal.hub_options import LIST_PARAMS, PULL_PARAMS, REMOVE_PARAMS

_EXIT_MAKES_NO_SENSE = 1  # of a dry run


def _pull(**params: Any) -> None:
    from runner.terminal.pull_command import pull_model

    context = click.get_current_context()
    if not params["word"] and not params["hf_repo"]:
        raise click.UsageError("Missing NAME, such as user/repo:Q4_K_M.", context)
    if params["word"]:
        if is_on_command_line(context, "hf_repo"):
            raise click.UsageError("Give the model either as NAME or with -hf, not both.", context)
        params["hf_repo"] = None
    context.exit(0 if pull_model(params) else _EXIT_MAKES_NO_SENSE)


def _list(folders: tuple[str, ...], as_json: bool, verbose: bool) -> None:
    from runner.terminal.models_command import list_models

    list_models(folders, as_json)


def _remove(word: str, yes: bool, as_json: bool, verbose: bool) -> None:
    from runner.terminal.models_command import remove_model

    remove_model(word, yes, as_json)


def _list_command(name: str) -> FlagCommand:
    return FlagCommand(
        name,
        params=[*LIST_PARAMS],
        callback=_list,
        hidden=name == "ls",
        short_help="List the models on this machine",
        help="List the models in the Hugging Face cache, and those in each FOLDER.",
    )


HUB_COMMANDS = (
    FlagCommand(
        "pull",
        params=[*PULL_PARAMS],
        callback=_pull,
        short_help="Fetch a model from a hub",
        help="Fetch the model NAME, user/repo or user/repo:QUANT, from a hub into the Hugging Face"
        " cache, which other programs share. Without QUANT that is Q4_K_M, else Q8_0, else the"
        " first. First its header is read, and what cannot be run here is refused. What was cut"
        " off is continued by the same command.",
    ),
    _list_command("list"),
    _list_command("ls"),
    FlagCommand(
        "rm",
        params=[*REMOVE_PARAMS],
        callback=_remove,
        short_help="Remove a model from the cache",
        help="Remove the model NAME, user/repo:QUANT, from the Hugging Face cache; without QUANT"
        " all models of the repository and what cut-off downloads left of it.",
    ),
)
