"""llama.cpp itself, through llama-cpp-python's C API: the numbers and speeds to compare with."""

import ctypes
from pathlib import Path
from typing import Self

import numpy as np
from llama_cpp import llama_cpp as C

from quant.devices import Device
from runner.llama_library import llama_library

# LLAMA_FTYPE numbers of llama.cpp's quantizer
FILE_TYPES = {
    "F16": 1, "Q8_0": 7, "Q6_K": 18, "Q5_K": 17, "Q4_K": 15, "Q4_0": 2, "Q3_K": 12, "Q2_K": 10,
    "IQ4_XS": 30,
}  # fmt: skip


class LlamaCpp:
    """One model in llama.cpp on the CPU, or all of it on one device; weights used in place like
    ours (no repacking)."""

    def __init__(
        self, path: Path, n_ctx: int = 1024, n_batch: int = 512, n_threads: int = 1,
        repack: bool = False, device: Device | None = None,
    ) -> None:  # fmt: skip
        llama_library()  # keeps llama.cpp's log quiet
        model_params = C.llama_model_default_params()
        model_params.use_extra_bufts = repack
        offered = (ctypes.c_void_p * 2)(device.handle if device else None, None)
        model_params.devices = ctypes.cast(offered, ctypes.c_void_p)
        model_params.n_gpu_layers = -1 if device else 0
        self.model = C.llama_model_load_from_file(str(path).encode(), model_params)
        assert self.model, f"llama.cpp cannot load {path}"
        params = C.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_batch, n_batch
        params.n_threads = params.n_threads_batch = n_threads
        self.context = C.llama_init_from_model(self.model, params)
        self.vocab = C.llama_model_get_vocab(self.model)
        self.n_vocab = C.llama_vocab_n_tokens(self.vocab)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        C.llama_free(self.context)
        C.llama_model_free(self.model)

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        data = text.encode()
        tokens = (C.llama_token * (len(data) + 8))()
        n = C.llama_tokenize(self.vocab, data, len(data), tokens, len(tokens), add_special, True)
        assert n >= 0
        return list(tokens[:n])

    def reset(self) -> None:
        C.llama_memory_clear(C.llama_get_memory(self.context), True)

    def decode(self, tokens: list[int]) -> np.ndarray:
        """Append tokens as one batch; logits of the last, (n_vocab,)."""
        array = (C.llama_token * len(tokens))(*tokens)
        status = C.llama_decode(self.context, C.llama_batch_get_one(array, len(tokens)))
        assert status == 0, f"llama_decode: {status}"
        logits = C.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, (self.n_vocab,)).copy()

    def teacher_forced(self, tokens: list[int]) -> np.ndarray:
        """Token by token from an empty context: logits (n_tokens, n_vocab)."""
        self.reset()
        return np.array([self.decode([token]) for token in tokens])

    def greedy(self, prompt: list[int], n: int) -> list[int]:
        """The n most likely tokens after the prompt, one after the other."""
        self.reset()
        made = [int(self.decode(prompt).argmax())]
        while len(made) < n:
            made.append(int(self.decode([made[-1]]).argmax()))
        return made


def quantize(source: Path, target: Path, file_type: int) -> Path:
    """llama.cpp's own quantizer; `file_type` is its LLAMA_FTYPE number."""
    llama_library()
    params = C.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = file_type, 2, True
    status = C.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    assert status == 0, f"llama_model_quantize: {status}"
    return target


def mean_kl(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean over positions of KL(reference || other) in nats; logits (n, n_vocab)."""
    p, q = _log_softmax(reference), _log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))
