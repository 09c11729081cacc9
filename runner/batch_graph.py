"""The graphs that compute one batch size.

A graph spans the experts of MoE layer L-1, then attention and router of layer L; there the host
reads the routing back and decides. When the experts of a layer were computed one after the other,
by `ExpertPass`, the graph begins with the sum of their outputs instead. A dense layer is a graph of
its own and needs no decision.
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from quant.ggml import GraphAllocator, Tensor
from quant.graph import Graph, HostPort
from runner import model
from runner.device_state import BatchShape, EngineParts
from runner.model import BatchTensors
from runner.readback import Readback
from runner.token_graph import TokenGraph

_NODES_PER_LAYER = 64  # attention, router and experts together have fewer, sums over experts apart


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
        self._predicts = parts.predicts and shape.n_tokens == 1
        n_graphs = parts.config.n_layer + (not shape.is_trace)  # a trace ends with a router
        self._graphs = [self._build(index, False) for index in range(n_graphs)]
        self._after_passes: dict[int, Graph] = {}  # by index, for layers computed in passes
        self._is_after_passes = False  # the experts of the routed layer were computed in passes
        self._whole: dict[bool, TokenGraph] = {}  # all layers at once, by `is_restricted`
        self._is_whole_done = False
        self._chosen_port: HostPort | None = None
        self.compute_ns = 0  # time inside ggml since the last `begin`
        self._make_ports()

    def close(self) -> None:
        for graph in (*self._graphs, *self._after_passes.values()):
            graph.close()
        for whole in self._whole.values():
            whole.close()

    def reserve(self, allocator: GraphAllocator) -> None:
        for graph in self._graphs:
            graph.reserve(allocator)

    def check_support(self) -> None:
        """Raise BackendError that names what the device cannot compute."""
        for graph in self._graphs:
            graph.check_support()

    def lay_out(self, allocator: GraphAllocator) -> None:
        """Place the values of all graphs; `allocator` serves graphs that are built later too."""
        self._allocator = allocator
        for graph in self._graphs:
            graph.lay_out(allocator)

    # running

    def begin(self, tokens: np.ndarray, first_position: int, cells: np.ndarray) -> None:
        """Upload one batch; tokens (n_tokens,), cells (n_tokens,) where K and V go."""
        self._tokens.array[:] = tokens
        self._positions.array[:] = np.arange(first_position, first_position + self.shape.n_tokens)
        self._cells.array[:] = cells
        self._parts.kv.cells.fill_mask(self._mask.array, first_position)
        for port in (self._positions, self._cells, self._mask, self._last_token):
            port.upload()
        embedding = self._parts.weights.embedding
        if embedding is None:
            self._tokens.upload()
        else:
            embedding.read(tokens, self._residual.array)
            self._residual.upload()
        self.compute_ns = 0
        self._is_after_passes = False
        self._is_whole_done = False

    def run_whole(self, is_restricted: bool) -> None:
        """Run all layers of a single token at once; `finish` then has nothing left to run.

        Every expert must be resident in the slot of its number, or else is_restricted: the router
        chooses among residents, which `EngineParts.residency` must know.
        """
        assert self.shape.n_tokens == 1 and not self.shape.is_trace
        graph = self._whole.get(is_restricted)
        if graph is None:
            graph = TokenGraph(self._parts, self.shape.n_kv, is_restricted)
            with ExitStack() as undo:
                undo.callback(graph.close)
                graph.lay_out(self._allocator)
                undo.pop_all()
            self._whole[is_restricted] = graph
        start = time.perf_counter_ns()
        graph.compute()
        self.compute_ns += time.perf_counter_ns() - start
        self._is_whole_done = True

    def chosen(self) -> np.ndarray:
        """What the free router of `run_whole` chose, (n_layer, n_expert_used) int32."""
        if self._chosen_port is None:
            chosen = self._parts.state.chosen
            self._chosen_port = self._port(chosen, (chosen.shape[1], chosen.shape[0]), np.int32)
        return self._chosen_port.download()[:, : self._parts.config.n_expert_used]

    def route(self, layer: int) -> np.ndarray:
        """Run up to and including the router of `layer`.

        Returns expert ids (n, n_expert_used) int32, best first; the next call overwrites them.
        """
        self._routing = self._routing_ports[self._narrows_at(layer)]
        readback = self._parts.readback
        if readback is None or len(self._routing.slot_ids.array) > 1:
            self._compute(layer)
            return self._routing.slot_ids.download()
        self._compute(layer, readback)
        return readback.expert_ids

    def router_weights(self) -> np.ndarray:
        """The weights of the experts that `route` returned, (n, n_expert_used) float32."""
        return self._routing.weights.download()

    def router_scores(self) -> np.ndarray:
        """The router's logits for every expert, (n, n_expert) float32."""
        return self._routing.scores.download()

    def ffn_input(self) -> np.ndarray:
        """What the experts of the routed layer get, (n, n_embd) float32."""
        return self._rows_of(self._parts.state.ffn_input)

    def residual(self) -> np.ndarray:
        """The residual stream between the routed layer's attention and its experts, likewise."""
        return self._rows_of(self._parts.state.residual)

    def _rows_of(self, tensor: Tensor) -> np.ndarray:
        n, n_embd = len(self._routing.slot_ids.array), self._parts.config.n_embd
        return self._port(tensor, (n, n_embd), np.float32).download()

    def has_prediction(self, layer: int) -> bool:
        """Whether routing `layer` also predicts what the next one will choose."""
        return self._predicts and layer + 1 < self._parts.config.n_layer

    def predicted_experts(self) -> list[int]:
        """What the layer behind the routed one will probably choose, best first."""
        ids: list[int] = self._predicted.download().tolist()
        return ids

    def apply(self, slot_ids: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Say which slots compute the experts of the routed layer; they run with the next graph.

        slot_ids (n, n_expert_used) int32; weights as many float32, None = the router's.
        """
        port = self._routing.slot_ids
        if slot_ids is not port.array:
            port.array[:] = slot_ids
            port.upload()
        self._replace_weights(weights)

    def apply_passes(self, weights: np.ndarray | None = None) -> None:
        """Say that every pair of the routed layer was computed, by `ExpertPass`."""
        self._is_after_passes = True
        self._replace_weights(weights)

    def _replace_weights(self, weights: np.ndarray | None) -> None:
        if weights is not None:
            port = self._routing.weights
            port.array[:] = weights
            port.upload()

    def pass_dense(self, layer: int) -> None:
        """Run a layer without experts."""
        self._compute(layer)

    def finish(self) -> np.ndarray:
        """Run the rest; returns the last token's logits (n_vocab,), until the next run."""
        if not self._is_whole_done:
            self._compute(len(self._graphs) - 1)
        return self._logits_port.download()

    def _compute(self, index: int, readback: Readback | None = None) -> None:
        """Run a graph to its end, and what is read back behind it."""
        graph = self._graphs[index]
        if self._is_after_passes:
            graph = self._graph_after_passes(index)
            self._is_after_passes = False
        start = time.perf_counter_ns()
        if readback is None:
            graph.compute()
        else:
            try:
                graph.start()
                readback.start()
            finally:
                self._parts.backend.synchronize()
        self.compute_ns += time.perf_counter_ns() - start

    # building

    def _graph_after_passes(self, index: int) -> Graph:
        """The graph that begins with a sum; built when it is first needed."""
        graph = self._after_passes.get(index)
        if graph is None:
            with ExitStack() as undo:
                graph = undo.enter_context(self._build(index, is_after_passes=True))
                graph.lay_out_within(self._allocator)
                undo.pop_all()
            self._after_passes[index] = graph
        return graph

    def _build(self, index: int, is_after_passes: bool) -> Graph:
        """The graph up to the router of layer `index`, or the one behind the last layer."""
        config, weights, state = self._parts.config, self._parts.weights, self._parts.state
        n_for_experts = 2 * config.n_expert_used  # a view and a sum for each
        g = Graph(self._parts.backend, _NODES_PER_LAYER + n_for_experts)
        if index == config.n_layer:
            residual = self._after_layer(g, index - 1, 1, is_after_passes)
            g.copy(model.head(g, config, weights, residual), state.logits)
            return g
        batch = state.batch(g, self.shape)
        if index == 0:
            residual = self._embed(g, batch)
        else:
            residual = self._after_layer(g, index - 1, self.shape.n_tokens, is_after_passes)
        residual = self._attention(g, index, batch, residual)
        if config.is_moe:
            router = state.router(g, residual.shape[1])
            model.route(g, config, weights.layers[index], residual, router)
            if self.has_prediction(index):
                following = weights.layers[index + 1]
                model.predict_route(g, config, following, residual, state.predicted_ids)
        else:
            model.dense_ffn(g, config, weights.layers[index], residual)
        return g

    def _embed(self, g: Graph, batch: BatchTensors) -> Tensor:
        """On a device of its own the host has uploaded the tokens' rows already."""
        if self._parts.weights.embedding is not None:
            return batch.residual
        return model.embed(g, self._parts.weights, batch)

    def _after_layer(self, g: Graph, layer: int, n: int, is_after_passes: bool) -> Tensor:
        """The residual of n tokens behind `layer`, whose experts have yet to run if it has any."""
        state, slabs = self._parts.state, self._parts.slabs[layer]
        residual = g.first_rows(state.residual, n)
        if slabs is None:
            return residual
        weights = g.first_rows(state.weights, n)
        if is_after_passes:
            k = self._parts.config.n_expert_used
            n_embd = self._parts.config.n_embd
            outputs = g.reshape_3d(g.first_rows(state.passes.outputs, k * n), n_embd, k, n)
            return model.sum_of_experts(g, outputs, weights, residual)
        inputs, slot_ids = g.first_rows(state.ffn_input, n), g.first_rows(state.slot_ids, n)
        return model.experts(g, slabs, inputs, slot_ids, weights, residual)

    def _attention(self, g: Graph, layer: int, batch: BatchTensors, residual: Tensor) -> Tensor:
        kv = self._parts.kv
        return model.attention(
            g, self._parts.config, self._parts.weights, layer, kv.k[layer], kv.v[layer], batch,
            residual, self._narrows_at(layer),
        )  # fmt: skip

    def _narrows_at(self, layer: int) -> bool:
        """Whether only the last token goes on behind the attention of `layer`."""
        return layer == self._parts.config.n_layer - 1 and not self.shape.is_trace

    # the host's side

    def _make_ports(self) -> None:
        state, n = self._parts.state, self.shape.n_tokens
        self._tokens = self._port(state.tokens, (n,), np.int32)
        self._positions = self._port(state.positions, (n,), np.int32)
        self._cells = self._port(state.cells, (n,), np.int64)
        self._mask = HostPort(self._parts.backend, state.mask, state.host_mask(self.shape))
        self._last_token = self._port(state.last_token, (1,), np.int32)
        self._last_token.array[0] = n - 1
        self._residual = self._port(state.residual, (n, self._parts.config.n_embd), np.float32)
        self._logits_port = self._port(state.logits, (self._parts.config.n_vocab,), np.float32)
        self._predicted = self._port(
            state.predicted_ids, (self._parts.config.n_expert_used,), np.int32
        )
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
