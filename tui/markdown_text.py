"""Lays texts out as lines of a given width: Markdown, plain text with a mark before it.

Text comes in as `visible` made it; what an entity like `&#8238;` adds is made visible here. HTML
is text, links show where they lead, and a line break in the text is a line break on the screen.
"""

import io
from dataclasses import dataclass
from enum import Enum

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Markdown
from rich.segment import Segment
from rich.style import Style
from rich.syntax import Syntax
from rich.text import Text
from rich.theme import Theme
from textual.strip import Strip

from runner.client import visible

_MIN_WIDTH = 8  # Rich needs some room
_ASCII = str.maketrans("•▌─━│┃…🌆", "*|--||.@")


class Kind(Enum):
    """What a text is; decides how it looks."""

    QUESTION = "question"  # of the person
    ANSWER = "answer"  # Markdown
    THINKING = "thinking"
    REMARK = "remark"  # of the program
    WARNING = "warning"
    FIGURES = "figures"  # timings after an answer


@dataclass(frozen=True)
class Look:
    """Colours for a theme, in Rich's words."""

    question: str
    code: str
    heading: str
    warning: str
    is_dark: bool
    is_ascii: bool


class TextLayout:
    """Lays out with one look."""

    def __init__(self, look: Look) -> None:
        self._look = look
        self._parser = MarkdownIt("commonmark", {"html": False})
        self._parser.enable(["strikethrough", "table"]).disable("reference")
        self._console = Console(
            file=io.StringIO(),
            force_terminal=True,
            color_system="truecolor",
            legacy_windows=False,
            theme=_theme(look),
        )
        mark = ">" if look.is_ascii else "❯"
        bar = "|" if look.is_ascii else "│"
        question = Style.parse(look.question) + Style(bold=True)
        self._plain = {
            Kind.QUESTION: (f"{mark} ", "  ", question),
            Kind.THINKING: (f"{bar} ", f"{bar} ", Style(dim=True, italic=True)),
            Kind.REMARK: ("", "", Style()),
            Kind.WARNING: ("! ", "  ", Style.parse(look.warning)),
            Kind.FIGURES: ("", "", Style(dim=True)),
        }

    def lines(self, text: str, kind: Kind, width: int, is_open: bool = False) -> list[Strip]:
        """The lines of a text, each at most `width` cells wide. Where the text is still growing
        code has no colours yet: they take the most time."""
        width = max(width, _MIN_WIDTH)
        if kind is Kind.ANSWER:
            return self._markdown(text, width, is_open)
        first, others, style = self._plain[kind]
        lines = self._wrapped(Text(text), width - len(first))
        marks = [first, *[others] * (len(lines) - 1)]
        return [
            Strip([Segment(mark + "".join(s.text for s in line), style)])
            for mark, line in zip(marks, lines, strict=True)
        ]

    def _markdown(self, text: str, width: int, is_open: bool) -> list[Strip]:
        markdown = _Markdown(
            "", code_theme="monokai" if self._look.is_dark else "default", hyperlinks=False
        )
        markdown.parsed = self._parsed(text)
        if is_open:
            for token in markdown.parsed:
                token.info = ""
        options = self._console.options.update_width(width)
        try:
            lines = self._console.render_lines(markdown, options, pad=False)
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError):
            # Rich and the lexers of Pygments meet text that nobody wrote by hand.
            lines = self._wrapped(Text(text), width)
        # Most words of code have the same colour as those beside them: fewer pieces, less work.
        return [Strip(self._decorated(line)).simplify() for line in _without_empty_ends(lines)]

    def _parsed(self, text: str) -> list[Token]:
        try:
            tokens = self._parser.parse(text)
        except (LookupError, RecursionError, ValueError):
            tokens = [
                Token("paragraph_open", "p", 1),
                _inline(text),
                Token("paragraph_close", "p", -1),
            ]
        for token in tokens:
            _clean(token)
        return tokens

    def _wrapped(self, text: Text, width: int) -> list[list[Segment]]:
        text.overflow = "fold"
        options = self._console.options.update_width(max(width, 1))
        return self._console.render_lines(text, options, pad=False) or [[]]

    def _decorated(self, line: list[Segment]) -> list[Segment]:
        if not self._look.is_ascii:
            return line
        return [Segment(text.translate(_ASCII), style, control) for text, style, control in line]


class _Code(CodeBlock):
    """Without empty lines around it: a long block comes in several parts."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Syntax(
            str(self.text).rstrip("\n"),
            self.lexer_name,
            theme=self.theme,
            word_wrap=True,
            padding=(0, 1),
        )


class _Markdown(Markdown):
    """Parsed by us."""

    elements = {**Markdown.elements, "fence": _Code, "code_block": _Code}  # noqa: RUF012


def _inline(text: str) -> Token:
    child = Token("text", "", 0, content=text)
    return Token("inline", "", 0, content=text, children=[child])


def _clean(token: Token) -> None:
    """Make visible what entities brought in; break lines where the text breaks them."""
    token.content = visible(token.content)
    token.attrs = {
        name: visible(value) if isinstance(value, str) else value
        for name, value in token.attrs.items()
    }
    if token.type == "softbreak":
        token.type = "hardbreak"
    for child in token.children or ():
        _clean(child)


def _without_empty_ends(lines: list[list[Segment]]) -> list[list[Segment]]:
    """Rich puts empty lines around blocks; here the parts have them."""
    begin, end = 0, len(lines)
    while begin < end and _is_empty(lines[begin]):
        begin += 1
    while begin < end and _is_empty(lines[end - 1]):
        end -= 1
    return lines[begin:end] or [[]]


def _is_empty(line: list[Segment]) -> bool:
    return not any(s.text.strip() or (s.style and s.style.bgcolor) for s in line)


def _theme(look: Look) -> Theme:
    heading = Style.parse(look.heading) + Style(bold=True)
    headings = {f"markdown.h{n}": heading for n in range(1, 7)}
    quiet = Style(dim=True)
    return Theme(
        {
            **headings,
            "markdown.h1": heading + Style(underline=True),
            "markdown.code": look.code,
            "markdown.code_block": look.code,
            "markdown.item.bullet": heading,
            "markdown.item.number": heading,
            "markdown.block_quote": quiet,
            "markdown.hr": quiet,
            "markdown.link": look.code,
            "markdown.link_url": look.code,
            "markdown.table.border": quiet,
            "markdown.table.header": heading,
        }
    )
