"""The command line: reads argv and the environment, starts the client, maps errors to exit codes.

Nothing heavy is imported before a command needs it, so that `--help` is immediate. Exit codes:
0 done, 1 a problem told in one message, 2 wrong usage, 130 Ctrl-C, 141 the reader of a pipe left.
"""

import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from runner.errors import BuddyrunError
from runner.terminal import cli_options as options
from runner.terminal.bench_options import BENCH_FLAGS
from runner.terminal.cli_options import Params
from runner.terminal.command_group import DefaultGroup, FlagCommand, SectionedCommand
from runner.terminal.device_options import DEVICE_FLAGS, PLAN_DEVICE_FLAGS
from runner.terminal.expert_options import EXPERT_FLAGS, EXPERT_PLAN_FLAGS, planned_cache
from runner.terminal.frontier_options import FRONTIER_FLAGS, flags_without_meaning
from runner.terminal.hub_commands import HUB_COMMANDS
from runner.terminal.hub_options import HF_REPO_FLAG, HUB_FLAGS, MODEL
from runner.terminal.perplexity_options import PERPLEXITY_FLAGS
from runner.terminal.profile_options import PROFILE_FLAGS
from runner.terminal.terminal_text import visible
from runner.terminal.watch_commands import WATCH_COMMANDS

if TYPE_CHECKING:
    from runner.screens import Screens

NAME = "buddyrun"
EXIT_PROBLEM, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 130, 141
_COMPLETE_VARIABLE = "_BUDDYRUN_COMPLETE"


def main(arguments: list[str] | None = None, screens: "Screens | None" = None) -> int:
    """Run the command line; returns the exit code and never shows a traceback unasked.

    screens: those that commands can open; None without any.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    prepare_streams()
    signal.signal(signal.SIGTERM, _leave)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, _leave)
    try:
        status = _run(arguments, screens)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        _forget_stdout()
        return EXIT_BROKEN_PIPE
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED
    except BuddyrunError as error:
        return _complain(str(error))
    except OSError as error:
        _forget_stdout()
        return _complain(_os_error_text(error))
    except Exception as error:  # the edge of the process
        return _complain_of_bug(error, arguments)


def _run(arguments: list[str], screens: "Screens | None") -> int:
    instruction = os.environ.get(_COMPLETE_VARIABLE)
    if instruction:
        from click.shell_completion import shell_complete

        from runner.terminal.bash_completion import use_for_bash

        use_for_bash()
        return shell_complete(commands, {}, NAME, _COMPLETE_VARIABLE, instruction)
    try:
        with commands.make_context(NAME, list(arguments), obj=screens) as context:
            commands.invoke(context)
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    return 0


def prepare_streams() -> None:
    """Make the streams usable whatever the caller left: closed, or of an odd encoding."""
    if sys.stdin is None:  # the first, so that it gets the lowest free number, 0
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            encoding = stream.encoding if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="replace")


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """End as after an exception, so that the terminal and the worker are left in order."""
    raise SystemExit(128 + number)


def _forget_stdout() -> None:
    """Let what is still buffered go nowhere, or the interpreter would complain at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, sys.stdout.fileno())
    except (OSError, ValueError):
        pass
    finally:
        os.close(nowhere)


def _complain(text: str) -> int:
    print(f"{NAME}: {visible(text)}", file=sys.stderr)
    return EXIT_PROBLEM


def _os_error_text(error: OSError) -> str:
    if error.filename is None:
        return f"cannot write or read: {error.strerror or error}"
    return f"{error.filename}: {error.strerror}"


def _complain_of_bug(error: Exception, arguments: list[str]) -> int:
    if {"-v", "--verbose"} & set(arguments) or os.environ.get("BUDDYRUN_VERBOSE"):
        import traceback

        traceback.print_exception(error)
    return _complain(
        f"internal error: {type(error).__name__}: {str(error)[:300]}. This is a bug; please report"
        " it with what --verbose adds."
    )


def _show_version(context: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from runner.version import version

        click.echo(f"{NAME} {version()}")
        context.exit()


def _run_command(**params: Any) -> None:
    from runner.terminal.run_command import run_model

    words = list(params["words"])
    context = click.get_current_context()
    params |= options.settled_rivals(context)
    is_named = [options.is_on_command_line(context, name) for name in ("model", "hf_repo")]
    if all(is_named):
        raise click.UsageError("Give the model either with -m or with -hf, not both.", context)
    if not any(is_named) and words:
        params["model"], params["hf_repo"] = words.pop(0), None
    if not params["model"] and not params["hf_repo"]:
        raise click.UsageError("Missing MODEL, the path of a GGUF file.", context)
    if is_named[0]:
        params["hf_repo"] = None
    run_model(params, words, os.environ, sorted(commands.commands), context.obj)


def _demo_command(**params: Any) -> None:
    from runner.terminal.model_path import demo_model
    from runner.terminal.run_command import run_model

    context = click.get_current_context()
    params |= options.settled_rivals(context)
    params["model"] = str(demo_model())
    run_model(params, list(params["words"]), os.environ, [], context.obj)


def _show_command(**params: Any) -> None:
    from runner.terminal.run_command import show_model

    run_config = planned_cache(click.get_current_context())
    show_model(_chosen_model(params), params, params["as_json"], run_config)


def _bench_command(**params: Any) -> None:
    from runner.terminal.bench_command import bench_model, bench_texts

    model = _chosen_model(params)
    idle = flags_without_meaning(click.get_current_context())
    if not params["frontier"]:
        if idle:
            raise click.UsageError(f"{', '.join(idle)}: only with --frontier.")
        bench_model(model, params)
        return
    if idle:
        print(f"note: --frontier takes no notice of {', '.join(idle)}", file=sys.stderr)
    from runner.terminal.frontier_command import measure_frontier

    measure_frontier(model, params, bench_texts(params["texts"], params["text"]))


def _perplexity_command(**params: Any) -> None:
    from runner.terminal.perplexity_command import judge_model

    judge_model(_chosen_model(params), params)


def _profile_command(**params: Any) -> None:
    from runner.terminal.profile_command import profile_model

    profile_model(_chosen_model(params), params, os.environ)


def _doctor_command(**params: Any) -> None:
    from runner.terminal.doctor_command import examine_machine

    click.get_current_context().exit(examine_machine(params, os.environ))


def _chosen_model(params: Params) -> str:
    context = click.get_current_context()
    if params["word"] and options.is_on_command_line(context, "model"):
        raise click.UsageError("Give the model either as MODEL or with -m, not both.", context)
    word: str | None = params["word"] or params["model"]
    if not word:
        raise click.UsageError("Missing MODEL, the path of a GGUF file.")
    return word


_CHAT_SECTIONS = (
    ("Prompt and chat", options.PROMPT_FLAGS),
    ("Device, context and speed", (*DEVICE_FLAGS, *options.CONTEXT_FLAGS, *options.THREAD_FLAGS)),
    ("Experts", EXPERT_FLAGS),
    ("Sampling", options.SAMPLING_FLAGS),
    ("Terminal", options.TERMINAL_FLAGS),
)


_BENCH_SECTIONS = (
    ("Model", (options.MODEL_FLAG,)),
    ("Tests", BENCH_FLAGS),
    ("Speed against quality: --frontier, and what goes with it only", FRONTIER_FLAGS),
    ("Device and speed", (*DEVICE_FLAGS, *options.THREAD_FLAGS)),
    ("Experts", EXPERT_FLAGS),
)


def _chat_command(name: str, help: str, callback: Any, words: str, flags: Any) -> click.Command:
    sections = (("Model", flags), *_CHAT_SECTIONS) if flags else _CHAT_SECTIONS
    argument = click.Argument(["words"], nargs=-1, metavar=words, type=MODEL)
    params = [argument, *(param for _, section in sections for param in section)]
    short = help.partition(";")[0].partition(". ")[0].removesuffix(".")
    command = SectionedCommand(name, params=params, callback=callback, help=help, short_help=short)
    command.sections = sections
    return command


_bench = SectionedCommand(
    "bench",
    params=[
        click.Argument(["word"], required=False, metavar="MODEL", type=MODEL),
        *(param for _, section in _BENCH_SECTIONS for param in section),
        options.VERBOSE_FLAG,
    ],
    callback=_bench_command,
    short_help="Measure the speed of prompts and generation",
    help="Measure the speed of prompts and generation; columns and fields as llama-bench. With"
    " --frontier measure speed against quality, of every policy that lets experts stand in for"
    " missing ones and with every budget.",
)
_bench.sections = _BENCH_SECTIONS

commands = DefaultGroup(
    NAME,
    help="Run Mixture-of-Experts GGUF models that are larger than the GPU.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    params=[
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_show_version,
            help="Show the version and exit.",
        )
    ],
    commands=[
        _chat_command(
            "run",
            "Chat with MODEL, a GGUF file; this is what buddyrun does without a command. With a"
            " PROMPT, or text piped in, answer once and exit.",
            _run_command,
            "MODEL [PROMPT]...",
            (options.MODEL_FLAG, HF_REPO_FLAG, *HUB_FLAGS),
        ),
        _chat_command(
            "demo",
            "Chat with the small demo model that comes with buddyrun.",
            _demo_command,
            "[PROMPT]...",
            (),
        ),
        FlagCommand(
            "show",
            params=[
                click.Argument(["word"], required=False, metavar="MODEL", type=MODEL),
                options.MODEL_FLAG,
                options.switch("--json", "as_json", help="Print JSON.", has_twin=False),
                options.switch("--template", "template", help="Print the chat template too."),
                *HUB_FLAGS,
                *PLAN_DEVICE_FLAGS,
                *EXPERT_PLAN_FLAGS,
                options.CTX_SIZE_FLAG,
                *options.BATCH_FLAGS,
                options.VERBOSE_FLAG,
            ],
            callback=_show_command,
            short_help="Print a model's architecture, types and sizes",
            help="Print a model's architecture, types and sizes; with a flag about the device or"
            " the experts also how a run would share out the memory. Of a model on a hub,"
            " user/repo:QUANT, only the header is fetched.",
        ),
        *HUB_COMMANDS,
        *WATCH_COMMANDS,
        _bench,
        FlagCommand(
            "perplexity",
            params=[
                click.Argument(["word"], required=False, metavar="MODEL", type=MODEL),
                options.MODEL_FLAG,
                *PERPLEXITY_FLAGS,
                *DEVICE_FLAGS,
                *options.THREAD_FLAGS,
                *EXPERT_FLAGS,
            ],
            callback=_perplexity_command,
            short_help="Measure what stand-ins cost in quality",
            help="Measure what stand-ins cost in quality: every text is run exactly, then with the"
            " settings given, token by token from windows with an empty context, and every token"
            " but a window's first is scored. Figures as llama-perplexity --kl-divergence; base is"
            " the exact run of the same file.",
        ),
        FlagCommand(
            "profile",
            params=[
                click.Argument(["word"], required=False, metavar="MODEL", type=MODEL),
                options.MODEL_FLAG,
                *PROFILE_FLAGS,
                *EXPERT_FLAGS,
            ],
            callback=_profile_command,
            short_help="Measure which experts can stand in for which",
            help="Measure which experts of MODEL can stand in for which, once for a model: a text"
            " is run, and the experts are compared on it. An interrupted profile is continued by"
            " the same command. Needs PyTorch: uv tool install '.[profile]' in a checkout.",
        ),
        FlagCommand(
            "doctor",
            params=[
                options.switch("--json", "as_json", help="Print JSON.", has_twin=False),
                options.switch("--no-measure", "no_measure", help="Measure nothing: at once."),
                options.VERBOSE_FLAG,
            ],
            callback=_doctor_command,
            short_help="Tell what this machine can compute on",
            help="Tell what this machine can compute on: the backends of the installed"
            " llama-cpp-python, the devices they show and how fast the memory of each is, and the"
            " GPUs that cannot be used, with the command that mends it.",
        ),
    ],
)

if __name__ == "__main__":
    sys.exit(main())
