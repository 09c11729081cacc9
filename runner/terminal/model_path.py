"""Which file a MODEL argument means, and what to do when it means none. Opens nothing."""

import difflib
import re
from pathlib import Path

from runner.errors import BuddyrunError, ModelError
from runner.hub.model_name import looks_like_name

_HUB_NAME = " MODEL is the path of a .gguf file, or user/repo:QUANT on Hugging Face"
_QUANT_NAME = re.compile(r"(.*:)?(I?Q\d_\w+|F16|BF16|F32|MXFP4\w*)", re.IGNORECASE)


_OLLAMA_NAME = re.compile(r"[\w.-]+:[\w.-]+")
_DEMO_WORD, _DEMO_MODEL = "demo", "buddy-demo-q8_0.gguf"


def find_model(text: str, commands: list[str]) -> Path:
    """The path of an existing file, also of a model in the cache that is named as on its hub.

    Raises ModelError as `find_file`.
    """
    found = find_file(text, commands)
    if found is not None:
        return found
    from runner.hub.cached_models import find_cached
    from runner.hub.model_name import parse

    name = parse(text)
    found = find_cached(name, is_any_good=True)
    if found is None:
        raise ModelError(f"{name} is not on this machine: `buddyrun pull {name}` gets it.")
    return found


def find_file(text: str, commands: list[str]) -> Path | None:
    """The path of an existing file; None for what can only be the name of a model on a hub.

    Where no command can be meant, `demo` is the demo model. Raises ModelError with the likeliest
    remedy; `commands` are the names that a misplaced or mistyped command may have meant.
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
    if looks_like_name(text) and not _near_files(path):
        return None
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
    if _QUANT_NAME.fullmatch(text):
        return " That looks like the name of a quantization; MODEL is the path of a .gguf file."
    if text == "serve":
        return " buddyrun has no server; `buddyrun MODEL` chats."
    if _OLLAMA_NAME.fullmatch(text):
        return _HUB_NAME + " as in `buddyrun pull user/repo:Q4_K_M`."
    return _HUB_NAME + "; `buddyrun demo` runs without one."


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
