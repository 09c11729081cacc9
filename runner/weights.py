"""The model's weights as device tensors, used in place over the mapped file. Knows no graph."""

from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from quant.ggml import Backend, Context, Tensor
from quant.gguf_file import GGUFFile, TensorInfo
from runner.model_config import ModelConfig


@dataclass(frozen=True)
class ExpertSlabs:
    """One layer's experts side by side; the last dimension is the slot."""

    ffn_gate_exps: Tensor  # (n_embd, n_ff_exp, n_slots)
    ffn_up_exps: Tensor  # (n_embd, n_ff_exp, n_slots)
    ffn_down_exps: Tensor  # (n_ff_exp, n_embd, n_slots)


@dataclass(frozen=True)
class LayerWeights:
    """One layer; attributes are named like the GGUF tensors `blk.N.*`."""

    attn_norm: Tensor
    attn_q: Tensor
    attn_k: Tensor
    attn_v: Tensor
    attn_output: Tensor
    attn_q_bias: Tensor | None
    attn_k_bias: Tensor | None
    attn_v_bias: Tensor | None
    attn_output_bias: Tensor | None
    ffn_norm: Tensor
    ffn_gate_inp: Tensor | None  # the router; None in a dense layer
    experts: ExpertSlabs | None  # None in a dense layer, and where they were left out
    ffn_gate: Tensor | None  # these three in a dense layer only
    ffn_up: Tensor | None
    ffn_down: Tensor | None
    ffn_gate_bias: Tensor | None
    ffn_up_bias: Tensor | None
    ffn_down_bias: Tensor | None


class Weights:
    """All weights of a model on one backend; `file` must stay open until `close`."""

    def __init__(
        self, file: GGUFFile, config: ModelConfig, backend: Backend, n_ctx: int,
        copies_experts: bool = True,
    ) -> None:  # fmt: skip
        """copies_experts: experts that cannot be used in place are copied; else left out."""
        self._file = file
        self._backend = backend
        self._copies_experts = copies_experts
        self._n_copied_bytes = 0
        with ExitStack() as owned:
            self._owned = owned
            self._context = owned.enter_context(Context(backend.ggml, len(file.tensors) + 1))
            self._mappings = [
                owned.enter_context(backend.wrap(file.mapping(i))) for i in range(len(file.paths))
            ]
            self._place(config, n_ctx)
            self._owned = owned.pop_all()

    def _place(self, config: ModelConfig, n_ctx: int) -> None:
        self.token_embd = self._tensor("token_embd.weight")
        self.output_norm = self._tensor("output_norm.weight")
        self.output = self._optional("output.weight") or self.token_embd
        rope_factors = config.rope_factors_tensor(self._file, n_ctx)
        self.rope_factors = self._tensor(rope_factors) if rope_factors else None
        self.layers = tuple(self._layer(config, layer) for layer in range(config.n_layer))

    def close(self) -> None:
        self._owned.close()

    @property
    def n_copied_bytes(self) -> int:
        """Bytes of weights that could not be used in place (scattered experts of old files)."""
        return self._n_copied_bytes

    def _layer(self, config: ModelConfig, layer: int) -> LayerWeights:
        prefix = f"blk.{layer}."
        dense = config.n_expert == 0
        names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        biases = {f"{name}_bias": self._optional(f"{prefix}{name}.bias") for name in names}
        return LayerWeights(
            attn_norm=self._tensor(prefix + "attn_norm.weight"),
            attn_q=self._tensor(prefix + "attn_q.weight"),
            attn_k=self._tensor(prefix + "attn_k.weight"),
            attn_v=self._tensor(prefix + "attn_v.weight"),
            attn_output=self._tensor(prefix + "attn_output.weight"),
            ffn_norm=self._tensor(prefix + "ffn_norm.weight"),
            ffn_gate_inp=None if dense else self._tensor(prefix + "ffn_gate_inp.weight"),
            experts=None if dense else self._experts(config, layer),
            ffn_gate=self._tensor(prefix + "ffn_gate.weight") if dense else None,
            ffn_up=self._tensor(prefix + "ffn_up.weight") if dense else None,
            ffn_down=self._tensor(prefix + "ffn_down.weight") if dense else None,
            **biases,
        )

    def _experts(self, config: ModelConfig, layer: int) -> ExpertSlabs | None:
        gate, up, down = (self._slab(config, layer, part) for part in ("gate", "up", "down"))
        if gate is None or up is None or down is None:
            return None
        return ExpertSlabs(gate, up, down)

    def _slab(self, config: ModelConfig, layer: int, part: str) -> Tensor | None:
        merged = self._optional(f"blk.{layer}.ffn_{part}_exps.weight")
        if merged is not None:
            return merged
        infos = [
            self._file.tensors[f"blk.{layer}.ffn_{part}.{expert}.weight"]
            for expert in range(config.n_expert)
        ]
        stride = _even_stride(infos)
        if stride is None:
            return self._copied_slab(infos) if self._copies_experts else None
        slab = self._context.tensor(infos[0].type.id, *infos[0].shape, len(infos))
        slab.set_slice_stride(stride)
        self._mappings[infos[0].shard].place(slab, infos[0].offset)
        return slab

    def _copied_slab(self, infos: list[TensorInfo]) -> Tensor:
        """Experts that lie unevenly in the file cannot be one tensor in place: copy them."""
        context = self._owned.enter_context(Context(self._backend.ggml, 1))
        slab = context.tensor(infos[0].type.id, *infos[0].shape, len(infos))
        self._n_copied_bytes += self._owned.enter_context(context.allocate(self._backend)).n_bytes
        for expert, info in enumerate(infos):
            data = np.empty(info.n_bytes, np.uint8)
            self._file.read(info.range, data)
            self._backend.write(slab, data, expert * info.n_bytes)
        return slab

    def _tensor(self, name: str) -> Tensor:
        info = self._file.tensors[name]
        tensor = self._context.tensor(info.type.id, *info.shape)
        self._mappings[info.shard].place(tensor, info.offset)
        return tensor

    def _optional(self, name: str) -> Tensor | None:
        return self._tensor(name) if name in self._file.tensors else None


def _even_stride(infos: list[TensorInfo]) -> int | None:
    """The distance in bytes from one expert to the next when it is always the same, else None."""
    if len(infos) == 1:
        return infos[0].n_bytes
    same_shard = all(info.shard == infos[0].shard for info in infos)
    steps = {b.offset - a.offset for a, b in pairwise(infos)}
    stride = steps.pop()
    return stride if same_shard and not steps and stride >= infos[0].n_bytes else None
