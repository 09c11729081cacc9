"""What the host needs of a routed token, brought back behind the graph: who computes it, and what
those experts get.

A copy that the host waits for is a round trip of its own on a device. These follow the graph in its
queue, so that one wait is for all. Knows no graph and no policy.
"""

from contextlib import ExitStack

import numpy as np

from quant.ggml import Backend, PinnedMemory, Tensor
from quant.graph import HostPort

_N_BYTES = 4  # of an id, and of a number of the input


class Readback:
    """Pinned memory of the host for the routing of one token, and the copies into it."""

    def __init__(self, backend: Backend, expert_ids: Tensor, ffn_input: Tensor) -> None:
        """expert_ids (n_expert_used, n) int32, ffn_input (n_embd, n) float32, in ggml's order: of
        both the first row is copied. Raises OutOfMemoryError."""
        n_expert_used, n_embd = expert_ids.shape[0], ffn_input.shape[0]
        with ExitStack() as owned:
            memory = PinnedMemory(backend, _N_BYTES * (n_embd + n_expert_used))
            owned.callback(memory.close)
            memory.array[:] = 0
            start_of_ids = _N_BYTES * n_embd
            self.ffn_input = memory.array[:start_of_ids].view(np.float32)[None]  # (1, n_embd)
            self.expert_ids = memory.array[start_of_ids:].view(np.int32)[None]  # (1, n_expert_used)
            self._ids_port = HostPort(backend, expert_ids, self.expert_ids)
            self._input_port = HostPort(backend, ffn_input, self.ffn_input)
            self._owned = owned.pop_all()

    def close(self) -> None:
        """The arrays must not be used any more."""
        self._owned.close()

    def start(self) -> None:
        """Copy what the graph in the queue writes; the arrays have it when `Backend.synchronize`
        returns, until the next `start`."""
        self._ids_port.download_later()
        self._input_port.download_later()
