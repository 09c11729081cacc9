"""Checks that a MODEL argument is a file, and says what to do when it is not. Opens nothing."""

import difflib
import re
from pathlib import Path

from runner.errors import BuddyrunError, ModelError

_REPOSITORY = re.compile(r"(hf\.co/|hf://|https?://\S+/)?[\w.-]+/[\w.-]+(:[\w.-]+)?")
_QUANT_NAME = re.compile(r"(.*:)?(I?Q\d_\w+|F16|BF16|F32|MXFP4\w*)", re.IGNORECASE)


_DEMO_WORD, _DEMO_MODEL = "demo", "buddy-demo-q8_0.gguf"


def find_model(text: str, commands: list[str]) -> Path:
    """The path of an existing file; where no command can be meant, `demo` is the demo model.

    Raises ModelError with the likeliest remedy; `commands` are the names that a misplaced or
    mistyped command may have meant.
    """
    path = Path(text)
    try:
        if path.is_dir():
            raise ModelError(f"{text} is a directory; give the GGUF file itself." + _offer(path))
        if path.exists():
            return path
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot open {text[:200]!r}: {error}") from error
    if text == _DEMO_WORD and not commands:
        return demo_model()
    raise ModelError(f"There is no file {text}." + _remedy(text, path, commands))


def demo_model() -> Path:
    """The demo model inside the package. Raises BuddyrunError when the installation lacks it."""
    path = Path(__file__).parents[1] / "demo" / _DEMO_MODEL
    if not path.is_file():
        raise BuddyrunError(f"this installation lacks the demo model {path}; install it again")
    return path


def _remedy(text: str, path: Path, commands: list[str]) -> str:
    if text in commands:
        return f" The command comes first: buddyrun {text} [FLAGS] ..."
    near = _near_files(path)
    if near:
        return f" Did you mean {near}?"
    close = difflib.get_close_matches(text, commands, n=1, cutoff=0.7)
    if close:
        return f" Did you mean the command '{close[0]}'?"
    if _REPOSITORY.fullmatch(text) and not text.endswith(".gguf"):
        return (
            " That looks like a repository on a hub; MODEL is the path of a .gguf file on this"
            " machine. Download the file first."
        )
    if _QUANT_NAME.fullmatch(text):
        return " That looks like the name of a quantization; MODEL is the path of a .gguf file."
    return " MODEL is the path of a .gguf file; `buddyrun demo` runs without one."


def _near_files(path: Path) -> str:
    close = difflib.get_close_matches(path.name, [p.name for p in _models(path.parent)], n=1)
    return str(path.with_name(close[0])) if close else ""


def _offer(folder: Path) -> str:
    models = _models(folder)
    names = ", ".join(str(path) for path in models[:4])
    return f" In it: {names}{', ...' if len(models) > 4 else '.'}" if models else ""


def _models(folder: Path) -> list[Path]:
    try:
        return sorted(folder.glob("*.gguf"))[:1000]
    except OSError:
        return []
