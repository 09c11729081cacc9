"""The flags of the commands, spelled as llama.cpp spells them. Knows no command and runs nothing.

A flag has an environment twin: `--ctx-size` is `BUDDYRUN_CTX_SIZE`. A flag beats its twin. What
belongs to one command or one moment has none: the window of a measurement, `--yes`, `--json`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from runner.config import (
    BUDDY_OFF,
    DEFAULT_MAX_CTX,
    DEVICE_AUTO,
    DEVICE_CPU,
    DEVICE_GPU,
    MAX_BATCH,
    MAX_CTX,
    MAX_THREADS,
    EngineConfig,
    SamplingConfig,
)
from runner.errors import OptionError
from runner.terminal.sampling_options import N_PREDICT, SAMPLING_OPTIONS, SamplingOption, default_of

ENVIRONMENT_PREFIX = "BUDDYRUN"
FILE = click.Path(path_type=str)  # lets a shell complete file names
CACHE_TYPES = click.Choice(["f16", "q8_0"])

Params = dict[str, Any]  # what click makes of the command line, by parameter name


def flag(
    *names: str, help: str, type: Any = None, default: Any = None, has_twin: bool = True
) -> click.Option:
    """An option with its environment twin; the last of `names` is the parameter's name."""
    return click.Option(
        names,
        help=help,
        type=type,
        default=default,
        **(twin(names) if has_twin else {}),
        show_default=default not in ("", None),
    )


def switch(
    *names: str, help: str, default: bool | None = False, has_twin: bool = True
) -> click.Option:
    """An on/off option with its environment twin."""
    parts = twin(names) if has_twin else {}
    return click.Option(names, help=help, is_flag=True, default=default, **parts)


def twin(names: Sequence[str]) -> Params:
    """click's arguments for the environment twin of a flag with these names."""
    name = next(name for name in names if name.startswith("--")).partition("/")[0]
    variable = f"{ENVIRONMENT_PREFIX}_{name.strip('-').replace('-', '_').upper()}"
    return {"envvar": variable, "show_envvar": True}


class _SamplingType(click.ParamType):  # type: ignore[type-arg]
    """Lets click read a sampling parameter through the table that `/set` uses too."""

    def __init__(self, option: SamplingOption) -> None:
        self._option = option
        self.name = {int: "N", float: "N", str: "TEXT"}.get(option.kind, "TEXT")

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | float | str | bool:
        """Raises click.BadParameter for a value outside its range."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        try:
            return self._option.parse(value)
        except OptionError as error:
            self.fail(str(error), param, ctx)


def _sampling_flag(option: SamplingOption) -> click.Option:
    names = [option.short] if option.short else []
    names += [f"--{name}" for name in option.names]
    default = default_of(option)
    if option.kind is bool:
        return switch(*names, option.field, help=option.help)
    return flag(*names, option.field, help=option.help, type=_SamplingType(option), default=default)


MODEL_FLAG = flag("-m", "--model", "model", help="The GGUF file, instead of MODEL.", type=FILE)
VERBOSE_FLAG = switch("-v", "--verbose", "verbose", help="Show traces of bugs.")

PROMPT_FLAGS = (
    flag(
        *("-p", "--prompt", "prompt"),
        help="Answer this and exit. Stdin is read too unless it is a terminal; < /dev/null"
        " keeps it out.",
    ),
    flag("-f", "--file", "prompt_file", help="Take the prompt from a file.", type=FILE),
    flag("-sys", "--system-prompt", "system_prompt", help="Sent before every chat.", default=""),
    switch(
        *("-cnv/-no-cnv", "--conversation/--no-conversation", "conversation"),
        help="Chat on after the prompt / complete the raw prompt without a chat template.",
        default=None,
    ),
    switch("-st", "--single-turn", "single_turn", help="Leave after one answer."),
    flag("--chat-template", "chat_template", help="Jinja text or a name: chatml, llama3 ..."),
    flag("--chat-template-file", "chat_template_file", help="The same from a file.", type=FILE),
)

BATCH_FLAGS = (
    flag(
        *("-b", "--batch-size", "n_batch"),
        help="Most tokens of a prompt computed at once.",
        type=click.IntRange(1, MAX_BATCH),
        default=EngineConfig.n_batch,
    ),
    flag(
        *("-ctk", "--cache-type-k", "cache_type_k"),
        help="Type of the cached keys.",
        type=CACHE_TYPES,
        default=EngineConfig.cache_type_k,
    ),
    flag(
        *("-ctv", "--cache-type-v", "cache_type_v"),
        help="Type of the cached values.",
        type=CACHE_TYPES,
        default=EngineConfig.cache_type_v,
    ),
)

THREAD_FLAGS = (
    flag(
        *("-t", "--threads", "n_threads"),
        help="Threads for generation; 0 = one per core.",
        type=click.IntRange(0, MAX_THREADS),
        default=EngineConfig.n_threads,
    ),
    flag(
        *("-tb", "--threads-batch", "n_threads_batch"),
        help="Threads for prompts; 0 = as for generation.",
        type=click.IntRange(0, MAX_THREADS),
        default=EngineConfig.n_threads_batch,
    ),
    *BATCH_FLAGS,
)

CTX_SIZE_FLAG = flag(
    *("-c", "--ctx-size", "n_ctx"),
    help=f"Context in tokens; 0 = the model's, at most {DEFAULT_MAX_CTX}.",
    type=click.IntRange(0, MAX_CTX),
    default=EngineConfig.n_ctx,
)

CONTEXT_FLAGS = (
    CTX_SIZE_FLAG,
    switch(
        *("--context-shift/--no-context-shift", "context_shift"),
        help="When the context is full forget its oldest half instead of stopping.",
    ),
    flag(
        *("--keep", "n_keep"),
        help="Tokens behind the first that a context shift keeps as well.",
        type=click.IntRange(0, MAX_CTX),
        default=EngineConfig.n_keep,
    ),
)

SAMPLING_FLAGS = (
    _sampling_flag(N_PREDICT),
    *map(_sampling_flag, SAMPLING_OPTIONS),
    flag("--grammar-file", "grammar_file", help="Grammar from a file.", type=FILE),
    flag(
        "-jf",
        "--json-schema-file",
        "json_schema_file",
        help="The JSON schema from a file.",
        type=FILE,
    ),
    click.Option(
        ("--dry-sequence-breaker", "dry_sequence_breakers"),
        multiple=True,
        help="Text that ends a repeat for DRY; may be repeated; 'none' = no breakers."
        " Without it: newline, colon, quote and star.",
        **twin(["--dry-sequence-breaker"]),
    ),
)

TERMINAL_FLAGS = (
    switch("--hide-thinking", "hide_thinking", help="Do not show thinking sections."),
    switch("--no-color", "no_color", help="No colours; NO_COLOR does the same."),
    switch("--simple-io", "simple_io", help="Plain line input, for dumb terminals."),
    switch("--tui", "tui", help="Chat on the whole screen, beside a monitor of the engine."),
    flag(
        *("--history", "history"),
        help="File for the lines typed in a chat; '' = keep none.",
        type=FILE,
    ),
    switch("-v", "--verbose", "verbose", help="Show timings in full, and traces of bugs."),
)


# Flags of which only one can be used.
_RIVALS = (
    ("grammar", "grammar_file", "json_schema", "json_schema_file"),
    ("chat_template", "chat_template_file"),
)


def is_on_command_line(context: click.Context, name: str) -> bool:
    """Whether a parameter comes from the command line, not from its twin or its default."""
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def settled_rivals(context: click.Context) -> Params:
    """The parameters of which only one can be used; the one on the command line beats the twins
    of the others. Raises click.UsageError for two of the same origin."""
    settled: Params = {}
    for rivals in _RIVALS:
        flags = [name for name in rivals if is_on_command_line(context, name)]
        chosen = flags or [name for name in rivals if context.params[name]]
        if len(chosen) > 1:
            names = " and ".join(_shown_name(context, name) for name in chosen)
            raise click.UsageError(f"{names} cannot be used together.", context)
        settled |= {name: context.params[name] if name in chosen else "" for name in rivals}
    if context.params["conversation"] is False and is_on_command_line(context, "system_prompt"):
        raise click.UsageError("-sys needs a chat; -no-cnv sends the prompt alone.", context)
    return settled


def _shown_name(context: click.Context, name: str) -> str:
    param = next(param for param in context.command.params if param.name == name)
    if is_on_command_line(context, name) or not isinstance(param.envvar, str):
        return param.opts[-1]
    return param.envvar


def engine_config(params: Params) -> EngineConfig:
    """The engine's settings in the parameters of a command; what it lacks keeps its default."""
    names = EngineConfig.__dataclass_fields__
    values = {name: params[name] for name in names if name in params}
    for name in ("moe_cache_profile", "buddy_profile"):
        if values.get(name) and values[name] != BUDDY_OFF:
            values[name] = os.path.abspath(values[name])  # the worker is somewhere else
    if params.get("exact"):
        values["buddy"] = BUDDY_OFF
    if "device" in params:
        values["device"] = _settled_device(params["device"].lower(), params.get("n_gpu_layers"))
    return EngineConfig(**values)


def _settled_device(device: str, n_gpu_layers: int | None) -> str:
    """What --device and -ngl say together. Raises click.UsageError when they contradict."""
    if n_gpu_layers is None:
        return device
    is_cpu = n_gpu_layers == 0
    if device != DEVICE_AUTO and (device == DEVICE_CPU) != is_cpu:
        context = click.get_current_context()
        typed = [name for name in ("device", "n_gpu_layers") if is_on_command_line(context, name)]
        if typed == ["device"]:  # it beats the twin of the other
            return device
        if typed != ["n_gpu_layers"]:
            n_layers = "all" if n_gpu_layers < 0 else n_gpu_layers
            text = f"-ngl {n_layers} contradicts --device {device}: leave one out"
            raise click.UsageError(text, context)
        device = DEVICE_AUTO
    if is_cpu:
        return DEVICE_CPU
    return DEVICE_GPU if device == DEVICE_AUTO else device


def sampling_config(params: Params) -> SamplingConfig:
    """The sampling settings after `settled_rivals`; files are read. Raises OptionError."""
    values = {option.field: params[option.field] for option in SAMPLING_OPTIONS}
    if params["grammar_file"]:
        values["grammar"] = read_text(params["grammar_file"], "the grammar")
    if params["json_schema_file"]:
        values["json_schema"] = read_text(params["json_schema_file"], "the JSON schema")
    breakers = tuple(params["dry_sequence_breakers"])
    if breakers:
        values["dry_sequence_breakers"] = () if breakers == ("none",) else breakers
    return SamplingConfig(**values)


def chat_template(params: Params) -> str | None:
    """The template (or a built-in one's name) that replaces the model's own, or None.

    Raises OptionError when the file cannot be read.
    """
    if params["chat_template_file"]:
        return read_text(params["chat_template_file"], "the chat template")
    return params["chat_template"] or None


def read_text(path: str, what: str) -> str:
    """A UTF-8 text file. Raises OptionError when it cannot be read or is not text."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise OptionError(f"cannot read {what} from {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OptionError(
            f"cannot read {what} from {path}: it is not UTF-8 text (byte {error.start})"
        ) from error
