"""Text from a model or a file cannot steer the terminal or hide from the reader."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.terminal.terminal_text import storable, visible, visible_line

HARMFUL = {
    "\x1b[2J": "␛[2J",
    "\x1b]52;c;ZXZpbA==\x07": "␛]52;c;ZXZpbA==␇",
    "a\rb": "a␍b",
    "a\x08b": "a␈b",
    "\x00": "␀",
    "\x7f": "␡",
    "\x9b31m": "<U+009B>31m",
    "\u202eevil": "<U+202E>evil",
    "\u2066x\u2069": "<U+2066>x<U+2069>",
    "a\u200bb": "a<U+200B>b",
    "\u200e": "<U+200E>",
    "\ufeff": "<U+FEFF>",
    "\u2028": "<U+2028>",
    "so\u00adft": "so<U+00AD>ft",
    "\U000e0041": "<U+E0041>",
    "\U000e0100": "<U+E0100>",
    "\u3164": "<U+3164>",
    "\ud83d": "<U+D83D>",
    "p\u200cq": "p<U+200C>q",
    "p\u200dq": "p<U+200D>q",
}
HARMLESS = [
    "plain text\n\twith a tab",
    "naïve café",
    "e\u0301 combining",
    "日本語 العربية עברית",
    "👩\u200d👩\u200d👧",
    "❤\ufe0f",
    "می\u200cخواهم",
    "क्\u200dष",
    "\ufffd",
]


@pytest.mark.parametrize(("text", "shown"), HARMFUL.items(), ids=ascii)
def test_what_a_terminal_would_obey_or_hide_is_shown(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize("text", HARMLESS, ids=ascii)
def test_ordinary_text_of_any_script_is_left_alone(text: str) -> None:
    assert visible(text) == text


def test_a_windows_line_end_becomes_a_newline() -> None:
    assert visible("one\r\ntwo\r") == "one\ntwo␍"


def test_a_joiner_split_from_its_emoji_is_kept_when_the_text_before_is_given() -> None:
    assert visible("\u200d👧", before="👩") == "\u200d👧"
    assert visible("\u200dx", before="a") == "<U+200D>x"
    assert visible("x", before="\x1b") == "x"


def test_a_line_stays_one_line() -> None:
    assert visible_line("a\nb\r\nc\td\x1b") == "a␊b␊c d␛"


def test_undecodable_bytes_of_a_command_line_can_be_encoded() -> None:
    assert storable("ok \udcff \ud800").encode("utf-8").count("\ufffd".encode()) >= 2
    assert storable("日本") == "日本"


@given(st.text(st.characters(exclude_categories=()), max_size=60))
def test_no_control_or_format_character_is_left(text: str) -> None:
    shown = visible(text)
    kept = {"\n", "\t", "\u200c", "\u200d"}
    bad = [
        c for c in shown if unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"} and c not in kept
    ]
    assert bad == []
    assert not set(shown) & set(
        "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f"
    )


@given(st.text(st.characters(exclude_categories=()), max_size=40), st.integers(0, 40))
def test_text_in_two_pieces_is_shown_like_the_whole(text: str, cut: int) -> None:
    head, tail = text[:cut], text[cut:]
    if head.endswith("\r") and tail.startswith("\n"):
        return  # a line end split between two pieces shows its carriage return
    assert visible(head) + visible(tail, head) == visible(text)
