"""The flags of `buddyrun bench` about its tests, as llama-bench has them. Runs nothing."""

from typing import Any

import click

from runner.terminal.cli_options import FILE, flag, twin

BENCH_FORMATS = ("md", "json", "jsonl", "csv")
_MAX_BENCH_TOKENS = 1 << 20


class _CountList(click.ParamType):  # type: ignore[type-arg]
    """Token counts as llama-bench takes them: 512 or 512,1024; 0 leaves a test out."""

    name = "N,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Raises click.BadParameter for anything but counts."""
        if not isinstance(value, str):
            return tuple(value)
        try:
            counts = tuple(int(part) for part in value.split(","))
        except ValueError:
            counts = (-1,)
        if any(not 0 <= n <= _MAX_BENCH_TOKENS for n in counts):
            self.fail(
                f"{value!r} is not a list of counts from 0 to {_MAX_BENCH_TOKENS}", param, ctx
            )
        return counts


def _join_counts(
    context: click.Context, param: click.Parameter, values: tuple[tuple[int, ...], ...]
) -> tuple[int, ...]:
    return tuple(n for counts in values for n in counts)


def _counts(*names: str, help: str, default: int) -> click.Option:
    return click.Option(
        names,
        help=help,
        type=_CountList(),
        multiple=True,
        default=[str(default)],
        show_default=True,
        callback=_join_counts,
        **twin(names),
    )


BENCH_FLAGS = (
    _counts("-p", "--n-prompt", "prompts", help="Prompts of N tokens.", default=512),
    _counts("-n", "--n-gen", "gens", help="Generations of N tokens.", default=128),
    flag(
        *("-r", "--repetitions", "repetitions"),
        help="How often each test runs.",
        type=click.IntRange(1, 1000),
        default=5,
    ),
    flag(
        *("-o", "--output", "form"),
        help="Format of the figures.",
        type=click.Choice(BENCH_FORMATS),
        default="md",
    ),
    flag(
        "--text",
        "text",
        help="The text whose tokens are used; a packaged one otherwise.",
        type=FILE,
    ),
)
