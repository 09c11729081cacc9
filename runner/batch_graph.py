"""The graphs that compute one batch size, and the device memory that passes between them.

A graph spans the experts of MoE layer L-1, then attention and router of layer L; there the host
reads the routing back and decides. A dense layer is a graph of its own and needs no decision.
"""

import time
from dataclasses import dataclass

import numpy as np

from quant.ggml import Backend, Context, GraphAllocator, Tensor
from quant.ggml_types import GGML_TYPES_BY_NAME
from quant.graph import Graph, HostPort
from runner import model
from runner.kv_cache import KVCache, padded_context
from runner.miss_policy import RoutingPlan
from runner.model import BatchTensors, RouterTensors
from runner.model_config import ModelConfig
from runner.weights import Weights

_F32 = GGML_TYPES_BY_NAME["F32"].id
_F16 = GGML_TYPES_BY_NAME["F16"].id
_I32 = GGML_TYPES_BY_NAME["I32"].id
_I64 = GGML_TYPES_BY_NAME["I64"].id

_NODES_PER_LAYER = 64  # attention, router and experts together have fewer, sums over experts apart


@dataclass(frozen=True)
class BatchShape:
    """What decides a graph; batches of equal shape reuse it."""

    n_tokens: int
    n_kv: int  # visible cells of the KV cache


class DeviceState:
    """Inputs, routing and the residual stream: one allocation for the largest batch.

    The router writes expert ids where the experts read slot ids, so a host that changes nothing
    has nothing to send back.
    """

    def __init__(self, backend: Backend, config: ModelConfig, n_batch: int, n_ctx: int) -> None:
        self._context = context = Context(backend.ggml, 16)
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
        self._buffer = context.allocate(backend)
        self._host_mask = np.empty(n_batch * padded_context(n_ctx), np.float16)

    def close(self) -> None:
        self._buffer.close()
        self._context.close()

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


@dataclass(frozen=True)
class EngineParts:
    """What every graph of a model is built from."""

    backend: Backend
    config: ModelConfig
    weights: Weights
    kv: KVCache
    state: DeviceState


@dataclass(frozen=True)
class _RoutingPorts:
    slot_ids: HostPort
    weights: HostPort
    scores: HostPort


class BatchGraph:
    """All graphs of one batch shape, in the order in which they run."""

    def __init__(self, parts: EngineParts, shape: BatchShape) -> None:
        self.shape = shape
        self._parts = parts
        self._graphs: list[Graph] = []
        self.compute_ns = 0  # time inside ggml since the last `begin`
        self._logits = self._build()
        self._make_ports()

    def close(self) -> None:
        for graph in self._graphs:
            graph.close()

    def reserve(self, allocator: GraphAllocator) -> None:
        for graph in self._graphs:
            graph.reserve(allocator)

    def lay_out(self, allocator: GraphAllocator) -> None:
        for graph in self._graphs:
            graph.lay_out(allocator)

    # running

    def begin(self, tokens: np.ndarray, first_position: int, cells: np.ndarray) -> None:
        """Upload one batch; tokens (n_tokens,), cells (n_tokens,) where K and V go."""
        self._tokens.array[:] = tokens
        self._positions.array[:] = np.arange(first_position, first_position + self.shape.n_tokens)
        self._cells.array[:] = cells
        self._parts.kv.cells.fill_mask(self._mask.array, first_position)
        for port in (self._tokens, self._positions, self._cells, self._mask, self._last_token):
            port.upload()
        self.compute_ns = 0

    def route(self, layer: int) -> np.ndarray:
        """Run up to and including the router of `layer`.

        Returns expert ids (n, n_expert_used) int32, best first; the next call overwrites them.
        """
        self._compute(layer)
        self._routing = self._routing_ports[layer == self._parts.config.n_layer - 1]
        return self._routing.slot_ids.download()

    def router_weights(self) -> np.ndarray:
        """The weights of the experts that `route` returned, (n, n_expert_used) float32."""
        return self._routing.weights.download()

    def router_scores(self) -> np.ndarray:
        """The router's logits for every expert, (n, n_expert) float32."""
        return self._routing.scores.download()

    def apply(self, plan: RoutingPlan) -> None:
        """Say which slots compute the experts of the routed layer; they run with the next graph."""
        port = self._routing.slot_ids
        if plan.slot_ids is not port.array:
            port.array[:] = plan.slot_ids
            port.upload()

    def pass_dense(self, layer: int) -> None:
        """Run a layer without experts."""
        self._compute(layer)

    def finish(self) -> np.ndarray:
        """Run the rest; returns the last token's logits (n_vocab,), until the next run."""
        self._compute(len(self._graphs) - 1)
        return self._logits_port.download()

    def _compute(self, index: int) -> None:
        start = time.perf_counter_ns()
        self._graphs[index].compute()
        self.compute_ns += time.perf_counter_ns() - start

    # building

    def _build(self) -> Tensor:
        """One graph per layer and one for what follows the last; returns the logits."""
        config, weights = self._parts.config, self._parts.weights
        for layer in range(config.n_layer):
            g = self._new_graph()
            batch = self._parts.state.batch(g, self.shape)
            residual = self._start_of(g, layer, batch)
            residual = self._attention(g, layer, batch, residual)
            if config.is_moe:
                router = self._parts.state.router(g, residual.shape[1])
                model.route(g, config, weights.layers[layer], residual, router)
            else:
                model.dense_ffn(g, config, weights.layers[layer], residual)
        g = self._new_graph()
        return model.head(g, config, weights, self._after_layer(g, config.n_layer - 1, 1))

    def _new_graph(self) -> Graph:
        n_for_experts = 2 * self._parts.config.n_expert_used  # a view and a sum for each
        graph = Graph(self._parts.backend, _NODES_PER_LAYER + n_for_experts)
        self._graphs.append(graph)
        return graph

    def _start_of(self, g: Graph, layer: int, batch: BatchTensors) -> Tensor:
        if layer == 0:
            return model.embed(g, self._parts.weights, batch)
        return self._after_layer(g, layer - 1, self.shape.n_tokens)

    def _after_layer(self, g: Graph, layer: int, n: int) -> Tensor:
        """The residual of n tokens behind `layer`, whose experts have yet to run if it has any."""
        state, slabs = self._parts.state, self._parts.weights.layers[layer].experts
        residual = g.first_rows(state.residual, n)
        if slabs is None:
            return residual
        return model.experts(
            g, slabs,
            g.first_rows(state.ffn_input, n),
            g.first_rows(state.slot_ids, n),
            g.first_rows(state.weights, n),
            residual,
        )  # fmt: skip

    def _attention(self, g: Graph, layer: int, batch: BatchTensors, residual: Tensor) -> Tensor:
        kv = self._parts.kv
        return model.attention(
            g, self._parts.config, self._parts.weights, layer, kv.k[layer], kv.v[layer], batch,
            residual,
        )  # fmt: skip

    # the host's side

    def _make_ports(self) -> None:
        state, n = self._parts.state, self.shape.n_tokens
        self._tokens = self._port(state.tokens, (n,), np.int32)
        self._positions = self._port(state.positions, (n,), np.int32)
        self._cells = self._port(state.cells, (n,), np.int64)
        self._mask = HostPort(self._parts.backend, state.mask, state.host_mask(self.shape))
        self._last_token = self._port(state.last_token, (1,), np.int32)
        self._last_token.array[0] = n - 1
        self._logits_port = self._port(self._logits, (self._parts.config.n_vocab,), np.float32)
        self._routing_ports = self._make_routing_ports()
        self._routing = self._routing_ports[0]

    def _make_routing_ports(self) -> tuple["_RoutingPorts", ...]:
        """Index 0 serves all layers but the last, where only one token goes on: index 1."""
        state, config = self._parts.state, self._parts.config
        k = config.n_expert_used
        return tuple(
            _RoutingPorts(
                slot_ids=self._port(state.slot_ids, (n, k), np.int32),
                weights=self._port(state.weights, (n, k), np.float32),
                scores=self._port(state.scores, (n, config.n_expert), np.float32),
            )
            for n in (self.shape.n_tokens, 1)
        )

    def _port(self, tensor: Tensor, shape: tuple[int, ...], kind: type[np.generic]) -> HostPort:
        return HostPort(self._parts.backend, tensor, np.zeros(shape, kind))
