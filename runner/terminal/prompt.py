"""Puts a prompt together from words, a file and a pipe. Knows neither command line nor engine."""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from runner.errors import OptionError
from runner.terminal.terminal_text import storable

MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Prompt:
    """What to answer; `warnings` are for the person."""

    text: str
    warnings: tuple[str, ...] = ()


def join_prompt(piped: bytes | None, file: str | None, words: str | None) -> Prompt | None:
    """What was piped, then the file, then the words, with an empty line between; None when there
    was none of them. Raises OptionError when the file cannot be read."""
    warnings: list[str] = []
    parts = []
    if piped is not None:
        parts.append(_decode(piped, "the pipe", warnings))
    if file:
        parts.append(_decode(_file_bytes(file), file, warnings))
    if words is not None:
        parts.append(storable(words))
    if not parts:
        return None
    return Prompt("\n\n".join(part for part in parts if part.strip()), tuple(warnings))


def read_pipe(stream: BinaryIO) -> bytes:
    """All that comes through a pipe. Raises OptionError for more than anyone would send."""
    data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise OptionError(f"the piped prompt is too large: at most {MAX_BYTES >> 20} MiB")
    return data


def _file_bytes(file: str) -> bytes:
    try:
        with Path(file).open("rb") as stream:
            return read_pipe(stream)
    except OSError as error:
        raise OptionError(f"cannot read the prompt from {file}: {error.strerror}") from error


def _decode(data: bytes, source: str, warnings: list[str]) -> str:
    """Bytes that are not UTF-8 become U+FFFD, with a warning; one newline at the end goes."""
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        warnings.append(
            f"the prompt from {source} is not UTF-8 (first at byte {error.start}); what could not"
            " be read is sent as U+FFFD"
        )
    return text.removesuffix("\n").removesuffix("\r")
