"""The `llama` architecture once more in numpy float32, for what llama.cpp does not do."""

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

from tests.random_model import RandomModel

Served = tuple[np.ndarray, np.ndarray]
"""who computes each token's pairs in a layer, and with what weights: (n_tokens, n) both."""


def numpy_logits(
    path: Path,
    m: RandomModel,
    tokens: list[int],
    sliding_window: int = 0,
    serving: Sequence[Served] | None = None,
) -> np.ndarray:
    """Logits (n_tokens, n_vocab) of an F32 file with experts, which the router chooses unless
    `serving` says who computes."""
    w = {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}
    x = w["token_embd.weight"][tokens]
    for layer in range(m.n_layer):
        p = f"blk.{layer}."
        normed = _norm(x, w[p + "attn_norm.weight"])
        x = x + _attention(w, p, m, normed, sliding_window)
        served = serving[layer] if serving is not None else None
        x = x + _experts(w, p, m, _norm(x, w[p + "ffn_norm.weight"]), served)
    return _norm(x, w["output_norm.weight"]) @ w["output.weight"].T


def _norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-5) * weight


def _attention(
    w: dict[str, np.ndarray], p: str, m: RandomModel, x: np.ndarray, sliding_window: int
) -> np.ndarray:
    n, group = len(x), m.n_head // m.n_head_kv
    q = _rope((x @ w[p + "attn_q.weight"].T).reshape(n, m.n_head, m.head))
    k = _rope((x @ w[p + "attn_k.weight"].T).reshape(n, m.n_head_kv, m.head))
    v = (x @ w[p + "attn_v.weight"].T).reshape(n, m.n_head_kv, m.head)
    scores = np.einsum("ihd,jhd->hij", q, np.repeat(k, group, axis=1)) / np.sqrt(m.head)
    back = np.arange(n)[:, None] - np.arange(n)
    hidden = (back < 0) | ((back >= sliding_window) if sliding_window else False)
    scores = np.where(hidden, -np.inf, scores)
    probabilities = _softmax(scores)
    out = np.einsum("hij,jhd->ihd", probabilities, np.repeat(v, group, axis=1))
    return out.reshape(n, -1) @ w[p + "attn_output.weight"].T


def _rope(heads: np.ndarray) -> np.ndarray:
    n, _, size = heads.shape
    angles = np.arange(n)[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
    turn = np.exp(1j * angles)[:, None, :]
    pairs = (heads[..., 0::2] + 1j * heads[..., 1::2]) * turn
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(heads.shape).astype(np.float32)


def _route(w: dict[str, np.ndarray], p: str, m: RandomModel, x: np.ndarray) -> Served:
    probabilities = _softmax(x @ w[p + "ffn_gate_inp.weight"].T)
    chosen = np.argsort(-probabilities, axis=1)[:, : m.n_expert_used]
    weights = np.take_along_axis(probabilities, chosen, axis=1)
    return chosen, weights / weights.sum(axis=1, keepdims=True)


def _experts(
    w: dict[str, np.ndarray], p: str, m: RandomModel, x: np.ndarray, served: Served | None = None
) -> np.ndarray:
    experts, weights = served if served is not None else _route(w, p, m, x)
    out = np.zeros_like(x)
    for i, row in enumerate(x):
        for expert, weight in zip(experts[i], weights[i], strict=True):
            gate = w[p + "ffn_gate_exps.weight"][expert] @ row
            up = w[p + "ffn_up_exps.weight"][expert] @ row
            hidden = gate / (1 + np.exp(-gate)) * up
            out[i] += weight * (w[p + "ffn_down_exps.weight"][expert] @ hidden)
    return out


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)
