import pytest
from hypothesis import given
from hypothesis import strategies as st

from tui.answer_parts import MAX_PART, MarkdownPart, PartSplitter

LINES = st.lists(
    st.sampled_from(
        (
            *("", "text", "# head", "- item", "1. one", "  more", "    deep", "```python", "```"),
            *("~~~", "| a | b |", "|---|---|", "| 1 | 2 |", "> said", "---", "x" * 300),
            "word " * 500,
        )
    ),
    max_size=40,
)


def parts_of(text: str, n_chars: int = 10**9) -> list[MarkdownPart]:
    """The parts of a text that comes in pieces of so many characters."""
    splitter = PartSplitter()
    parts: list[MarkdownPart] = []
    for begin in range(0, len(text), n_chars):
        parts += splitter.push(text[begin : begin + n_chars])
    return [*parts, *splitter.open_parts]


def texts(text: str) -> list[str]:
    return [part.text for part in parts_of(text)]


def test_paragraphs_headings_and_quotes_are_parts() -> None:
    assert texts("# Head\nOne\ntwo\n\nThree\n\n\n> said\n> more") == [
        "# Head",
        "One\ntwo",
        "Three",
        "> said\n> more",
    ]


def test_items_of_a_list_are_parts_without_a_gap_and_keep_what_is_nested() -> None:
    parts = parts_of("Say:\n1. one\n2. two\n   - nested\n\n   more\n3. three\nlazy\n\nAfter")
    assert [part.text for part in parts] == [
        "Say:",
        "1. one",
        "2. two\n   - nested\n\n   more",
        "3. three\nlazy",
        "After",
    ]
    assert [part.has_gap for part in parts] == [False, True, False, False, True]


def test_a_code_block_is_one_part_whatever_is_in_it() -> None:
    code = "```python\n# no heading\n\n- no item\n~~~\n```"
    assert texts(f"Look:\n{code}\nEnd") == ["Look:", code, "End"]
    assert (
        texts("- item\n  ```\n  a\n\n# b\n  ```\n- next")[0] == "- item\n  ```\n  a\n\n# b\n  ```"
    )


def test_a_rule_is_no_list() -> None:
    assert [part.has_gap for part in parts_of("* * *\n\n* * *")] == [False, True]


def test_a_code_block_that_is_too_long_gets_its_fence_again() -> None:
    lines = [f"line {n}" for n in range(600)]
    parts = parts_of("\n".join(["```python", *lines, "```"]))
    assert len(parts) > 2
    assert all(part.text.startswith("```python\n") for part in parts)
    assert all(part.text.endswith("\n```") for part in parts)
    shown = [line for part in parts for line in part.text.split("\n")[1:-1]]
    assert shown == lines
    assert [part.has_gap for part in parts] == [False] * len(parts)


def test_a_table_that_is_too_long_gets_its_head_again() -> None:
    head = ["| name | value |", "|------|-------|"]
    rows = [f"| row {n} | {n * n} |" for n in range(300)]
    parts = parts_of("\n".join(head + rows))
    assert len(parts) > 2
    assert all(part.text.split("\n")[:2] == head for part in parts)
    assert [row for part in parts for row in part.text.split("\n")[2:]] == rows


def test_a_long_line_is_cut_behind_spaces_or_anywhere() -> None:
    words = texts("word " * 1000)
    assert "".join(words) == "word " * 1000
    assert all(text.endswith("word ") for text in words)
    assert "".join(texts("x" * 100_000)) == "x" * 100_000


@pytest.mark.parametrize("n_chars", (1, 7, 100))
@given(lines=LINES)
def test_the_pieces_of_a_text_make_no_difference(n_chars: int, lines: list[str]) -> None:
    text = "\n".join(lines)
    assert parts_of(text, n_chars) == parts_of(text)


@given(lines=LINES)
def test_no_line_is_lost_and_no_part_is_long(lines: list[str]) -> None:
    parts = parts_of("\n".join(lines))
    shown = "".join("".join(part.text for part in parts).split())
    missing = iter(shown)
    # What is shown again (fences, heads of tables) comes besides.
    assert all(character in missing for character in "".join("".join(lines).split()))
    assert all(len(part.text) <= MAX_PART + 110 for part in parts)
