"""The attention cache: which cell holds which position, and the device memory of K and V.

`KVCells` is pure bookkeeping; `KVCache` owns the tensors. A cell is a row of the tensors, a
position is a place in the text; they differ once a context shift has freed cells in the middle.
"""

from contextlib import ExitStack

import numpy as np

from quant.ggml import Backend, Context
from quant.ggml_types import GGMLType
from runner.model_config import ModelConfig

CELL_PADDING = 256  # attention sees whole blocks of cells, so one graph serves many tokens
FREE = np.iinfo(np.int32).max  # later than every position, so that no token looks there

_MINUS_INFINITY_F16 = np.uint16(0xFC00)


class KVCells:
    """Positions by cell. Shapes: `positions` (n_cells,) int32, FREE where nothing is stored."""

    def __init__(self, n_cells: int, sliding_window: int = 0) -> None:
        assert n_cells % CELL_PADDING == 0
        self.positions = np.full(n_cells, FREE, np.int32)
        self._sliding_window = sliding_window
        self._end = 0  # one past the last used cell

    @property
    def n_visible(self) -> int:
        """Cells that attention has to look at, in whole blocks."""
        return max(CELL_PADDING, -(-self._end // CELL_PADDING) * CELL_PADDING)

    @property
    def n_used(self) -> int:
        """Cells up to and including the last one in use."""
        return self._end

    def take(self, first_position: int, n: int) -> np.ndarray:
        """Claim n free cells for consecutive positions; returns their indices (n,) int64."""
        if self._end + n <= len(self.positions) and self._end == first_position:
            cells = np.arange(self._end, self._end + n)  # the usual case: nothing was shifted
        else:
            cells = np.flatnonzero(self.positions == FREE)[:n]
        assert len(cells) == n, "the caller checks that the context has room"
        self.positions[cells] = np.arange(first_position, first_position + n, dtype=np.int32)
        self._end = max(self._end, int(cells[-1]) + 1)
        return cells

    def cell_of(self, position: int) -> int:
        """The cell of a position that is stored."""
        return int(np.flatnonzero(self.positions == position)[0])

    def truncate(self, n_past: int) -> None:
        """Forget every position from n_past on."""
        self.positions[self.positions >= n_past] = FREE
        used = np.flatnonzero(self.positions != FREE)
        self._end = int(used[-1]) + 1 if len(used) else 0

    def shift(self, n_keep: int, n_discard: int) -> np.ndarray:
        """Drop positions [n_keep, n_keep + n_discard) and move the later ones down.

        Returns by how much each cell moved, (n_cells,) int32: 0 or -n_discard.
        """
        later = (self.positions >= n_keep + n_discard) & (self.positions != FREE)
        dropped = (self.positions >= n_keep) & ~later
        self.positions[dropped] = FREE
        moves = np.where(later, -n_discard, 0).astype(np.int32)
        self.positions += moves
        return moves

    def fill_mask(self, mask: np.ndarray, first_position: int) -> None:
        """Write 0 where a token may look and -inf where not; mask (n_tokens, n_visible) float16."""
        n_tokens, n_visible = mask.shape
        cells = self.positions[:n_visible]
        queries = np.arange(first_position, first_position + n_tokens, dtype=np.int32)[:, None]
        hidden = cells > queries
        if self._sliding_window:
            hidden |= queries - cells >= self._sliding_window
        np.multiply(hidden, _MINUS_INFINITY_F16, out=mask.view(np.uint16))


class KVCache:
    """K and V of every layer on one backend, and their bookkeeping in `cells`."""

    def __init__(
        self, backend: Backend, config: ModelConfig, n_ctx: int, type_k: GGMLType, type_v: GGMLType
    ) -> None:
        n_cells = padded_context(n_ctx)
        self.cells = KVCells(n_cells, config.sliding_window)
        self._backend = backend
        context = Context(backend.ggml, 2 * config.n_layer)
        row = config.n_embd_head * config.n_head_kv
        layers = range(config.n_layer)
        self.k = [context.tensor(type_k.id, row, n_cells) for _ in layers]
        self.v = [context.tensor(type_v.id, row, n_cells) for _ in layers]
        with ExitStack() as owned:
            owned.callback(context.close)
            self._buffer = owned.enter_context(context.allocate(backend))
            self._owned = owned.pop_all()
        self._n_cleared = 0

    @property
    def n_bytes(self) -> int:
        return self._buffer.n_bytes

    def close(self) -> None:
        self._owned.close()

    def truncate(self, n_past: int) -> None:
        """Forget every position from n_past on, and zero its cells before they are seen again."""
        self.cells.truncate(n_past)
        self._n_cleared = min(self._n_cleared, self.cells.n_used)

    def clear_visible(self) -> None:
        """Zero cells when they come into view: masked or not, a NaN left there would spread.

        Memory that no token has reached stays untouched, and so unused.
        """
        n_visible = self.cells.n_visible
        if n_visible <= self._n_cleared:
            return
        for tensor in (*self.k, *self.v):
            row_bytes = tensor.strides[1]
            n_rows = n_visible - self._n_cleared
            self._backend.clear(tensor, self._n_cleared * row_bytes, n_rows * row_bytes)
        self._n_cleared = n_visible

    def read_cell(self, cell: int) -> np.ndarray:
        """What a cell holds of K and V in all layers, (n_bytes,) uint8."""
        rows = [np.empty(tensor.strides[1], np.uint8) for tensor in (*self.k, *self.v)]
        for tensor, row in zip((*self.k, *self.v), rows, strict=True):
            self._backend.read(tensor, row, cell * row.nbytes)
        return np.concatenate(rows)

    def write_cell(self, cell: int, rows: np.ndarray) -> None:
        """Put back what `read_cell` returned."""
        start = 0
        for tensor in (*self.k, *self.v):
            row_bytes = tensor.strides[1]
            self._backend.write(tensor, rows[start : start + row_bytes], cell * row_bytes)
            start += row_bytes


def padded_context(n_ctx: int) -> int:
    """n_ctx rounded up to whole blocks of cells."""
    return -(-n_ctx // CELL_PADDING) * CELL_PADDING
