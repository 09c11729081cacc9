"""How large the parts of a model are and where its experts lie in the file. Reads no weights."""

import re
from dataclasses import dataclass

from quant.ggml_types import GGML_TYPES_BY_NAME
from quant.gguf_file import ByteRange, GGUFFile
from runner.model_config import ModelConfig

_PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True)
class ExpertRanges:
    """Where the three matrices of one expert lie."""

    gate: ByteRange
    up: ByteRange
    down: ByteRange

    @property
    def parts(self) -> tuple[ByteRange, ByteRange, ByteRange]:
        return self.gate, self.up, self.down

    @property
    def n_bytes(self) -> int:
        return sum(part.n_bytes for part in self.parts)


@dataclass(frozen=True)
class ModelSizes:
    """How large the parts of a model are."""

    n_params: int
    n_params_active: int  # used for one token
    expert_bytes: tuple[int, ...]  # of one expert, per layer; empty in a dense model
    n_params_one_expert: int  # as if every layer had a single expert, which is always used
    all_experts_bytes: int
    non_expert_bytes: int
    embedding_bytes: int = 0  # of the token embedding, where it is not the output as well

    @property
    def n_bytes(self) -> int:
        return self.all_experts_bytes + self.non_expert_bytes


def is_expert_tensor(name: str) -> bool:
    """Whether a GGUF tensor of this name holds experts, in either layout."""
    return re.fullmatch(r"blk\.\d+\.ffn_(gate|up|down)(_exps|\.\d+)\.weight", name) is not None


def expert_ranges(file: GGUFFile, config: ModelConfig, layer: int, expert: int) -> ExpertRanges:
    """Where the matrices of `expert` in `layer` lie, in either layout."""
    assert 0 <= expert < config.n_expert, expert
    gate, up, down = (
        _expert_range(file, config, layer, expert, projection) for projection in _PROJECTIONS
    )
    return ExpertRanges(gate, up, down)


def model_sizes(file: GGUFFile, config: ModelConfig) -> ModelSizes:
    """Count parameters and bytes."""
    n_params = sum(tensor.n_elements for tensor in file.tensors.values())
    n_bytes = sum(tensor.n_bytes for tensor in file.tensors.values())
    if not config.is_moe:
        return ModelSizes(n_params, n_params, (), n_params, 0, n_bytes, _embedding_bytes(file))
    expert_bytes = tuple(
        expert_ranges(file, config, layer, 0).n_bytes for layer in range(config.n_layer)
    )
    n_params_expert = 3 * config.n_embd * config.n_ff_exp * config.n_layer
    n_params_without = n_params - n_params_expert * config.n_expert
    all_experts_bytes = sum(expert_bytes) * config.n_expert
    return ModelSizes(
        n_params,
        n_params_without + n_params_expert * config.n_expert_used,
        expert_bytes,
        n_params_without + n_params_expert,
        all_experts_bytes,
        n_bytes - all_experts_bytes,
        _embedding_bytes(file),
    )


def _embedding_bytes(file: GGUFFile) -> int:
    is_apart = "output.weight" in file.tensors
    return file.tensors["token_embd.weight"].n_bytes if is_apart else 0


def kv_bytes_per_token(config: ModelConfig, type_k: str = "f16", type_v: str = "f16") -> int:
    """Bytes of keys and values of one token in all layers, for llama.cpp's cache type names."""
    row = sum(
        GGML_TYPES_BY_NAME[name.upper()].row_bytes(config.n_embd_kv) for name in (type_k, type_v)
    )
    return row * config.n_layer


def _expert_range(
    file: GGUFFile, config: ModelConfig, layer: int, expert: int, projection: str
) -> ByteRange:
    if not config.has_merged_experts:
        return file.tensors[f"blk.{layer}.ffn_{projection}.{expert}.weight"].range
    merged = file.tensors[f"blk.{layer}.ffn_{projection}_exps.weight"]
    n_bytes = merged.n_bytes // config.n_expert
    return ByteRange(merged.shard, merged.offset + expert * n_bytes, n_bytes)
