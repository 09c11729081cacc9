"""Computes pairs of a batch apart from the graphs of the layers: by slots, or on the host.

Where a layer's experts are not all resident at once, they run one pass after the other. Experts
outside the slots can be computed by the CPU where the file is mapped; beside a device with memory
of its own that happens while the device computes.
"""

import time
from contextlib import ExitStack

import numpy as np

from quant.ggml import Context, GraphAllocator
from quant.ggml_types import GGML_TYPES_BY_NAME
from quant.graph import HostPort
from runner.device_state import EngineParts, PassTensors
from runner.expert_pass import Numbers, PassSet

_F32 = GGML_TYPES_BY_NAME["F32"].id


class ExpertPasses:
    """The passes over the slots, and those over the mapped file."""

    def __init__(self, parts: EngineParts, n_batch: int, allocator: GraphAllocator) -> None:
        """Reserve memory for a pass of all pairs of n_batch tokens, where passes are possible."""
        self._parts = parts
        self._host_memory: _HostMemory | None = None
        self.compute_ns = 0  # spent here, since the model was loaded
        tensors, config = parts.state.passes, parts.config
        mapped = tuple(layer.experts for layer in parts.weights.layers)
        self._by_slots = PassSet(parts.backend, config, tensors, parts.slabs, allocator)
        if not parts.state.has_passes:
            self._by_host = PassSet(parts.host, config, tensors, mapped, allocator)
            return
        self._by_slots.reserve(n_batch)
        if not parts.backend.is_host:
            self._host_memory = memory = _HostMemory(parts, n_batch)
            tensors, allocator = memory.tensors, memory.allocator
        self._by_host = PassSet(parts.host, config, tensors, mapped, allocator)
        if self._host_memory is not None:
            with ExitStack() as undo:
                undo.callback(self._host_memory.close)
                self._by_host.reserve(n_batch)
                undo.pop_all()

    @property
    def has_device(self) -> bool:
        """Whether the slots are on a device beside the CPU, so that both can compute at once."""
        return self._host_memory is not None

    def has_host(self, layer: int) -> bool:
        """Whether the layer's experts can be computed where they are mapped."""
        return self._by_host.has(layer)

    def run(self, layer: int, on_host: bool, pairs: Numbers, slots: Numbers, n_tokens: int) -> int:
        """Compute pairs by the layer's slots, or by the experts where they are mapped.

        Shapes as in `PassSet.run`; on the host a slot is an expert; n_tokens are the batch's.
        Returns nanoseconds.
        """
        started = time.perf_counter_ns()
        if not on_host:
            self._by_slots.run(layer, pairs, slots, n_tokens)
        else:
            if self._host_memory is not None:
                self._host_memory.fetch(n_tokens)
            self._run_on_host(layer, pairs, slots, n_tokens)
        spent_ns = time.perf_counter_ns() - started
        self.compute_ns += spent_ns
        return spent_ns

    def run_beside(
        self,
        layer: int,
        pairs: Numbers,
        slots: Numbers,
        host_pairs: Numbers,
        experts: Numbers,
        n_tokens: int,
    ) -> int:
        """Compute some pairs by slots on the device while the host computes others by `experts`.

        Only with a device. Returns the host's nanoseconds.
        """
        assert self._host_memory is not None
        started = time.perf_counter_ns()
        host_ns = 0

        def compute_on_host() -> None:
            nonlocal host_ns
            host_started = time.perf_counter_ns()
            self._run_on_host(layer, host_pairs, experts, n_tokens)
            host_ns = time.perf_counter_ns() - host_started

        self._host_memory.fetch(n_tokens)
        self._by_slots.run(layer, pairs, slots, n_tokens, compute_on_host)
        self.compute_ns += time.perf_counter_ns() - started
        return host_ns

    def _run_on_host(self, layer: int, pairs: Numbers, experts: Numbers, n_tokens: int) -> None:
        self._by_host.run(layer, pairs, experts, n_tokens)
        if self._host_memory is not None:
            self._host_memory.deliver(pairs)

    def close(self) -> None:
        self.drop_all()
        self._by_host.drop_all()
        if self._host_memory is not None:
            self._host_memory.close()

    def drop_all(self) -> None:
        """Forget what was laid out in the allocator's memory."""
        self._by_slots.drop_all()
        if self._host_memory is None:  # else the host's passes have an allocator of their own
            self._by_host.drop_all()


class _HostMemory:
    """What the host's passes read and write, beside a device that has its own."""

    def __init__(self, parts: EngineParts, n_batch: int) -> None:
        config, host = parts.config, parts.host
        self._parts = parts
        with ExitStack() as owned:
            context = owned.enter_context(Context(host.ggml, 8))
            ffn_input = context.tensor(_F32, config.n_embd, n_batch)
            n_pairs = config.n_expert_used * n_batch
            self.tensors = PassTensors(context, config, n_pairs, ffn_input)
            owned.enter_context(context.allocate(host))
            self.allocator = owned.enter_context(GraphAllocator(host))
            self._owned = owned.pop_all()
        row = (-1, config.n_embd)
        self._inputs = host.view(ffn_input).view(np.float32).reshape(row)
        outputs = host.view(self.tensors.outputs).view(np.float32).reshape(row)
        self._outputs = HostPort(parts.backend, parts.state.passes.outputs, outputs)

    def close(self) -> None:
        self._owned.close()

    def fetch(self, n_tokens: int) -> None:
        """Bring the experts' inputs of the routed layer here; one token's came with its ids."""
        if n_tokens == 1 and self._parts.readback is not None:
            self._inputs[:1] = self._parts.readback.ffn_input
        else:
            self._parts.backend.read(self._parts.state.ffn_input, self._inputs[:n_tokens])

    def deliver(self, pairs: Numbers) -> None:
        """Put the outputs of these pairs, in ascending order, among those of the device."""
        first, last = int(pairs[0]), int(pairs[-1])
        if last - first + 1 == len(pairs):  # one token's nearly always are, so without numpy
            self._deliver_run(first, last)
            return
        for run in np.split(pairs, np.flatnonzero(np.diff(pairs) != 1) + 1):
            self._deliver_run(int(run[0]), int(run[-1]))

    def _deliver_run(self, first: int, last: int) -> None:
        """Pairs that lie side by side."""
        n_bytes = self._outputs.array.strides[0]  # of one pair
        self._outputs.upload_part(first * n_bytes, (last + 1 - first) * n_bytes)
