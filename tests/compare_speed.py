"""Speed and memory beside llama.cpp: the same file, threads and tokens, taking turns in one run.

    python -m tests.compare_speed [MODEL] [--threads N] [--rounds N]

Without MODEL a random Mixtral of 2.54 GB is written to a temporary folder first.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runner.config import EngineConfig
from runner.engine import Engine
from tests.llama_cpp_oracle import LlamaCpp
from tests.paths import DEMO
from tests.random_model import write_big_mixtral

TURN = 8  # tokens decoded by one side before the other has its turn


@dataclass(frozen=True)
class Comparison:
    """Tokens per second of both sides, one pair a round, and the ratios ours / theirs."""

    name: str
    theirs: list[float]
    ours: list[float]

    @property
    def ratios(self) -> np.ndarray:
        return np.array(self.ours) / np.array(self.theirs)

    def __str__(self) -> str:
        low, middle, high = np.percentile(self.ratios, [0, 50, 100])
        return (
            f"{self.name:<22} llama.cpp {np.median(self.theirs):7.2f} t/s   "
            f"buddyrun {np.median(self.ours):7.2f} t/s   "
            f"ratio {middle:.3f} ({low:.3f} to {high:.3f}, {len(self.ours)} rounds)"
        )


def compare_decode(reference: LlamaCpp, engine: Engine, tokens: list[int]) -> tuple[float, float]:
    """Median time of a turn for each side, as tokens per second."""
    reference.reset()
    engine.reset()
    reference.decode(tokens[:1])
    engine.decode(tokens[0])
    theirs, ours = [], []
    for start in range(1, len(tokens) - TURN, TURN):
        turn = tokens[start : start + TURN]
        theirs.append(seconds(lambda turn=turn: [reference.decode([t]) for t in turn]))
        ours.append(seconds(lambda turn=turn: [engine.decode(t) for t in turn]))
    return TURN / float(np.median(theirs)), TURN / float(np.median(ours))


def compare_prompt(reference: LlamaCpp, engine: Engine, tokens: list[int]) -> tuple[float, float]:
    """Tokens per second of one whole prompt for each side."""
    reference.reset()
    engine.reset()
    theirs = seconds(lambda: reference.decode(tokens))
    ours = seconds(lambda: engine.prefill(tokens))
    return len(tokens) / theirs, len(tokens) / ours


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(
    path: Path, n_threads: int, n_rounds: int, repack: bool, n_prompt: int = 512
) -> list[Comparison]:
    """Decode 64 tokens and read a prompt, n_rounds times each, taking turns."""
    engine = Engine(path, EngineConfig(n_threads=n_threads, n_ctx=1024))
    rng = np.random.default_rng(1)
    label = ", repacked" if repack else ""
    decode = Comparison("decode" + label, [], [])
    prompt = Comparison(f"prompt of {n_prompt}{label}", [], [])
    with LlamaCpp(path, n_threads=n_threads, repack=repack) as reference:
        for _ in range(n_rounds):
            tokens = list(map(int, rng.integers(300, engine.model_config.n_vocab - 1, n_prompt)))
            for result, measure in ((decode, compare_decode), (prompt, compare_prompt)):
                n = 66 if measure is compare_decode else n_prompt
                theirs, ours = measure(reference, engine, tokens[:n])
                result.theirs.append(theirs)
                result.ours.append(ours)
    engine.close()
    return [decode, prompt]


def python_us_per_layer(path: Path, n_threads: int) -> float:
    """Time outside ggml per MoE layer and decoded token, in microseconds."""
    engine = Engine(path, EngineConfig(n_threads=n_threads))
    tokens = list(map(int, np.random.default_rng(1).integers(300, 4000, 300)))
    for token in tokens[:10]:
        engine.decode(token)
    before = engine.snapshot()
    for token in tokens[10:]:
        engine.decode(token)
    after = engine.snapshot()
    engine.close()
    spent = after.python_s - before.python_s
    return spent / (after.n_routings - before.n_routings) * 1e6


def anonymous_megabytes(path: Path) -> dict[str, float]:
    """Anonymous memory of both processes after an answer, in MB (the weights are file pages)."""
    command = [sys.executable, "-m", "tests.chat_memory", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    used: dict[str, float] = json.loads(done.stdout)
    return used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repack", action="store_true", help="let llama.cpp repack its weights")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.model or write_big_mixtral(Path(folder) / "mixtral.gguf")
        for name, megabytes in anonymous_megabytes(path).items():
            print(f"anonymous memory of {name}: {megabytes:.0f} MB", flush=True)
        for comparison in compare(path, options.threads, options.rounds, options.repack):
            print(comparison, flush=True)
    spent = python_us_per_layer(DEMO, options.threads)
    print(f"outside ggml, demo model: {spent:.1f} us per MoE layer and token")


if __name__ == "__main__":
    main()
