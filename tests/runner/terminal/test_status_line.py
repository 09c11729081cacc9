"""The line that is written over while something goes on."""

import io
import re
import threading

from runner.terminal.status_line import StatusLine


def displayed(raw: str) -> list[str]:
    """What the line showed after each write, trailing blanks removed."""
    return [text.rstrip() for text in raw.split("\r") if text]


def test_a_bar_grows_and_is_removed() -> None:
    out = io.StringIO()
    line = StatusLine(out, is_shown=True)
    line.show_progress("reading weights", 1, 2)
    line.clear()
    first, last = displayed(out.getvalue())
    assert re.fullmatch(r"reading weights \[#{12}-{12}\]  50%", first)
    assert last == "" and out.getvalue().endswith(" \r")


def test_a_shorter_text_leaves_nothing_of_a_longer_one() -> None:
    out = io.StringIO()
    line = StatusLine(out, is_shown=True)
    line.show("x" * 40)
    line.clear()
    line.show("y")
    assert out.getvalue() == "\r" + "x" * 40 + "\r" + " " * 40 + "\r" + "\ry"


def test_odd_counts_are_no_problem() -> None:
    for done, total, share in ((0, 0, "0%"), (5, 0, "0%"), (9, 3, "100%"), (-1, 3, "0%")):
        out = io.StringIO()
        StatusLine(out, is_shown=True).show_progress("x", done, total)
        assert out.getvalue().endswith(share)


def test_updates_that_come_too_fast_are_left_out() -> None:
    out = io.StringIO()
    line = StatusLine(out, is_shown=True)
    for done in range(1000):
        line.show_progress("x", done, 1000)
    assert len(displayed(out.getvalue())) < 20


def test_nothing_is_written_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    line = StatusLine(out)
    line.show_progress("x", 1, 2)
    line.clear()
    assert out.getvalue() == ""


def test_a_text_is_shown_only_when_its_block_takes_long() -> None:
    class Out(io.StringIO):
        written = threading.Event()

        def write(self, text: str) -> int:
            n = super().write(text)
            self.written.set()
            return n

    out = Out()
    line = StatusLine(out, is_shown=True)
    with line.shown_after(3600, "reading"):
        pass
    assert out.getvalue() == ""
    with line.shown_after(0, "reading"):
        assert out.written.wait(10)
    assert displayed(out.getvalue()) == ["reading", ""]
