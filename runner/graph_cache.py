"""Keeps the graphs of recent batch shapes; all share one piece of compute memory."""

from collections import OrderedDict
from contextlib import ExitStack, closing
from dataclasses import replace

from quant.ggml import GraphAllocator
from runner.batch_graph import BatchGraph
from runner.device_state import BatchShape, EngineParts
from runner.expert_passes import ExpertPasses
from runner.token_graph import TokenGraph

_MAX_GRAPHS = 12  # the decode graph of every context block in use and a few prompt sizes


class GraphCache:
    """Builds a graph at first use of its shape; the least recently used shape goes first."""

    def __init__(self, parts: EngineParts, largest: BatchShape) -> None:
        self._parts = parts
        self._graphs: OrderedDict[BatchShape, BatchGraph] = OrderedDict()
        with ExitStack() as owned:
            self._allocator = owned.enter_context(GraphAllocator(parts.backend))
            self._reserve(largest)
            self.passes = ExpertPasses(parts, largest.n_tokens, self._allocator)
            owned.callback(self.passes.close)
            owned.callback(self._drop_all)
            self._owned = owned.pop_all()

    def get(self, shape: BatchShape) -> BatchGraph:
        """The graph of this shape, ready to run."""
        graph = self._graphs.get(shape)
        if graph is None:
            graph = self._add(shape)
        self._graphs.move_to_end(shape)
        return graph

    @property
    def n_bytes(self) -> int:
        """Memory for values within graphs."""
        return self._allocator.n_bytes

    def close(self) -> None:
        self._owned.close()

    def _reserve(self, largest: BatchShape) -> None:
        """Make the memory large enough for all graphs but the passes."""
        parts = self._parts
        with closing(BatchGraph(parts, largest)) as graph:
            graph.reserve(self._allocator)
            if not parts.backend.is_host:
                graph.check_support()
                self._check_single_token(largest)
        if parts.config.is_moe:
            is_restricted = parts.residency is not None
            with closing(TokenGraph(parts, largest.n_kv, is_restricted)) as token_graph:
                token_graph.reserve(self._allocator)

    def _check_single_token(self, largest: BatchShape) -> None:
        """What a device can compute depends on shapes too: a prompt's are not a token's."""
        with closing(BatchGraph(self._parts, replace(largest, n_tokens=1))) as graph:
            graph.check_support()
        if self._parts.config.is_moe:
            with closing(TokenGraph(self._parts, largest.n_kv, is_restricted=False)) as whole:
                whole.check_support()

    def _add(self, shape: BatchShape) -> BatchGraph:
        while len(self._graphs) >= _MAX_GRAPHS:
            self._graphs.popitem(last=False)[1].close()
        with ExitStack() as undo:
            graph = BatchGraph(self._parts, shape)
            undo.callback(graph.close)
            before = self._allocator.n_bytes
            try:
                graph.reserve(self._allocator)
            finally:
                if self._allocator.n_bytes != before:
                    self._drop_all()  # the memory moved or is gone: their addresses are void
                    self.passes.drop_all()
            graph.lay_out(self._allocator)
            undo.pop_all()
        self._graphs[shape] = graph
        return graph

    def _drop_all(self) -> None:
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
