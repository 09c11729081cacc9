"""What one side does in a process of its own, to be run under a memory cap; prints JSON.

    python -m tests.capped_child llama.cpp|buddyrun|endurance SETTINGS

SETTINGS is the JSON of a `Settings`. Knows nothing of control groups.
"""

import json
import mmap
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from runner.config import EngineConfig
from runner.engine import Engine
from runner.model_sizes import model_sizes
from runner.stats import StatsSnapshot
from tests.chat_memory import anonymous_megabytes
from tests.compare_speed import seconds
from tests.llama_cpp_oracle import LlamaCpp

SAMPLE_EVERY = 50  # tokens between two looks at the memory
_SPARE = 8  # cells of the context that the prompt leaves to the answer
_PIECE_BYTES = 8 << 20
_BLOCK_BYTES = 4096


@dataclass(frozen=True)
class Settings:
    """What both sides are given."""

    model: str
    n_threads: int
    n_ctx: int = 1024
    n_batch: int = 256
    n_prompt: int = 256
    n_decode: int = 48
    seed: int = 0
    n_slots: int = 0  # 0 = as many as the memory buys
    policy: str = "lfu"
    miss: str = "load"
    buddy: str = "off"
    buddy_budget: float = 1.0
    buddy_min_rank: int = 1

    @property
    def engine_config(self) -> EngineConfig:
        return EngineConfig(
            n_ctx=self.n_ctx,
            n_batch=self.n_batch,
            n_threads=self.n_threads,
            context_shift=True,
            moe_cache_slots=self.n_slots,
            moe_cache_policy=self.policy,
            moe_miss=self.miss,
            buddy=self.buddy,
            buddy_budget=self.buddy_budget,
            buddy_min_rank=self.buddy_min_rank,
        )

    def tokens(self, n_vocab: int) -> tuple[list[int], list[int]]:
        """The prompt and the tokens to decode: the same on both sides, others per seed."""
        rng = np.random.default_rng(self.seed)
        tokens = rng.integers(300, n_vocab - 1, self.n_prompt + self.n_decode).tolist()
        return tokens[: self.n_prompt], tokens[self.n_prompt :]


@dataclass(frozen=True)
class Times:
    """What both sides measure, in seconds."""

    load_s: float
    prompt_cold_s: float
    prompt_warm_s: float
    decode_s: list[float]  # of each token


@dataclass(frozen=True)
class Decoding:
    """What buddyrun's counters say of the decoded tokens, per token where they add up."""

    hit_share: float
    loaded_share: float
    on_host_share: float
    substituted_share: float
    policy_us: float  # per MoE layer and token: choosing stand-ins and counting what they carry
    missed_bytes: float  # of the experts that had to be read
    read_bytes: float  # read ahead in vain included
    read_gb_per_s: float  # while reading
    read_s: float
    compute_s: float
    wait_s: float
    python_s: float
    n_slots: tuple[int, ...]
    disk_gb_per_s: tuple[float, float]  # of the file, right before and after
    anonymous_mb: tuple[float, float]  # after the first token and at the end


def run_llama_cpp(settings: Settings) -> dict[str, Any]:
    started = time.perf_counter()
    path, s = Path(settings.model), settings
    with LlamaCpp(path, n_ctx=s.n_ctx, n_batch=s.n_batch, n_threads=s.n_threads) as reference:
        load_s = time.perf_counter() - started
        prompt, tokens = s.tokens(reference.n_vocab)
        cold_s = seconds(lambda: reference.decode(prompt))
        decode_s = [seconds(lambda t=token: reference.decode([t])) for token in tokens]
        reference.reset()
        warm_s = seconds(lambda: reference.decode(prompt))
    return {"times": asdict(Times(load_s, cold_s, warm_s, decode_s))}


def run_buddyrun(settings: Settings) -> dict[str, Any]:
    started = time.perf_counter()
    engine = Engine(settings.model, settings.engine_config)
    load_s = time.perf_counter() - started
    prompt, tokens = settings.tokens(engine.model_config.n_vocab)
    cold_s = seconds(lambda: engine.prefill(prompt))
    engine.reset()
    warm_s = seconds(lambda: engine.prefill(prompt))
    policy_ns = timed_policy(engine)
    disk_before, before = disk_gb_per_s(settings.model), engine.snapshot()
    decode_s = [seconds(lambda: engine.decode(tokens[0]))]
    memory_before = anonymous_megabytes("self")
    decode_s += [seconds(lambda t=token: engine.decode(t)) for token in tokens[1:]]
    memory, spent = anonymous_megabytes("self"), engine.snapshot().counted_since(before)
    disk = (disk_before, disk_gb_per_s(settings.model))
    policy_us = sum(policy_ns) / 1e3 / (len(tokens) * engine.model_config.n_layer)
    decoding = _decoding(engine, spent, disk, (memory_before, memory), policy_us)
    engine.close()
    return {
        "times": asdict(Times(load_s, cold_s, warm_s, decode_s)),
        "decoding": asdict(decoding),
    }


def timed_policy(engine: Engine) -> list[int]:
    """Nanoseconds of every call that the engine makes of its policy from now on."""
    spent: list[int] = []
    policy = engine.buddies.policy
    for name in ("begin", "choose", "spend", "end") if policy is not None else ():
        setattr(policy, name, _timed(getattr(policy, name), spent))
    return spent


def _timed(call: Callable[..., Any], spent: list[int]) -> Callable[..., Any]:
    def timed(*args: Any) -> Any:
        started = time.perf_counter_ns()
        try:
            return call(*args)
        finally:
            spent.append(time.perf_counter_ns() - started)

    return timed


def _decoding(
    engine: Engine,
    spent: StatsSnapshot,
    disk: tuple[float, float],
    memory: tuple[float, float],
    policy_us: float,
) -> Decoding:
    expert_bytes = model_sizes(engine.file, engine.model_config).expert_bytes
    n = spent.n_tokens_generated
    missed = sum(n * size for n, size in zip(spent.loaded, expert_bytes, strict=True))
    return Decoding(
        hit_share=spent.hit_share,
        loaded_share=spent.loaded_share,
        on_host_share=spent.on_host_share,
        substituted_share=spent.substituted_share,
        policy_us=policy_us,
        missed_bytes=missed / n,
        read_bytes=sum(spent.bytes_read) / n,
        read_gb_per_s=spent.read_gb_per_s,
        read_s=spent.read_s / n,
        compute_s=spent.compute_s / n,
        wait_s=spent.wait_s / n,
        python_s=spent.python_s / n,
        n_slots=engine.cache_plan.n_slots,
        disk_gb_per_s=disk,
        anonymous_mb=memory,
    )


def run_endurance(settings: Settings) -> dict[str, Any]:
    """Fill the context, then generate n_decode tokens, shifting; look at the memory meanwhile.

    Keys and values take memory as the context fills; a full one takes no more.
    """
    engine = Engine(settings.model, settings.engine_config)
    sample = _sampler(settings.seed)
    filled = replace(settings, n_prompt=engine.n_ctx - _SPARE)
    prompt, _ = filled.tokens(engine.model_config.n_vocab)
    made: list[int] = []
    anonymous_mb: list[tuple[int, float]] = []
    before = engine.snapshot()
    for step in engine.generate(prompt, sample, settings.n_decode, lambda token: False):
        if not made:
            before = engine.snapshot()
        made.append(step.token)
        if len(made) % SAMPLE_EVERY == 0 or len(made) == settings.n_decode:
            anonymous_mb.append((len(made), anonymous_megabytes("self")))
            print("{:5} tokens: anonymous {:.3f} MB".format(*anonymous_mb[-1]), file=sys.stderr)
    now = engine.snapshot()
    rates = now.since(before)
    engine.close()
    return {
        "tokens": made,
        "anonymous_mb": anonymous_mb,
        "tokens_per_s": rates.generation_tokens_per_s,
        "n_slots": now.n_slots,
        "hit_share": rates.hit_share,
    }


def _sampler(seed: int) -> Callable[[np.ndarray], int]:
    """Draws tokens by their probability, the same ones for the same logits."""
    rng = np.random.default_rng(seed)
    return lambda logits: int((logits + rng.gumbel(size=len(logits))).argmax())


def disk_gb_per_s(path: str) -> float:
    """How fast this file can be read past the page cache: the better of one and two threads."""
    return max(_direct_gb_per_s(path, n_threads) for n_threads in (1, 2))


def _direct_gb_per_s(path: str, n_threads: int, duration_s: float = 1.0) -> float:
    """Pieces of 8 MiB at random blocks, each thread into huge pages of its own."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    memory = [
        mmap.mmap(-1, _PIECE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for _ in range(n_threads)
    ]
    n_bytes = [0] * n_threads
    n_blocks = (os.path.getsize(path) - _PIECE_BYTES) // _BLOCK_BYTES

    def read(thread: int) -> None:
        draw = random.Random(thread)
        while time.perf_counter() - started < duration_s:
            offset = draw.randrange(n_blocks) * _BLOCK_BYTES
            n_bytes[thread] += os.preadv(file, [memory[thread]], offset)

    for piece in memory:
        piece.madvise(mmap.MADV_HUGEPAGE)
        os.preadv(file, [piece], 0)  # the memory is there before the clock runs
    threads = [threading.Thread(target=read, args=(i,)) for i in range(n_threads)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent_s = time.perf_counter() - started
    os.close(file)
    return sum(n_bytes) / spent_s / 1e9


SIDES = {"llama.cpp": run_llama_cpp, "buddyrun": run_buddyrun, "endurance": run_endurance}


def command(side: str, settings: Settings) -> list[str]:
    """What starts this side."""
    return [sys.executable, "-m", "tests.capped_child", side, json.dumps(asdict(settings))]


def main() -> None:
    side, settings = sys.argv[1:]
    print(json.dumps(SIDES[side](Settings(**json.loads(settings)))))


if __name__ == "__main__":
    main()
