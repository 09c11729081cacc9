"""The click classes behind the command line: a default command, flags, help in sections."""

from collections.abc import Sequence

import click
from click.parser import _OptionParser, _ParsingState
from click.shell_completion import CompletionItem

EXAMPLES = (
    ("buddyrun demo", "chat with the small model that comes along"),
    ("buddyrun MODEL.gguf", "chat with a model"),
    ("buddyrun user/repo:Q4_K_M", "the same with one from a hub, fetched if needed"),
    ('buddyrun MODEL.gguf -p "Why?" -n 64', "answer once and exit"),
    ('buddyrun MODEL.gguf "Sum up:" < notes.txt', "answer about what is piped in"),
)
_OF_LLAMA_CPP = {
    ("-fa", "--flash-attn"): "attention is always flash attention",
    ("-ncmoe", "--n-cpu-moe", "-cmoe", "--cpu-moe"): "--moe-cache says how many experts fit",
    ("-ub", "--ubatch-size"): "-b says how many tokens are computed at once",
    ("--mlock", "--no-mmap", "--mmap"): "weights stay in the mapped file, experts in --moe-cache",
    ("-fit", "--fit"): "what fits is worked out; --fit-margin leaves memory to others",
    ("-fitt", "--fit-target"): "--fit-margin says how much memory is left to others",
    ("--jinja", "--no-jinja"): "the model's Jinja template is always used",
    ("-i", "--interactive", "-if", "--interactive-first"): "it chats unless there is a prompt",
    ("-sm", "--split-mode", "-ts", "--tensor-split", "-mg", "--main-gpu"): "one device computes;"
    " --device chooses it",
    ("-ot", "--override-tensor"): "--moe-cache says how many experts fit",
    ("--host", "--port", "--api-key"): "buddyrun has no server",
    ("-mm", "--mmproj", "--image"): "it reads text only",
    ("-md", "--model-draft"): "there is no speculative decoding",
    ("--lora", "--control-vector"): "it runs a model as its file is",
}
_INSTEAD = {name: what for names, what in _OF_LLAMA_CPP.items() for name in names}
_USUAL = ("model", "prompt", "n_predict", "n_ctx", "n_threads", "system_prompt", "temperature")


class DefaultGroup(click.Group):
    """A group whose command `run` is meant when the first word is none of its commands.

    A file called like a command is reached as `./show` or `-m show`.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `run` before anything that is neither a command nor a flag of the group."""
        own = {name for param in self.params for name in param.opts} | set(ctx.help_option_names)
        has_model_twin = not args and self._run_has_model(ctx)
        if has_model_twin or (args and args[0] not in self.commands and args[0] not in own):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def _run_has_model(self, ctx: click.Context) -> bool:
        flags = [
            param for param in self.commands["run"].params if param.name in ("model", "hf_repo")
        ]
        return any(param.resolve_envvar_value(ctx) for param in flags)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands and, since the first word may be a model, files and models in the cache.

        Files come first: in bash they take the place of what was offered before them.
        """
        from runner.terminal.hub_options import cached_names

        files = CompletionItem(incomplete, type="file")
        return [files, *super().shell_complete(ctx, incomplete), *cached_names(incomplete)]

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The default command and the others."""
        formatter.write_usage("buddyrun", "[FLAGS] MODEL [PROMPT]...")
        formatter.write_usage("buddyrun", "COMMAND [FLAGS] ...", prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Commands, examples and the flags that are used most."""
        self.format_commands(ctx, formatter)
        with formatter.section("Examples"):
            formatter.write_dl(EXAMPLES)
        run = self.commands["run"]
        usual = [param for param in run.params if param.name in _USUAL]
        with formatter.section("Most used flags (all of them: buddyrun run --help)"):
            formatter.write_dl(_help_rows(usual, ctx))
        with formatter.section("Other"):
            formatter.write_dl(_help_rows(self.get_params(ctx), ctx))


class FlagCommand(click.Command):
    """A command that takes `-ngl` for one flag, as llama.cpp does, and not for `-n gl`."""

    def make_parser(self, ctx: click.Context) -> _OptionParser:
        """As click makes it, but of our class."""
        parser = _FlagParser(ctx)
        for param in self.get_params(ctx):
            param.add_to_parser(parser, ctx)
        return parser


class SectionedCommand(FlagCommand):
    """A command whose help lists its flags under headings."""

    sections: Sequence[tuple[str, Sequence[click.Parameter]]] = ()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One list of flags per section."""
        for title, params in self.sections:
            with formatter.section(title):
                formatter.write_dl(_help_rows(params, ctx))
        listed = {id(param) for _, params in self.sections for param in params}
        others = [param for param in self.get_params(ctx) if id(param) not in listed]
        with formatter.section("Other"):
            formatter.write_dl(_help_rows(others, ctx))


class _FlagParser(_OptionParser):
    """Click's own parser, which has no public hook for this; a test guards its private name."""

    def _match_long_opt(self, opt: str, explicit_value: str | None, state: _ParsingState) -> None:
        if opt in self._long_opt:
            super()._match_long_opt(opt, explicit_value, state)
            return
        if opt in _INSTEAD:
            raise click.NoSuchOption(opt, _no_flag(opt), ctx=self.ctx)
        longer = sorted(name for name in self._long_opt if name.startswith(opt)) if opt else []
        if opt.startswith("--") and longer:
            raise click.NoSuchOption(opt, possibilities=longer, ctx=self.ctx)
        super()._match_long_opt(opt, explicit_value, state)

    def _match_short_opt(self, arg: str, state: _ParsingState) -> None:
        is_known = arg in _INSTEAD and arg not in self._short_opt
        if not arg[2:3].isalpha() and not is_known:  # a number or a path may be glued on: -n4
            super()._match_short_opt(arg, state)
            return
        flag = arg.partition("=")[0]
        raise click.NoSuchOption(flag, _no_flag(flag), ctx=self.ctx)


def _no_flag(flag: str) -> str:
    instead = f": {_INSTEAD[flag]}." if flag in _INSTEAD else "."
    return f"buddyrun has no flag {flag}{instead}"


def _help_rows(params: Sequence[click.Parameter], ctx: click.Context) -> list[tuple[str, str]]:
    rows = [param.get_help_record(ctx) for param in params if isinstance(param, click.Option)]
    return [row for row in rows if row is not None]
