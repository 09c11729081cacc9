"""What a model takes besides its experts, from shapes alone. Allocates nothing.

Estimates are the high side of what ggml allocates: a budget that is too small costs some speed,
one that is too large costs the process.
"""

from dataclasses import dataclass

from runner.config import EngineConfig
from runner.model_config import ModelConfig
from runner.model_sizes import ModelSizes, kv_bytes_per_token

# Python, the libraries, the vocabulary, graphs, and what else the machine does meanwhile.
HEADROOM_BYTES = 96 << 20
HEADROOM_SHARE = 0.02  # of the available memory

_F32_BYTES = 4
_F16_BYTES = 2


@dataclass(frozen=True)
class OtherMemory:
    """Memory that is not for experts."""

    weights_bytes: int
    kv_bytes: int  # of the full context
    compute_bytes: int
    headroom_bytes: int

    @property
    def n_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.headroom_bytes


def other_memory(
    config: EngineConfig,
    model: ModelConfig,
    sizes: ModelSizes,
    n_ctx: int,
    n_batch: int,
    available: int | None,
) -> OtherMemory:
    """Memory for n_ctx tokens in batches of n_batch, on a machine with `available` bytes."""
    per_token = kv_bytes_per_token(model, config.cache_type_k, config.cache_type_v)
    staging_bytes = max(sizes.expert_bytes, default=0)  # an expert that is read ahead
    compute_bytes = graph_bytes(model, n_batch) + state_bytes(model, n_ctx, n_batch)
    return OtherMemory(
        weights_bytes=sizes.non_expert_bytes,
        kv_bytes=per_token * n_ctx,
        compute_bytes=compute_bytes + staging_bytes,
        headroom_bytes=HEADROOM_BYTES + int(HEADROOM_SHARE * (available or 0)),
    )


def device_memory(
    config: EngineConfig, model: ModelConfig, sizes: ModelSizes, n_ctx: int, n_batch: int
) -> OtherMemory:
    """Memory that a device beside the CPU needs besides the experts' slots.

    The token embedding stays on the host unless it is the output as well.
    """
    per_token = kv_bytes_per_token(model, config.cache_type_k, config.cache_type_v)
    compute_bytes = graph_bytes(model, n_batch) + state_bytes(model, n_ctx, n_batch)
    return OtherMemory(
        weights_bytes=sizes.non_expert_bytes - sizes.embedding_bytes,
        kv_bytes=per_token * n_ctx,
        compute_bytes=compute_bytes,
        headroom_bytes=config.fit_margin_bytes,
    )


def graph_bytes(model: ModelConfig, n_batch: int) -> int:
    """Intermediate values of the largest graph; they share memory from layer to layer."""
    attention = model.n_embd + 2 * model.n_embd_q + model.n_embd_kv
    router = 2 * model.n_embd + 4 * model.n_expert
    per_token = max(attention, router, _ffn_floats(model))
    head = 2 * model.n_embd + model.n_vocab  # one token's logits
    return _F32_BYTES * max(per_token * n_batch, head)


def state_bytes(model: ModelConfig, n_ctx: int, n_batch: int) -> int:
    """What passes between graphs, the mask on both sides, and inputs converted for a kernel."""
    n_pairs = max(1, model.n_expert_used)
    inputs = 4 + model.n_embd + model.n_expert  # token, position and cell; residual; scores
    experts = model.n_embd + n_pairs * (6 + model.n_embd)  # inputs; ids, weights and outputs
    mask = 2 * _F16_BYTES * n_ctx
    converted = _F16_BYTES * max(model.n_ff, model.n_ff_exp * n_pairs, model.n_embd_q)
    per_token = _F32_BYTES * (inputs + experts) + mask + converted
    return n_batch * per_token + _F32_BYTES * model.n_vocab


def _ffn_floats(model: ModelConfig) -> int:
    """Per token: up, gate, their product, and input or output; for each of a token's pairs."""
    if not model.is_moe:
        return 3 * model.n_ff + model.n_embd
    return (3 * model.n_ff_exp + model.n_embd) * model.n_expert_used
