"""A raw GGUF writer for tests, which can lie, and a small good Mixtral file made with it.

Independent of the code under test: every byte is packed here by hand.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)
_FORMATS = {
    U8: "B",
    I8: "b",
    U16: "H",
    I16: "h",
    U32: "I",
    I32: "i",
    F32: "f",
    BOOL: "B",
    U64: "Q",
    I64: "q",
    F64: "d",
}
TYPE_F32, TYPE_F16, TYPE_Q4_0, TYPE_Q4_K, TYPE_Q8_0 = 0, 1, 2, 12, 8
_BLOCKS = {TYPE_F32: (1, 4), TYPE_F16: (1, 2), TYPE_Q4_0: (32, 18), TYPE_Q8_0: (32, 34)}


@dataclass(frozen=True)
class Array:
    """An array value; `n` and `element_type` may lie."""

    element_type: int
    values: tuple[Any, ...]
    n: int | None = None

    def packed(self) -> bytes:
        head = struct.pack("<IQ", self.element_type, len(self.values) if self.n is None else self.n)
        return head + b"".join(packed_value(self.element_type, v) for v in self.values)


@dataclass(frozen=True)
class Tensor:
    """A tensor's entry and data; `offset` may lie."""

    name: str | bytes
    shape: tuple[int, ...]
    type: int = TYPE_F32
    data: bytes = b""
    offset: int | None = None
    n_dims: int | None = None


@dataclass(frozen=True)
class Gguf:
    """A file as parts; whatever is None is filled in truthfully."""

    keys: dict[str, tuple[int, Any]] = field(default_factory=dict)
    tensors: tuple[Tensor, ...] = ()
    magic: bytes = b"GGUF"
    version: int = 3
    n_tensors: int | None = None
    n_keys: int | None = None
    extra_keys: tuple[bytes, ...] = ()  # raw entries, written after the others
    alignment: int = 32

    def packed(self) -> bytes:
        return self.header() + self.padding() + self.data()

    def header(self) -> bytes:
        n_keys = len(self.keys) + len(self.extra_keys) if self.n_keys is None else self.n_keys
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        parts = [self.magic, struct.pack("<IQQ", self.version, n_tensors, n_keys)]
        parts += [key_entry(name, type_, value) for name, (type_, value) in self.keys.items()]
        parts += self.extra_keys
        parts += self._tensor_entries()
        return b"".join(parts)

    def padding(self) -> bytes:
        return b"\0" * (-len(self.header()) % self.alignment)

    def data(self) -> bytes:
        return b"".join(t.data + b"\0" * (-len(t.data) % self.alignment) for t in self.tensors)

    def _tensor_entries(self) -> list[bytes]:
        entries, offset = [], 0
        for t in self.tensors:
            n_dims = len(t.shape) if t.n_dims is None else t.n_dims
            at = offset if t.offset is None else t.offset
            dims = struct.pack(f"<I{len(t.shape)}Q", n_dims, *t.shape)
            entries.append(packed_string(t.name) + dims + struct.pack("<IQ", t.type, at % 2**64))
            offset += -(-len(t.data) // self.alignment) * self.alignment
        return entries

    def with_key(self, name: str, type_: int, value: Any) -> "Gguf":
        return replace(self, keys={**self.keys, name: (type_, value)})

    def without_key(self, name: str) -> "Gguf":
        return replace(self, keys={k: v for k, v in self.keys.items() if k != name})

    def with_tensor(self, name: str, /, **changes: Any) -> "Gguf":
        assert any(t.name == name for t in self.tensors), name
        tensors = tuple(replace(t, **changes) if t.name == name else t for t in self.tensors)
        return replace(self, tensors=tensors)

    def without_tensor(self, name: str) -> "Gguf":
        return replace(self, tensors=tuple(t for t in self.tensors if t.name != name))


def packed_string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def packed_value(type_: int, value: Any) -> bytes:
    if type_ == STR:
        return packed_string(value)
    if type_ == ARR:
        assert isinstance(value, Array)
        return value.packed()
    return struct.pack("<" + _FORMATS[type_], value)


def key_entry(name: str | bytes, type_: int, value: Any) -> bytes:
    return packed_string(name) + struct.pack("<I", type_) + packed_value(type_, value)


def small_vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types of a SentencePiece-like vocabulary of 300 with all byte tokens."""
    words = ["▁", "▁the", "he", "th", "in", "er", "an", "▁a", "▁t", "on"]
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + words
    tokens += [chr(ord("a") + i) for i in range(26)]
    tokens += [f"<extra_{i}>" for i in range(300 - len(tokens))]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    return tokens, [-float(i) for i in range(len(tokens))], types


def small_mixtral(
    n_embd: int = 32,
    n_layer: int = 2,
    n_head: int = 4,
    n_head_kv: int = 2,
    n_ff: int = 64,
    n_expert: int = 4,
    n_expert_used: int = 2,
    old_layout: bool = False,
    matrix_type: int = TYPE_F16,
    seed: int = 0,
) -> Gguf:
    """A complete file of random weights that llama.cpp itself loads; dense when `n_expert` is 0."""
    tokens, scores, types = small_vocabulary()
    keys: dict[str, tuple[int, Any]] = {
        "general.architecture": (STR, "llama"),
        "general.name": (STR, "small mixtral"),
        "general.file_type": (U32, 1),
        "llama.context_length": (U32, 256),
        "llama.embedding_length": (U32, n_embd),
        "llama.block_count": (U32, n_layer),
        "llama.feed_forward_length": (U32, n_ff),
        "llama.attention.head_count": (U32, n_head),
        "llama.attention.head_count_kv": (U32, n_head_kv),
        "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
        "llama.rope.dimension_count": (U32, n_embd // n_head),
        "llama.rope.freq_base": (F32, 10000.0),
        "llama.vocab_size": (U32, len(tokens)),
        "tokenizer.ggml.model": (STR, "llama"),
        "tokenizer.ggml.tokens": (ARR, Array(STR, tuple(tokens))),
        "tokenizer.ggml.scores": (ARR, Array(F32, tuple(scores))),
        "tokenizer.ggml.token_type": (ARR, Array(I32, tuple(types))),
        "tokenizer.ggml.bos_token_id": (U32, 1),
        "tokenizer.ggml.eos_token_id": (U32, 2),
        "tokenizer.ggml.unknown_token_id": (U32, 0),
    }
    if n_expert:
        keys["llama.expert_count"] = (U32, n_expert)
        keys["llama.expert_used_count"] = (U32, n_expert_used)
    rng = np.random.default_rng(seed)

    def matrix(name: str, *shape: int) -> Tensor:
        values = rng.standard_normal(int(np.prod(shape)), np.float32) * 0.05
        return Tensor(name, shape, matrix_type, _encoded(values, matrix_type))

    def norm(name: str) -> Tensor:
        return Tensor(name, (n_embd,), TYPE_F32, np.ones(n_embd, np.float32).tobytes())

    n_kv = n_embd // n_head * n_head_kv
    tensors = [matrix("token_embd.weight", n_embd, len(tokens)), norm("output_norm.weight")]
    tensors.append(matrix("output.weight", n_embd, len(tokens)))
    for i in range(n_layer):
        p = f"blk.{i}."
        tensors += [norm(p + "attn_norm.weight"), norm(p + "ffn_norm.weight")]
        tensors += [matrix(p + "attn_q.weight", n_embd, n_embd)]
        tensors += [matrix(f"{p}attn_{x}.weight", n_embd, n_kv) for x in "kv"]
        tensors += [matrix(p + "attn_output.weight", n_embd, n_embd)]
        shapes = {"gate": (n_embd, n_ff), "up": (n_embd, n_ff), "down": (n_ff, n_embd)}
        if not n_expert:
            tensors += [matrix(f"{p}ffn_{x}.weight", *shape) for x, shape in shapes.items()]
            continue
        router = rng.standard_normal(n_embd * n_expert, np.float32).tobytes()
        tensors.append(Tensor(p + "ffn_gate_inp.weight", (n_embd, n_expert), TYPE_F32, router))
        for x, shape in shapes.items():
            merged = matrix(f"{p}ffn_{x}_exps.weight", *shape, n_expert)
            tensors += _split_experts(merged, p, x, n_expert) if old_layout else [merged]
    return Gguf(keys, tuple(tensors))


def write_small_mixtral(path: Path, **overrides: Any) -> Path:
    """Write `small_mixtral(**overrides)`."""
    path.write_bytes(small_mixtral(**overrides).packed())
    return path


def split_gguf(model: Gguf, n_shards: int) -> list[Gguf]:
    """The parts of a split model, the tensors dealt out in order."""
    size = -(-len(model.tensors) // n_shards)
    shards = []
    for i in range(n_shards):
        keys: dict[str, tuple[int, Any]] = dict(model.keys) if i == 0 else {}
        keys |= {
            "split.no": (U16, i),
            "split.count": (U16, n_shards),
            "split.tensors.count": (I32, len(model.tensors)),
        }
        shards.append(Gguf(keys, model.tensors[i * size : (i + 1) * size]))
    return shards


def write_shards(path: Path, shards: Sequence[Gguf | None]) -> Path:
    """Write the shards that are not None beside `path`; returns the first one's path."""
    stem = path.name.removesuffix(".gguf")
    paths = [
        path.with_name(f"{stem}-{i + 1:05d}-of-{len(shards):05d}.gguf") for i in range(len(shards))
    ]
    for shard_path, shard in zip(paths, shards, strict=True):
        if shard is not None:
            shard_path.write_bytes(shard.packed())
    return paths[0]


def _encoded(values: NDArray[Any], type_: int) -> bytes:
    if type_ == TYPE_F32:
        return values.astype("<f4").tobytes()
    if type_ == TYPE_F16:
        return values.astype("<f2").tobytes()
    assert type_ == TYPE_Q8_0
    blocks = values.reshape(-1, 32)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype("<f2")
    rounded = np.round(blocks / np.maximum(scale.astype(np.float32), 1e-8)).astype(np.int8)
    return np.concatenate([scale.view(np.uint8), rounded.view(np.uint8)], axis=1).tobytes()


def _split_experts(merged: Tensor, p: str, projection: str, n_expert: int) -> list[Tensor]:
    size = len(merged.data) // n_expert
    return [
        Tensor(
            f"{p}ffn_{projection}.{e}.weight",
            merged.shape[:2],
            merged.type,
            merged.data[e * size : (e + 1) * size],
        )
        for e in range(n_expert)
    ]
