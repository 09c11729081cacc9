"""What happens when the context is full and the user allows its oldest part to go.

The keys of the tokens that stay are rotated to their new positions; nothing is recomputed.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from quant.ggml import Backend, Context, GraphAllocator, Tensor
from quant.ggml_types import GGML_TYPES_BY_NAME
from quant.graph import Graph, HostPort
from runner import model
from runner.device_state import EngineParts
from runner.model_config import RopeConfig

_F32 = GGML_TYPES_BY_NAME["F32"].id
_I32 = GGML_TYPES_BY_NAME["I32"].id


def without_oldest(tokens: list[int], n_ctx: int, n_keep: int) -> list[int]:
    """A prompt cut to fit: its first n_keep tokens and its end, in steps of half the context."""
    block = max(1, (n_ctx - n_keep) // 2)
    n_blocks = -(-(len(tokens) - n_ctx + 1) // block)
    return tokens[:n_keep] + tokens[n_keep + n_blocks * block :]


def rotate_keys(parts: EngineParts, moves: np.ndarray) -> None:
    """Turn every cached key by how far its position moved; moves (n_cells,) int32.

    The keys of a device come to the host for it and go back: this is rare, and a graph that is made
    for one run corrupted memory of ggml's Vulkan backend.
    """
    factors, device, host = parts.weights.rope_factors, parts.backend, parts.host
    if device.is_host:
        _rotate(host, parts, parts.kv.k, factors, moves)
        return
    n_cells = parts.kv.cells.n_visible
    with Context(host.ggml, len(parts.kv.k) + 1) as context:
        copies = [context.tensor(k.type, k.shape[0], n_cells) for k in parts.kv.k]
        own_factors = context.tensor(_F32, factors.shape[0]) if factors is not None else None
        with context.allocate(host):
            for k, copy in zip(parts.kv.k, copies, strict=True):
                device.read(k, host.view(copy))
            if factors is not None and own_factors is not None:
                device.read(factors, host.view(own_factors))
            _rotate(host, parts, copies, own_factors, moves)
            for k, copy in zip(parts.kv.k, copies, strict=True):
                device.write(k, host.view(copy))


def _rotate(
    backend: Backend,
    parts: EngineParts,
    keys: Sequence[Tensor],
    factors: Tensor | None,
    moves: np.ndarray,
) -> None:
    n_cells, config = parts.kv.cells.n_visible, parts.config
    turn = _pure_rotation(config.rope)
    with Graph(backend, 8 * config.n_layer) as g, GraphAllocator(backend) as allocator:
        positions = g.input(_I32, n_cells)
        for k in keys:
            rows = g.first_rows(k, n_cells)
            heads = g.reshape_3d(g.cast(rows, _F32), config.n_embd_head, config.n_head_kv, n_cells)
            turned = model.rope(g, turn, heads, positions, factors)
            g.copy(g.reshape_2d(turned, rows.shape[0], n_cells), rows)
        g.reserve(allocator)
        g.lay_out(allocator)
        HostPort(backend, positions, moves[:n_cells].copy()).upload()
        g.compute()


def _pure_rotation(rope: RopeConfig) -> RopeConfig:
    """The same rotation without its scale, which the cached keys have already.

    ggml multiplies by attn_factor and, with an ext_factor, by 1 + 0.1 ln(1 / freq_scale).
    """
    scale = 1 + 0.1 * math.log(1 / rope.freq_scale) if rope.ext_factor else 1.0
    return replace(rope, attn_factor=1 / scale)
