"""One token through all layers in a single graph, for when nothing has to be asked of the host.

That is so when every expert is resident, or when the router is restricted to residents: then the
place of each expert comes from a table on the device. What the router would have chosen freely is
kept for whoever counts.
"""

from quant.ggml import GraphAllocator, Tensor
from quant.graph import Graph
from runner import model
from runner.device_state import BatchShape, EngineParts
from runner.model import RouterTensors

_NODES_PER_LAYER = 80  # sums over experts apart


class TokenGraph:
    """All layers of one token that sees n_kv cells of the context."""

    def __init__(self, parts: EngineParts, n_kv: int, is_restricted: bool) -> None:
        """is_restricted: the router chooses among residents only, by `parts.residency`."""
        config, state = parts.config, parts.state
        self._parts = parts
        self._is_restricted = is_restricted
        n_nodes = (_NODES_PER_LAYER + 2 * config.n_expert_used) * (config.n_layer + 1)
        self._graph = g = Graph(parts.backend, n_nodes)
        batch = state.batch(g, BatchShape(1, n_kv))
        residual = batch.residual
        if parts.weights.embedding is None:
            residual = model.embed(g, parts.weights, batch)
        for layer in range(config.n_layer):
            k, v = parts.kv.k[layer], parts.kv.v[layer]
            residual = model.attention(
                g, config, parts.weights, layer, k, v, batch, residual, is_last_only=False
            )
            residual = self._experts(g, layer, residual)
        g.copy(model.head(g, config, parts.weights, residual), state.logits)

    def close(self) -> None:
        self._graph.close()

    def reserve(self, allocator: GraphAllocator) -> None:
        self._graph.reserve(allocator)

    def check_support(self) -> None:
        """Raise BackendError when the device cannot compute it."""
        self._graph.check_support()

    def lay_out(self, allocator: GraphAllocator) -> None:
        self._graph.lay_out_within(allocator)

    def compute(self) -> None:
        """Run to the end; inputs and logits are where the graphs of layers have them."""
        self._graph.compute()

    def _experts(self, g: Graph, layer: int, residual: Tensor) -> Tensor:
        """Router and experts of one layer."""
        config, weights = self._parts.config, self._parts.weights.layers[layer]
        slabs = self._parts.slabs[layer]
        assert slabs is not None, "only for models with experts"
        if not self._is_restricted:
            router = self._parts.state.lone_router(g, layer)
            model.route(g, config, weights, residual, router)
            slots, shares = router.expert_ids, router.weights
        else:
            assert self._parts.residency is not None
            router = self._parts.state.router(g, 1)
            here = self._parts.residency.of_layer(g, layer)
            kept = RouterTensors(router.ffn_input, here.expert_ids, here.weights, here.scores)
            model.route(g, config, weights, residual, kept)
            slots, shares = model.route_to_residents(g, config, here, router)
        return model.experts(g, slabs, router.ffn_input, slots, shares, residual)
