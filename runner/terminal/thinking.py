"""Finds the thinking section at the start of an answer while the answer streams. Prints nothing.

Only a section that opens the answer counts: a `<think>` in the middle is the model talking about
the tag, and must not swallow the rest of the answer.
"""

from dataclasses import dataclass

_OPEN = "<think>"
_CLOSE = "</think>"


@dataclass(frozen=True)
class Part:
    """A stretch of an answer that is either thinking or not; tags are left out."""

    text: str
    is_thinking: bool


class ThinkingSplitter:
    """Sorts the pieces of one answer; holds back what may be the beginning of a tag."""

    def __init__(self) -> None:
        self._held = ""
        self._state = "start"  # then "opened", "thinking" and "answer", or "answer" at once

    def push(self, text: str) -> list[Part]:
        """The parts that are certain after this piece."""
        self._held += text
        parts: list[Part] = []
        if self._state == "start":
            self._leave_start()
        if self._state == "opened":
            self._held = self._held.lstrip("\n")
            self._state = "thinking" if self._held else "opened"
        if self._state == "thinking":
            parts += self._leave_thinking()
        if self._state == "answer" and self._held:
            parts.append(Part(self._held, is_thinking=False))
            self._held = ""
        return parts

    def flush(self) -> list[Part]:
        """What was held back when the answer ended."""
        held, self._held = self._held, ""
        return [Part(held, self._state == "thinking")] if held else []

    def _leave_start(self) -> None:
        begin = self._held.lstrip()
        if begin.startswith(_OPEN):
            self._state = "opened"
            self._held = begin[len(_OPEN) :]
        elif not _OPEN.startswith(begin):
            self._state = "answer"

    def _leave_thinking(self) -> list[Part]:
        thought, found, rest = self._held.partition(_CLOSE)
        if found:
            self._state = "answer"
            self._held = rest
        else:
            n_held = _overlap(thought, _CLOSE)
            cut = len(thought) - n_held
            thought, self._held = thought[:cut], thought[cut:]
        return [Part(thought, is_thinking=True)] if thought else []


def without_thinking(answer: str) -> str:
    """`answer` without its thinking section, as earlier answers are sent back to a model.

    An answer whose template opened the section holds only the closing tag; an answer that was
    stopped while thinking has nothing left.
    """
    begin = answer.lstrip()
    if not begin.startswith(_OPEN):
        head, found, rest = answer.partition("\n" + _CLOSE)
        return rest.lstrip() if found and _OPEN not in head else answer
    _, found, rest = begin.partition(_CLOSE)
    return rest.lstrip()


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`."""
    for n in range(min(len(text), len(tag) - 1), 0, -1):
        if tag.startswith(text[-n:]):
            return n
    return 0
