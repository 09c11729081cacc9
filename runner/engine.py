"""The engine: loads a model and turns tokens into logits, layer by layer. Knows no text.

One thread drives it. Per MoE layer the router's choice is read back, the miss policy makes a plan,
and the experts run by that plan.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quant.ggml import Backend
from quant.ggml_types import GGML_TYPES_BY_NAME, GGMLType
from quant.gguf_file import GGUFFile
from runner import context_shift, miss_policy
from runner.batch_graph import BatchGraph, BatchShape, DeviceState, EngineParts
from runner.config import DEFAULT_MAX_CTX, EngineConfig
from runner.errors import CancelledError, ContextFullError, ModelError, OptionError
from runner.graph_cache import GraphCache
from runner.hardware import n_physical_cores
from runner.kv_cache import KVCache, padded_context
from runner.model_config import ModelConfig
from runner.page_in import page_in
from runner.stats import StatsRecorder, StatsSnapshot
from runner.weights import Weights

CACHE_TYPES = ("f16", "q8_0")

Progress = Callable[[str, int, int], None]
Cancelled = Callable[[], bool]


@dataclass(frozen=True)
class Step:
    """One generated token, or the end."""

    token: int  # -1 when `stop_reason` is "cancelled" or "context"
    stop_reason: str | None = None  # "eos" (token is not text), "length", "context", "cancelled"


class Engine:
    """A loaded model with its context."""

    def __init__(
        self,
        path: str | Path,
        config: EngineConfig,
        on_progress: Progress | None = None,
        cancelled: Cancelled = lambda: False,
    ) -> None:
        """Load a model.

        Raises GGUFError, ModelError, BackendError or OptionError; CancelledError when `cancelled`.
        """
        report = on_progress or (lambda stage, done, total: None)
        self.config = config
        self.notes: tuple[str, ...] = ()
        report("reading the header", 0, 1)
        self.file = GGUFFile.open(path)
        self.model_config = ModelConfig.from_gguf(self.file)
        self.n_ctx = self._choose_context()
        self.n_threads = config.n_threads or n_physical_cores()
        self._n_threads_batch = config.n_threads_batch or self.n_threads
        self._check_options()
        self.backend = Backend.cpu(self.n_threads)
        if not page_in(self.file, report, cancelled):
            self.notes += ("The model is larger than the free memory: expect it to be slow.",)
        self._allocate()
        self._tokens: list[int] = []  # what the KV cache holds, in order
        self._stats = StatsRecorder(self.model_config.n_layer)

    def close(self) -> None:
        self._graphs.close()
        self._state.close()
        self._kv.close()
        self._weights.close()
        self.backend.close()
        self.file.close()

    @property
    def n_past(self) -> int:
        """Tokens in the context."""
        return len(self._tokens)

    @property
    def device_name(self) -> str:
        return self.backend.description

    @property
    def ggml_version(self) -> str:
        return self.backend.ggml.version_text

    def snapshot(self) -> StatsSnapshot:
        return self._stats.snapshot(self.n_past, self.n_ctx)

    # generating

    def generate(
        self,
        tokens: Sequence[int],
        sample: Callable[[np.ndarray], int],
        n_predict: int,
        is_stop: Callable[[int], bool],
        cancelled: Cancelled = lambda: False,
        on_prompt: Callable[[int, int, int], None] = lambda done, total, cached: None,
    ) -> Iterator[Step]:
        """Continue `tokens`, the whole context so far; what the cache holds is not recomputed.

        `sample` picks a token from logits (n_vocab,). At most n_predict tokens, -1 = no limit. The
        last step carries the reason for the stop. Raises ContextFullError when the prompt does not
        fit, before anything is computed.
        """
        try:
            logits = self.prefill(self._fit(list(tokens)), cancelled, on_prompt)
            n_made = 0
            while n_predict < 0 or n_made < n_predict:
                token = sample(logits)
                n_made += 1
                if is_stop(token):
                    yield Step(token, "eos")
                    return
                yield Step(token, "length" if n_made == n_predict else None)
                if n_made == n_predict:
                    return
                if cancelled():
                    raise CancelledError
                if self.n_past >= self.n_ctx and not self._make_room():
                    yield Step(-1, "context")
                    return
                logits = self.decode(token)
        except CancelledError:
            yield Step(-1, "cancelled")

    def prefill(
        self,
        tokens: Sequence[int],
        cancelled: Cancelled = lambda: False,
        on_prompt: Callable[[int, int, int], None] = lambda done, total, cached: None,
    ) -> np.ndarray:
        """Make `tokens` the context; returns the last token's logits (n_vocab,).

        on_prompt(done, total, n_cached) after every batch. Raises CancelledError; what was
        computed until then stays in the cache.
        """
        n_cached = self._reuse(tokens)
        self.backend.set_n_threads(self._n_threads_batch)
        logits = np.empty(0, np.float32)
        on_prompt(n_cached, len(tokens), n_cached)
        for start in range(n_cached, len(tokens), self.config.n_batch):
            batch = tokens[start : start + self.config.n_batch]
            logits = self._run(batch, cancelled=cancelled)
            on_prompt(start + len(batch), len(tokens), n_cached)
        self.backend.set_n_threads(self.n_threads)
        return logits[-1]

    def decode(self, token: int) -> np.ndarray:
        """Append one token; returns its logits (n_vocab,), overwritten by the next call."""
        return self._run([token])[-1]

    def evaluate(self, tokens: Sequence[int]) -> np.ndarray:
        """Append tokens, at most n_batch; returns the logits of each (n_tokens, n_vocab)."""
        return self._run(tokens, all_outputs=True)

    def reset(self) -> None:
        """Empty the context."""
        self._truncate(0)

    def _run(
        self,
        tokens: Sequence[int],
        all_outputs: bool = False,
        cancelled: Cancelled = lambda: False,
    ) -> np.ndarray:
        start = time.perf_counter_ns()
        position = self.n_past
        cells = self._kv.cells.take(position, len(tokens))
        self._kv.clear_visible()
        shape = BatchShape(len(tokens), self._kv.cells.n_visible, all_outputs)
        graph = self._graphs.get(shape)
        graph.begin(np.asarray(tokens, np.int32), position, cells)
        try:
            logits = self._forward(graph, cancelled)
        except CancelledError:
            self._kv.cells.truncate(position)
            raise
        self._tokens += tokens
        self._stats.add_compute(graph.compute_ns)
        is_prompt = len(tokens) > 1
        self._stats.add_batch(len(tokens), time.perf_counter_ns() - start, is_prompt)
        return logits

    def _forward(self, graph: BatchGraph, cancelled: Cancelled) -> np.ndarray:
        for layer in self._moe_layers:
            if cancelled():
                raise CancelledError
            expert_ids = graph.route(layer)
            plan = miss_policy.exact(expert_ids, slot_of=None)
            graph.apply(plan)
            self._stats.record(layer, plan)
        return graph.finish()

    # the context

    def _reuse(self, tokens: Sequence[int]) -> int:
        """Keep the cache of the common beginning; at least one token is left to compute."""
        n = 0
        for mine, wanted in zip(self._tokens, tokens[:-1], strict=False):
            if mine != wanted:
                break
            n += 1
        self._truncate(n)
        return n

    def _truncate(self, n_past: int) -> None:
        self._kv.cells.truncate(n_past)
        del self._tokens[n_past:]

    def _fit(self, tokens: list[int]) -> list[int]:
        """The prompt as it can be computed: itself, or without its oldest part if shifting."""
        if not tokens:
            raise OptionError("the prompt is empty: there is nothing to continue")
        if len(tokens) < self.n_ctx:
            return tokens
        if self.config.context_shift:
            return context_shift.without_oldest(tokens, self.n_ctx, self.config.n_keep)
        raise ContextFullError(
            f"the prompt has {len(tokens)} tokens and the context holds {self.n_ctx}, one of them "
            "for the answer: shorten it, use /clear, a larger -c, or --context-shift"
        )

    def _make_room(self) -> bool:
        """Drop the oldest half of the context if the user allows it."""
        if not self.config.context_shift:
            return False
        n_keep = min(self.config.n_keep, self.n_ctx - 2)
        n_discard = (self.n_ctx - n_keep) // 2
        moves = self._kv.cells.shift(n_keep, n_discard)
        context_shift.rotate_keys(self._parts, moves)
        del self._tokens[n_keep : n_keep + n_discard]
        return True

    # loading

    def _choose_context(self) -> int:
        trained = self.model_config.n_ctx_train
        if not self.config.n_ctx:
            n_ctx = min(trained, DEFAULT_MAX_CTX)
            if n_ctx < trained:
                self.notes += (f"The context is {n_ctx} of the model's {trained} tokens (-c).",)
            return n_ctx
        if self.config.n_ctx > trained:
            self.notes += (
                f"The model was trained on {trained} tokens of context; "
                f"beyond them (-c {self.config.n_ctx}) its answers may get worse.",
            )
        return self.config.n_ctx

    def _check_options(self) -> None:
        if self.n_ctx < 2 or self.n_ctx > 1 << 24:
            raise OptionError(f"-c {self.n_ctx}: expected 2 to {1 << 24} tokens")
        if self.config.n_batch < 1:
            raise OptionError(f"-b {self.config.n_batch}: expected at least 1 token")
        for flag, n in (("-t", self.n_threads), ("-tb", self._n_threads_batch)):
            if not 1 <= n <= 512:
                raise OptionError(f"{flag} {n}: expected 1 to 512 threads")
        for flag, name in (("-ctk", self.config.cache_type_k), ("-ctv", self.config.cache_type_v)):
            kind = _cache_type(flag, name)
            if self.model_config.n_embd_head % kind.block_size:
                raise OptionError(
                    f"{flag} {name} stores blocks of {kind.block_size} numbers, and this model's "
                    f"heads have {self.model_config.n_embd_head}: use f16"
                )

    def _allocate(self) -> None:
        config = self.model_config
        self._weights = Weights(self.file, config, self.backend, self.n_ctx)
        type_k = _cache_type("-ctk", self.config.cache_type_k)
        type_v = _cache_type("-ctv", self.config.cache_type_v)
        self._kv = KVCache(self.backend, config, self.n_ctx, type_k, type_v)
        n_batch = min(self.config.n_batch, self.n_ctx)
        self._state = DeviceState(self.backend, config, n_batch, self.n_ctx)
        self._parts = EngineParts(self.backend, config, self._weights, self._kv, self._state)
        largest = BatchShape(n_batch, padded_context(self.n_ctx), all_outputs=False)
        self._graphs = GraphCache(self._parts, largest)
        self._moe_layers = range(config.n_layer if config.n_expert else 0)
        if self._weights.n_copied_bytes:
            self.notes += (
                f"{self._weights.n_copied_bytes / 1e9:.1f} GB of experts lie scattered in this "
                "file and were copied to memory; a file made by a current llama.cpp avoids that.",
            )


def _cache_type(flag: str, name: str) -> GGMLType:
    if name not in CACHE_TYPES:
        raise OptionError(f"{flag} {name}: expected one of {', '.join(CACHE_TYPES)}")
    return GGML_TYPES_BY_NAME[name.upper()]
