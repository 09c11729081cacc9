"""Reads a model's shape from its metadata, and checks all of it. Runs nothing.

Which keys count, their types and defaults are llama.cpp's for the architecture `llama`.
"""

import math

from quant.ggml_types import file_type_name, guessed_file_type_name
from quant.gguf_file import GGUFFile
from runner.checks.model_keys import ModelKeys, as_f32, shown
from runner.checks.model_tensors import check_norms, check_tensors
from runner.checks.tokenizer_checks import check_tokenizer
from runner.errors import ModelError
from runner.model_config import ModelConfig, RopeConfig

SUPPORTED_ARCHITECTURES = ("llama",)
MAX_LAYERS = 512  # llama.cpp's own limits
MAX_EXPERTS = 1024
MAX_VOCAB = 1 << 19
MAX_EMBD = 1 << 18  # several times the widest model there is
ROPE_SCALING_TYPES = ("none", "linear", "yarn", "longrope")

# Keys of other architectures; llama.cpp reads none of them for `llama`, and neither do we.
_IGNORED_KEYS = (
    "attention.scale",
    "expert_weights_scale",
    "expert_gating_func",
    "rope.scaling.yarn_log_multiplier",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
)


def read_model(file: GGUFFile) -> ModelConfig:
    """Read the shape, then check every tensor, the norms' values and the tokenizer.

    Raises ModelError for a model that cannot be run, GGUFError for a file that vanishes.
    """
    config = read_shape(file)
    check_norms(file, config)
    return config


def read_shape(file: GGUFFile) -> ModelConfig:
    """The same from the header alone, without the norms' values: for files that are far away."""
    keys = ModelKeys(file)
    config = _read_config(keys, file, _architecture(keys))
    check_tensors(file, config)
    check_tokenizer(file, config.n_vocab)
    return config


def _architecture(keys: ModelKeys) -> str:
    name = keys.text("general.architecture")
    if name not in SUPPORTED_ARCHITECTURES:
        raise keys.error(
            "general.architecture",
            shown(name),
            "'llama', with experts (Mixtral and its kin) or without (Llama, Mistral)",
        )
    return name


def _read_config(keys: ModelKeys, file: GGUFFile, architecture: str) -> ModelConfig:
    p = architecture + "."
    n_layer = keys.unsigned(p + "block_count", 1, MAX_LAYERS)
    n_embd = keys.unsigned(p + "embedding_length", 1, MAX_EMBD)
    n_ctx_train = keys.unsigned(p + "context_length", 1)
    n_ff = keys.uniform(p + "feed_forward_length", n_layer, 1, 2**31 - 1)
    n_head, n_head_kv = _read_heads(keys, p, n_layer)
    n_embd_head = _read_head_size(keys, p, n_embd, n_head)
    n_expert, n_expert_used = _read_experts(keys, p, n_layer)
    _refuse_unsupported(keys, p)
    return ModelConfig(
        architecture=architecture,
        name=keys.text("general.name", default=""),
        n_vocab=_read_vocab_size(file),
        n_ctx_train=n_ctx_train,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        n_head_kv=n_head_kv,
        n_embd_head=n_embd_head,
        n_ff=n_ff,
        n_expert=n_expert,
        n_expert_used=n_expert_used,
        n_ff_exp=n_ff if n_expert else 0,
        norm_rms_eps=keys.positive_float(p + "attention.layer_norm_rms_epsilon"),
        attention_scale=as_f32(1 / math.sqrt(n_embd_head)),
        rope=_read_rope(keys, p, n_embd_head, n_ctx_train),
        sliding_window=keys.unsigned(p + "attention.sliding_window", default=0),
        file_type=_file_type(keys, file),
        has_merged_experts="blk.0.ffn_down_exps.weight" in file.tensors,
        notes=_notes(keys, p),
    )


def _read_heads(keys: ModelKeys, p: str, n_layer: int) -> tuple[int, int]:
    n_head = keys.uniform(p + "attention.head_count", n_layer, 1, 1 << 16)
    key = p + "attention.head_count_kv"
    n_head_kv = keys.uniform(key, n_layer, 1, n_head, default=n_head)
    if n_head % n_head_kv:
        raise keys.error(key, str(n_head_kv), f"a divisor of the {n_head} attention heads")
    return n_head, n_head_kv


def _read_head_size(keys: ModelKeys, p: str, n_embd: int, n_head: int) -> int:
    key_length, value_length = p + "attention.key_length", p + "attention.value_length"
    if key_length not in keys and n_embd % n_head:
        expected = f"a multiple of the {n_head} attention heads"
        raise keys.error(p + "embedding_length", str(n_embd), expected)
    size = keys.unsigned(key_length, 1, 1 << 16, default=n_embd // n_head)
    if size % 2:
        raise keys.error(key_length, f"heads of {size} elements", "an even number")
    for key in (value_length, p + "rope.dimension_count"):
        default = n_embd // n_head if key == value_length else size
        if (other := keys.unsigned(key, default=default)) != size:
            raise keys.error(key, str(other), f"{size}, the length of an attention head")
    return size


def _read_experts(keys: ModelKeys, p: str, n_layer: int) -> tuple[int, int]:
    n_expert = keys.unsigned(p + "expert_count", 0, MAX_EXPERTS, default=0)
    key = p + "expert_used_count"
    n_used = keys.uniform(key, n_layer, 0, 2**31 - 1, default=0)
    if n_expert and not 1 <= n_used <= n_expert:
        raise keys.error(key, str(n_used), f"1 to {n_expert}, the number of experts")
    if not n_expert and n_used:
        raise keys.error(key, str(n_used), "0 in a model without experts")
    return n_expert, n_used


def _refuse_unsupported(keys: ModelKeys, p: str) -> None:
    for key, limit, what in (
        ("expert_group_count", 1, "groups of experts"),
        ("nextn_predict_layers", 0, "layers that predict further tokens"),
        ("expert_shared_count", 0, "experts shared by all tokens"),
    ):
        if (found := keys.unsigned(p + key, default=0)) > limit:
            raise keys.error(p + key, str(found), f"{limit} at most: {what} are not supported")
    if not keys.boolean(p + "attention.causal", default=True):
        raise keys.error(p + "attention.causal", "false", "a model that generates text")


def _read_rope(keys: ModelKeys, p: str, n_rot: int, n_ctx_train: int) -> RopeConfig:
    scaling_type = keys.text(p + "rope.scaling.type", default="linear")
    if scaling_type not in ROPE_SCALING_TYPES:
        expected = ", ".join(ROPE_SCALING_TYPES)
        raise keys.error(p + "rope.scaling.type", shown(scaling_type), expected)
    factor = _rope_factor(keys, p) if scaling_type != "none" else 1.0
    is_yarn = scaling_type == "yarn"
    attn_factor = keys.positive_float(p + "rope.scaling.attn_factor", default=1.0)
    if attn_factor > 1e6:
        raise keys.error(p + "rope.scaling.attn_factor", repr(attn_factor), "at most 1000000")
    n_ctx_orig = keys.unsigned(p + "rope.scaling.original_context_length", default=n_ctx_train)
    return RopeConfig(
        n_rot=n_rot,
        freq_base=keys.positive_float(p + "rope.freq_base", default=10000.0),
        freq_scale=as_f32(1 / factor),
        n_ctx_orig=n_ctx_orig or n_ctx_train,
        ext_factor=1.0 if is_yarn else 0.0,
        attn_factor=as_f32(attn_factor * (_yarn_attn_factor(factor) if is_yarn else 1.0)),
        beta_fast=32.0,
        beta_slow=1.0,
        scaling_type=scaling_type,
    )


def _rope_factor(keys: ModelKeys, p: str) -> float:
    """By how much the context was stretched; 0 in the file means not at all."""
    key = p + "rope.scaling.factor"
    if key not in keys:
        key = p + "rope.scale_linear"
    factor = keys.finite_float(key, default=0.0)
    if factor != 0 and not 1e-3 <= factor <= 1e6:
        raise keys.error(key, repr(factor), "0, or a factor from 0.001 to 1000000")
    return factor or 1.0


def _yarn_attn_factor(factor: float) -> float:
    """ggml multiplies by 1 + 0.1 ln(factor) itself, so llama.cpp divides that out beforehand."""
    scale = as_f32(1 / as_f32(1 / factor))
    magnitude = 1.0 if scale <= 1 else as_f32(0.1 * math.log(scale) + 1)
    return as_f32(magnitude * as_f32(1 / as_f32(1 + 0.1 * math.log(scale))))


def _read_vocab_size(file: GGUFFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        found = "no such tensor" if embedding is None else f"{len(embedding.shape)} dimensions"
        raise ModelError(
            f"{file.paths[0]}: tensor 'token_embd.weight': found {found}; expected 2 dimensions"
        )
    n_vocab = embedding.shape[1]
    if n_vocab > MAX_VOCAB:
        raise ModelError(
            f"{file.paths[0]}: tensor 'token_embd.weight': found {n_vocab} tokens; "
            f"expected at most {MAX_VOCAB}"
        )
    return n_vocab


def _file_type(keys: ModelKeys, file: GGUFFile) -> str:
    if "general.file_type" in keys:
        return file_type_name(keys.unsigned("general.file_type", high=2**32 - 1))
    counts: dict[int, int] = {}
    for tensor in file.tensors.values():
        counts[tensor.type.id] = counts.get(tensor.type.id, 0) + 1
    commonest = max(sorted(counts), key=lambda id: counts[id])
    return next(
        guessed_file_type_name(t.type) for t in file.tensors.values() if t.type.id == commonest
    )


def _notes(keys: ModelKeys, p: str) -> tuple[str, ...]:
    return tuple(
        f"The file declares {p}{key}; it is ignored, as llama.cpp does for this architecture."
        for key in _IGNORED_KEYS
        if p + key in keys
    )
