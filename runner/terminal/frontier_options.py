"""The flags of `bench --frontier`. Knows no command, runs nothing."""

from collections.abc import Sequence
from typing import Any

import click

from runner.config import BUDDY_POLICIES
from runner.quality.frontier import ALL
from runner.terminal.bench_options import BENCH_FLAGS
from runner.terminal.buddy_options import Share
from runner.terminal.cli_options import (
    FILE,
    flag,
    is_on_command_line,
    switch,
)
from runner.terminal.perplexity_options import WINDOW_FLAG, max_tokens_flag, texts_flag

_N_TOKENS = 512  # of each text
_MAX_SEEDS = 100
_IGNORED = ("buddy", "exact", "buddy_budget", "verify_every")  # besides those of the tests


class _PolicyList(click.ParamType):  # type: ignore[type-arg]
    """Policies by name: blend,router."""

    name = "policy,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Raises click.BadParameter for a policy that does not exist."""
        if not isinstance(value, str):
            return tuple(value)
        names = tuple(part.strip() for part in value.split(","))
        for name in names:
            if name not in BUDDY_POLICIES:
                known = ", ".join(BUDDY_POLICIES)
                self.fail(f"{name!r:.40} is no policy: expected {known}", param, ctx)
        return names


class _BudgetList(click.ParamType):  # type: ignore[type-arg]
    """Shares of the router's weight, 2%,0.05,all; None stands for `all`."""

    name = "share,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float | None, ...]:
        """Raises click.BadParameter for what is no share, and for 0."""
        if not isinstance(value, str):
            return tuple(value)
        parts = [part.strip() for part in value.split(",")]
        shares = tuple(None if part == ALL else Share().convert(part, param, ctx) for part in parts)
        if 0.0 in shares:
            self.fail("a budget of 0 is the exact run, which is measured anyway", param, ctx)
        return shares


FRONTIER_FLAGS = (
    switch(
        "--frontier",
        help="Instead of the tests run the texts once exactly, then with every policy and budget,"
        " token by token; show what each brings in speed and costs in quality; write the figures"
        " as JSON and a picture of them as SVG.",
    ),
    flag(
        "--policies",
        help=f"Some of {','.join(BUDDY_POLICIES)}. Default: all that can run.",
        type=_PolicyList(),
    ),
    flag(
        "--budgets",
        help="The most of the router's weight that stand-ins may carry; all = no limit, and the"
        " router's first choice may be replaced too.",
        type=_BudgetList(),
        default="2%,5%,10%,20%,100%,all",
    ),
    flag(
        "--seeds",
        help="How often the policy random runs, each time with other numbers.",
        type=click.IntRange(1, _MAX_SEEDS),
        default=1,
    ),
    texts_flag("A text to run; may be repeated. Without it that of --text."),
    WINDOW_FLAG,
    max_tokens_flag(_N_TOKENS),
    flag(
        "--frontier-out",
        help="Where figures and picture go: FILE.json and FILE.svg.",
        type=FILE,
        default="frontier",
    ),
)


def flags_without_meaning(context: click.Context) -> list[str]:
    """The flags on the command line that --frontier takes no notice of, or that need it."""
    if context.params["frontier"]:
        tests = [param.name for param in BENCH_FLAGS if param.name != "text"]
        return _given(context, [*filter(None, tests), *_IGNORED])
    return _given(context, [param.name for param in FRONTIER_FLAGS[1:] if param.name])


def _given(context: click.Context, names: Sequence[str]) -> list[str]:
    params = {param.name: param for param in context.command.params}
    return [params[name].opts[-1] for name in names if is_on_command_line(context, name)]
