"""Owns llama.cpp's text side: a model's vocabulary, loaded without its weights, and the
built-in chat templates, known by name ("llama3", "mistral-v1"). Knows no engine and no Jinja.

Text that is not valid Unicode (lone surrogates from undecodable bytes) is tokenized as U+FFFD.
"""

import codecs
import ctypes
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from runner.errors import ModelError, OptionError, TemplateError
from runner.llama_library import llama_library

_NO_TOKEN = -1
_MAX_TEXT_BYTES = 2**31 - 1024  # llama.cpp counts bytes and tokens in int32
_PIECE_BYTES = 256
_SLACK_BYTES = 4096  # for what a built-in template writes around the messages


class Tokenizer:
    """The vocabulary of one GGUF file. Tokens that the vocabulary lacks are -1."""

    def __init__(self, path: str | Path) -> None:
        """Load the vocabulary only; no weight is mapped or read. Raises ModelError."""
        self._library = llama_library()
        self._api = self._library.api
        self._model = _load_vocabulary(Path(path))
        self._vocab = self._api.llama_model_get_vocab(self._model)
        if self._api.llama_vocab_type(self._vocab) == self._api.LLAMA_VOCAB_TYPE_NONE:
            self.close()
            raise ModelError(f"{path}: the file has no tokenizer (tokenizer.ggml.model).")
        self.n_vocab: int = self._api.llama_vocab_n_tokens(self._vocab)
        self.bos: int = self._api.llama_vocab_bos(self._vocab)
        self.eos: int = self._api.llama_vocab_eos(self._vocab)
        self.add_bos: bool = self._api.llama_vocab_get_add_bos(self._vocab)
        template = self._api.llama_model_chat_template(self._model, None)
        self.chat_template: str | None = template.decode("utf-8", "replace") if template else None

    def close(self) -> None:
        """Free the vocabulary. Samplers made from it must be closed before."""
        if self._model is not None:
            self._api.llama_model_free(self._model)
        self._model = self._vocab = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def vocab(self) -> Any:
        """llama.cpp's `llama_vocab` handle, for the sampler."""
        assert self._vocab is not None, "the tokenizer is closed"
        return self._vocab

    @property
    def bos_text(self) -> str:
        """How the token that begins a text is written in chat templates; "" without one."""
        return self.token_text(self.bos)

    @property
    def eos_text(self) -> str:
        """How the token that ends a text is written in chat templates; "" without one."""
        return self.token_text(self.eos)

    @functools.cached_property
    def end_of_generation_tokens(self) -> tuple[int, ...]:
        """All tokens that end an answer, in order."""
        return tuple(t for t in range(self.n_vocab) if self.is_end_of_generation(t))

    def is_end_of_generation(self, token: int) -> bool:
        """Whether llama.cpp ends an answer at `token`."""
        return bool(self._api.llama_vocab_is_eog(self.vocab, self._checked(token)))

    def token_text(self, token: int) -> str:
        """A token as the vocabulary spells it ("<s>"), not as it is shown; "" for token -1."""
        if token == _NO_TOKEN:
            return ""
        text = self._api.llama_vocab_get_text(self.vocab, self._checked(token))
        return str(text.decode("utf-8", "replace"))

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Tokens of `text`. Raises OptionError when it is too long for llama.cpp.

        `add_special` adds BOS or EOS if the model asks for it; where `text` already begins with
        one there is still only one BOS. `parse_special` reads "<s>" and the like as the tokens
        they name; without it they are plain text.
        """
        data = _utf8(text)
        if len(data) > _MAX_TEXT_BYTES:
            raise OptionError(f"The text has {len(data)} bytes; at most {_MAX_TEXT_BYTES} fit.")
        tokens = self._tokenize(data, add_special and self._can_add_special(), parse_special)
        has_two_bos = add_special and self.add_bos and tokens[:2] == [self.bos, self.bos]
        return tokens[1:] if has_two_bos else tokens

    def detokenizer(self, keep_leading_space: bool = False) -> "Detokenizer":
        """A fresh stream from tokens to text.

        SentencePiece vocabularies write a space before the first word. The stream drops it as
        llama.cpp does, unless `keep_leading_space` says that its text continues other text.
        """
        return Detokenizer(self, keep_leading_space)

    def piece(self, token: int, is_first: bool = False) -> bytes:
        """The bytes of one token; b"" for special tokens. `is_first`: at the start of a text."""
        if is_first:
            return self._detokenize(np.array([self._checked(token)], np.int32))
        size = _PIECE_BYTES
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._api.llama_token_to_piece(
                self.vocab, self._checked(token), buffer, size, 0, False
            )
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def _tokenize(self, data: bytes, add_special: bool, parse_special: bool) -> list[int]:
        capacity = len(data) + 8
        while True:
            tokens = (ctypes.c_int32 * capacity)()
            n: int = self._api.llama_tokenize(
                self.vocab, data, len(data), tokens, capacity, add_special, parse_special
            )
            if n >= 0:
                return tokens[:n]
            if n == -(2**31):
                raise OptionError(f"The text has {len(data)} bytes: too many for the tokenizer.")
            capacity = -n

    def _detokenize(self, ids: np.ndarray) -> bytes:
        pointer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        size = 8 * ids.size + _PIECE_BYTES
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._api.llama_detokenize(
                self.vocab, pointer, ids.size, buffer, size, False, False
            )
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def _can_add_special(self) -> bool:
        # llama.cpp aborts when the file asks for a special token that its vocabulary lacks.
        vocab, api = self.vocab, self._api
        lacks_bos = self.add_bos and self.bos == _NO_TOKEN
        lacks_eos = api.llama_vocab_get_add_eos(vocab) and self.eos == _NO_TOKEN
        lacks_sep = api.llama_vocab_get_add_sep(vocab) and api.llama_vocab_sep(vocab) == _NO_TOKEN
        return not (lacks_bos or lacks_eos or lacks_sep)

    def _checked(self, token: int) -> int:
        # llama.cpp aborts the process for a token outside its vocabulary.
        assert 0 <= token < self.n_vocab, f"token {token} is not in 0..{self.n_vocab - 1}"
        return token


class Detokenizer:
    """Turns tokens into text as they come; a character split over tokens waits for its end."""

    def __init__(self, tokenizer: Tokenizer, keep_leading_space: bool) -> None:
        self._tokenizer = tokenizer
        self._is_first = not keep_leading_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that `token` completes; may be "". Invalid bytes become U+FFFD."""
        piece = self._tokenizer.piece(token, self._is_first)
        self._is_first = False
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed, or ""."""
        return self._decoder.decode(b"", final=True)


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


def _load_vocabulary(path: Path) -> Any:
    library = llama_library()
    params = library.api.llama_model_default_params()
    params.vocab_only = True
    # An empty list of devices: a vocabulary needs none, and asking a GPU for its memory wakes it.
    no_devices = (ctypes.c_void_p * 1)()
    params.devices = ctypes.addressof(no_devices)
    library.forget()
    model = library.api.llama_model_load_from_file(
        str(path).encode("utf-8", "surrogateescape"), params
    )
    if not model:
        raise ModelError(library.explain(f"{path}: the vocabulary cannot be loaded."))
    return model


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        # Pairs of surrogates become the character they stand for, lone ones become U+FFFD.
        data = text.encode("utf-16", "surrogatepass")
        return data.decode("utf-16", "replace").encode("utf-8")


def _c_text(text: str) -> bytes:
    # A NUL would end the message early.
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace")
