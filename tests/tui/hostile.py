"""Texts that a model may make and a screen must bear, by name; each of about `n_chars`."""

from collections.abc import Callable
from itertools import count


def _repeated(text: str) -> Callable[[int], str]:
    return lambda n_chars: text * (n_chars // len(text) + 1)


def _numbered(line: str, head: str = "") -> Callable[[int], str]:
    def make(n_chars: int) -> str:
        text = head
        for number in count(1):
            if len(text) >= n_chars:
                return text
            text += line.format(n=number)
        raise AssertionError

    return make


KINDS: dict[str, Callable[[int], str]] = {
    "prose": _repeated("The quick brown fox jumps over the lazy dog. " * 9 + "\n\n"),
    "markdown": _repeated("Some **bold** and *slanted* words with `code` in them. " * 5 + "\n\n"),
    "list": _numbered("{n}. An item of a **long** list\n"),
    "table": _numbered("| {n} | some *text* | x |\n", "| a | b | c |\n|---|---|---|\n"),
    "code": _numbered("    value_{n} = [i for i in range({n})]\n", "```python\n"),
    "one line": _repeated("x"),
    "words on one line": _repeated("word "),
    "escapes": _repeated("\x1b[2J\x1b]0;owned\x07\x9b31m\x1b[?1049h\x1b[?1003l\x00 "),
    "markup": _repeated("[/ [red]x[/red] [/] [@click=app.quit]q[/] \\[ $x "),
    "bidi": _repeated("a\u202eb\u2066c\u200d\u200b\ufeff\u00ad "),
    "surrogates": _repeated("\ud800x\udfff "),
    "brackets": _repeated("["),
    "links": _repeated("[a](b) "),
    "stars": _repeated("*a_ "),
    "ticks": _repeated("`a``b"),
    "tags": _repeated("<a <b "),
    "quotes": _repeated("> "),
    "marks": _repeated("e\u0301\u0302\u0303"),
    "wide": _repeated("漢字"),
    "emoji": _repeated("👨\u200d👩\u200d👧🇩🇪👍🏽"),
    "unclosed code": _repeated("```\nx(\n"),
    "wide table": lambda n: "|a" * (n // 3) + "|\n" + "|-" * (n // 3) + "|\n|b|",
    "empty lines": _repeated("\n"),
    "parentheses in code": lambda n: "```python\n" + "x(" * (n // 2),
}
