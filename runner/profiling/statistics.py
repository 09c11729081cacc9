"""What recorded routing and expert outputs say of a layer: plain numpy. Knows no file."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runner.buddies import N_PERCENTILES
from runner.standins import buddymoe


@dataclass(frozen=True)
class LayerRecord:
    """What one layer did with the sampled tokens, exactly.

    `gram` allows to compute what any policy changes: if c (n_expert,) is the difference between
    the weights that the router gives the experts of a token t and those that a policy gives them,
    the layer's output changes by ||c F_t||^2 = c gram[t] c, with F_t the experts' outputs.
    """

    expert_ids: np.ndarray  # (n, n_expert_used) int32, best first
    weights: np.ndarray  # (n, n_expert_used) float32
    scores: np.ndarray  # (n, n_expert) float32, the router's logits
    gram: np.ndarray  # (n, n_expert, n_expert) float32, F_t F_t^T


def uses(expert_ids: np.ndarray, n_expert: int) -> np.ndarray:
    """How many tokens chose each expert: (n_expert,) int64."""
    return np.bincount(expert_ids.reshape(-1), minlength=n_expert)


def tae_percentiles(scores: np.ndarray, expert_ids: np.ndarray) -> np.ndarray:
    """The percentiles 0 to 100 of the tokens' activating entropy: (101,) float32, in [0, 1]."""
    entropy = buddymoe.tae(scores, expert_ids)
    values = np.percentile(entropy, np.linspace(0, 100, N_PERCENTILES)).astype(np.float32)
    return np.maximum.accumulate(np.clip(values, 0.0, 1.0))


def standing_in(record: LayerRecord) -> tuple[np.ndarray, np.ndarray]:
    """How well each expert b replaces each expert e on the tokens routed to e.

    Returns scale = <f_e, f_b> / <f_b, f_b> and error = ||f_e - scale f_b||^2 / ||f_e||^2 over all
    these tokens, both [e, b] (n_expert, n_expert) float32. Without tokens scale is 0 and error 1.
    """
    n_expert = record.gram.shape[1]
    scale, error = np.zeros((2, n_expert, n_expert))
    for expert in range(n_expert):
        is_routed = (record.expert_ids == expert).any(axis=1)
        products = record.gram[is_routed].sum(axis=0, dtype=np.float64)  # (n_expert, n_expert)
        with np.errstate(divide="ignore", invalid="ignore"):
            cross, squares = products[expert], products.diagonal()
            scale[expert] = np.where(squares == 0, 0.0, cross / squares)
            explained = scale[expert] * cross / squares[expert]
        error[expert] = 1.0 - np.where(squares[expert] == 0, 0.0, explained)
    np.fill_diagonal(scale, 1.0)
    np.fill_diagonal(error, 0.0)
    return scale.astype(np.float32), np.clip(error, 0.0, 1.0).astype(np.float32)


def mean_gram(record: LayerRecord) -> np.ndarray:
    """The mean of `gram` over the tokens, (n_expert, n_expert) float32.

    A token counts by the square of the smallest weight among its experts': its outputs matter as
    much as its last expert is likely to be given away.
    """
    counts = np.square(record.weights.min(axis=1), dtype=np.float64)
    counts /= counts.sum() or 1.0
    gram = np.einsum("t,tij->ij", counts, record.gram, dtype=np.float64)
    mean: np.ndarray = ((gram + gram.T) / 2).astype(np.float32)
    return mean


def power_behind(records: Sequence[LayerRecord], before: Sequence[float]) -> np.ndarray:
    """The mean squared norm of the residual stream behind each layer: (n_layer,) float32.

    before: the same in front of each layer's experts. Behind the last layer its experts' output is
    added, as if it pointed elsewhere.
    """
    last = records[-1]
    weights = np.zeros(last.scores.shape)
    np.put_along_axis(weights, last.expert_ids, last.weights, axis=1)
    output = np.einsum("ti,tij,tj->t", weights, last.gram, weights).mean()
    return np.array([*before[1:], before[-1] + output], np.float32)


def best_error(error: np.ndarray, used: np.ndarray) -> float:
    """The mean over the used experts of the error of their best buddy; error [e, b]."""
    others = error + 2.0 * np.eye(len(error))
    return float(others[used > 0].min(axis=1).mean())
