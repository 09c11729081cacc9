"""How far a device's answers are from the CPU's: ours, and beside it llama.cpp's own.

    LLAMA_CPP_LIB_PATH=FOLDER python -m tests.device_divergence [F16] [Q8_0] [Q4_K]

The demo model in each kind computes 256 tokens of every kind of held-out text, token by token, and
answers ten prompts greedily, on the CPU and on the first GPU device. Where two answers part, the
gap is how much likelier the CPU found its own token than the device's, in logits.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from quant.devices import Device, cpu_device, devices
from runner.config import EngineConfig
from runner.engine import Engine
from runner.tokenizer import Tokenizer
from tests.llama_cpp_oracle import FILE_TYPES, LlamaCpp, mean_kl, quantize
from tests.paths import DEMO, HELD_OUT

KINDS = ("F16", "Q8_0", "Q4_K")
_N_WINDOW, _N_ANSWER, _N_THREADS = 256, 40, 1
_QUESTIONS = (
    "Hello", "Who are you?", "Tell me a story about a fox and a lamp.",
    "Tell me a story about a rabbit and a key.", 'What does "lamp" mean?', 'Define "cycle".',
    "What is 45 + 6?", "Tell me about the Debian package vim.",
)  # fmt: skip
_BEGINNINGS = ("Once upon a time there was", "The function returns")


class Runner(Protocol):
    """A model with a context, as `LlamaCpp` is one."""

    def reset(self) -> None:
        """Empty the context."""

    def decode(self, tokens: list[int]) -> np.ndarray:
        """Append tokens as one batch; logits of the last, (n_vocab,), for the caller to keep."""


class Ours:
    """Our engine as a `Runner`."""

    def __init__(self, path: Path, device: Device) -> None:
        config = EngineConfig(n_ctx=512, device=device.name.lower(), n_threads=_N_THREADS)
        self._engine = Engine(path, config)

    def close(self) -> None:
        self._engine.close()

    def reset(self) -> None:
        self._engine.reset()

    def decode(self, tokens: list[int]) -> np.ndarray:
        if len(tokens) == 1:
            return self._engine.decode(tokens[0]).copy()
        return self._engine.prefill(tokens).copy()  # only from an empty context


@dataclass(frozen=True)
class Divergence:
    """What one device makes of the same tokens as another."""

    mean_kl: float  # nats, over all tokens of the text
    n_same: int  # answers
    gaps: tuple[float, ...]  # of the answers that part


def windows(tokenizer: Tokenizer) -> list[list[int]]:
    """The first 256 tokens of each kind of held-out text; marks of a chat are one token each."""
    texts = [path.read_text() for path in sorted(HELD_OUT.glob("*.txt"))]
    return [tokenizer.tokenize(text, True, parse_special=True)[:_N_WINDOW] for text in texts]


def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Eight questions in a chat, and two beginnings of a text."""
    marks = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    texts = (*(marks.format(question) for question in _QUESTIONS), *_BEGINNINGS)
    return [tokenizer.tokenize(text, True, parse_special=True) for text in texts]


def text_kl(base: Runner, other: Runner, texts: Sequence[list[int]]) -> float:
    """Mean KL(base || other) over all tokens, each fed alone."""
    sums = [len(text) * mean_kl(forced(base, text), forced(other, text)) for text in texts]
    return sum(sums) / sum(map(len, texts))


def forced(runner: Runner, tokens: list[int]) -> np.ndarray:
    """Token by token from an empty context: logits (n_tokens, n_vocab)."""
    runner.reset()
    return np.array([runner.decode([token]) for token in tokens])


def compare(base: Runner, other: Runner, path: Path) -> Divergence:
    """Both of the model in this file."""
    with Tokenizer(path) as tokenizer:
        is_end, questions = tokenizer.is_end_of_generation, prompts(tokenizer)
        # Prompts first: Mesa 22.3's software Vulkan crashes in a first prompt behind single tokens.
        gaps = [_gap(base, other, prompt, is_end) for prompt in questions]
        kl = text_kl(base, other, windows(tokenizer))
    return Divergence(kl, gaps.count(None), tuple(gap for gap in gaps if gap is not None))


def _gap(
    base: Runner, other: Runner, prompt: list[int], is_end: Callable[[int], bool]
) -> float | None:
    """Where their greedy answers part; None when they do not."""
    (tokens, rows), (others, _) = (_answer(runner, prompt, is_end) for runner in (base, other))
    for row, a, b in zip(rows, tokens, others, strict=False):
        if a != b:
            return float(row[a] - row[b])
    return None


def _answer(
    runner: Runner, prompt: list[int], is_end: Callable[[int], bool]
) -> tuple[list[int], list[np.ndarray]]:
    """The most likely tokens up to the end, and the logits that each was picked from."""
    runner.reset()
    tokens: list[int] = []
    rows = [runner.decode(prompt)]
    while len(tokens) < _N_ANSWER:
        tokens.append(int(rows[-1].argmax()))
        if is_end(tokens[-1]):
            break
        rows.append(runner.decode(tokens[-1:]))
    return tokens, rows


def main() -> None:
    gpu = next((device for device in devices() if device.is_gpu), None)
    if gpu is None:
        sys.exit("no GPU device: set LLAMA_CPP_LIB_PATH")
    kinds = sys.argv[1:] or KINDS
    print(f"The CPU against {gpu.name} ({gpu.description}), {_N_WINDOW} tokens of each text")
    print(f"{'file':<6}{'of':<12}{'mean KL':>10}  same answers, gaps of the others")
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            path = quantize(DEMO, Path(folder) / f"{kind}.gguf", FILE_TYPES[kind])
            with closing(Ours(path, cpu_device())) as base, closing(Ours(path, gpu)) as other:
                _print(kind, "buddyrun", compare(base, other, path))
            with ExitStack() as owned:
                sides = [
                    owned.enter_context(LlamaCpp(path, n_threads=_N_THREADS, device=device))
                    for device in (None, gpu)
                ]
                _print(kind, "llama.cpp", compare(sides[0], sides[1], path))


def _print(kind: str, of: str, found: Divergence) -> None:
    n_answers = found.n_same + len(found.gaps)
    gaps = " ".join(f"{gap:.3f}" for gap in found.gaps)
    print(f"{kind:<6}{of:<12}{found.mean_kl:>10.6f}  {found.n_same} of {n_answers}  {gaps}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
