"""The flags that name a model on a hub, and completion of models' names. Asks no hub."""

import re
from typing import Any

import click
from click.shell_completion import CompletionItem

from runner.terminal.cli_options import FILE, flag, switch

_HARMLESS = re.compile(r"[\w./:@+-]+", re.ASCII)


class ModelType(click.Path):
    """A MODEL: a file, or the name of a model on a hub; the ones in the cache are completed."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[Any]]:
        """Files, and models in the cache."""
        return [*super().shell_complete(ctx, param, incomplete), *cached_names(incomplete)]


def cached_names(incomplete: str) -> list[CompletionItem[Any]]:
    """The models in the cache whose names begin so, and that no shell takes for more than words."""
    from runner.hub.cached_models import cached_models

    names = (str(model.name) for model in cached_models())
    return [
        CompletionItem(name)
        for name in names
        if name.startswith(incomplete) and _HARMLESS.fullmatch(name)
    ]


MODEL = ModelType(path_type=str)

HF_REPO_FLAG = flag(
    *("-hf", "-hfr", "--hf-repo", "hf_repo"),
    help="The model user/repo[:QUANT] on a hub, instead of MODEL; fetched if it is not here.",
    type=MODEL,
)

HUB_FLAGS = (
    flag("-hff", "--hf-file", "hf_file", help="A file of the repository, instead of QUANT."),
    flag("-hft", "--hf-token", "hf_token", help="Token for the hub; HF_TOKEN does the same."),
    flag("--revision", "revision", help="Branch, tag or commit of the repository; else main."),
    switch("--offline", "offline", help="Ask no hub; HF_HUB_OFFLINE=1 does the same."),
)

_NAME_ARGUMENT = click.Argument(["word"], required=False, metavar="NAME", type=MODEL)

PULL_PARAMS: tuple[click.Parameter, ...] = (
    _NAME_ARGUMENT,
    HF_REPO_FLAG,
    *HUB_FLAGS,
    flag("--local-dir", "local_dir", help="A folder for the files, not the cache.", type=FILE),
    switch("--dry-run", "dry_run", help="Only say what would come and how it would run."),
    switch(
        *("--force", "force"),
        help="Fetch it even if it cannot be run on this machine.",
        has_twin=False,
    ),
    switch("--json", "as_json", help="Print JSON.", has_twin=False),
    switch("-v", "--verbose", "verbose", help="Show traces of bugs."),
)

LIST_PARAMS: tuple[click.Parameter, ...] = (
    click.Argument(["folders"], nargs=-1, metavar="[FOLDER]...", type=FILE),
    switch("--json", "as_json", help="Print JSON.", has_twin=False),
    switch("-v", "--verbose", "verbose", help="Show traces of bugs."),
)

REMOVE_PARAMS: tuple[click.Parameter, ...] = (
    click.Argument(["word"], metavar="NAME", type=MODEL),
    switch("-y", "--yes", "yes", help="Do not ask.", has_twin=False),
    switch("--json", "as_json", help="Print JSON.", has_twin=False),
    switch("-v", "--verbose", "verbose", help="Show traces of bugs."),
)
