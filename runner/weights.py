"""The model's weights as tensors: in place over the mapped file, or copied to a device.

With a device beside the CPU everything but the experts and the token embedding is copied there;
those stay mapped, where the CPU can use them. Knows no graph.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from quant.ggml import Backend, Context, Tensor
from quant.gguf_file import ByteRange, GGUFFile, TensorInfo
from runner.embedding import Embedding
from runner.errors import CancelledError
from runner.model_config import ModelConfig

_PIECE_BYTES = 16 << 20  # copied to a device at once


@dataclass(frozen=True)
class ExpertSlabs:
    """One layer's experts side by side; the last dimension is the slot."""

    ffn_gate_exps: Tensor  # (n_embd, n_ff_exp, n_slots)
    ffn_up_exps: Tensor  # (n_embd, n_ff_exp, n_slots)
    ffn_down_exps: Tensor  # (n_ff_exp, n_embd, n_slots)

    @property
    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up and down."""
        return self.ffn_gate_exps, self.ffn_up_exps, self.ffn_down_exps


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
    """All weights of a model; `file` must stay open until `close`."""

    def __init__(
        self, file: GGUFFile, config: ModelConfig, backend: Backend, host: Backend, n_ctx: int,
        copies_experts: bool = True,
    ) -> None:  # fmt: skip
        """copies_experts: experts that cannot be used in place are copied; else left out.

        `host` is the CPU. On another backend nothing is there before `upload`; raises
        OutOfMemoryError.
        """
        self._file = file
        self._host = host
        self._copies_experts = copies_experts
        self._n_copied_bytes = 0
        self._to_upload: dict[str, Tensor] | None = None if backend.is_host else {}
        self.embedding = None if backend.is_host else Embedding(file)
        with ExitStack() as owned:
            self._owned = owned
            n_tensors = len(file.tensors) + 1
            self._context = owned.enter_context(Context(host.ggml, n_tensors))
            self._mappings = [
                owned.enter_context(host.wrap(file.mapping(i))) for i in range(len(file.paths))
            ]
            self._device_context = owned.enter_context(Context(host.ggml, n_tensors))
            self._place(config, n_ctx)
            self.n_device_bytes = 0  # on a device beside the CPU
            if self._to_upload:
                buffer = owned.enter_context(self._device_context.allocate(backend))
                self.n_device_bytes = buffer.n_bytes
            self._owned = owned.pop_all()

    def upload(
        self,
        backend: Backend,
        on_progress: Callable[[str, int, int], None],
        cancelled: Callable[[], bool],
    ) -> None:
        """Copy to the device what belongs there; nothing on the CPU. Raises CancelledError,
        GGUFError."""
        tensors = self._to_upload or {}
        done, total = 0, sum(self._file.tensors[name].n_bytes for name in tensors)
        piece = np.empty(_PIECE_BYTES, np.uint8)
        for name, tensor in tensors.items():
            info = self._file.tensors[name]
            for start in range(0, info.n_bytes, _PIECE_BYTES):
                if cancelled():
                    raise CancelledError
                part = piece[: min(_PIECE_BYTES, info.n_bytes - start)]
                self._file.read(ByteRange(info.shard, info.offset + start, part.nbytes), part)
                backend.write(tensor, part, start)
                done += part.nbytes
                on_progress(f"copying weights to {backend.device.name}", done, total)

    def _place(self, config: ModelConfig, n_ctx: int) -> None:
        self.token_embd = self._mapped("token_embd.weight")
        self.output_norm = self._tensor("output_norm.weight")
        self.output = self._optional("output.weight") or self._tied_output()
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
        merged = f"blk.{layer}.ffn_{part}_exps.weight"
        if merged in self._file.tensors:
            return self._mapped(merged)
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
        context = self._owned.enter_context(Context(self._host.ggml, 1))
        slab = context.tensor(infos[0].type.id, *infos[0].shape, len(infos))
        self._n_copied_bytes += self._owned.enter_context(context.allocate(self._host)).n_bytes
        for expert, info in enumerate(infos):
            data = np.empty(info.n_bytes, np.uint8)
            self._file.read(info.range, data)
            self._host.write(slab, data, expert * info.n_bytes)
        return slab

    def _tied_output(self) -> Tensor:
        """The head of a model whose file has none is its embedding."""
        return self.token_embd if self._to_upload is None else self._tensor("token_embd.weight")

    def _tensor(self, name: str) -> Tensor:
        """A weight where the graphs of the layers compute."""
        if self._to_upload is None:
            return self._mapped(name)
        info = self._file.tensors[name]
        self._to_upload[name] = tensor = self._device_context.tensor(info.type.id, *info.shape)
        return tensor

    def _mapped(self, name: str) -> Tensor:
        """A weight in place, for the CPU."""
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
