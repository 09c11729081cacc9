"""Computes every expert of a layer on the same tokens with torch: the only module that imports it.

Memory, as arithmetic: never more than one matrix of one expert is there in float32. With n tokens
that is 4 n_embd n_ff_exp bytes for the matrix, its blocks as the file has them (at most as much),
2 x 4 n n_ff_exp for what gate and up make, and 4 n n_embd (n_expert + 2) for the inputs and
outputs. Mixtral 8x7B (4096, 14336, 8 experts) and 1024 tokens: 235 MB + 33 MB (Q4_K; F32 235 MB)
+ 117 MB + 168 MB = 0.55 GB (0.76 GB), besides some 0.3 GB of torch itself. On a GPU it is 0.52 GB,
and the host needs the matrix and its blocks.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from quant.dequantize import dequantize
from quant.ggml_types import GGMLType
from quant.gguf_file import ByteRange, GGUFFile
from runner.errors import CancelledError, ProfileError
from runner.model_config import ModelConfig
from runner.model_sizes import expert_ranges


class ExpertOutputs:
    """Computes layer after layer of one file, on the GPU if torch has one."""

    def __init__(self, file: GGUFFile, model: ModelConfig, n_threads: int) -> None:
        """n_threads: of the CPU."""
        torch.set_num_threads(n_threads)
        self._file = file
        self._model = model
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._floats = np.empty(model.n_embd * model.n_ff_exp, np.float32)
        self._blocks = np.empty(0, np.uint8)

    @staticmethod
    def needed_bytes(model: ModelConfig, n_tokens: int) -> int:
        """The most memory that `gram` takes of the host, and of the GPU if there is one."""
        n_matrix = model.n_embd * model.n_ff_exp
        n_hidden = 2 * n_tokens * model.n_ff_exp
        n_outputs = n_tokens * model.n_embd * (model.n_expert + 2)
        n_gram = n_tokens * model.n_expert**2
        return 4 * (2 * n_matrix + n_hidden + n_outputs + n_gram)

    @property
    def device_name(self) -> str:
        """As the user knows it."""
        if self._device.type == "cuda":
            return torch.cuda.get_device_name(self._device)
        n = torch.get_num_threads()
        return f"CPU, {n} thread{'s' if n > 1 else ''}"

    def gram(
        self,
        layer: int,
        ffn_input: np.ndarray,
        on_expert: Callable[[int], None],
        cancelled: Callable[[], bool],
    ) -> np.ndarray:
        """The products of all experts' outputs: ffn_input (n, n_embd) float32 ->
        (n, n_expert, n_expert) float32.

        on_expert(n_done) after each expert. Raises CancelledError; GGUFError when the file cannot
        be read any more; ProfileError when the GPU has too little memory.
        """
        n_expert = self._model.n_expert
        try:
            with torch.inference_mode():
                x = torch.from_numpy(ffn_input).to(self._device)
                outputs = torch.empty(len(x), n_expert, self._model.n_embd, device=self._device)
                for expert in range(n_expert):
                    if cancelled():
                        raise CancelledError
                    outputs[:, expert] = self._output(layer, expert, x)
                    on_expert(expert + 1)
                gram: np.ndarray = torch.bmm(outputs, outputs.transpose(1, 2)).cpu().numpy()
        except torch.cuda.OutOfMemoryError as error:
            n_bytes = self.needed_bytes(self._model, len(ffn_input))
            raise ProfileError(
                f"{self.device_name} has too little free memory: comparing the experts takes "
                f"{n_bytes / 1e9:.1f} GB; CUDA_VISIBLE_DEVICES= computes on the CPU"
            ) from error
        return gram

    def _output(self, layer: int, expert: int, x: torch.Tensor) -> torch.Tensor:
        """down(silu(gate x) * up x), as in `runner.model.expert_outputs`: (n, n_embd)."""
        ranges = expert_ranges(self._file, self._model, layer, expert)
        n_embd, n_ff = self._model.n_embd, self._model.n_ff_exp
        types = [self._type_of(layer, expert, name) for name in ("gate", "up", "down")]
        gate = self._matrix(ranges.gate, types[0], n_ff, n_embd)
        hidden = functional.silu(x @ gate.T, inplace=True)
        del gate  # on a GPU it has memory of its own
        up = self._matrix(ranges.up, types[1], n_ff, n_embd)
        hidden *= x @ up.T
        del up
        return hidden @ self._matrix(ranges.down, types[2], n_embd, n_ff).T

    def _type_of(self, layer: int, expert: int, name: str) -> GGMLType:
        merged, single = f"blk.{layer}.ffn_{name}_exps.weight", f"blk.{layer}.ffn_{name}.{expert}"
        tensors = self._file.tensors
        return tensors[merged if self._model.has_merged_experts else f"{single}.weight"].type

    def _matrix(self, part: ByteRange, type: GGMLType, n_rows: int, n_columns: int) -> torch.Tensor:
        """One matrix in float32, (n_rows, n_columns); void after the next call."""
        if self._blocks.nbytes != part.n_bytes:
            self._blocks = np.empty(part.n_bytes, np.uint8)
        self._file.read(part, self._blocks)
        floats = dequantize(self._blocks, type, self._floats)
        return torch.from_numpy(floats).view(n_rows, n_columns).to(self._device)
