"""The tensors of a model: which must be there, with which shapes, types and values."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from quant.ggml_types import GGML_TYPES_BY_NAME
from quant.gguf_cursor import shown
from quant.gguf_file import GGUFFile, TensorInfo
from runner.errors import ModelError
from runner.model_config import ModelConfig

F32_ONLY = frozenset({"F32"})
# ggml's mul_mat and get_rows take every type but plain integers, doubles and activation formats.
MATRIX_TYPES = frozenset(GGML_TYPES_BY_NAME) - {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"}

_PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True)
class _Wanted:
    """What a tensor must look like."""

    name: str
    shape: tuple[int, ...]
    types: frozenset[str] = MATRIX_TYPES
    is_optional: bool = False


def check_tensors(file: GGUFFile, config: ModelConfig) -> None:
    """Raise ModelError unless the file has exactly the tensors that the model's shape asks for."""
    known = set()
    for wanted in _wanted_tensors(config):
        known.add(wanted.name)
        _check_tensor(file, wanted)
    _check_expert_types(file, config)
    unknown = [name for name in file.tensors if name not in known]
    if unknown:
        raise ModelError(
            f"{file.paths[0]}: found {len(unknown)} tensors that are no part of a "
            f"{config.architecture} model of this shape, the first {shown(unknown[0])}; "
            f"{_guess_reason(unknown[0])}"
        )


def _check_expert_types(file: GGUFFile, config: ModelConfig) -> None:
    """Experts in tensors of their own must be of one type: they are multiplied together."""
    if config.has_merged_experts or not config.is_moe:
        return
    for layer in range(config.n_layer):
        for projection in _PROJECTIONS:
            prefix = f"blk.{layer}.ffn_{projection}"
            names = [f"{prefix}.{expert}.weight" for expert in range(config.n_expert)]
            first, *others = (file.tensors[name] for name in names)
            for other in others:
                if other.type != first.type:
                    expected = f"{first.type.name} as in '{first.name}'"
                    raise _tensor_error(file, other, f"type {other.type.name}", expected)


def check_norms(file: GGUFFile, config: ModelConfig) -> None:
    """Read the norms, biases and rope factors; raise ModelError for a NaN or an infinity.

    Reads about 2 x n_layer x n_embd x 4 bytes with `pread`, one tensor at a time.
    """
    for wanted in _wanted_tensors(config):
        if wanted.types is not F32_ONLY or wanted.name not in file.tensors:
            continue
        info = file.tensors[wanted.name]
        values = np.empty(info.n_elements, np.float32)
        file.read(info.range, values)
        is_bad = ~np.isfinite(values)
        if wanted.name.startswith("rope_"):
            is_bad |= values <= 0
        if is_bad.any():
            at = int(is_bad.argmax())
            raise _tensor_error(file, info, f"the value {values[at]} at index {at}", "a number")


def _wanted_tensors(config: ModelConfig) -> Iterator[_Wanted]:
    yield _Wanted("token_embd.weight", (config.n_embd, config.n_vocab))
    yield _Wanted("output_norm.weight", (config.n_embd,), F32_ONLY)
    yield _Wanted("output.weight", (config.n_embd, config.n_vocab), is_optional=True)
    is_longrope = config.rope.scaling_type == "longrope"
    factors = ("rope_factors_long", "rope_factors_short") if is_longrope else ("rope_freqs",)
    for name in factors:
        yield _Wanted(f"{name}.weight", (config.rope.n_rot // 2,), F32_ONLY, is_optional=True)
    for layer in range(config.n_layer):
        yield from _attention_tensors(config, f"blk.{layer}.")
        ffn = _moe_tensors if config.is_moe else _dense_tensors
        yield from ffn(config, f"blk.{layer}.")


def _attention_tensors(config: ModelConfig, p: str) -> Iterator[_Wanted]:
    n_embd, n_q, n_kv = config.n_embd, config.n_embd_q, config.n_embd_kv
    yield _Wanted(p + "attn_norm.weight", (n_embd,), F32_ONLY)
    for name, n_in, n_out in (
        ("attn_q", n_embd, n_q),
        ("attn_k", n_embd, n_kv),
        ("attn_v", n_embd, n_kv),
        ("attn_output", n_q, n_embd),
    ):
        yield _Wanted(f"{p}{name}.weight", (n_in, n_out))
        yield _Wanted(f"{p}{name}.bias", (n_out,), F32_ONLY, is_optional=True)
    yield _Wanted(p + "ffn_norm.weight", (n_embd,), F32_ONLY)


def _dense_tensors(config: ModelConfig, p: str) -> Iterator[_Wanted]:
    for projection in _PROJECTIONS:
        shape = _ffn_shape(config.n_embd, config.n_ff, projection)
        yield _Wanted(f"{p}ffn_{projection}.weight", shape)
        yield _Wanted(f"{p}ffn_{projection}.bias", shape[1:], F32_ONLY, is_optional=True)


def _moe_tensors(config: ModelConfig, p: str) -> Iterator[_Wanted]:
    yield _Wanted(p + "ffn_gate_inp.weight", (config.n_embd, config.n_expert))
    for projection in _PROJECTIONS:
        shape = _ffn_shape(config.n_embd, config.n_ff_exp, projection)
        if config.has_merged_experts:
            yield _Wanted(f"{p}ffn_{projection}_exps.weight", (*shape, config.n_expert))
            continue
        for expert in range(config.n_expert):
            yield _Wanted(f"{p}ffn_{projection}.{expert}.weight", shape)


def _ffn_shape(n_embd: int, n_ff: int, projection: str) -> tuple[int, int]:
    return (n_ff, n_embd) if projection == "down" else (n_embd, n_ff)


def _check_tensor(file: GGUFFile, wanted: _Wanted) -> None:
    info = file.tensors.get(wanted.name)
    expected = "x".join(map(str, wanted.shape))
    if info is None:
        if wanted.is_optional:
            return
        raise ModelError(
            f"{file.paths[0]}: found no tensor {wanted.name!r}; expected one of shape {expected}"
        )
    # The format drops trailing dimensions of length 1, as in a model with one expert.
    if info.shape + (1,) * (len(wanted.shape) - len(info.shape)) != wanted.shape:
        raise _tensor_error(file, info, f"shape {'x'.join(map(str, info.shape))}", expected)
    if info.type.name not in wanted.types:
        types = "F32" if wanted.types is F32_ONLY else "a type that ggml can multiply"
        raise _tensor_error(file, info, f"type {info.type.name}", types)


def _tensor_error(file: GGUFFile, info: TensorInfo, found: str, expected: str) -> ModelError:
    path = file.paths[info.shard]
    return ModelError(f"{path}: tensor {shown(info.name)}: found {found}; expected {expected}")


def _guess_reason(name: str) -> str:
    if ".attn_qkv." in name:
        return "attention weights fused into one tensor are not supported"
    if "_shexp." in name:
        return "experts shared by all tokens are not supported"
    if name.endswith((".scale", ".input_scale")):
        return "tensors with separate scales are not supported"
    return "expected none: the metadata and the tensors do not belong together"
