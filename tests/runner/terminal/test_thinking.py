"""Thinking sections are found wherever the pieces of an answer are cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.terminal.thinking import ThinkingSplitter, without_thinking


def split(*pieces: str) -> tuple[str, str]:
    """All thinking and all answer of a stream."""
    splitter = ThinkingSplitter()
    parts = [part for piece in pieces for part in splitter.push(piece)] + splitter.flush()
    thinking = "".join(part.text for part in parts if part.is_thinking)
    return thinking, "".join(part.text for part in parts if not part.is_thinking)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<think>a</think>b", ("a", "b")),
        (" \n<think>\na\n</think>\n\nb", ("a\n", "\n\nb")),
        ("<think>never closed", ("never closed", "")),
        ("<think></think>b", ("", "b")),
        ("no tags", ("", "no tags")),
        ("the tag <think>x</think> in text", ("", "the tag <think>x</think> in text")),
        ("<thin", ("", "<thin")),
        ("<think>a</th", ("a</th", "")),
        ("<thinking>a", ("", "<thinking>a")),
        ("<think>a</think>b</think>c", ("a", "b</think>c")),
        ("", ("", "")),
    ],
)
def test_any_cut_gives_the_same_parts(answer: str, expected: tuple[str, str]) -> None:
    assert split(answer) == expected
    assert split(*answer) == expected


@given(st.lists(st.sampled_from(["<", "think>", "</", "<think>", "</think>", "a", "\n"])))
def test_pieces_and_the_whole_give_the_same_parts(pieces: list[str]) -> None:
    assert split(*pieces) == split("".join(pieces))


def test_text_that_is_no_tag_is_not_held_back() -> None:
    splitter = ThinkingSplitter()
    assert [part.text for part in splitter.push("<b")] == ["<b"]


@pytest.mark.parametrize(
    ("answer", "sent"),
    [
        ("<think>a</think>\n\nb", "b"),
        ("a\n</think>\n\nb", "b"),
        ("<think>stopped", ""),
        ("plain", "plain"),
        ("write </think> to end it", "write </think> to end it"),
    ],
)
def test_what_is_sent_back_has_no_thinking(answer: str, sent: str) -> None:
    assert without_thinking(answer) == sent
