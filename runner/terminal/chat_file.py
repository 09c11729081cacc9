"""Saved chats: one JSON file with messages and settings. Knows neither terminal nor engine."""

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runner.errors import BuddyrunError, OptionError
from runner.terminal.conversation import ChatSettings, Message
from runner.terminal.sampling_options import N_PREDICT, SAMPLING_OPTIONS, SamplingOption
from runner.terminal.terminal_text import storable

FORMAT = "buddyrun-chat"
VERSION = 1
MAX_BYTES = 64 << 20
MAX_TEXT_BYTES = 16 << 20  # of a file for the next message


class ChatFileError(BuddyrunError):
    """A chat or text file cannot be written or read; the message says which and why."""


def save_chat(path: Path, messages: list[Message], settings: ChatSettings, model: str) -> None:
    """Write a chat. An older chat at `path` is replaced as a whole or, on failure, stays whole.

    Raises ChatFileError, also rather than replacing a file that is not a saved chat.
    """
    document = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "settings": {
            **asdict(settings.sampling),
            "n_predict": settings.n_predict,
            "system_prompt": settings.system_prompt,
        },
        "messages": messages,
    }
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not _is_replaceable(target):
            raise ChatFileError(f"{path} exists and is not a saved chat; choose another name")
        _replace(target, storable(json.dumps(document, ensure_ascii=False, indent=1)) + "\n")
    except OSError as error:
        raise ChatFileError(f"cannot save to {path}: {error.strerror}") from error


def load_chat(path: Path) -> tuple[list[Message], ChatSettings, str]:
    """Messages, settings and the model's name of a saved chat. Raises ChatFileError."""
    try:
        document = json.loads(_read(path, MAX_BYTES))
    except (ValueError, RecursionError) as error:
        raise ChatFileError(f"{path} is not a saved chat: it is not JSON ({error})") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ChatFileError(f"{path} is not a saved chat: it lacks 'format': '{FORMAT}'")
    if document.get("version") != VERSION:
        raise ChatFileError(
            f"{path} has version {document.get('version')!r:.20} of the format; this buddyrun"
            f" reads version {VERSION}"
        )
    settings = _settings(path, document.get("settings", {}))
    return _messages(path, document.get("messages")), settings, str(document.get("model", ""))


def read_text_file(path: Path) -> str:
    """The text of a file for a message; other encodings than UTF-8 and binaries are refused."""
    data = _read(path, MAX_TEXT_BYTES)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ChatFileError(f"{path} is not UTF-8 text (byte {error.start})") from error
    if "\0" in text:
        raise ChatFileError(f"{path} is a binary file, not text")
    return text


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise ChatFileError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > max_bytes:
        raise ChatFileError(f"{path} is too large: at most {max_bytes >> 20} MiB")
    return data


def _is_replaceable(target: Path) -> bool:
    if not target.is_file():
        return False
    with target.open("rb") as file:
        head = file.read(200)
    return not head or f'"{FORMAT}"'.encode() in head


def _replace(target: Path, text: str) -> None:
    """Write beside the target, then rename: a full disk never costs the old file."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:40]}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _messages(path: Path, found: object) -> list[Message]:
    if not isinstance(found, list):
        raise ChatFileError(f"{path}: 'messages' must be a list")
    messages: list[Message] = []
    for number, message in enumerate(found):
        expected = ("user", "assistant")[number % 2]
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str) or message.get("role") != expected:
            raise ChatFileError(f"{path}: message {number} must be text of role '{expected}'")
        messages.append({"role": expected, "content": content})
    if len(messages) % 2:
        raise ChatFileError(f"{path}: the last message has no answer")
    return messages


def _settings(path: Path, found: object) -> ChatSettings:
    """Unknown settings are left out, so that a later buddyrun may add some."""
    if not isinstance(found, dict):
        raise ChatFileError(f"{path}: 'settings' must be an object")
    system_prompt = found.get("system_prompt", "")
    if not isinstance(system_prompt, str):
        raise ChatFileError(f"{path}: 'system_prompt' must be text")
    settings = ChatSettings(system_prompt=system_prompt)
    for option in (N_PREDICT, *SAMPLING_OPTIONS):
        if option.field in found:
            settings = _with_saved(path, settings, option, found[option.field])
    return settings


def _with_saved(
    path: Path, settings: ChatSettings, option: SamplingOption, value: Any
) -> ChatSettings:
    is_number = option.kind in (int, float) and type(value) in (int, float)
    if type(value) is not option.kind and not is_number:
        raise ChatFileError(f"{path}: {option.name} must not be {value!r:.40}")
    try:
        return settings.with_value(option, option.parse(str(value)))
    except OptionError as error:
        raise ChatFileError(f"{path}: {error}") from error
