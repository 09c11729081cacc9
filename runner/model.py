"""The `llama` architecture (Mixtral, and dense Llama) as pieces of a graph. Holds no state.

Shapes are in ggml's order. Each function adds its operations to `g`; the residual stream lives in
memory of its own between the pieces, and every piece adds to it in place.
"""

from dataclasses import dataclass

from quant.ggml import Tensor
from quant.graph import Graph
from runner.model_config import ModelConfig, RopeConfig
from runner.residency import LayerResidency
from runner.weights import ExpertSlabs, LayerWeights, Weights

_ROPE_NORM = 0  # rotates neighbouring pairs; the files' q and k are permuted for it
_SMALLEST_WEIGHT_SUM = 6.103515625e-5  # the smallest float16; keeps the division finite


@dataclass(frozen=True)
class BatchTensors:
    """One batch's inputs, as views of the device state."""

    tokens: Tensor  # (n_tokens) int32
    positions: Tensor  # (n_tokens) int32
    cells: Tensor  # (n_tokens) int64, where K and V are stored
    mask: Tensor  # (n_kv, n_tokens) float16
    last_token: Tensor  # (1) int32, the token whose logits are wanted
    residual: Tensor  # (n_embd, n_tokens) float32


@dataclass(frozen=True)
class RouterTensors:
    """What leaves the router; views of the device state."""

    ffn_input: Tensor  # (n_embd, n) float32, the normalised input of the experts
    expert_ids: Tensor  # (n_expert_used, n) int32
    weights: Tensor  # (n_expert_used, n) float32
    scores: Tensor  # (n_expert, n) float32


def embed(g: Graph, weights: Weights, batch: BatchTensors) -> Tensor:
    """tokens -> residual (n_embd, n_tokens)."""
    return g.copy(g.get_rows(weights.token_embd, batch.tokens), batch.residual)


def attention(
    g: Graph, config: ModelConfig, weights: Weights, layer: int, k: Tensor, v: Tensor,
    batch: BatchTensors, residual: Tensor, is_last_only: bool,
) -> Tensor:  # fmt: skip
    """residual += attention(norm(residual)), or only its last token; k, v: this layer's cache."""
    w = weights.layers[layer]
    n_tokens = residual.shape[1]
    x = g.rms_norm(residual, w.attn_norm, config.norm_rms_eps)
    head, n_head, n_head_kv = config.n_embd_head, config.n_head, config.n_head_kv
    q_heads = g.reshape_3d(_linear(g, w.attn_q, x, w.attn_q_bias), head, n_head, n_tokens)
    k_heads = g.reshape_3d(_linear(g, w.attn_k, x, w.attn_k_bias), head, n_head_kv, n_tokens)
    v_rows = _linear(g, w.attn_v, x, w.attn_v_bias)
    q_heads = rope(g, config.rope, q_heads, batch.positions, weights.rope_factors)
    k_heads = rope(g, config.rope, k_heads, batch.positions, weights.rope_factors)
    k_rows = g.reshape_2d(k_heads, head * n_head_kv, n_tokens)
    g.expand(g.set_rows(k, k_rows, batch.cells))
    g.expand(g.set_rows(v, v_rows, batch.cells))
    n_kv = batch.mask.shape[0]
    out = g.flash_attention(
        g.permute(q_heads, (0, 2, 1, 3)),
        _heads_of_cache(g, k, head, n_head_kv, n_kv),
        _heads_of_cache(g, v, head, n_head_kv, n_kv),
        batch.mask,
        config.attention_scale,
    )
    out = g.reshape_2d(out, head * n_head, n_tokens)
    out = _linear(g, w.attn_output, out, w.attn_output_bias)
    if is_last_only:
        return _add_last_only(g, out, residual, batch.last_token)
    return g.expand(g.add_inplace(residual, out))


def rope(
    g: Graph, config: RopeConfig, heads: Tensor, positions: Tensor, factors: Tensor | None
) -> Tensor:
    """Rotary position embedding of heads (n_embd_head, n_head, n_tokens)."""
    return g.rope(
        heads, positions, factors,
        (config.n_rot, _ROPE_NORM, config.n_ctx_orig, config.freq_base, config.freq_scale,
         config.ext_factor, config.attn_factor, config.beta_fast, config.beta_slow),
    )  # fmt: skip


def route(
    g: Graph, config: ModelConfig, w: LayerWeights, residual: Tensor, out: RouterTensors
) -> None:
    """Router: softmax over all experts, top-k, weights of the chosen normalised to sum 1.

    The order of operations is llama.cpp's, so that its rounding is too.
    """
    assert w.ffn_gate_inp is not None
    n, k = residual.shape[1], config.n_expert_used
    x = g.rms_norm(residual, w.ffn_norm, config.norm_rms_eps)
    g.copy(x, out.ffn_input)
    logits = g.mul_mat(w.ffn_gate_inp, x)
    g.copy(logits, out.scores)
    probabilities = g.soft_max(logits)
    ids = g.top_k(probabilities, k)
    normalised = _weights_of(g, config, probabilities, ids, n)
    g.copy(ids, out.expert_ids)
    g.copy(normalised, out.weights)


def _weights_of(
    g: Graph, config: ModelConfig, probabilities: Tensor, ids: Tensor, n: int
) -> Tensor:
    """The probabilities of the chosen experts, normalised to sum 1: (n_expert_used, n)."""
    chosen = g.get_rows(g.reshape_3d(probabilities, 1, config.n_expert, n), ids)  # (1, k, n)
    chosen = g.reshape_2d(chosen, config.n_expert_used, n)
    total = g.clamp(g.sum_rows(chosen), _SMALLEST_WEIGHT_SUM, float("inf"))
    return g.div(chosen, total)


def route_to_residents(
    g: Graph, config: ModelConfig, here: LayerResidency, out: RouterTensors
) -> tuple[Tensor, Tensor]:
    """The router restricted to residents, after `route` has written its scores to `here`.

    Returns slot ids (n_expert_used, 1) and weights, in memory of `out`: the best residents by
    score, weighed by the softmax over them.
    """
    k = config.n_expert_used
    probabilities = g.soft_max(g.add(here.scores, here.mask))
    ids = g.top_k(probabilities, k)
    slots = g.reshape_2d(g.get_rows(here.slot_of, ids), k, 1)
    weights = _weights_of(g, config, probabilities, ids, 1)
    return g.copy(slots, out.expert_ids), g.copy(weights, out.weights)


def predict_route(
    g: Graph, config: ModelConfig, following: LayerWeights, residual: Tensor, out: Tensor
) -> None:
    """The experts that the following layer would choose if it saw this layer's input.

    A guess, made early enough to read ahead: the residual stream changes little from one layer to
    the next. Writes expert ids (n_expert_used, n), best first, to `out`.
    """
    assert following.ffn_gate_inp is not None
    x = g.rms_norm(residual, following.ffn_norm, config.norm_rms_eps)
    g.copy(g.top_k(g.mul_mat(following.ffn_gate_inp, x), config.n_expert_used), out)


def experts(
    g: Graph, slabs: ExpertSlabs, ffn_input: Tensor, slot_ids: Tensor, weights: Tensor,
    residual: Tensor,
) -> Tensor:  # fmt: skip
    """residual += sum over k of weights[k] * expert in slot_ids[k]; slot_ids, weights (k, n)."""
    return sum_of_experts(g, expert_outputs(g, slabs, ffn_input, slot_ids), weights, residual)


def expert_outputs(g: Graph, slabs: ExpertSlabs, ffn_input: Tensor, slot_ids: Tensor) -> Tensor:
    """Each pair computed by its expert: ffn_input (n_embd, n), slot_ids (k, n) -> (n_embd, k, n).

    A pair's value does not depend on the slot, but ggml may choose the kernel by how many pairs of
    a call share one; so all pairs that an expert has in a batch belong into the same call.
    """
    n_embd, n = ffn_input.shape[:2]
    x = g.reshape_3d(ffn_input, n_embd, 1, n)
    up = g.mul_mat_id(slabs.ffn_up_exps, x, slot_ids)  # (n_ff_exp, k, n)
    gate = g.mul_mat_id(slabs.ffn_gate_exps, x, slot_ids)
    return g.mul_mat_id(slabs.ffn_down_exps, g.swiglu(gate, up), slot_ids)


def sum_of_experts(g: Graph, outputs: Tensor, weights: Tensor, residual: Tensor) -> Tensor:
    """residual += sum over k of weights[k] * outputs[k]; outputs (n_embd, k, n), weights (k, n)."""
    n_embd, k, n = outputs.shape[:3]
    weighted = g.expand(g.mul(outputs, g.reshape_3d(weights, 1, k, n)))
    row, matrix = weighted.strides[1], weighted.strides[2]
    parts = [g.view_2d(weighted, n_embd, n, matrix, i * row) for i in range(k)]
    total = parts[0]
    for part in parts[1:]:
        total = g.add(total, part)
    return g.expand(g.add_inplace(residual, total))


def dense_ffn(g: Graph, config: ModelConfig, w: LayerWeights, residual: Tensor) -> Tensor:
    """residual += the feed-forward network of a layer without experts."""
    assert w.ffn_gate is not None and w.ffn_up is not None and w.ffn_down is not None
    x = g.rms_norm(residual, w.ffn_norm, config.norm_rms_eps)
    up = _linear(g, w.ffn_up, x, w.ffn_up_bias)
    gate = _linear(g, w.ffn_gate, x, w.ffn_gate_bias)
    down = _linear(g, w.ffn_down, g.swiglu(gate, up), w.ffn_down_bias)
    return g.expand(g.add_inplace(residual, down))


def head(g: Graph, config: ModelConfig, weights: Weights, residual: Tensor) -> Tensor:
    """residual (n_embd, n) -> logits (n_vocab, n)."""
    x = g.rms_norm(residual, weights.output_norm, config.norm_rms_eps)
    return g.mul_mat(weights.output, x)


def _linear(g: Graph, weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    y = g.mul_mat(weight, x)
    return g.add(y, bias) if bias is not None else y


def _heads_of_cache(g: Graph, cache: Tensor, head: int, n_head: int, n_kv: int) -> Tensor:
    """Rows of all heads (head * n_head, n_cells) -> (head, n_kv, n_head), without a copy."""
    row_bytes = cache.strides[1]
    heads = g.view_3d(cache, (head, n_head, n_kv), (row_bytes // n_head, row_bytes))
    return g.permute(heads, (0, 2, 1, 3))


def _add_last_only(g: Graph, out: Tensor, residual: Tensor, last_token: Tensor) -> Tensor:
    """Only one token goes on; it moves to the front."""
    last = g.add(g.get_rows(out, last_token), g.get_rows(residual, last_token))
    return g.copy(last, g.first_rows(residual, 1))
