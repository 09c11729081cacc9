"""Files with a sound header whose model, tokenizer or set of shards cannot be used."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.gguf_writer import (
    ARR,
    BOOL,
    F32,
    F64,
    I32,
    STR,
    TYPE_F32,
    U8,
    U16,
    U32,
    Array,
    Gguf,
    Tensor,
    small_mixtral,
    small_vocabulary,
    split_gguf,
    write_shards,
)
from tests.malformed_cases import Cases

_MIB = 1 << 20
_P = "llama."
_T = "tokenizer.ggml."

Shards = dict[int, Gguf]  # by number, a missing one left out


def add_model_cases(cases: Cases) -> None:
    _add_hparam_cases(cases)
    _add_expert_cases(cases)
    _add_weight_cases(cases)
    _add_tokenizer_cases(cases)
    _add_split_cases(cases)


def _without_key(key: str) -> Gguf:
    return small_mixtral().without_key(key)


def _without_tensor(name: str) -> Gguf:
    return small_mixtral().without_tensor(name)


def _add_hparam_cases(cases: Cases) -> None:
    for key in (
        "general.architecture",
        _P + "context_length",
        _P + "embedding_length",
        _P + "block_count",
        _P + "feed_forward_length",
        _P + "attention.head_count",
        _P + "attention.layer_norm_rms_epsilon",
        _P + "expert_used_count",
        _T + "model",
        _T + "tokens",
    ):
        cases.add(f"without_{key}", partial(_without_key, key))
    cases.add_key("architecture_unknown", "general.architecture", STR, "qwen9moe")
    cases.add_key("architecture_a_number", "general.architecture", U32, 7)
    cases.add_key("architecture_with_escapes", "general.architecture", STR, "\x1b[2J\x07\u202e")
    cases.add_key("block_count_0", _P + "block_count", U32, 0)
    cases.add_key("block_count_3", _P + "block_count", U32, 3)
    cases.add_key("block_count_1", _P + "block_count", U32, 1)
    cases.add_key("block_count_100000", _P + "block_count", U32, 100_000)
    cases.add_key("block_count_2_32_minus_1", _P + "block_count", U32, 2**32 - 1)
    cases.add_key("block_count_text", _P + "block_count", STR, "2")
    cases.add_key("block_count_float", _P + "block_count", F32, 2.0)
    cases.add_key("embedding_length_0", _P + "embedding_length", U32, 0)
    cases.add_key("embedding_length_2_25", _P + "embedding_length", U32, 2**25)
    cases.add_key("embedding_length_64", _P + "embedding_length", U32, 64)
    cases.add_key("embedding_length_not_divisible", _P + "embedding_length", U32, 33)
    cases.add_key("context_length_0", _P + "context_length", U32, 0)
    cases.add_key("context_length_i32", _P + "context_length", I32, 256)
    cases.add_key("feed_forward_length_0", _P + "feed_forward_length", U32, 0)
    cases.add_key("feed_forward_length_128", _P + "feed_forward_length", U32, 128)
    mixed, short = Array(U32, (64, 32)), Array(U32, (64,))
    cases.add_key("feed_forward_length_mixed", _P + "feed_forward_length", ARR, mixed)
    cases.add_key("feed_forward_length_too_few", _P + "feed_forward_length", ARR, short)
    cases.add_key("head_count_0", _P + "attention.head_count", U32, 0)
    cases.add_key("head_count_5", _P + "attention.head_count", U32, 5)
    cases.add_key("head_count_bool", _P + "attention.head_count", BOOL, 1)
    cases.add_key("head_count_kv_0", _P + "attention.head_count_kv", U32, 0)
    cases.add_key("head_count_kv_3", _P + "attention.head_count_kv", U32, 3)
    cases.add_key("head_count_kv_8", _P + "attention.head_count_kv", U32, 8)
    cases.add_key("key_length_odd", _P + "attention.key_length", U32, 7)
    cases.add_key("value_length_differs", _P + "attention.value_length", U32, 16)
    cases.add_key("rope_dimension_count_4", _P + "rope.dimension_count", U32, 4)
    cases.add_key("not_causal", _P + "attention.causal", BOOL, 0)
    for name, value in {
        "nan": float("nan"),
        "0": 0.0,
        "minus_1": -1.0,
        "inf": float("inf"),
    }.items():
        cases.add_key(f"epsilon_{name}", _P + "attention.layer_norm_rms_epsilon", F32, value)
        cases.add_key(f"rope_freq_base_{name}", _P + "rope.freq_base", F32, value)
    cases.add_key("epsilon_f64", _P + "attention.layer_norm_rms_epsilon", F64, 1e-5)
    cases.add_key("rope_scaling_type_unknown", _P + "rope.scaling.type", STR, "spiral")
    cases.add_key("rope_scaling_factor_nan", _P + "rope.scaling.factor", F32, float("nan"))
    cases.add_key("rope_scaling_factor_negative", _P + "rope.scaling.factor", F32, -4.0)
    cases.add_key("rope_scaling_attn_factor_0", _P + "rope.scaling.attn_factor", F32, 0.0)


def _add_expert_cases(cases: Cases) -> None:
    cases.add_key("expert_count_0", _P + "expert_count", U32, 0)
    cases.add_key("expert_count_3", _P + "expert_count", U32, 3)
    cases.add_key("expert_count_5", _P + "expert_count", U32, 5)
    cases.add_key("expert_count_1000000", _P + "expert_count", U32, 10**6)
    cases.add_key("expert_count_text", _P + "expert_count", STR, "4")
    cases.add_key("expert_used_count_0", _P + "expert_used_count", U32, 0)
    cases.add_key("expert_used_count_5_of_4", _P + "expert_used_count", U32, 5)
    cases.add_key("expert_used_count_2_31", _P + "expert_used_count", U32, 2**31)
    cases.add_key("expert_groups_2", _P + "expert_group_count", U32, 2)
    used = (U32, 2)
    cases.add(
        "expert_used_count_without_experts",
        lambda: small_mixtral(n_expert=0).with_key(_P + "expert_used_count", *used),
    )
    cases.add(
        "old_layout_one_expert_missing",
        lambda: small_mixtral(old_layout=True).without_tensor("blk.1.ffn_up.3.weight"),
    )
    cases.add("old_layout_mixed_types", _experts_of_two_types)
    cases.add(
        "old_layout_declares_8_experts",
        lambda: small_mixtral(old_layout=True).with_key(_P + "expert_count", U32, 8),
    )


def _experts_of_two_types() -> Gguf:
    model, name = small_mixtral(old_layout=True), "blk.1.ffn_down.2.weight"
    n_f16_bytes = next(len(tensor.data) for tensor in model.tensors if tensor.name == name)
    return model.with_tensor(name, type=TYPE_F32, data=bytes(2 * n_f16_bytes))


def _add_weight_cases(cases: Cases) -> None:
    for name in (
        "token_embd.weight",
        "output_norm.weight",
        "blk.1.attn_q.weight",
        "blk.1.ffn_norm.weight",
        "blk.0.ffn_gate_inp.weight",
        "blk.1.ffn_up_exps.weight",
    ):
        cases.add(f"without_{name}", partial(_without_tensor, name))
    cases.add_tensor("wrong_shape_swapped", "blk.0.attn_k.weight", shape=(16, 32))
    cases.add_tensor("wrong_shape_flat", "blk.0.attn_q.weight", shape=(1024,))
    cases.add_tensor("wrong_type_i8", "blk.0.attn_k.weight", type=24, data=bytes(512))
    cases.add_tensor("wrong_type_f16_norm", type=1, data=bytes(64))
    for name, value in {"nan": np.nan, "inf": np.inf}.items():
        ones = np.ones(32, np.float32)
        ones[31] = value
        cases.add_tensor(f"norm_with_{name}", data=ones.tobytes())
    _add_extra_tensor(cases, "unexpected_tensor", "blk.0.ffn_gate_shexp.weight", (32,), 1.0)
    _add_extra_tensor(cases, "fused_attention", "blk.0.attn_qkv.weight", (32,), 1.0)
    _add_extra_tensor(cases, "rope_freqs_wrong_shape", "rope_freqs.weight", (8,), 1.0)
    _add_extra_tensor(cases, "rope_freqs_zero", "rope_freqs.weight", (4,), 0.0)


def _add_extra_tensor(
    cases: Cases, name: str, tensor: str, shape: tuple[int, ...], value: float
) -> None:
    data = np.full(shape, value, np.float32).tobytes()
    extra = (Tensor(tensor, shape, TYPE_F32, data),)
    cases.add(name, lambda: replace(small_mixtral(), tensors=small_mixtral().tensors + extra))


def _add_tokenizer_cases(cases: Cases) -> None:
    tokens = tuple(small_vocabulary()[0])

    def with_tokens(name: str, changed: tuple[Any, ...]) -> None:
        cases.add_key(name, _T + "tokens", ARR, Array(STR, changed))

    with_tokens("tokens_one_too_few", tokens[:-1])
    with_tokens("tokens_none", ())
    with_tokens("tokens_repeated", (*tokens[:-1], "<s>"))
    with_tokens("tokens_repeated_after_nul", (*tokens[:-1], "<s>\0x"))
    with_tokens("tokens_named_like_the_empty_one", (*tokens[:-2], "", "[EMPTY_298]"))
    with_tokens("tokens_without_a_byte", (*tokens[:3], "nul", *tokens[4:]))
    with_tokens("token_of_a_megabyte", (*tokens[:-1], "x" * _MIB))
    cases.add_key("tokens_are_numbers", _T + "tokens", ARR, Array(U32, tuple(range(300))))
    cases.add_key("tokens_are_a_text", _T + "tokens", STR, "all of them")
    cases.add_key("scores_too_few", _T + "scores", ARR, Array(F32, (0.0,) * 10))
    cases.add_key("scores_are_texts", _T + "scores", ARR, Array(STR, tokens))
    cases.add_key("scores_nan", _T + "scores", ARR, Array(F32, (float("nan"),) * 300))
    cases.add_key("token_types_too_few", _T + "token_type", ARR, Array(I32, (1,) * 10))
    cases.add_key("token_types_are_bytes", _T + "token_type", ARR, Array(U8, (1,) * 300))
    cases.add_key("merges_are_numbers", _T + "merges", ARR, Array(U32, (1, 2, 3)))
    cases.add_key("tokenizer_unknown", _T + "model", STR, "mind-reader")
    cases.add_key("tokenizer_none", _T + "model", STR, "no_vocab")
    cases.add_key("tokenizer_bpe_without_merges", _T + "model", STR, "gpt2")
    cases.add_key("bos_outside_the_vocabulary", _T + "bos_token_id", U32, 300)
    cases.add_key("eos_2_32_minus_1", _T + "eos_token_id", U32, 2**32 - 1)
    cases.add_key("eos_a_text", _T + "eos_token_id", STR, "</s>")
    cases.add_key("add_bos_a_number", _T + "add_bos_token", U32, 1)
    cases.add_key("chat_template_a_number", "tokenizer.chat_template", U32, 1)


def _add_split_cases(cases: Cases) -> None:
    def shards(name: str, change: Callable[[Shards], object], named: int = 0) -> None:
        def write(path: Path) -> Path:
            made: Shards = dict(enumerate(split_gguf(small_mixtral(), 3)))
            change(made)
            first = write_shards(path, [made.get(i) for i in range(3)])
            return first.with_name(first.name.replace("-00001-", f"-{named + 1:05d}-"))

        cases.builders[name] = write

    def edit(i: int, key: str, type_: int, value: Any) -> Callable[[Shards], object]:
        def change(made: Shards) -> None:
            made[i] = made[i].with_key(key, type_, value)

        return change

    shards("shard_2_of_3_missing", lambda made: made.pop(1))
    shards("shard_1_of_3_missing", lambda made: made.pop(0), named=2)
    shards("shard_3_is_shard_2", lambda made: made.update({2: made[1]}))
    shards("shard_numbers_swapped", lambda made: made.update({0: made[2], 2: made[0]}))
    shards("shard_of_another_set", edit(1, "split.count", U16, 4))
    shards("shard_number_u32", edit(1, "split.no", U32, 1))
    shards("shard_number_too_high", edit(0, "split.no", U16, 3))
    shards("shard_count_u32", edit(0, "split.count", U32, 3))
    shards("shard_count_65535", edit(0, "split.count", U16, 65535))
    shards("shard_tensor_total_wrong", edit(0, "split.tensors.count", I32, 99))
    shards("shard_without_number", lambda made: made.update({1: made[1].without_key("split.no")}))
    shards("shard_with_a_tensor_of_another", _repeat_a_tensor)
    shards("shard_is_empty", lambda made: made.update({2: Gguf()}))
    cases.add_key("split_file_under_another_name", "split.count", U16, 3)


def _repeat_a_tensor(made: Shards) -> None:
    made[1] = replace(made[1], tensors=(made[0].tensors[0], *made[1].tensors[1:]))
