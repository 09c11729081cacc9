"""Text from outside made safe to print on a terminal. Knows no model and prints nothing itself.

A model, a file name or an error message may hold escape sequences that move the cursor or set the
clipboard, bidirectional controls that reorder a line, or characters that cannot be seen. Each of
these is replaced by something that can be read: ESC by `␛`, U+202E by `<U+202E>`.

Kept as they are: newline and tab, combining marks, the variation selectors of emoji (U+FE00 to
U+FE0F), and the joiners U+200C and U+200D after a character that is not ASCII, because Persian,
the Indic scripts and emoji families are written with them.
"""

import re

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 without tab and newline, DEL, C1
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f"  # soft hyphen, fillers, ALM
    "\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"  # zero width, marks, separators, bidi
    "\u3164\ufeff\uffa0\ufff0-\uffff\ud800-\udfff"  # fillers, BOM, specials, lone surrogates
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"  # invisible shorthand and music controls
    "\U000e0000-\U000e0fff]"  # tags and further variation selectors
    "|(?<=[\x00-\x7f])[\u200c\u200d]"  # a joiner that joins nothing
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_REPLACEMENT_CHARACTER = "\ufffd"


def visible(text: str, before: str = "") -> str:
    """`text` with everything that a terminal would obey or hide made visible; keeps \\n and \\t.

    `before` is what was printed just before, when a text arrives in pieces. A carriage return
    directly before a newline is dropped; any other is shown.
    """
    tail = before[-1:]
    shown = _UNSAFE.sub(_show, tail + text.replace("\r\n", "\n"))
    return shown[len(_UNSAFE.sub(_show, tail)) :]


def visible_line(text: str) -> str:
    """The same for a text that must stay on one line, such as a file name or a model's name."""
    return visible(text.replace("\r\n", "\n")).replace("\n", "\u240a").replace("\t", " ")


def storable(text: str) -> str:
    """`text` with lone surrogates (undecodable bytes of a command line) as U+FFFD.

    What comes out can always be encoded as UTF-8.
    """
    return _SURROGATE.sub("\ufffd", text)


def _show(found: re.Match[str]) -> str:
    character = found.group()
    code = ord(character)
    if character == _REPLACEMENT_CHARACTER:
        return character
    if code < 0x20:
        return chr(0x2400 + code)  # the block of control pictures
    if code == 0x7F:
        return "\u2421"
    return f"<U+{code:04X}>"
