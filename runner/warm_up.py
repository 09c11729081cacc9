"""Computes once at load, for nobody, as llama.cpp does: the largest batch and a single token.

A device compiles or loads its kernels when they are first used, and ggml takes memory of its own
for them that no plan knows of. Both happen here instead of within the first answer.
"""

from collections.abc import Callable

import numpy as np

from runner.device_state import BatchShape, EngineParts
from runner.errors import CancelledError
from runner.graph_cache import GraphCache

_N_LAYERS = 2  # the first has the embedding before it, the second experts, as all others have


def warm_up(
    parts: EngineParts,
    graphs: GraphCache,
    n_batch: int,
    slot: int | None,
    report: Callable[[str, int, int], None],
    cancelled: Callable[[], bool],
) -> None:
    """Compute a batch of n_batch tokens and a single token, by two layers and the output's.

    slot: one of the first layer that holds an expert; None for a model without experts. The
    context is empty before and after it. Raises CancelledError, BackendError.
    """
    sizes = (n_batch, 1)
    for done, n_tokens in enumerate(sizes):
        if cancelled():
            raise CancelledError
        report(f"warming up {parts.backend.device.name}", done, len(sizes))
        try:
            cells = parts.kv.cells.take(0, n_tokens)
            parts.kv.clear_visible()
            _compute(parts, graphs, cells, slot)
        finally:
            parts.kv.truncate(0)
    report(f"warming up {parts.backend.device.name}", len(sizes), len(sizes))


def _compute(parts: EngineParts, graphs: GraphCache, cells: np.ndarray, slot: int | None) -> None:
    n_tokens = len(cells)
    graph = graphs.get(BatchShape(n_tokens, parts.kv.cells.n_visible))
    graph.begin(np.zeros(n_tokens, np.int32), 0, cells)
    for layer in range(min(_N_LAYERS, parts.config.n_layer)):
        if slot is None:
            graph.pass_dense(layer)
            continue
        slot_ids = np.full_like(graph.route(layer), slot)
        if n_tokens == 1 and layer == 0:  # as for a token of which nothing is missing
            graph.apply(slot_ids)
            continue
        pairs = np.arange(0, n_tokens * parts.config.n_expert_used, parts.config.n_expert_used)
        graphs.passes.run(0, False, pairs, np.full_like(pairs, slot), n_tokens)
        graph.apply_passes()
    graph.finish()
