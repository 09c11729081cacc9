"""What the router of one layer saw and did, copied for whoever studies it."""

from dataclasses import dataclass

import numpy as np

from runner.batch_graph import BatchGraph


@dataclass(frozen=True)
class LayerTrace:
    """What one layer's router saw and did with n tokens."""

    expert_ids: np.ndarray  # (n, n_expert_used) int32, best first
    weights: np.ndarray  # (n, n_expert_used) float32
    scores: np.ndarray  # (n, n_expert) float32, the router's logits
    ffn_input: np.ndarray  # (n, n_embd) float32, what the experts get
    residual_power: np.ndarray  # (n,) float32, square of the residual stream's norm there


def trace_of(graph: BatchGraph, expert_ids: np.ndarray) -> LayerTrace:
    """The layer that the graph has just routed; expert_ids as `route` returned them."""
    return LayerTrace(
        expert_ids.copy(),
        graph.router_weights().copy(),
        graph.router_scores().copy(),
        graph.ffn_input().copy(),
        np.square(graph.residual()).sum(axis=1),
    )
