"""Judges a run by the exact run of the same file, token by token. Knows no terminal, no socket.

Unlike llama-perplexity, which computes a window as one batch and scores its second half, every
token is decoded alone, as in a chat, so the cache of experts evolves as it does there; and every
token of a window but the first is scored, by the logits behind the tokens in front of it.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from quant.gguf_file import GGUFFile
from runner.checks.read_model import read_model
from runner.config import BUDDY_OFF, EngineConfig
from runner.engine import Engine
from runner.engine_limits import choose_limits
from runner.errors import CancelledError, OptionError
from runner.protocol import PerplexityFields
from runner.quality.base_run import BaseRun, Window, check_room
from runner.quality.divergence import Scores, Softmax, perplexity
from runner.quality.evaluation import Evaluation, RunCost, RunProgress, WindowDone
from runner.standins.choose_policy import check_settings, choose_policy
from runner.stats import StatsSnapshot, share
from runner.tokenizer import Tokenizer

DEFAULT_N_CTX = 512  # tokens of a window, as in llama-perplexity
_REPORT_EVERY_S = 0.2


@dataclass(frozen=True)
class Listeners:
    """Who hears of a run while it goes on, and who may end it."""

    load: Callable[[str, int, int], None] = lambda stage, done, total: None
    emit: Callable[[RunProgress | WindowDone], None] = lambda event: None
    cancelled: Callable[[], bool] = lambda: False


_NOBODY = Listeners()


def evaluate(wanted: PerplexityFields, listeners: Listeners = _NOBODY) -> Evaluation:
    """Judge the settings that are wanted on the texts: an exact run, then the run itself.

    Raises BuddyrunError, first for what is known without loading; CancelledError.
    """
    config = wanted.engine
    windows = prepare(wanted, [config])
    with record_base(wanted.model, config, windows, listeners) as base:
        evaluation = compare(base, config, listeners)
    return replace(evaluation, texts=tuple(text.name for text in wanted.texts))


def prepare(wanted: PerplexityFields, runs: Sequence[EngineConfig]) -> list[list[int]]:
    """The windows of the texts, after a look at what the runs need, so that problems are told
    before the exact run. Raises BuddyrunError."""
    config = replace(wanted.engine, n_ctx=wanted.engine.n_ctx or DEFAULT_N_CTX)
    with GGUFFile.open(wanted.model) as file:
        model = read_model(file)
        choose_limits(config, model)
        for run in runs:
            check_settings(run)
        for run in {run.buddy: run for run in runs}.values():
            choose_policy(run, file, model, (model.n_expert_used,))
        first_part = file.paths[0]
    with Tokenizer(first_part) as tokenizer:
        windows = windows_of_texts(wanted, tokenizer, config.n_ctx)
        check_room(sum(len(window) - 1 for window in windows), tokenizer.n_vocab)
    return windows


def windows_of_texts(wanted: PerplexityFields, tokenizer: Tokenizer, n_ctx: int) -> list[list[int]]:
    """The windows of all texts in order. Raises OptionError for a text without a token to score."""
    bos = tokenizer.bos if tokenizer.add_bos else -1
    windows = []
    for text in wanted.texts:
        tokens = tokenizer.tokenize(text.text, add_special=False, parse_special=True)
        if tokens and tokens[0] == bos:
            tokens = tokens[1:]  # every window has its own
        cut = cut_windows(tokens, n_ctx, bos, wanted.max_windows, wanted.max_tokens)
        if not cut:
            n_needed = 1 if bos >= 0 else 2
            raise OptionError(
                f"{text.name} is too short: it has {len(tokens)} tokens and at least {n_needed}"
                " are needed to score one"
            )
        windows += cut
    if not windows:
        raise OptionError("there is no text to score")
    return windows


def cut_windows(
    tokens: Sequence[int], n_ctx: int, bos: int = -1, max_windows: int = 0, max_tokens: int = 0
) -> list[list[int]]:
    """Windows of n_ctx tokens, each begun by one `bos` of its own unless that is -1.

    The last one may be shorter; a rest without a token to score is left out. At most max_windows
    of the first max_tokens tokens; 0 = all.
    """
    start = [bos] if bos >= 0 else []
    step = n_ctx - len(start)
    used = tokens[:max_tokens] if max_tokens else tokens
    windows = [[*start, *used[at : at + step]] for at in range(0, len(used), step)]
    windows = [window for window in windows if len(window) > 1]
    return windows[:max_windows] if max_windows else windows


def record_base(
    path: str | Path,
    config: EngineConfig,
    windows: Sequence[Window],
    listeners: Listeners = _NOBODY,
) -> BaseRun:
    """Run the windows exactly, with the cache settings of `config`; close what is returned.

    An engine is loaded for this and closed. Raises OptionError when the disk has no room,
    CancelledError, and what loading raises.
    """
    assert windows
    with ExitStack() as undo:
        base = undo.enter_context(BaseRun(Path(path), windows))
        exact = replace(config, buddy=BUDDY_OFF)
        base.cost = cost_of(_run(base, exact, _Recorder(base), listeners))
        undo.pop_all()
    return base


def compare(
    base: BaseRun,
    config: EngineConfig,
    listeners: Listeners = _NOBODY,
    scores: Scores | None = None,
) -> Evaluation:
    """Run the windows of `base` with `config` and judge every token by what base said.

    An engine is loaded for this and closed. `scores`, of base.n_tokens tokens, gets the figures of
    each one. Raises CancelledError, and what loading raises.
    """
    assert base.cost is not None, "the exact run has not ended"
    scores = scores or Scores(base.n_tokens)
    counted = _run(base, config, _Judge(base, scores, listeners), listeners)
    return Evaluation(
        divergence=scores.divergence(),
        run=cost_of(counted),
        base=base.cost,
        policy=counted.buddy or BUDDY_OFF,
        buddy_budget=counted.buddy_budget,
        buddy_min_rank=config.buddy_min_rank,
        moe_cache_slots=min(counted.n_slots, default=0),
        n_ctx=base.n_ctx,
        n_windows=len(base.windows),
    )


def cost_of(counted: StatsSnapshot) -> RunCost:
    """What a run took, from the counters of it alone."""
    weights = {
        name: sum(getattr(counted, f"{name}_weight")) for name in ("hit", "loaded", "on_host")
    }
    has_weights = counted.weight > 0  # without a cache nobody counts them: all are hits
    hit_weight = share(weights["hit"], counted.weight) if has_weights else counted.hit_share
    return RunCost(
        hit_share=counted.hit_share,
        substituted_share=counted.substituted_share,
        loaded_share=counted.loaded_share,
        on_host_share=counted.on_host_share,
        dropped_share=counted.dropped_share,
        hit_weight_share=hit_weight,
        substituted_weight_share=counted.substituted_weight_share,
        loaded_weight_share=share(weights["loaded"], counted.weight),
        on_host_weight_share=share(weights["on_host"], counted.weight),
        dropped_weight_share=share(sum(counted.dropped_weight), counted.weight),
        bytes_read=sum(counted.bytes_read),
        seconds=counted.generation_s,
        tokens_per_s=share(counted.n_tokens_generated, counted.generation_s),
    )


class _Scorer(Protocol):
    """What is done with the logits of a run."""

    def add(self, logits: np.ndarray, token: int) -> None:
        """Take the logits in front of `token`."""

    def progress(self) -> RunProgress:
        """How far it is."""

    def end_window(self, number: int) -> None:
        """Window `number`, from 1, is over."""


class _Recorder:
    """Keeps the logits of the exact run."""

    def __init__(self, base: BaseRun) -> None:
        self._base = base
        self._nll: list[float] = []
        self._softmax: Softmax | None = None

    def add(self, logits: np.ndarray, token: int) -> None:
        self._base.write(logits)
        self._softmax = self._softmax or Softmax(len(logits))
        self._softmax.take(logits)
        self._nll.append(-self._softmax.ln_p(token))

    def progress(self) -> RunProgress:
        ppl = perplexity(np.array(self._nll))
        return RunProgress(True, len(self._nll), self._base.n_tokens, ppl)

    def end_window(self, number: int) -> None:
        pass


class _Judge:
    """Scores a run by the logits of the exact one."""

    def __init__(self, base: BaseRun, scores: Scores, listeners: Listeners) -> None:
        self._rows = base.rows()
        self._n_tokens = base.n_tokens
        self._scores = scores
        self._listeners = listeners

    def add(self, logits: np.ndarray, token: int) -> None:
        self._scores.add(next(self._rows), logits, token)

    def progress(self) -> RunProgress:
        scores = self._scores
        kl_mean = float(scores.kl.mean())
        return RunProgress(False, scores.n_scored, self._n_tokens, perplexity(scores.nll), kl_mean)

    def end_window(self, number: int) -> None:
        self._listeners.emit(WindowDone(number, self._scores.divergence()))


def _run(
    base: BaseRun, config: EngineConfig, scorer: _Scorer, listeners: Listeners
) -> StatsSnapshot:
    """Decode every window from an empty context; returns the counters of that."""
    config = replace(
        config, n_ctx=base.n_ctx, context_shift=False, counts_weight=True, verify_every=0
    )
    reported_s = -math.inf
    with closing(Engine(base.path, config, listeners.load, listeners.cancelled)) as engine:
        before, warnings = engine.snapshot(), engine.warnings
        for number, window in enumerate(base.windows):
            engine.reset()
            for token, following in pairwise(window):
                if listeners.cancelled():
                    raise CancelledError
                scorer.add(engine.decode(token), following)
                if time.monotonic() - reported_s >= _REPORT_EVERY_S:
                    listeners.emit(replace(scorer.progress(), warnings=warnings))
                    reported_s, warnings = time.monotonic(), ()
            scorer.end_window(number + 1)
        return engine.snapshot().counted_since(before)
