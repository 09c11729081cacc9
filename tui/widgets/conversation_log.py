"""The conversation on the screen: parts, one below the other, laid out once for a width.

Follows the end unless the person scrolled up. Knows no chat: it is told what to add.
"""

import time
from bisect import bisect_right
from dataclasses import dataclass, replace

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.color import Color, ColorParseError
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.selection import Selection
from textual.strip import Strip
from textual.timer import Timer

from tui.answer_parts import MAX_PART, MarkdownPart, PartSplitter
from tui.markdown_text import Kind, Look, TextLayout

_N_PAGES = 1  # above and below what is in sight whose lines are kept: turning a page is quick
_N_AT_ONCE = 500  # lines that may be laid out for a selection before the far ones go
_SLICE_S = 0.02  # laying out again after a change of width, at one go
_PAUSE_S = 0.01  # between two of these: keys are answered there


@dataclass(frozen=True)
class _Part:
    """A text and how much room it takes."""

    text: str
    kind: Kind
    has_gap: bool  # an empty line before it
    height: int = 0
    width: int = 0  # for which the height is right


class ConversationLog(ScrollView, can_focus=False):
    """Shows what was said; scrolls."""

    ALLOW_SELECT = True

    def __init__(self, is_ascii: bool = False, id: str | None = None) -> None:
        super().__init__(id=id)
        self._is_ascii = is_ascii
        self._parts: list[_Part] = []
        self._starts: list[int] = []  # first line of each
        self._n_lines = 0
        self._strips: dict[int, list[Strip]] = {}  # of the parts near what is in sight
        self._layout: TextLayout | None = None
        self._splitter: PartSplitter | None = None  # of the answer that is coming in
        self._is_thinking = False  # what comes in
        self._n_settled = 0  # parts before those that may still change
        self._follows = True
        self._relaying: Timer | None = None

    @property
    def text(self) -> str:
        """Everything, without layout."""
        return "\n".join(part.text for part in self._parts)

    def add(self, text: str, kind: Kind) -> None:
        """Add a text of its own; `show_open` shows it."""
        self.end_answer()
        for begin in range(0, max(len(text), 1), MAX_PART):
            piece = text[begin : begin + MAX_PART]
            self._append(_Part(piece, kind, has_gap=begin == 0 and self._needs_gap(kind)))
        self._n_settled = len(self._parts)

    def extend(self, text: str, is_thinking: bool) -> None:
        """Take the next piece of an answer. What is not a finished part comes with `show_open`."""
        if self._splitter is None or is_thinking != self._is_thinking:
            self.end_answer()
            self._splitter = PartSplitter()
            self._is_thinking = is_thinking
        self._forget(self._n_settled)
        for part in self._splitter.push(text):
            self._append_piece(part)
        self._n_settled = len(self._parts)

    def show_open(self) -> None:
        """Show everything that came, as far as it did."""
        if self._splitter is not None:
            self._forget(self._n_settled)
            for part in self._splitter.open_parts:
                self._append_piece(part, is_open=True)
        self._show()

    def end_answer(self) -> None:
        """The answer is over; what is added next is not part of it."""
        if self._splitter is not None:
            self._forget(self._n_settled)
            for part in self._splitter.open_parts:
                self._append_piece(part)
        self._splitter = None
        self._n_settled = len(self._parts)

    def follow(self) -> None:
        """Go to the end and stay there."""
        self._follows = True
        self.scroll_end(animate=False, immediate=True)

    def warm_up(self) -> None:
        """Let Rich and Pygments load what they load late: with the first code in an answer it
        would take longer than a key may wait."""
        assert self._layout is not None
        for code in ("```python\n1\n```", "| a |\n|---|\n| b |"):
            self._layout.lines(code, Kind.ANSWER, 80)

    def turn_page(self, n_pages: int) -> None:
        """Go up (-1) or down (1) by what is in sight."""
        n_lines = max(self.size.height - 1, 1)
        self.scroll_relative(y=n_pages * n_lines, animate=False, immediate=True)

    def _append_piece(self, piece: MarkdownPart, is_open: bool = False) -> None:
        kind = Kind.THINKING if self._is_thinking else Kind.ANSWER
        self._append(_Part(piece.text, kind, self._gap_of(piece.has_gap, kind)), is_open)

    def _gap_of(self, has_gap: bool, kind: Kind) -> bool:
        is_first = not self._parts or self._parts[-1].kind is not kind
        return has_gap or (is_first and self._needs_gap(kind))

    def _needs_gap(self, kind: Kind) -> bool:
        return bool(self._parts) and kind is not Kind.FIGURES

    # What is where

    def _append(self, part: _Part, is_open: bool = False) -> None:
        index = len(self._parts)
        self._parts.append(part)
        self._starts.append(self._n_lines)
        self._lay_out(index, is_open)
        self._n_lines += self._parts[index].height

    def _forget(self, n_kept: int) -> None:
        """Remove the parts from there on."""
        if n_kept == len(self._parts):
            return
        self._n_lines = self._starts[n_kept]
        for index in range(n_kept, len(self._parts)):
            self._strips.pop(index, None)
        del self._parts[n_kept:], self._starts[n_kept:]

    def _lay_out(self, index: int, is_open: bool = False) -> list[Strip]:
        """The lines of a part for the width of now, kept while it is near; its height is set."""
        part, width = self._parts[index], self._text_width
        if self._layout is None or not width:
            return []
        strips = self._layout.lines(part.text, part.kind, width, is_open)
        if part.has_gap:
            strips.insert(0, Strip([]))
        self._strips[index] = strips
        self._parts[index] = replace(part, height=len(strips), width=width)
        return strips

    def _measure(self) -> None:
        """Find out anew where each part begins."""
        self._n_lines = 0
        for index, part in enumerate(self._parts):
            self._starts[index] = self._n_lines
            self._n_lines += part.height

    @property
    def _text_width(self) -> int:
        return self.scrollable_content_region.width

    def _show(self) -> None:
        """Show what has changed, at the end if the person was there."""
        self.virtual_size = Size(self._text_width, self._n_lines)
        if self._follows:
            self.scroll_end(animate=False, immediate=True, x_axis=False)
        self._drop_far()
        self.refresh()

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Follow the end while it is in sight."""
        super().watch_scroll_y(old_value, new_value)
        self._follows = round(new_value) >= self.max_scroll_y
        self._drop_far()

    def _drop_far(self) -> None:
        """Keep the lines of what is near: each is made of hundreds of objects, and whenever
        Python looks for garbage among all of them the keys wait."""
        if not self._parts:
            return
        top, n_lines = round(self.scroll_y), self.size.height
        first = self._part_at(top - _N_PAGES * n_lines)
        last = self._part_at(top + (1 + _N_PAGES) * n_lines)
        self._strips = {
            n: strips
            for n, strips in self._strips.items()
            if first <= n <= last or n >= self._n_settled
        }

    # Another width, other colours

    def on_mount(self) -> None:
        """Take the colours of the theme, now and whenever it changes."""
        super().on_mount()  # type: ignore[no-untyped-call]
        self.app.theme_changed_signal.subscribe(self, lambda _: self._take_look())
        self._take_look()

    def on_resize(self, event: events.Resize) -> None:
        """Lay out for the new width, what is in sight first."""
        self._lay_out_again()

    def _take_look(self) -> None:
        self._layout = TextLayout(
            _look_of(self.app.theme_variables, self.app.current_theme.dark, self._is_ascii)
        )
        self._parts = [replace(part, width=0) for part in self._parts]
        self._lay_out_again()

    def _lay_out_again(self) -> None:
        self._strips.clear()
        if self._relaying is not None:
            self._relaying.stop()
            self._relaying = None
        self._lay_out_slice()

    def _lay_out_slice(self) -> None:
        """Lay out some of the parts whose width is not right, and the others a little later."""
        width = self._text_width
        stale = [n for n, part in enumerate(self._parts) if part.width != width]
        if not width or self._layout is None:
            return
        top = self._part_at(round(self.scroll_y))
        line = round(self.scroll_y) - self._starts[top] if self._parts else 0
        until_s = time.perf_counter() + _SLICE_S
        stale.sort(key=lambda n: -n if self._follows else (n < top, abs(n - top)))
        for index in stale:
            self._lay_out(index)
            if time.perf_counter() > until_s:
                self._relaying = self.set_timer(_PAUSE_S, self._lay_out_slice)
                break
        self._measure()
        self._show()
        if not self._follows and self._parts:
            line = min(line, max(self._parts[top].height - 1, 0))
            self.scroll_to(y=self._starts[top] + line, animate=False, immediate=True)

    def _part_at(self, y: int) -> int:
        return max(bisect_right(self._starts, y) - 1, 0)

    # Lines

    def render_line(self, y: int) -> Strip:
        """The line in row `y` of the widget."""
        scroll_x, scroll_y = self.scroll_offset
        line, width = scroll_y + y, self.size.width
        strip = self._line(line).crop_extend(scroll_x, scroll_x + width, None)
        strip = strip.apply_style(self.rich_style)
        if (selection := self.text_selection) is not None:
            strip = self._selected(strip, selection.get_span(line))
        return strip.apply_offsets(scroll_x, line)

    def _line(self, line: int) -> Strip:
        if line >= self._n_lines:
            return Strip([])
        index = self._part_at(line)
        strips = self._strips.get(index)
        if strips is None:
            strips = self._lay_out(index)
        within = line - self._starts[index]
        return strips[within] if within < len(strips) else Strip([])

    def _selected(self, strip: Strip, span: tuple[int, int] | None) -> Strip:
        if span is None:
            return strip
        begin, end = span
        end = strip.cell_length if end < 0 else min(end, strip.cell_length)
        if begin >= end:
            return strip
        style = self.screen.get_component_rich_style("screen--selection")
        before, chosen, after = (
            strip.crop(0, begin),
            strip.crop(begin, end),
            strip.crop(end, strip.cell_length),
        )
        chosen = Strip([Segment(text, (old or Style()) + style) for text, old, _ in chosen])
        return Strip.join([before, chosen, after])

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        """The text that the person marked, as it is laid out."""
        lines = []
        for line in range(self._n_lines):
            lines.append(self._line(line).text.rstrip())
            if line % _N_AT_ONCE == 0:
                self._drop_far()
        self._drop_far()
        return selection.extract("\n".join(lines)), "\n"

    def selection_updated(self, selection: Selection | None) -> None:
        """The marked text is shown as such."""
        self.refresh()


def _look_of(colors: dict[str, str], is_dark: bool, is_ascii: bool) -> Look:
    return Look(
        question=_rich(colors.get("text-primary", "")),
        code=_rich(colors.get("text-accent", "")),
        heading=_rich(colors.get("text-primary", "")),
        warning=_rich(colors.get("text-warning", "")),
        is_dark=is_dark,
        is_ascii=is_ascii,
    )


def _rich(color: str) -> str:
    """A colour of Textual in Rich's words."""
    try:
        return Color.parse(color).rich_color.name
    except ColorParseError:
        return "none"
