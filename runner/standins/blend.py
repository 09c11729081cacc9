"""Blends what is missing from what is there: a stand-in and an expert of the token's own.

The experts of a layer have much in common, so the output of a missing one is best approximated by
some of the token's heaviest kept expert and some of a stand-in. How much of each minimises the
mean squared error over the calibration text; the harm that is left decides which pairs are given
away. Knows no budget's history and no file.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from runner.standins.affordable import affordable_ranks, binding, has_missing
from runner.standins.routing import Choice, Gate, Routing
from runner.standins.substitution import exact

NOBODY = -1  # in the place of the kept expert: all of the token's pairs are given away
_SMALLEST = 1e-5  # of a determinant, relative: below it float32 cannot tell two experts apart


@dataclass(frozen=True)
class BlendRow:
    """How every expert b would stand in for a missing one beside one kept expert; lists by b."""

    harm: list[float]  # squared error that is left of the missing output, part of the residual's
    kept_part: list[float]  # of the missing pair's weight, added to the kept expert's
    buddy_part: list[float]  # of it, given to b


@dataclass(frozen=True)
class LayerBlend:
    """What the blends of one layer are made from."""

    gram: np.ndarray  # (n_expert, n_expert): mean products of the experts' outputs
    power: float  # mean square of the residual stream behind the layer, of a whole vector
    _rows: dict[tuple[int, int], BlendRow] = field(default_factory=dict, compare=False)

    def row(self, missing: int, kept: int) -> BlendRow:
        """For this missing expert beside this kept one, or NOBODY; made when first asked for."""
        row = self._rows.get((missing, kept))
        if row is None:
            row = self._rows[missing, kept] = self._make(missing, kept)
        return row

    def _make(self, e: int, o: int) -> BlendRow:
        """The normal equations of f_e ~ x f_o + y f_b, for every b at once."""
        g = self.gram.astype(np.float64)
        bb, eb, nothing = np.diag(g), g[e], np.zeros(len(g))
        oo, ob, oe = (g[o, o], g[o], g[o, e]) if o != NOBODY else (0.0, nothing, 0.0)
        if oo == 0.0:  # what puts out nothing is orthogonal to everything
            oo, ob, oe = 1.0, nothing, 0.0
        determinant = oo * bb - ob * ob
        is_apart = determinant > _SMALLEST * oo * bb
        y = np.divide(oo * eb - ob * oe, determinant, out=nothing.copy(), where=is_apart)
        x = (oe - y * ob) / oo
        left = g[e, e] - x * oe - y * eb
        harm = np.maximum(left, 0.0) / self.power
        return BlendRow(harm.tolist(), x.tolist(), y.tolist())


def blend(routing: Routing, gate: Gate, layer: LayerBlend, max_harm: float) -> Choice:
    """A pair of weight w goes to the resident, unselected expert whose blend leaves the least harm.

    Given away only if w * w * harm is at most max_harm. The stand-in gets a part of w, and so does
    the token's heaviest expert that is kept; the other weights stay as they are and nothing is
    renormalised. Ties: the lower index.
    """
    if not has_missing(routing):
        return exact(routing)
    if len(routing.expert_ids) == 1:
        return _blend_one(routing, gate, layer, max_harm)
    experts, weights = routing.expert_ids.copy(), routing.weights.copy()
    bounds = None if gate.allowance is None else binding(gate.allowance)
    spent = 0.0
    is_missing = ~routing.is_resident[routing.expert_ids]
    for token in np.flatnonzero(is_missing[:, gate.min_rank - 1 :].any(axis=1)).tolist():
        row = slice(token, token + 1)
        own = replace(
            routing, expert_ids=experts[row], weights=weights[row], scores=routing.scores[row]
        )
        left = None if bounds is None else bounds[row] - spent
        choice = _blend_one(own, replace(gate, allowance=left), layer, max_harm)
        if choice.experts is not own.expert_ids:
            spent += float(own.weights[choice.experts != own.expert_ids].sum(dtype=np.float64))
            experts[row], weights[row] = choice.experts, choice.weights
    return Choice(experts, weights)


def _blend_one(routing: Routing, gate: Gate, layer: LayerBlend, max_harm: float) -> Choice:
    ranks = affordable_ranks(routing, gate)
    if not ranks:
        return exact(routing)
    experts, weights = routing.expert_ids[0].tolist(), routing.weights[0].tolist()
    kept_rank = next((rank for rank in range(len(experts)) if rank not in ranks), NOBODY)
    kept = experts[kept_rank] if kept_rank != NOBODY else NOBODY
    resident = np.flatnonzero(routing.is_resident).tolist()
    free = [expert for expert in resident if expert not in experts]
    is_changed = False
    for rank in ranks:
        if not free:
            break
        row, weight = layer.row(experts[rank], kept), weights[rank]
        buddy = min(free, key=row.harm.__getitem__)
        if weight * weight * row.harm[buddy] > max_harm:
            continue
        free.remove(buddy)
        experts[rank], weights[rank] = buddy, weight * row.buddy_part[buddy]
        if kept_rank != NOBODY:
            weights[kept_rank] += weight * row.kept_part[buddy]
        is_changed = True
    if not is_changed:
        return exact(routing)
    return Choice(np.array([experts], np.int32), np.array([weights], np.float32))
