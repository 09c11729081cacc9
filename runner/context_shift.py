"""What happens when the context is full and the user allows its oldest part to go.

The keys of the tokens that stay are rotated to their new positions; nothing is recomputed.
"""

import numpy as np

from quant.ggml import GraphAllocator
from quant.ggml_types import GGML_TYPES_BY_NAME
from quant.graph import Graph, HostPort
from runner import model
from runner.batch_graph import EngineParts

_F32 = GGML_TYPES_BY_NAME["F32"].id


def without_oldest(tokens: list[int], n_ctx: int, n_keep: int) -> list[int]:
    """A prompt cut to fit: its first n_keep tokens and its end, in steps of half the context."""
    n_keep = min(n_keep, n_ctx - 2)
    block = max(1, (n_ctx - n_keep) // 2)
    n_blocks = -(-(len(tokens) - n_ctx + 1) // block)
    return tokens[:n_keep] + tokens[n_keep + n_blocks * block :]


def rotate_keys(parts: EngineParts, moves: np.ndarray) -> None:
    """Turn every cached key by how far its position moved; moves (n_cells,) int32."""
    n_cells = parts.kv.cells.n_visible
    config = parts.config
    with Graph(parts.backend, 8 * config.n_layer) as g:
        positions = g.input(GGML_TYPES_BY_NAME["I32"].id, n_cells)
        for layer in range(config.n_layer):
            rows = g.first_rows(parts.kv.k[layer], n_cells)
            keys = g.cast(rows, _F32)
            heads = g.reshape_3d(keys, config.n_embd_head, config.n_head_kv, n_cells)
            turned = model.rope(g, config, heads, positions, parts.weights.rope_factors)
            g.copy(g.reshape_2d(turned, rows.shape[0], n_cells), rows)
        allocator = GraphAllocator(parts.backend)
        g.reserve(allocator)
        g.lay_out(allocator)
        port = HostPort(parts.backend, positions, np.ascontiguousarray(moves[:n_cells], np.int32))
        port.upload()
        g.compute()
        allocator.close()
