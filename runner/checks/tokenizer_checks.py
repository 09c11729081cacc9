"""Checks of the tokenizer's metadata before llama.cpp reads it. Tokenizes nothing.

llama.cpp loads the vocabulary in the engine's process. What it refuses politely is left to it;
what would make it abort the process, or abort later while tokenizing, is refused here.
"""

from collections.abc import Iterator

import numpy as np

from quant.gguf_file import GGUFFile, MetadataArray
from runner.checks.model_keys import ModelKeys, shown
from runner.errors import ModelError

MAX_TOKEN_BYTES = 1 << 16
_P = "tokenizer.ggml."
_KINDS = {"llama": "SentencePiece", "gpt2": "byte-level BPE"}
_DEFAULT_BOS_EOS = {"llama": (1, 2), "gpt2": (11, 11)}
_PRE_WITHOUT_BOS = ("chatglm-bpe", "glm4", "glm5")
_FLAGS = ("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces")

# Bytes that occur in UTF-8 text, and the tokens that may stand for each.
_UTF8_BYTES = (*range(0xC0), *range(0xC2, 0xF5))
_BYTE_TOKENS = {f"<0x{byte:02X}>".encode(): byte for byte in _UTF8_BYTES} | {
    bytes([byte]): byte for byte in range(1, 0x80)
}


def check_tokenizer(file: GGUFFile, n_vocab: int) -> None:
    """Raise ModelError unless llama.cpp can use the tokenizer of a model of `n_vocab` tokens."""
    keys = ModelKeys(file)
    model = keys.text(_P + "model")
    if model not in _KINDS:
        kinds = ", ".join(f"{name!r} ({kind})" for name, kind in _KINDS.items())
        raise keys.error(_P + "model", shown(model), kinds)
    tokens = _check_arrays(keys, model, n_vocab)
    _check_special_tokens(keys, model, n_vocab)
    for flag in _FLAGS:
        keys.boolean(_P + flag, default=False)
    for key in (_P + "pre", "tokenizer.chat_template"):
        keys.text(key, default="")
    _check_tokens(file, tokens, needs_bytes=model == "llama")


def _check_arrays(keys: ModelKeys, model: str, n_vocab: int) -> MetadataArray:
    tokens = keys.array(_P + "tokens", ("str",), at_least=1)
    if tokens.n != n_vocab:
        expected = f"{n_vocab}, the rows of token_embd.weight"
        raise keys.error(_P + "tokens", f"{tokens.n} tokens", expected)
    if _P + "scores" in keys:
        scores = keys.array(_P + "scores", ("f32", "i32"), at_least=n_vocab)
        if scores.element_type == "f32" and np.isnan(scores.numbers(n_vocab)).any():
            raise keys.error(_P + "scores", "NaN", "numbers")
    if _P + "token_type" in keys:
        keys.array(_P + "token_type", ("i32",), at_least=n_vocab)
    if model == "gpt2" or _P + "merges" in keys:
        keys.array(_P + "merges", ("str",), at_least=0)
    return tokens


def _check_special_tokens(keys: ModelKeys, model: str, n_vocab: int) -> None:
    """llama.cpp asserts that there is a token to add when it must add one."""
    default_bos, default_eos = _DEFAULT_BOS_EOS[model]
    has_default_bos = keys.text(_P + "pre", default="") not in _PRE_WITHOUT_BOS or model == "llama"
    for name, default in (
        ("bos", default_bos if has_default_bos else None),
        ("eos", default_eos),
    ):
        key = f"{_P}{name}_token_id"
        is_added = keys.boolean(f"{_P}add_{name}_token", default=name == "bos" and has_default_bos)
        if key in keys:
            keys.unsigned(key, 0, n_vocab - 1)
        elif is_added and (default is None or default >= n_vocab):
            raise keys.error(key, "no such metadata key", f"a token id, 0 to {n_vocab - 1}")
    if f"{_P}eot_token_id" in keys:
        keys.unsigned(f"{_P}eot_token_id", 0, n_vocab - 1)


def _check_tokens(file: GGUFFile, tokens: MetadataArray, needs_bytes: bool) -> None:
    """Each token must differ from the others, and every byte of a text must have a token."""
    hashes = np.fromiter(map(hash, _texts(tokens)), np.int64, tokens.n)
    order = np.sort(hashes)
    repeated = order[1:][order[1:] == order[:-1]]
    if len(repeated):
        ids = np.flatnonzero(hashes == repeated[0])[:2]
        raise ModelError(
            f"{file.paths[0]}: {_P}tokens: found the same text for the tokens "
            f"{ids[0]} and {ids[1]}; expected each text once"
        )
    if not needs_bytes:
        return
    missing = set(_UTF8_BYTES).difference(
        _BYTE_TOKENS[text] for text in _texts(tokens) if text in _BYTE_TOKENS
    )
    if missing:
        raise ModelError(
            f"{file.paths[0]}: {_P}tokens: no token for {len(missing)} of the bytes in UTF-8, "
            f"the first <0x{min(missing):02X}>; expected one for each, or text could not be read"
        )


def _texts(tokens: MetadataArray) -> Iterator[bytes]:
    """The tokens as llama.cpp sees them: C strings, the empty ones with a name."""
    for i, text in enumerate(tokens.strings(MAX_TOKEN_BYTES)):
        yield text.partition(b"\0")[0] or f"[EMPTY_{i}]".encode()
