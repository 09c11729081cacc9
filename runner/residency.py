"""On the device: which experts are resident and where, and what each layer's router asked for.

With it a graph can restrict the router to residents and find their slots without the host.
"""

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from quant.ggml import Backend, Context, Tensor
from quant.ggml_types import GGML_TYPES_BY_NAME
from quant.graph import Graph, HostPort
from runner.model_config import ModelConfig

_F32 = GGML_TYPES_BY_NAME["F32"].id
_I32 = GGML_TYPES_BY_NAME["I32"].id


@dataclass(frozen=True)
class LayerResidency:
    """Views of one layer."""

    mask: Tensor  # (n_expert, 1) float32, 0 where resident, else -inf: added to the router's logits
    slot_of: Tensor  # (1, n_expert) int32, only residents' are looked up
    expert_ids: Tensor  # (n_expert_used, 1) int32, written: what the free router chooses
    weights: Tensor  # (n_expert_used, 1) float32, likewise
    scores: Tensor  # (n_expert, 1) float32, likewise


class Residency:
    """All layers' residents for graphs of one token, and their routing for the host."""

    def __init__(self, backend: Backend, config: ModelConfig) -> None:
        n_layer, n_expert, k = config.n_layer, config.n_expert, config.n_expert_used
        context = Context(backend.ggml, 5)
        self._mask = context.tensor(_F32, n_expert, n_layer)
        self._slot_of = context.tensor(_I32, n_expert, n_layer)
        self._ids = context.tensor(_I32, k, n_layer)
        self._weights = context.tensor(_F32, k, n_layer)
        self._scores = context.tensor(_F32, n_expert, n_layer)
        with ExitStack() as owned:
            owned.callback(context.close)
            owned.enter_context(context.allocate(backend))
            self._owned = owned.pop_all()
        self._is_current = False  # what the device has is what the ports' arrays say
        all_experts, chosen = (n_layer, n_expert), (n_layer, k)
        self._mask_port = HostPort(backend, self._mask, np.zeros(all_experts, np.float32))
        self._slots_port = HostPort(backend, self._slot_of, np.full(all_experts, -2, np.int32))
        self._ids_port = HostPort(backend, self._ids, np.zeros(chosen, np.int32))
        self._weights_port = HostPort(backend, self._weights, np.zeros(chosen, np.float32))
        self._scores_port = HostPort(backend, self._scores, np.zeros(all_experts, np.float32))

    def close(self) -> None:
        self._owned.close()

    def update(self, slot_of: np.ndarray) -> None:
        """Bring the device up to date; slot_of (n_layer, n_expert) int32, below 0 for missing."""
        if self._is_current and np.array_equal(slot_of, self._slots_port.array):
            return
        self._is_current = False
        self._slots_port.array[:] = slot_of
        self._mask_port.array[:] = np.where(slot_of < 0, -np.inf, 0.0)
        self._slots_port.upload()
        self._mask_port.upload()
        self._is_current = True

    def routed(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the free router chose: ids and weights (n_layer, n_expert_used), all scores
        (n_layer, n_expert); the next call overwrites them."""
        return (
            self._ids_port.download(),
            self._weights_port.download(),
            self._scores_port.download(),
        )

    def of_layer(self, g: Graph, layer: int) -> LayerResidency:
        """Views for a graph."""
        n_expert, k = self._mask.shape[0], self._ids.shape[0]
        return LayerResidency(
            mask=_row(g, self._mask, layer, n_expert),
            slot_of=g.view_2d(self._slot_of, 1, n_expert, 4, layer * n_expert * 4),
            expert_ids=_row(g, self._ids, layer, k),
            weights=_row(g, self._weights, layer, k),
            scores=_row(g, self._scores, layer, n_expert),
        )


def _row(g: Graph, a: Tensor, layer: int, n: int) -> Tensor:
    return g.view_2d(a, n, 1, a.strides[1], layer * a.strides[1])
