"""Owns the import of llama.cpp's low-level bindings and the capture of its log. Knows no model."""

import functools
import re
import sys
from collections import deque
from typing import Any

from runner.errors import BackendError

_WARN, _ERROR, _CONTINUE = 3, 4, 5  # ggml_log_level
_MAX_LINES = 8
_OF_A_DEVICE = re.compile(r"(CUDA|ROCm|MUSA) error: |ggml_(cuda|vulkan|metal|backend)")


class LlamaLibrary:
    """llama.cpp's C API as `api`, quiet, with its latest warnings and errors kept as text."""

    def __init__(self) -> None:
        self.api = _import_bindings()
        self._lines: deque[str] = deque(maxlen=_MAX_LINES)
        self._last_level = 0
        # llama.cpp keeps only the address of the callback, so it must live as long as the library.
        self._callback = self.api.llama_log_callback(self._on_log)
        self.api.llama_log_set(self._callback, None)

    def forget(self) -> None:
        """Drop the lines captured so far, before a call whose complaints are of interest."""
        self._lines.clear()

    def last_words(self) -> str:
        """The latest warnings and errors as one line of text; "" when there are none."""
        return "; ".join(line for line in self._lines if line)

    def explain(self, message: str) -> str:
        """`message` with llama.cpp's own last words behind it, if it said any."""
        words = self.last_words()
        return f"{message} llama.cpp says: {words}" if words else message

    def _on_log(self, level: int, text: bytes | None, _user_data: int | None) -> None:
        if level != _CONTINUE:
            self._last_level = level
        if self._last_level not in (_WARN, _ERROR) or not text:
            return
        piece = text.decode("utf-8", "replace").rstrip("\n")
        if _OF_A_DEVICE.search(piece):  # ggml aborts next: stderr is what outlives the process
            print(piece, file=sys.stderr, flush=True)
        if level == _CONTINUE and self._lines:
            self._lines[-1] += piece
        else:
            self._lines.append(piece.strip())


@functools.cache
def llama_library() -> LlamaLibrary:
    """The library, loaded on the first call. Raises BackendError when it cannot be."""
    return LlamaLibrary()


def _import_bindings() -> Any:
    try:
        import llama_cpp.llama_cpp as api
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(
            f"llama-cpp-python cannot be loaded: {error}."
            " Reinstall it, or check LLAMA_CPP_LIB_PATH."
        ) from error
    return api
