import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from tests.tui.hostile import KINDS
from tui.answer_parts import MAX_PART
from tui.markdown_text import Kind, Look, TextLayout

LOOK = Look("#57a5e2", "#ffc473", "#57a5e2", "#ffc473", is_dark=True, is_ascii=False)
LAYOUT = TextLayout(LOOK)
MARKS = st.text(
    alphabet="ab \n\t*_`~#>-+.1[]()!|&;<>\\:/\"'漢é\u0301\u200b\U0001f600", max_size=300
)


def shown(text: str, kind: Kind = Kind.ANSWER, width: int = 60) -> list[str]:
    return [strip.text.rstrip() for strip in LAYOUT.lines(text, kind, width)]


def styles(text: str) -> dict[str, str]:
    strips = LAYOUT.lines(text, Kind.ANSWER, 60)
    return {
        segment.text.strip(): str(segment.style)
        for strip in strips
        for segment in strip
        if segment.text.strip()
    }


def test_bold_and_code_have_styles_and_no_marks() -> None:
    found = styles("**bold** and `code` and *it*")
    assert "bold" in found["bold"]
    assert "#ffc473" in found["code"]
    assert "italic" in found["it"]


def test_lists_tables_and_code_are_laid_out() -> None:
    assert shown("- a\n  - b") == [" • a", "    • b"]
    assert shown("7. seven") == [" 7 seven"]
    assert shown("| a | b |\n|---|--:|\n| x | y |")[-1].split() == ["x", "y"]
    assert shown("```python\ndef f():\n\n    pass\n```") == [" def f():", "", "     pass"]


def test_a_line_break_in_the_text_is_one_on_the_screen() -> None:
    assert shown("Roses are red\nViolets are blue") == ["Roses are red", "Violets are blue"]


def test_html_rich_markup_and_link_definitions_are_text() -> None:
    text = "vector<int> <b>x</b> [red]y[/red] [/ [/]"
    assert shown(text) == [text]
    assert shown("<div>\n<p>\n</div>") == ["<div>", "<p>", "</div>"]
    assert shown("[a]: http://somewhere") == ["[a]: http://somewhere"]


def test_a_link_shows_where_it_leads_and_is_none_for_the_terminal() -> None:
    strips = LAYOUT.lines("[bank](http://evil.example)", Kind.ANSWER, 60)
    assert strips[0].text.rstrip() == "bank (http://evil.example)"
    assert all(segment.style is None or segment.style.link is None for segment in strips[0])


def test_what_an_entity_brings_in_is_made_visible() -> None:
    assert shown("a&#8238;b &lt; &#x200b;") == ["a<U+202E>b < <U+200B>"]
    assert "\u202e" not in "".join(shown("[x](http://a/&#8238;)", width=80))


def test_marks_tell_who_speaks_without_colour() -> None:
    assert shown("a\nb", Kind.QUESTION) == ["❯ a", "  b"]
    assert shown("a\nb", Kind.WARNING) == ["! a", "  b"]
    assert shown("a\nb", Kind.THINKING) == ["│ a", "│ b"]


def test_ascii_uses_no_other_character() -> None:
    layout = TextLayout(Look("none", "none", "none", "none", True, is_ascii=True))
    texts = ("- a\n\n> b", "| a |\n|---|\n| b |", "---", "# h")
    for strip in (s for text in texts for s in layout.lines(text, Kind.ANSWER, 40)):
        assert strip.text.isascii()
    for kind in (Kind.QUESTION, Kind.THINKING):
        assert layout.lines("a", kind, 40)[0].text.isascii()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", (1, 20, 80))
def test_hostile_text_fits_the_width(kind: str, width: int) -> None:
    text = KINDS[kind](4 * MAX_PART)[:MAX_PART]
    for strip in LAYOUT.lines(text, Kind.ANSWER, width):
        assert strip.cell_length <= max(width, 8)


@given(text=MARKS, width=st.integers(1, 80))
@settings(max_examples=300, deadline=None)
def test_any_text_is_laid_out_within_the_width(text: str, width: int) -> None:
    for kind in Kind:
        for strip in LAYOUT.lines(text, kind, width):
            assert "\n" not in strip.text
            assert cell_len(strip.text) <= max(width, 8)
