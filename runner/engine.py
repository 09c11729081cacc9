"""The engine: loads a model and turns tokens into logits, layer by layer. Knows no text.

One thread drives it. Per MoE layer the router's choice is read back, the miss policy makes a plan,
and the experts run by that plan.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quant.ggml import Backend
from quant.gguf_file import GGUFFile
from runner import context_shift, miss_policy
from runner.batch_graph import BatchGraph, BatchShape, DeviceState, EngineParts
from runner.checks.read_model import read_model
from runner.config import EngineConfig
from runner.engine_limits import choose_limits
from runner.errors import CancelledError, ContextFullError, ModelError, OptionError
from runner.graph_cache import GraphCache
from runner.kv_cache import KVCache, padded_context
from runner.miss_policy import RoutingPlan
from runner.page_in import page_in
from runner.stats import StatsRecorder, StatsSnapshot
from runner.weights import Weights

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
        with ExitStack() as owned:
            self.file = owned.enter_context(GGUFFile.open(path))
            self.model_config = read_model(self.file)
            self._limits = choose_limits(config, self.model_config)
            self.notes = self.model_config.notes + self._limits.notes
            self.backend = owned.enter_context(Backend.cpu(self._limits.n_threads))
            if not page_in(self.file, report, cancelled):
                self.notes += ("The model is larger than the free memory: expect it to be slow.",)
            self._parts = self._allocate(owned)
            largest = BatchShape(self._limits.n_batch, padded_context(self.n_ctx))
            self._graphs = GraphCache(self._parts, largest)
            owned.callback(self._graphs.close)
            self._owned = owned.pop_all()
        self._tokens: list[int] = []  # what the KV cache holds, in order
        self._stats = StatsRecorder(self.model_config.n_layer)

    def close(self) -> None:
        self._owned.close()

    @property
    def n_ctx(self) -> int:
        """Tokens that the context holds."""
        return self._limits.n_ctx

    @property
    def n_threads(self) -> int:
        return self._limits.n_threads

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
        fit, before anything is computed; ModelError when the file was overwritten meanwhile.
        """
        self._check_file()
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
        logits = np.empty(0, np.float32)
        on_prompt(n_cached, len(tokens), n_cached)
        self.backend.set_n_threads(self._limits.n_threads_batch)
        try:
            for start in range(n_cached, len(tokens), self._limits.n_batch):
                batch = tokens[start : start + self._limits.n_batch]
                logits = self._run(batch, is_prompt=True, cancelled=cancelled)
                on_prompt(start + len(batch), len(tokens), n_cached)
        finally:
            self.backend.set_n_threads(self.n_threads)
        return logits

    def decode(self, token: int) -> np.ndarray:
        """Append one token; returns its logits (n_vocab,), overwritten by the next call."""
        return self._run([token], is_prompt=False)

    def reset(self) -> None:
        """Empty the context."""
        self._truncate(0)

    def _run(
        self, tokens: Sequence[int], is_prompt: bool, cancelled: Cancelled = lambda: False
    ) -> np.ndarray:
        start_ns = time.perf_counter_ns()
        position, kv = self.n_past, self._parts.kv
        cells = kv.cells.take(position, len(tokens))
        try:
            kv.clear_visible()
            graph = self._graphs.get(BatchShape(len(tokens), kv.cells.n_visible))
            graph.begin(np.asarray(tokens, np.int32), position, cells)
            plans = self._run_layers(graph, cancelled)
            logits = graph.finish()
        except BaseException:
            kv.truncate(position)  # what was not finished was not read
            raise
        self._tokens += tokens
        total_ns = time.perf_counter_ns() - start_ns
        self._stats.record_batch(len(tokens), plans, total_ns, graph.compute_ns, is_prompt)
        return logits

    def _run_layers(self, graph: BatchGraph, cancelled: Cancelled) -> list[RoutingPlan]:
        """All layers of one batch; returns the plan of each layer with experts."""
        plans = []
        for layer in range(self.model_config.n_layer):
            if cancelled():
                raise CancelledError
            if not self.model_config.is_moe:
                graph.pass_dense(layer)
                continue
            expert_ids = graph.route(layer)
            plan = miss_policy.exact(expert_ids, slot_of=None)
            graph.apply(plan)
            plans.append(plan)
        return plans

    def _check_file(self) -> None:
        change = self.file.find_change()
        if change is not None and not change.is_data_intact:
            raise ModelError(
                f"{change.path} {change.description} since it was loaded; its weights can no "
                "longer be trusted: load the model again"
            )

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
        self._parts.kv.truncate(n_past)
        del self._tokens[n_past:]

    def _fit(self, tokens: list[int]) -> list[int]:
        """The prompt as it can be computed: itself, or without its oldest part if shifting."""
        if not tokens:
            raise OptionError("the prompt is empty: there is nothing to continue")
        if len(tokens) < self.n_ctx:
            return tokens
        if self.config.context_shift:
            return context_shift.without_oldest(tokens, self.n_ctx, self._n_keep)
        raise ContextFullError(
            f"the prompt has {len(tokens)} tokens and the context holds {self.n_ctx}, one of them "
            "for the answer: a larger -c makes more room"
        )

    @property
    def _n_keep(self) -> int:
        """Tokens that a shift keeps: the first, on which attention leans, and --keep more."""
        return min(1 + self.config.n_keep, self.n_ctx - 2)

    def _make_room(self) -> bool:
        """Drop the oldest half of the context if the user allows it."""
        if not self.config.context_shift:
            return False
        n_keep = self._n_keep
        n_discard = (self.n_ctx - n_keep) // 2
        try:
            context_shift.rotate_keys(self._parts, self._parts.kv.cells.shift(n_keep, n_discard))
        except BaseException:
            self.reset()  # keys and positions no longer agree
            raise
        del self._tokens[n_keep : n_keep + n_discard]
        return True

    # loading

    def _allocate(self, owned: ExitStack) -> EngineParts:
        config, limits = self.model_config, self._limits
        weights = Weights(self.file, config, self.backend, limits.n_ctx)
        owned.callback(weights.close)
        kv = KVCache(self.backend, config, limits.n_ctx, limits.type_k, limits.type_v)
        owned.callback(kv.close)
        state = DeviceState(self.backend, config, limits.n_batch, limits.n_ctx)
        owned.callback(state.close)
        if weights.n_copied_bytes:
            self.notes += (
                f"{weights.n_copied_bytes / 1e9:.1f} GB of experts lie scattered in this file and "
                "were copied to memory; converting it with a current llama.cpp avoids that.",
            )
        return EngineParts(self.backend, config, weights, kv, state)
