"""The slash commands of a chat. Knows the conversation and the view; asks no model itself."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from runner import message_values
from runner.byte_sizes import count_text
from runner.errors import BuddyrunError, OptionError
from runner.protocol import GenerateResult, ModelInfo
from runner.stats import StatsSnapshot
from runner.terminal.cache_text import cache_text
from runner.terminal.chat_file import load_chat, read_text_file, save_chat
from runner.terminal.chat_input import without_quotes
from runner.terminal.chat_view import device_memory_line, model_line
from runner.terminal.conversation import ChatSettings, Conversation
from runner.terminal.history import LineHistory
from runner.terminal.sampling_options import N_PREDICT, SAMPLING_OPTIONS, find_option
from runner.terminal.view import View


class Next(Enum):
    """What the chat does after a command."""

    READ = "read"
    ANSWER = "answer"
    LEAVE = "leave"


@dataclass(frozen=True)
class Command:
    """One line of the help."""

    name: str
    usage: str
    help: str
    takes_file: bool = False


COMMANDS = (
    Command("/?", "/?", "this list; also /help"),
    Command("/set", "/set NAME VALUE", "change a setting; /set alone lists them"),
    Command("/show", "/show WHAT", "info, parameters, system, template, context, stats or cache"),
    Command("/system", "/system [TEXT]", 'show or change the system prompt; "" removes it'),
    Command("/regen", "/regen", "answer the last message again"),
    Command("/read", "/read FILE", "add a file's text to the next message", takes_file=True),
    Command("/save", "/save FILE", "save messages and settings as JSON", takes_file=True),
    Command("/load", "/load FILE", "go on with a saved chat", takes_file=True),
    Command("/clear", "/clear", "forget the messages"),
    Command("/bye", "/bye", "leave; also /exit, /quit, Ctrl-D"),
)
ALIASES = {"/help": "/?", "/exit": "/bye", "/quit": "/bye"}
SHOW_TOPICS = ("info", "parameters", "system", "template", "context", "stats", "cache")
SWITCHES = ("verbose", "think", "nothink", "history", "nohistory", "system")

_KEYS_HELP = '''\
"""            begin and end a message of several lines; Alt-Enter or a \\ at the end also
                break the line
//text          send a message that begins with a slash
Ctrl-C          stop the answer, or clear the line
Up, Down        earlier lines        Tab   complete a command or a file name'''


@dataclass
class ChatState:
    """What commands look at and change besides the conversation."""

    info: ModelInfo
    stats: Callable[[], dict[str, Any]]
    history: LineHistory
    last_result: GenerateResult | None = None


class ChatCommands:
    """Runs one command line at a time. Problems are printed, never raised."""

    def __init__(self, conversation: Conversation, view: View, state: ChatState) -> None:
        self._conversation = conversation
        self._view = view
        self._state = state
        self._actions: dict[str, Callable[[str], Next | None]] = {
            "/?": self._help,
            "/set": self._set,
            "/show": self._show,
            "/system": self._system,
            "/regen": self._regen,
            "/read": self._read,
            "/save": self._save,
            "/load": self._load,
            "/clear": self._clear,
            "/bye": lambda _: Next.LEAVE,
        }

    def run(self, line: str) -> Next:
        """Do what `line`, which begins with a slash, says."""
        name, _, rest = line.strip().partition(" ")
        action = self._actions.get(ALIASES.get(name, name))
        if action is None:
            self._view.say(
                f"There is no command {name.split()[0]!s:.40}. /? lists the commands;"
                " a message that begins with a slash is written with two: //"
            )
            return Next.READ
        try:
            return action(rest.strip()) or Next.READ
        except BuddyrunError as error:
            self._view.warn(str(error))
            return Next.READ

    def _help(self, rest: str) -> None:
        lines = [f"{command.usage:<15} {command.help}" for command in COMMANDS]
        self._view.say("\n".join([*lines, "", _KEYS_HELP]))

    def _regen(self, rest: str) -> Next:
        if self._conversation.retry():
            return Next.ANSWER
        self._view.say("There is no message to answer yet.")
        return Next.READ

    def _clear(self, rest: str) -> None:
        self._conversation.clear()
        self._state.last_result = None
        self._view.say("The messages are forgotten; the settings stay.")

    def _read(self, rest: str) -> None:
        path = _path(rest, "/read FILE")
        text = read_text_file(path)
        self._conversation.attach(path.name, text)
        self._view.say(f"{len(text)} characters of {path.name} go with the next message.")

    def _save(self, rest: str) -> None:
        path = _path(rest, "/save FILE")
        conversation = self._conversation
        save_chat(path, conversation.messages, conversation.settings, self._state.info.name)
        self._view.say(f"Saved {_count(len(conversation.messages))} to {path}.")

    def _load(self, rest: str) -> None:
        path = _path(rest, "/load FILE")
        messages, loaded, model = load_chat(path)
        current = self._conversation.settings
        breakers = current.sampling.dry_sequence_breakers
        settings = replace(
            current,
            sampling=replace(loaded.sampling, dry_sequence_breakers=breakers),
            n_predict=loaded.n_predict,
            system_prompt=loaded.system_prompt,
        )
        self._conversation.restore(messages, settings)
        self._state.last_result = None
        other = f" It was made with {model}." if model and model != self._state.info.name else ""
        self._view.say(f"Loaded {_count(len(messages))} from {path}.{other}")

    def _system(self, rest: str) -> None:
        if not rest:
            self._view.say(self._conversation.settings.system_prompt or "No system prompt is set.")
            return
        text = "" if rest == '""' else without_quotes(rest)
        self._change(replace(self._conversation.settings, system_prompt=text))
        self._view.say(
            "The system prompt holds from the next answer on."
            if text
            else "The system prompt is removed."
        )

    def _set(self, rest: str) -> None:
        name, _, value = rest.removeprefix("parameter ").strip().partition(" ")
        value = value.strip()
        if not name:
            self._view.say(self._parameters())
        elif name == "system":
            self._system(value)
        elif name in SWITCHES:
            self._switch(name, value)
        else:
            self._set_parameter(name, value)

    def _switch(self, name: str, value: str) -> None:
        if value not in ("on", "off", ""):
            raise OptionError(f"{name} must be on or off, not {value!r:.60}")
        settings = self._conversation.settings
        is_on = (value != "off") != name.startswith("no")
        if name == "verbose":
            self._change(replace(settings, verbose=is_on))
            self._view.say(f"verbose is {_shown(is_on)}.")
        elif name in ("think", "nothink"):
            self._change(replace(settings, show_thinking=is_on))
            self._view.say(f"Thinking sections are {'shown' if is_on else 'hidden'}.")
        elif not self._state.history.has_file:
            self._view.say("No history file is in use.")
        else:
            self._state.history.keep(is_on)
            self._view.say(f"Lines are {'' if is_on else 'not '}kept in the history.")

    def _set_parameter(self, name: str, text: str) -> None:
        option = find_option(name)
        if option is None:
            raise OptionError(f"There is no setting {name!r:.60}; /set lists them.")
        if text:
            value = option.parse("" if text == '""' else without_quotes(text))
            self._change(self._conversation.settings.with_value(option, value))
        self._view.say(f"{option.name} = {_shown(self._conversation.settings.value_of(option))}")

    def _change(self, settings: ChatSettings) -> None:
        self._conversation.settings = settings

    def _parameters(self) -> str:
        settings = self._conversation.settings
        rows = [
            (option.name, _shown(settings.value_of(option)), option.help)
            for option in (N_PREDICT, *SAMPLING_OPTIONS)
        ]
        rows += [
            ("verbose", _shown(settings.verbose), "Full timings after every answer."),
            ("think, nothink", _shown(settings.show_thinking), "Show thinking sections."),
            ("history, nohistory", _shown(self._state.history.is_kept), "Keep typed lines."),
            ("system", _shown(settings.system_prompt), "The system prompt."),
        ]
        return "\n".join(f"{name:<18}  {value:<10}  {help}" for name, value, help in rows)

    def _show(self, rest: str) -> None:
        if rest not in ("", *SHOW_TOPICS):
            raise OptionError(f"/show knows {', '.join(SHOW_TOPICS)}; not {rest!r:.60}")
        match rest:
            case "parameters":
                text = self._parameters()
            case "system":
                text = self._conversation.settings.system_prompt or "No system prompt is set."
            case "template":
                text = self._state.info.chat_template or "The model has none; ChatML is used."
            case "context":
                text = self._context()
            case "stats":
                text = json.dumps(self._state.stats(), indent=1, ensure_ascii=False)
            case "cache":
                snapshot = message_values.parse(StatsSnapshot, self._state.stats())
                text = cache_text(self._state.info, snapshot)
            case _:
                text = self._info()
        self._view.say(text)

    def _info(self) -> str:
        info, memory = self._state.info, self._state.info.device_memory
        return "\n".join(
            (
                f"name        {info.name}",
                f"file        {info.path}",
                f"model       {info.description}: {model_line(info)}",
                f"parameters  {count_text(info.n_params)}",
                f"context     {info.n_ctx} tokens (trained on {info.n_ctx_train})",
                f"cache       {info.cache_type_k} keys, {info.cache_type_v} values",
                f"device      {info.device}, {info.n_threads} threads, batches of {info.n_batch}",
                *([f"memory      {device_memory_line(memory)}"] if memory is not None else []),
                f"ggml        {info.ggml_version}",
            )
        )

    def _context(self) -> str:
        result = self._state.last_result
        n_past = result.n_past if result else 0
        n_ctx = self._state.info.n_ctx
        used = f"{n_past} of {n_ctx} tokens are used ({n_past / n_ctx:.0%})"
        return f"{used}, {_count(len(self._conversation.messages))}."


def complete(line: str) -> tuple[int, list[str]]:
    """Completions of a command line: how many characters at its end to replace, by which words."""
    if not line.startswith("/") or "\n" in line:
        return 0, []
    name, space, rest = line.partition(" ")
    if not space:
        names = [command.name for command in COMMANDS] + list(ALIASES)
        return len(line), sorted(word for word in names if word.startswith(line))
    if any(command.name == name and command.takes_file for command in COMMANDS):
        return len(rest), _matching_files(rest)
    if " " in rest:
        return 0, []
    words: dict[str, list[str]] = {
        "/show": list(SHOW_TOPICS),
        "/set": [option.name for option in (N_PREDICT, *SAMPLING_OPTIONS)] + list(SWITCHES),
    }
    return len(rest), sorted(word for word in words.get(name, []) if word.startswith(rest))


def _matching_files(begin: str) -> list[str]:
    folder, _, stem = begin.rpartition("/")
    shown = begin[: len(begin) - len(stem)]
    try:
        entries = sorted(os.scandir(Path(folder or shown or ".").expanduser()), key=_name)
    except (OSError, RuntimeError, ValueError):  # no such folder, no such user, a NUL
        return []
    return [
        shown + entry.name + ("/" if os.path.isdir(entry) else "")
        for entry in entries
        if entry.name.startswith(stem) and (stem or not entry.name.startswith("."))
    ]


def _name(entry: "os.DirEntry[str]") -> str:
    return entry.name


def _path(text: str, usage: str) -> Path:
    if not text:
        raise OptionError(f"Give a file name: {usage}")
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1]
    if "\0" in text:
        raise OptionError("A file name cannot hold a NUL character.")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise OptionError(f"no such home directory: {text}") from error


def _count(n_messages: int) -> str:
    return "1 message" if n_messages == 1 else f"{n_messages} messages"


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    text = str(value).replace("\n", " ")
    return (text if len(text) <= 40 else text[:37] + "...") or '""'
