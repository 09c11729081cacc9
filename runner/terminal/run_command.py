"""The commands `run`, `demo` and `show`: from parameters to a chat, one answer or a description."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from runner.config import DEVICE_GPU, EngineConfig, GenerateRequest
from runner.errors import InternalError, OptionError, WorkerDiedError
from runner.protocol import ModelInfo
from runner.terminal import cli_options as options
from runner.terminal.chat_view import ChatView
from runner.terminal.cli_options import Params
from runner.terminal.model_path import find_file
from runner.terminal.prompt import Prompt, join_prompt, read_pipe
from runner.terminal.reported_device import reported_device
from runner.terminal.status_line import StatusLine
from runner.terminal.terminal_text import storable, visible

if TYPE_CHECKING:
    from quant.gguf_file import GGUFFile
    from runner.engine_client import Client
    from runner.model_config import ModelConfig
    from runner.screens import ChatRequest, Screens
    from runner.terminal.chat_input import Reader
    from runner.terminal.history import LineHistory

Environment = Mapping[str, str]
_PATIENCE_S = 1.0
_READING_STDIN = "reading the prompt from stdin until it ends; < /dev/null keeps it out"


def run_model(
    params: Params,
    words: list[str],
    environment: Environment,
    commands: list[str],
    screens: "Screens | None" = None,
) -> None:
    """Chat with a model or answer once, as the parameters say. Raises BuddyrunError."""
    open_screen = _screen(params, environment, screens) if params["tui"] else None
    path = _model_file(params, commands)
    prompt = _prompt(params, words)
    is_chat = _is_chat(params, prompt)
    if open_screen is not None and not is_chat:
        raise OptionError("--tui is for a chat, and a prompt asks for one answer; add -cnv")
    if not is_chat and (prompt is None or not prompt.text.strip()):
        raise OptionError("the prompt is empty; give one with -p, as words, or through a pipe")
    view = _view(params, environment)
    for warning in prompt.warnings if prompt else ():
        print(f"buddyrun: {visible(warning)}", file=sys.stderr)
    if is_chat:
        _chat(path, params, prompt, view, environment, open_screen)
    else:
        assert prompt is not None
        _answer_once(path, params, prompt.text, view)


def _model_file(params: Params, commands: list[str]) -> Path:
    """The model on this machine; one that is named as on a hub is fetched if it is not here."""
    text = params.get("hf_repo") or params["model"]
    if not params.get("hf_repo"):
        found = find_file(text, commands)
        if found is not None:
            return found
    from runner.terminal.pull_command import fetched_path, name_in

    return fetched_path(name_in({**params, "word": text}), params)


def show_model(model: str, params: Params, as_json: bool, run_config: EngineConfig | None) -> None:
    """Print what a model is, and its expert cache for `run_config`. Raises BuddyrunError."""
    from runner.show import describe, format_text

    with _opened(model, params) as (file, config):
        device = reported_device(run_config.device) if run_config is not None else None
        if run_config is not None and run_config.device == DEVICE_GPU and device is None:
            print("note: no GPU can be used here; what follows is for the CPU", file=sys.stderr)
        description = describe(file, config, params["template"], run_config, device)
    if as_json:
        print(json.dumps(asdict(description), indent=2))
    else:
        text = format_text(description)
        print(visible(text) if sys.stdout.isatty() else text)


@contextmanager
def _opened(model: str, params: Params) -> Iterator[tuple["GGUFFile", "ModelConfig"]]:
    """A model's file here, or its header on a hub."""
    from quant.gguf_file import GGUFFile
    from runner.checks.read_model import read_model, read_shape

    path = find_file(model, [])
    if path is None:
        from runner.terminal.pull_command import opened_there

        path_or_header = opened_there(model, params)
        if isinstance(path_or_header, GGUFFile):
            with path_or_header as header:
                yield header, read_shape(header)
            return
        path = path_or_header
    with GGUFFile.open(path) as file:
        yield file, read_model(file)


@contextmanager
def loaded_model(
    path: Path, params: Params, template: str | None, view: ChatView
) -> Iterator[tuple["Client", ModelInfo]]:
    """A client with the model loaded; the worker ends with the block."""
    from runner.chat import progress
    from runner.engine_client import Client

    with Client.start() as client:
        try:
            config = options.engine_config(params)
            info = client.load(path, config, template, progress(view))
            view.status.clear()
            yield client, info
        except (InternalError, WorkerDiedError):
            if params.get("verbose"):
                print(visible(client.log), file=sys.stderr)
            raise
        finally:
            view.status.clear()


def _prompt(params: Params, words: list[str]) -> Prompt | None:
    """The prompt of the command line, a file and the pipe; None when there is none."""
    given = [text for text in (params["prompt"], *words) if text is not None]
    piped = None
    if sys.stdin is not None and not sys.stdin.isatty() and params["conversation"] is not True:
        with StatusLine(sys.stderr).shown_after(_PATIENCE_S, _READING_STDIN):
            piped = read_pipe(sys.stdin.buffer)
    return join_prompt(piped, params["prompt_file"], " ".join(given) if given else None)


def _is_chat(params: Params, prompt: Prompt | None) -> bool:
    """A chat needs a person at both ends, or -cnv; a prompt means one answer, unless -cnv."""
    if params["conversation"] is not None:
        return bool(params["conversation"])
    return prompt is None and sys.stdout.isatty()


def _view(params: Params, environment: Environment) -> ChatView:
    is_terminal = sys.stdout.isatty()
    has_color = (
        not params["no_color"]
        and not environment.get("NO_COLOR")
        and environment.get("TERM") != "dumb"
    )
    return ChatView(sys.stdout, sys.stderr, is_terminal, has_color)


def _answer_once(path: Path, params: Params, prompt: str, view: ChatView) -> None:
    from runner.terminal.one_shot import answer_once, remarks

    request = _request(params, prompt)
    template = options.chat_template(params)
    with loaded_model(path, params, template, view) as (client, info):
        began_s = time.monotonic()
        result = answer_once(client, request, view, not params["hide_thinking"])
        remarks(result, info, began_s, sys.stderr, params["verbose"])


def _request(params: Params, prompt: str) -> GenerateRequest:
    """The raw prompt after -no-cnv, else a chat of one message."""
    sampling = options.sampling_config(params)
    if params["conversation"] is False:
        return GenerateRequest(prompt=prompt, n_predict=params["n_predict"], sampling=sampling)
    messages = [{"role": "user", "content": prompt}]
    if params["system_prompt"]:
        messages.insert(0, {"role": "system", "content": storable(params["system_prompt"])})
    return GenerateRequest(
        messages=tuple(messages), n_predict=params["n_predict"], sampling=sampling
    )


def _screen(
    params: Params, environment: Environment, screens: "Screens | None"
) -> "Callable[[ChatRequest], None]":
    """What opens the chat's screen. Raises OptionError when there cannot be one."""
    for name, flag in (("simple_io", "--simple-io"), ("single_turn", "-st")):
        if params[name]:
            raise OptionError(f"--tui contradicts {flag}: leave one out")
    # The screen is drawn on stderr.
    if not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        raise OptionError("--tui needs a terminal: stdin, stdout and stderr must lead to it")
    if environment.get("TERM", "dumb") in ("dumb", "unknown"):
        raise OptionError(
            f"--tui needs a terminal that can place text; TERM is {environment.get('TERM', '')!r}"
        )
    if screens is None:
        raise OptionError("this way of starting buddyrun has no screens; leave --tui out")
    return screens.chat


def _chat(
    path: Path,
    params: Params,
    prompt: Prompt | None,
    view: ChatView,
    environment: Environment,
    open_screen: "Callable[[ChatRequest], None] | None",
) -> None:
    from runner.chat import Chat
    from runner.screens import ChatRequest
    from runner.terminal.conversation import ChatSettings, Conversation
    from runner.version import version

    settings = ChatSettings(
        sampling=options.sampling_config(params),
        n_predict=params["n_predict"],
        system_prompt=storable(params["system_prompt"]),
        show_thinking=not params["hide_thinking"],
        verbose=params["verbose"],
    )
    template = options.chat_template(params)
    history = _history(params, environment)
    first_message = prompt.text if prompt else ""
    with loaded_model(path, params, template, view) as (client, info):
        if open_screen is not None:
            is_ascii = "utf" not in sys.stdout.encoding.lower()
            conversation = Conversation(settings)
            open_screen(ChatRequest(client, info, conversation, history, first_message, is_ascii))
            return
        view.banner(version(), info)
        reader = _reader(params, environment, history)
        chat = Chat(client, info, Conversation(settings), view, reader)
        chat.run(first_message, params["single_turn"])


def _reader(params: Params, environment: Environment, history: "LineHistory") -> "Reader":
    from runner.terminal.chat_commands import complete
    from runner.terminal.chat_input import EditingReader, PlainReader

    is_person = sys.stdin is not None and sys.stdin.isatty()
    if params["simple_io"] or not is_person or not sys.stdout.isatty():
        return PlainReader(history, shows_prompt=is_person and sys.stdout.isatty())
    if environment.get("TERM", "dumb" if sys.platform != "win32" else "") in ("dumb", "unknown"):
        return PlainReader(history)
    return EditingReader(history, complete)


def _history(params: Params, environment: Environment) -> "LineHistory":
    from runner.terminal.history import LineHistory, default_history_path

    # An empty twin means "keep none"; click takes an empty one for unset.
    chosen = params["history"]
    if chosen is None:
        chosen = environment.get("BUDDYRUN_HISTORY")
    if chosen is None:
        return LineHistory(default_history_path(environment, sys.platform == "win32"))
    try:
        return LineHistory(Path(chosen).expanduser() if chosen else None)
    except RuntimeError as error:  # ~name of a user that does not exist
        raise OptionError(f"cannot keep the history in {chosen}: there is no such user") from error
