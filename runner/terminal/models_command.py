"""The commands `list` and `rm`: the models on this machine as a table, and removing one."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from runner.byte_sizes import bytes_text
from runner.errors import HubError
from runner.hub.cached_models import cached_models, unfinished, unfinished_bytes
from runner.hub.local_models import LocalModel, Removal, local_models, plan_removal, remove
from runner.hub.model_name import parse
from runner.hub.places import cache_folder, hidden_folder
from runner.terminal.terminal_text import visible_line

_HEAD = ("NAME", "QUANT", "SIZE", "ARCH", "EXPERTS", "RUNS", "PROFILE")


def list_models(folders: Sequence[str], as_json: bool) -> None:
    """Print the models in the cache and in `folders`. Raises BuddyrunError."""
    own_folders = [Path(os.path.expanduser(folder)) for folder in folders]
    models = local_models(own_folders)
    if as_json:
        print(json.dumps([asdict(model) for model in models], indent=2))
        return
    if models:
        _print_table([_HEAD, *map(_row, models)])
    else:
        print(
            f"No models in {visible_line(str(cache_folder()))}; `buddyrun pull user/repo` gets one."
        )
    for model in models:
        if not model.can_run:
            print(visible_line(f"{model.name} cannot be run: {model.reason}"), file=sys.stderr)
    _tell_unfinished(own_folders)


def _tell_unfinished(own_folders: Sequence[Path]) -> None:
    """Of the cache, and of folders that files were pulled to."""
    parts = unfinished()
    if parts:
        size = bytes_text(sum(part.n_bytes for part in parts))
        repos = ", ".join(sorted({part.repo for part in parts}))
        print(
            f"{size} of unfinished downloads: {visible_line(repos)}. `buddyrun pull` goes on with"
            " them, `buddyrun rm user/repo` removes them.",
            file=sys.stderr,
        )
    for folder in own_folders:
        n_bytes = unfinished_bytes(folder)
        if n_bytes:
            print(
                f"{bytes_text(n_bytes)} of unfinished downloads:"
                f" {visible_line(str(hidden_folder(folder)))}. `buddyrun pull --local-dir` goes on"
                " with them; delete that folder if none is running.",
                file=sys.stderr,
            )


def remove_model(word: str, is_sure: bool, as_json: bool) -> None:
    """Ask, then remove a model from the cache. Raises HubError, click.Abort."""
    removal = _removal(word)
    if not is_sure:
        names = ", ".join(removal.names) or f"what is left of {removal.repo}"
        text = f"Remove {names} ({bytes_text(removal.n_bytes)})?"
        click.confirm(visible_line(text), abort=True, err=True)
    remove(removal)
    if as_json:
        print(json.dumps(asdict(removal), indent=2))
    else:
        print(f"removed {bytes_text(removal.n_bytes)}")


def _removal(word: str) -> Removal:
    if Path(word).is_file():
        raise HubError(f"{word} is a file of yours, not of the cache: delete it yourself")
    name = parse(word)
    removal = plan_removal(name)
    if not removal.parts:
        here = [model for model in cached_models() if model.name.repo == name.repo]
        there = ", ".join(str(model.name) for model in here) or "none of this repository"
        raise HubError(f"{name} is not in the cache; there are: {there}")
    return removal


def _row(model: LocalModel) -> tuple[str, ...]:
    experts = f"{model.n_layer} x {model.n_expert}" if model.n_expert else "-"
    return (
        model.name,
        model.quant or "-",
        bytes_text(model.size_bytes),
        model.architecture,
        experts,
        "yes" if model.can_run else "no",
        "yes" if model.has_profile else "no",
    )


def _print_table(rows: list[tuple[str, ...]]) -> None:
    shown = [tuple(visible_line(cell) for cell in row) for row in rows]
    widths = [max(len(row[column]) for row in shown) for column in range(len(_HEAD))]
    for row in shown:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
