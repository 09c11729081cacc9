"""Owns llama.cpp's built-in chat templates, known by name ("llama3", "mistral-v1"). No Jinja."""

import ctypes
import functools
from collections.abc import Mapping, Sequence

from runner.errors import TemplateError
from runner.llama_library import llama_library

_SLACK_BYTES = 4096


@functools.cache
def builtin_template_names() -> tuple[str, ...]:
    """The names that `apply_builtin_template` knows."""
    api = llama_library().api
    n = api.llama_chat_builtin_templates(None, 0)
    names = (ctypes.c_char_p * n)()
    api.llama_chat_builtin_templates(names, n)
    return tuple(name.decode() for name in names if name is not None)


def apply_builtin_template(
    name: str, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool
) -> str:
    """The prompt that a built-in template makes of `messages`. Raises TemplateError."""
    assert name in builtin_template_names()
    api = llama_library().api
    texts = [(_c_text(message["role"]), _c_text(message["content"])) for message in messages]
    chat = (api.llama_chat_message * len(texts))(*texts)
    size = 2 * sum(len(role) + len(content) for role, content in texts) + _SLACK_BYTES
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = api.llama_chat_apply_template(
            name.encode(), chat, len(texts), add_generation_prompt, buffer, size
        )
        if n < 0:
            raise TemplateError(f"llama.cpp's chat template {name!r} refused the conversation.")
        if n <= size:
            return buffer.raw[:n].decode("utf-8", "replace")
        size = n


def _c_text(text: str) -> bytes:
    # A NUL would end the message early.
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace")
