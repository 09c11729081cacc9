"""Rows of the token embedding, read on the host. Knows no graph.

Beside a GPU they stay in the mapped file, as in llama.cpp: few are used, and not every device can
take rows out of a quantized matrix.
"""

import numpy as np

from quant.dequantize import dequantize
from quant.gguf_file import GGUFFile


class Embedding:
    """The matrix `token_embd.weight` of an open file."""

    def __init__(self, file: GGUFFile) -> None:
        info = file.tensors["token_embd.weight"]
        self._type = info.type
        n_rows = info.shape[1]
        blocks = file.mapping(info.shard)[info.offset : info.offset + info.n_bytes]
        self._rows = blocks.reshape(n_rows, -1)

    def read(self, tokens: np.ndarray, into: np.ndarray) -> None:
        """The rows of tokens (n,) as float32, into (n, n_embd)."""
        for token, row in zip(tokens.tolist(), into, strict=True):
            dequantize(self._rows[token], self._type, row)
