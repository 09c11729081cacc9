"""Cuts a Markdown text that streams in into parts to lay out one by one. Lays out nothing.

A finished part never changes again, so a screen lays it out once; only the last one, which is at
most MAX_PART characters long, is laid out again while the text grows. Blocks that are longer than
that are cut: tables and code get their first lines again.
"""

import re
from dataclasses import dataclass

MAX_PART = 700  # characters; what is worst in Markdown takes 0.02 s for so many
_TELLING = 16  # characters of a line that tell which block it begins

_FENCE = re.compile(r"\s*(?:[-*+]\s+|\d{1,9}[.)]\s+)?(`{3,}|~{3,})")
_ITEM = re.compile(r" {0,3}(?:[-*+]|\d{1,9}[.)])(?:[ \t]+|$)")
_HEADING = re.compile(r" {0,3}#{1,6}(?:[ \t]|$)")
_RULE = re.compile(r" {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})$")
_TABLE_RULE = re.compile(r"[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-*:?[ \t]*)*$")


@dataclass(frozen=True)
class MarkdownPart:
    """One block, or one item of a list, or a piece of one that is too long."""

    text: str
    has_gap: bool  # an empty line goes before it


class PartSplitter:
    """Takes pieces of one text and sorts its lines into parts."""

    def __init__(self) -> None:
        self._lines: list[str] = []  # of the open part, complete
        self._n_chars = 0  # of these lines
        self._n_again = 0  # of these lines, those that the part before had already
        self._rest = ""  # the line that is not complete, or what is not taken of it yet
        self._begun = ""  # its beginning, once a part of it was taken
        self._fence = ""  # what closes the open code block
        self._is_blank = False  # the last line was empty, in a list item
        self._is_list = False  # the open part is a list item
        self._indent = 0  # of what belongs to it
        self._was_list = False  # the part before it is
        self._is_continued = False  # the open part goes on with one that was cut
        self._is_first = True
        self._finished: list[MarkdownPart] = []

    def push(self, text: str) -> list[MarkdownPart]:
        """The parts that are finished after this piece."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._take(line)
        is_known = bool(self._begun) or len(self._rest.lstrip()) > _TELLING
        if self._n_chars + len(self._rest) > MAX_PART and is_known:
            self._take_begin()
        finished, self._finished = self._finished, []
        return finished

    @property
    def open_parts(self) -> list[MarkdownPart]:
        """What is there of the text that is not finished, at most two parts."""
        is_new = bool(self._rest.strip()) and not self._begun and not self._fence
        is_apart = is_new and self._begins_part(self._rest)
        lines = [*self._lines, self._rest] if self._rest and not is_apart else self._lines
        is_list = self._is_list if self._lines or self._begun else _is_item(self._rest)
        parts = []
        if any(line.strip() for line in lines):
            parts.append(MarkdownPart("\n".join(lines).rstrip("\n"), self._has_gap(is_list)))
        if is_apart:
            parts.append(MarkdownPart(self._rest, not (is_list and _is_item(self._rest))))
        return parts

    def _take(self, line: str) -> None:
        """Add a complete line, or the end of one, to the open part or to a new one."""
        begin, self._begun = self._begun or line, ""
        if self._fence:
            self._add(line)
            self._close_fence(begin)
            return
        if not begin.strip():
            self._take_blank(line)
            return
        if begin is line:
            self._begin(line)
        self._add(line)
        if found := _FENCE.match(begin):
            self._fence = found.group(1)
        elif _HEADING.match(begin):
            self._finish()

    def _take_begin(self) -> None:
        """Take what there is too much of the line that is not complete."""
        if not self._begun:
            self._begun = self._rest
            if not self._fence:
                self._begin(self._rest)
        self._rest = self._without_overlong_begin(self._rest)

    def _begin(self, line: str) -> None:
        """A line that is not blank comes: into the open part, or into a new one."""
        if self._begins_part(line):
            self._finish()
        self._is_blank = False
        if self._lines:
            return
        item = _ITEM.match(line)
        self._is_list = _is_item(line)
        self._indent = item.end() if item else 0

    def _take_blank(self, line: str) -> None:
        if self._is_list and self._lines:
            self._is_blank = True
            self._add("")
        else:
            self._finish()

    def _begins_part(self, line: str) -> bool:
        if not self._lines:
            return False
        n_spaces = len(line) - len(line.lstrip(" "))
        if self._is_list and (n_spaces >= self._indent or line[0] == "\t"):
            return False
        if _ITEM.match(line) or _HEADING.match(line):
            return True
        return self._is_blank or _FENCE.match(line) is not None

    def _close_fence(self, line: str) -> None:
        mark = line.strip()
        if mark.startswith(self._fence) and not mark.strip(self._fence[0]):
            self._fence = ""
            if not self._is_list:
                self._finish()

    def _add(self, line: str) -> None:
        line = self._without_overlong_begin(line)
        self._lines.append(line)
        self._n_chars += len(line) + 1

    def _without_overlong_begin(self, line: str) -> str:
        """Cut until `line` fits into the open part; what is left of it."""
        while self._n_chars + len(line) > MAX_PART:
            if len(self._lines) == self._n_again:
                end = _cut_at(line, MAX_PART - self._n_chars)
                self._lines.append(line[:end])
                line = line[end:]
            self._cut()
        return line

    def _cut(self) -> None:
        """Finish the open part and begin one that goes on with it."""
        again = self._lines_again()
        fence, is_list = self._fence, self._is_list
        if fence:
            self._lines.append(fence)
        self._finish()
        self._fence, self._is_list, self._is_continued = fence, is_list, True
        self._lines, self._n_again = again, len(again)
        self._n_chars = sum(len(line) + 1 for line in again)

    def _lines_again(self) -> list[str]:
        """The first lines that a code block or a table needs once more."""
        lines = self._lines
        if self._fence:
            opener = next((line for line in lines if self._fence in line), self._fence)
            return [opener.strip()[:100]]
        is_table = len(lines) > 2 and "|" in lines[0] and _TABLE_RULE.match(lines[1])
        return lines[:2] if is_table and len(lines[0]) + len(lines[1]) < MAX_PART / 2 else []

    def _finish(self) -> None:
        if any(line.strip() for line in self._lines):
            text = "\n".join(self._lines).rstrip("\n")
            self._finished.append(MarkdownPart(text, self._has_gap(self._is_list)))
            self._is_first = False
            self._was_list = self._is_list
        self._lines = []
        self._n_chars = self._n_again = 0
        self._fence = ""
        self._is_blank = self._is_list = self._is_continued = False

    def _has_gap(self, is_list: bool) -> bool:
        return not (self._is_first or self._is_continued or (is_list and self._was_list))


def _is_item(line: str) -> bool:
    return _ITEM.match(line) is not None and not _RULE.match(line)


def _cut_at(line: str, n_chars: int) -> int:
    """Where to cut a line after at most `n_chars`: behind a space, if there is one to be found."""
    space = line.rfind(" ", n_chars // 2, n_chars)
    return n_chars if space < 0 else space + 1
