"""Writes GGUF files with random weights in any shape, through the gguf package."""

from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T


@dataclass(frozen=True)
class RandomModel:
    """The shape of a `llama` model; `n_expert` 0 = dense."""

    n_embd: int = 128
    n_ff: int = 192
    n_layer: int = 2
    n_head: int = 4
    n_head_kv: int = 2
    n_expert: int = 4
    n_expert_used: int = 2
    n_vocab: int = 320
    n_ctx: int = 1024
    n_embd_head: int = 0  # 0 = n_embd / n_head
    type: T = T.F16
    seed: int = 1
    tied_output: bool = False
    biases: bool = False
    old_layout: bool = False  # one tensor per expert
    scattered: bool = False  # the old layout with experts in uneven places
    tensors_per_shard: int = 0
    metadata: dict[str, float | int | str] = field(default_factory=dict)  # below "llama."
    rope_freqs: tuple[float, ...] = ()
    rope_factors_long: tuple[float, ...] = ()
    rope_factors_short: tuple[float, ...] = ()

    @property
    def head(self) -> int:
        return self.n_embd_head or self.n_embd // self.n_head


def write_random_model(path: Path, m: RandomModel) -> Path:
    """Write the model; returns the path to open (the first shard when split)."""
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=m.tensors_per_shard)
    write_metadata(writer, m)
    write_vocabulary(writer, m)
    _write_weights(writer, m)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else sorted(path.parent.glob(path.stem + "-00001-of-*.gguf"))[0]


def write_metadata(w: gguf.GGUFWriter, m: RandomModel) -> None:
    w.add_name("random")
    w.add_context_length(m.n_ctx)
    w.add_embedding_length(m.n_embd)
    w.add_block_count(m.n_layer)
    w.add_feed_forward_length(m.n_ff)
    w.add_head_count(m.n_head)
    w.add_head_count_kv(m.n_head_kv)
    w.add_rope_dimension_count(m.head)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(m.n_vocab)
    if m.n_embd_head:
        w.add_key_length(m.n_embd_head)
        w.add_value_length(m.n_embd_head)
    if m.n_expert:
        w.add_expert_count(m.n_expert)
        w.add_expert_used_count(m.n_expert_used)
    add = {float: w.add_float32, int: w.add_uint32, str: w.add_string}
    for key, value in m.metadata.items():
        add[type(value)](f"llama.{key}", value)


def write_vocabulary(w: gguf.GGUFWriter, m: RandomModel) -> None:
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    kinds = [2, 3, 3] + [6] * 256
    n_words = m.n_vocab - len(tokens)
    w.add_tokenizer_model("llama")
    w.add_token_list(tokens + [f"\u2581w{i}" for i in range(n_words)])
    w.add_token_scores([0.0] * m.n_vocab)
    w.add_token_types(kinds + [1] * n_words)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)


def _write_weights(w: gguf.GGUFWriter, m: RandomModel) -> None:
    rng = np.random.default_rng(m.seed)

    def matrix(name: str, *shape: int, type: T | None = None) -> None:
        values = rng.standard_normal(shape, np.float32) / np.sqrt(shape[-1])
        _add(w, name, values * 1.5, m.type if type is None else type)  # F32 is 0

    def vector(name: str, n: int) -> None:
        w.add_tensor(name, 1 + 0.1 * rng.standard_normal(n, np.float32))

    matrix("token_embd.weight", m.n_vocab, m.n_embd)
    vector("output_norm.weight", m.n_embd)
    if not m.tied_output:
        matrix("output.weight", m.n_vocab, m.n_embd)
    for name in ("rope_freqs", "rope_factors_long", "rope_factors_short"):
        if factors := getattr(m, name):
            w.add_tensor(f"{name}.weight", np.array(factors, np.float32))
    for layer in range(m.n_layer):
        _write_layer(m, f"blk.{layer}.", matrix, vector)


def _write_layer(m: RandomModel, p: str, matrix, vector) -> None:  # type: ignore[no-untyped-def]
    rows = {"attn_q": m.head * m.n_head, "attn_k": m.head * m.n_head_kv}
    rows["attn_v"] = rows["attn_k"]
    vector(p + "attn_norm.weight", m.n_embd)
    for name, n in rows.items():
        matrix(f"{p}{name}.weight", n, m.n_embd)
        if m.biases:
            vector(f"{p}{name}.bias", n)
    matrix(p + "attn_output.weight", m.n_embd, m.head * m.n_head)
    vector(p + "ffn_norm.weight", m.n_embd)
    shapes = {"gate": (m.n_ff, m.n_embd), "up": (m.n_ff, m.n_embd), "down": (m.n_embd, m.n_ff)}
    if not m.n_expert:
        for part, shape in shapes.items():
            matrix(f"{p}ffn_{part}.weight", *shape)
        return
    matrix(p + "ffn_gate_inp.weight", m.n_expert, m.n_embd, type=T.F32)
    for part, shape in shapes.items():
        if not m.old_layout:
            matrix(f"{p}ffn_{part}_exps.weight", m.n_expert, *shape)
            continue
        experts = range(m.n_expert)
        for expert in sorted(experts, key=lambda e: -(e % 3)) if m.scattered else experts:
            matrix(f"{p}ffn_{part}.{expert}.weight", *shape)


def _add(w: gguf.GGUFWriter, name: str, values: np.ndarray, type: T) -> None:
    if type == T.F32:
        w.add_tensor(name, values.astype(np.float32))
    elif type == T.F16:
        w.add_tensor(name, values.astype(np.float16))
    else:
        w.add_tensor(name, gguf.quants.quantize(values.astype(np.float32), type), raw_dtype=type)


def write_big_mixtral(
    path: Path, n_embd: int = 2048, n_ff: int = 7168, n_layer: int = 12, n_vocab: int = 32000
) -> Path:
    """A Q4_K Mixtral (8 experts, top-2) with random blocks, for speed and memory: fast to write.

    The default shape has 2.54 GB.
    """
    m = RandomModel(
        n_embd, n_ff, n_layer, n_head=n_embd // 128, n_head_kv=n_embd // 512, n_expert=8,
        n_vocab=n_vocab, n_ctx=8192,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    w = gguf.GGUFWriter(path, "llama")
    write_metadata(w, m)
    write_vocabulary(w, m)

    def matrix(name: str, *shape: int, type: T | None = None) -> None:
        kind = T.Q4_K if type is None else type  # F32 is 0
        if kind == T.F32:
            w.add_tensor(name, rng.standard_normal(shape, np.float32) * 0.02)
        else:
            w.add_tensor(name, _random_blocks(rng, shape, kind), raw_dtype=kind)

    def vector(name: str, n: int) -> None:
        w.add_tensor(name, np.ones(n, np.float32))

    matrix("token_embd.weight", n_vocab, n_embd)
    vector("output_norm.weight", n_embd)
    matrix("output.weight", n_vocab, n_embd, type=T.Q6_K)
    for layer in range(n_layer):
        _write_layer(m, f"blk.{layer}.", matrix, vector)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def _random_blocks(rng: np.random.Generator, shape: tuple[int, ...], kind: T) -> np.ndarray:
    """Random quantized values around zero with a standard deviation near 0.02."""
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // block, n_bytes), np.uint8)
    if kind == T.Q4_K:  # scale * (d * q) - (dmin * m), with 6-bit scales and 4-bit q
        scale = 0.02 / (32 * 4.6)
        blocks[:, 0:2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
        blocks[:, 2:4] = np.frombuffer(np.float16(scale * 7.5).tobytes(), np.uint8)
    else:
        assert kind == T.Q6_K
        blocks[:, -2:] = np.frombuffer(np.float16(0.02 / (74 * 18)).tobytes(), np.uint8)
    return blocks.reshape(*shape[:-1], -1)
