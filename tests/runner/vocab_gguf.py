"""Writes small GGUF files that hold a vocabulary and no model, for tests of tokenizers."""

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

BYTES = [f"<0x{i:02X}>" for i in range(256)]
WORDS = ["▁", "a", "b", "▁a", "▁b", "ab", "▁ab", "H", "e", "l", "o", "He", "llo", "ll", "lo"]
WORDS += ["Hello", "▁H", "▁He", "▁Hello", "w", "r", "d", "wo", "rld", "ld", "▁w", "▁wo", "▁world"]
UNKNOWN, CONTROL, NORMAL, BYTE = 2, 3, 1, 6


def write_spm(
    path: Path,
    words: Sequence[str] = WORDS,
    byte_tokens: Sequence[str] = BYTES,
    model: str = "llama",
    add_bos: bool = True,
    add_space_prefix: bool = True,
) -> Path:
    """A SentencePiece vocabulary: <unk>, <s>, </s>, the bytes, then `words`."""
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *words]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * len(byte_tokens), *[NORMAL] * len(words)]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_scores([float(len(token)) for token in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(add_bos)
    writer.add_add_space_prefix(add_space_prefix)
    writer.add_tensor("unused", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
