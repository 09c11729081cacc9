"""Device memory that passes between the graphs of a batch, and what every graph is built from.

Knows no graph's order and no policy.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np

from quant.ggml import Backend, Context, Tensor
from quant.ggml_types import GGML_TYPES_BY_NAME
from quant.graph import Graph
from runner.kv_cache import KVCache, padded_context
from runner.model import BatchTensors, RouterTensors
from runner.model_config import ModelConfig
from runner.readback import Readback
from runner.residency import Residency
from runner.weights import ExpertSlabs, Weights

_F32 = GGML_TYPES_BY_NAME["F32"].id
_F16 = GGML_TYPES_BY_NAME["F16"].id
_I32 = GGML_TYPES_BY_NAME["I32"].id
_ROW = 64  # numbers; Vulkan's devices want at most 256 bytes
_I64 = GGML_TYPES_BY_NAME["I64"].id


@dataclass(frozen=True)
class BatchShape:
    """What decides a graph; batches of equal shape reuse it."""

    n_tokens: int
    n_kv: int  # visible cells of the KV cache
    is_trace: bool = False  # every layer routes every token, and no logits are made


class PassTensors:
    """What passes over experts (`ExpertPass`) read and write; n_pairs is the most of one pass."""

    def __init__(
        self, context: Context, config: ModelConfig, n_pairs: int, ffn_input: Tensor
    ) -> None:
        self.ffn_input = ffn_input  # (n_embd, n_batch) float32
        self.tokens = context.tensor(_I32, n_pairs)
        self.slots = context.tensor(_I32, 1, n_pairs)
        self.pairs = context.tensor(_I64, n_pairs)
        self.outputs = context.tensor(_F32, config.n_embd, n_pairs)


class DeviceState:
    """Inputs, routing and the residual stream: one allocation for the largest batch.

    The router writes expert ids where the experts read slot ids, so a host that changes nothing
    has nothing to send back.
    """

    def __init__(
        self, backend: Backend, config: ModelConfig, n_batch: int, n_ctx: int, has_passes: bool
    ) -> None:
        """has_passes: experts of a layer may be computed one after the other (`ExpertPass`)."""
        self.has_passes = has_passes
        context = Context(backend.ggml, 24)
        pairs, scores = max(1, config.n_expert_used), max(1, config.n_expert)
        self.tokens = context.tensor(_I32, n_batch)
        self.positions = context.tensor(_I32, n_batch)
        self.cells = context.tensor(_I64, n_batch)
        self.mask = context.tensor(_F16, padded_context(n_ctx), n_batch)
        self.last_token = context.tensor(_I32, 1)
        self.residual = context.tensor(_F32, config.n_embd, n_batch)
        self.ffn_input = context.tensor(_F32, config.n_embd, n_batch)
        self.slot_ids = context.tensor(_I32, pairs, n_batch)
        self.weights = context.tensor(_F32, pairs, n_batch)
        self.scores = context.tensor(_F32, scores, n_batch)
        self.chosen = context.tensor(_I32, _padded_row(pairs), config.n_layer)  # of a whole token
        self.predicted_ids = context.tensor(_I32, pairs, 1)
        self.logits = context.tensor(_F32, config.n_vocab)
        n_pairs = pairs * n_batch if has_passes else 1
        self.passes = PassTensors(context, config, n_pairs, self.ffn_input)
        with ExitStack() as owned:
            owned.callback(context.close)
            self._buffer = owned.enter_context(context.allocate(backend))
            self._owned = owned.pop_all()
        self._host_mask = np.empty(n_batch * padded_context(n_ctx), np.float16)

    @property
    def n_bytes(self) -> int:
        return self._buffer.n_bytes

    def close(self) -> None:
        self._owned.close()

    def host_mask(self, shape: BatchShape) -> np.ndarray:
        """Host memory for the mask (n_tokens, n_kv); all batch shapes share it."""
        n_tokens, n_kv = shape.n_tokens, shape.n_kv
        return self._host_mask[: n_tokens * n_kv].reshape(n_tokens, n_kv)

    def batch(self, g: Graph, shape: BatchShape) -> BatchTensors:
        """Views of the inputs for one batch shape."""
        n = shape.n_tokens
        return BatchTensors(
            tokens=g.matrix(self.tokens, n, 1),
            positions=g.matrix(self.positions, n, 1),
            cells=g.matrix(self.cells, n, 1),
            mask=g.matrix(self.mask, shape.n_kv, n),
            last_token=self.last_token,
            residual=g.first_rows(self.residual, n),
        )

    def router(self, g: Graph, n: int) -> RouterTensors:
        """Views for the routing of n tokens."""
        return RouterTensors(
            ffn_input=g.first_rows(self.ffn_input, n),
            expert_ids=g.first_rows(self.slot_ids, n),
            weights=g.first_rows(self.weights, n),
            scores=g.first_rows(self.scores, n),
        )

    def lone_router(self, g: Graph, layer: int) -> RouterTensors:
        """The same of one token, whose expert ids stay when the next layer is routed."""
        row_bytes = self.chosen.strides[1]
        ids = g.view_2d(self.chosen, self.slot_ids.shape[0], 1, row_bytes, layer * row_bytes)
        return replace(self.router(g, 1), expert_ids=ids)


def _padded_row(n: int) -> int:
    """At least n numbers of 4 bytes, so that every row begins where a device lets a view begin."""
    return -(-n // _ROW) * _ROW


@dataclass(frozen=True)
class EngineParts:
    """What every graph of a model is built from."""

    backend: Backend
    host: Backend  # the CPU; `backend` itself where there is no other device
    config: ModelConfig
    weights: Weights
    slabs: tuple[ExpertSlabs | None, ...]  # per layer, what slot ids count in; None = dense layer
    kv: KVCache
    state: DeviceState
    residency: Residency | None = None  # where the host need not be asked who computes what
    readback: Readback | None = None  # on a device whose experts may be missing
    predicts: bool = False  # decoding predicts the next layer's experts, to read ahead
