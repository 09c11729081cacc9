"""A run is judged by the exact run of the same file."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runner import evaluate as module
from runner.config import EngineConfig
from runner.errors import CancelledError, ModelError, OptionError
from runner.evaluate import (
    Listeners,
    compare,
    cost_of,
    cut_windows,
    evaluate,
    record_base,
    windows_of_texts,
)
from runner.miss_policy import RoutingPlan, ServedWeight
from runner.protocol import NamedText, PerplexityFields
from runner.quality.base_run import BaseRun, check_room
from runner.quality.divergence import Scores
from runner.quality.evaluation import Divergence, RunProgress, WindowDone
from runner.session import Session
from runner.stats import StatsSnapshot
from runner.stats_recorder import StatsRecorder
from runner.tokenizer import Tokenizer
from tests.llama_cpp_oracle import LlamaCpp
from tests.paths import DEMO

LN2 = math.log(2)
CACHE = EngineConfig(moe_cache_slots=4, moe_miss="load", n_threads=1)


# the arithmetic


def logits_of(*probabilities: float) -> np.ndarray:
    """Logits with these probabilities, moved by a constant that must not matter."""
    return (np.log(np.array(probabilities)) + 3.5).astype(np.float32)


def scored(*rows: tuple[np.ndarray, np.ndarray, int]) -> Scores:
    scores = Scores(len(rows))
    for base, run, token in rows:
        scores.add(base, run, token)
    return scores


def plain_kl(base: list[float], run: list[float]) -> float:
    """KL(base || run) by its definition, in plain Python."""

    def probabilities(logits: list[float]) -> list[float]:
        exponentials = [math.exp(logit) for logit in logits]
        return [value / math.fsum(exponentials) for value in exponentials]

    pairs = zip(probabilities(base), probabilities(run), strict=True)
    return math.fsum(p * math.log(p / q) for p, q in pairs)


def test_kl_and_probabilities_of_one_token_are_those_on_paper() -> None:
    half, even = logits_of(0.5, 0.25, 0.25), logits_of(1 / 3, 1 / 3, 1 / 3)
    scores = scored((half, even, 0))
    assert scores.kl[0] == pytest.approx(0.5 * math.log(1.5) + 0.5 * math.log(0.75), abs=1e-6)
    assert scores.nll_base[0] == pytest.approx(LN2, abs=1e-6)
    assert scores.nll[0] == pytest.approx(math.log(3), abs=1e-6)
    assert scores.delta_p[0] == pytest.approx(1 / 3 - 1 / 2, abs=1e-6)


def test_kl_is_that_of_its_definition() -> None:
    random = np.random.default_rng(7)
    for scale in (0.1, 1.0, 8.0):
        base = (scale * random.normal(size=500)).astype(np.float32)
        run = (base + random.normal(size=500)).astype(np.float32)
        assert scored((base, run, 3)).kl[0] == pytest.approx(
            plain_kl(base.tolist(), run.tolist()), rel=1e-10
        )


def test_kl_is_directed_from_base_to_the_run() -> None:
    sure, even = logits_of(0.98, 0.01, 0.01), logits_of(0.4, 0.3, 0.3)
    assert scored((sure, even, 0)).kl[0] < scored((even, sure, 0)).kl[0]


def test_equal_logits_have_a_kl_of_exactly_0_and_a_ratio_of_exactly_1() -> None:
    random = np.random.default_rng(1)
    rows = [(random.normal(size=1000) * 10).astype(np.float32) for _ in range(20)]
    found = scored(*((row, row.copy(), 5) for row in rows)).divergence()
    assert (found.kl_mean, found.kl_max, found.kl_min) == (0.0, 0.0, 0.0)
    assert (found.ppl_ratio, found.ln_ppl_ratio, found.ppl_difference) == (1.0, 0.0, 0.0)
    assert (found.top1_agreement, found.top1_agreement_error) == (1.0, 0.0)
    assert (found.delta_p_rms, found.delta_p_rms_error) == (0.0, 0.0)
    assert found.ppl_ratio_error == found.ppl_difference_error == 0.0
    assert found.ppl_correlation == pytest.approx(1.0)


def test_large_logits_do_not_overflow() -> None:
    sure, other = np.array([3e4, 0, -3e4], np.float32), np.array([2e4, 0, 0], np.float32)
    scores = scored((sure, other, 0))
    assert scores.kl[0] == 0.0 and scores.nll[0] == 0.0


def test_a_hopeless_run_has_an_endless_perplexity_and_not_an_error() -> None:
    even, sure = np.zeros(2, np.float32), np.array([0, 3e4], np.float32)
    found = scored((even, sure, 0)).divergence()
    assert found.ppl == math.inf and found.ppl_base == pytest.approx(2.0)
    assert found.kl_mean == pytest.approx(1.5e4 - LN2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_logits_that_are_no_numbers_are_refused(value: float) -> None:
    good, bad = np.zeros(3, np.float32), np.array([0, value, 0], np.float32)
    with pytest.raises(ModelError, match="no numbers"):
        scored((good, bad, 0))


def test_perplexity_is_the_exponential_of_the_mean() -> None:
    half, eighth = logits_of(0.5, 0.5), logits_of(0.125, 0.875)
    found = scored((half, half, 0), (half, eighth, 0)).divergence()
    assert found.n_tokens == 2
    assert found.ppl_base == pytest.approx(2.0, rel=1e-6)
    assert found.ppl == pytest.approx(4.0, rel=1e-6)  # the root of 2 * 8
    assert found.ppl_ratio == pytest.approx(2.0, rel=1e-6)
    assert found.ln_ppl_ratio == pytest.approx(LN2, rel=1e-6)
    assert found.ppl_difference == pytest.approx(2.0, rel=1e-6)


def test_the_same_top_token_is_the_first_of_equals() -> None:
    tie, second = np.array([1, 1, 0], np.float32), np.array([0, 1, 0], np.float32)
    scores = scored((tie, tie, 0), (tie, second, 0), (second, second, 0), (second, tie, 0))
    assert scores.is_same_top.tolist() == [True, False, True, False]
    found = scores.divergence()
    assert found.top1_agreement == 0.5
    assert found.top1_agreement_error == pytest.approx(math.sqrt(0.25 / 3))


def divergence_of(nll: np.ndarray, nll_base: np.ndarray) -> Divergence:
    """Of runs over two tokens that give the right one these logarithms."""
    p, p_base = np.exp(-nll), np.exp(-nll_base)
    return scored(
        *((logits_of(q, 1 - q), logits_of(r, 1 - r), 0) for q, r in zip(p_base, p, strict=True))
    ).divergence()


def test_standard_errors_are_llama_cpps() -> None:
    random = np.random.default_rng(3)
    n = 50
    nll_base = random.uniform(0.1, 3, n)
    nll = nll_base * random.uniform(0.8, 1.2, n)
    found = divergence_of(nll, nll_base)

    def variance_of_mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(((a * b).mean() - a.mean() * b.mean()) / (n - 1))

    own, base = variance_of_mean(nll, nll), variance_of_mean(nll_base, nll_base)
    both = variance_of_mean(nll, nll_base)
    ppl, ppl_base = math.exp(nll.mean()), math.exp(nll_base.mean())
    near = {"rel": 1e-4}
    assert found.ppl_error == pytest.approx(ppl * math.sqrt(own), **near)
    assert found.ppl_base_error == pytest.approx(ppl_base * math.sqrt(base), **near)
    assert found.ppl_correlation == pytest.approx(both / math.sqrt(own * base), **near)
    ratio_error = math.sqrt(own + base - 2 * both)
    assert found.ln_ppl_ratio_error == pytest.approx(ratio_error, **near)
    assert found.ppl_ratio_error == pytest.approx(found.ppl_ratio * ratio_error, **near)
    difference = ppl**2 * own + ppl_base**2 * base - 2 * ppl * ppl_base * both
    assert found.ppl_difference_error == pytest.approx(math.sqrt(difference), **near)
    delta_p = np.exp(-nll) - np.exp(-nll_base)
    squares_error = math.sqrt(variance_of_mean(delta_p**2, delta_p**2))
    assert found.delta_p_mean == pytest.approx(delta_p.mean(), **near)
    assert found.delta_p_rms == pytest.approx(math.sqrt((delta_p**2).mean()), **near)
    assert found.delta_p_rms_error == pytest.approx(0.5 / found.delta_p_rms * squares_error, **near)


def test_ten_tokens_have_no_standard_error() -> None:
    nll = np.linspace(0.1, 1, 10)
    found = divergence_of(nll, nll[::-1])
    assert (found.ppl_error, found.kl_mean_error, found.ppl_ratio_error) == (0.0, 0.0, 0.0)
    assert divergence_of(np.linspace(0.1, 1, 11), np.full(11, 0.5)).ppl_error > 0


def test_quantiles_lie_between_the_values_as_in_llama_cpp() -> None:
    scores = Scores(101)
    scores._kl[:] = np.random.default_rng(0).permutation(np.arange(101.0))
    scores._delta_p[:] = scores._kl - 50
    scores.n_scored = 101
    found = scores.divergence()
    assert (found.kl_min, found.kl_max, found.kl_median) == (0.0, 100.0, 50.0)
    assert (found.kl_p99, found.kl_p95, found.kl_p90, found.kl_p10) == (99.0, 95.0, 90.0, 10.0)
    assert found.kl_p999 == pytest.approx(99.9) and found.kl_p01 == pytest.approx(0.1)
    assert (found.delta_p_p75, found.delta_p_p25, found.delta_p_p5) == (25.0, -25.0, -45.0)


# windows


def test_every_window_begins_with_its_own_bos() -> None:
    windows = cut_windows([5, 6, 7, 8, 9, 10, 11], 4, bos=1)
    assert windows == [[1, 5, 6, 7], [1, 8, 9, 10], [1, 11]]


def test_without_bos_a_rest_of_one_token_is_left_out() -> None:
    assert cut_windows([5, 6, 7, 8, 9], 4) == [[5, 6, 7, 8]]
    assert cut_windows([5], 4) == []
    assert cut_windows([], 4, bos=0) == []


def test_windows_and_tokens_can_be_limited() -> None:
    assert cut_windows(range(2, 100), 4, bos=1, max_windows=2) == [[1, 2, 3, 4], [1, 5, 6, 7]]
    assert cut_windows(range(2, 100), 4, bos=1, max_tokens=4) == [[1, 2, 3, 4], [1, 5]]


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[Tokenizer]:
    with Tokenizer(DEMO) as tokenizer:
        yield tokenizer


def wanted_of(*texts: str, **fields: Any) -> PerplexityFields:
    named = tuple(NamedText(f"text{number}", text) for number, text in enumerate(texts))
    return PerplexityFields(str(DEMO), named, fields.pop("engine", CACHE), **fields)


def test_the_windows_of_all_texts_come_in_order_and_each_text_has_its_limits(
    tokenizer: Tokenizer,
) -> None:
    first, second = "One two three four five six.", "Seven eight nine ten eleven twelve."
    windows = windows_of_texts(wanted_of(first, second, max_tokens=3), tokenizer, 512)
    expected = [
        [tokenizer.bos, *tokenizer.tokenize(text, add_special=False, parse_special=True)[:3]]
        for text in (first, second)
    ]
    assert windows == expected


def test_special_tokens_are_parsed_and_a_bos_of_the_text_is_not_doubled(
    tokenizer: Tokenizer,
) -> None:
    text = tokenizer.bos_text + "hi<|im_end|>"
    (window,) = windows_of_texts(wanted_of(text), tokenizer, 512)
    assert window[0] == tokenizer.bos and tokenizer.bos not in window[1:]
    assert tokenizer.token_text(window[-1]) == "<|im_end|>"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("some words", ""), "text1 is too short: it has 0 tokens and at least 1 are needed"),
        ((), "no text to score"),
    ],
)
def test_a_text_without_a_token_to_score_is_refused(
    texts: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Engine", None)  # it must not come so far
    with pytest.raises(OptionError, match=message):
        evaluate(wanted_of(*texts))


# the file of logits


def test_logits_come_back_as_they_were_as_often_as_wanted() -> None:
    rows = np.random.default_rng(0).normal(size=(5, 33)).astype(np.float32)
    with BaseRun(DEMO, [[1, 2, 3], [1, 2, 3, 4]]) as base:
        for row in rows:
            base.write(row)
        for _ in range(2):
            assert [row.tolist() for row in base.rows()] == rows.tolist()


def test_logits_lie_in_the_temporary_folder_where_nobody_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with BaseRun(DEMO, [[1, 2]]) as base:
        base.write(np.zeros(1000, np.float32))
        if os.name == "posix":
            assert list(tmp_path.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_told_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = type("Usage", (), {"free": 100 << 20})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    check_room(1000, 4096)
    with pytest.raises(OptionError, match=r"4000 tokens take 65\.5 MB in .*105 MB are free there"):
        check_room(4000, 4096)
    monkeypatch.setattr(module, "Engine", None)
    with pytest.raises(OptionError, match="are free there"):
        evaluate(wanted_of("many words " * 5000))


class FullDisk:
    """A file that takes half of what is written, or nothing."""

    def __init__(self, error: OSError | None) -> None:
        self._error = error

    def write(self, data: memoryview) -> int:
        if self._error:
            raise self._error
        return data.nbytes // 2

    def close(self) -> None:
        pass


@pytest.mark.parametrize("error", [None, OSError(28, "No space left on device")])
def test_a_disk_that_fills_up_meanwhile_is_told(
    error: OSError | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: FullDisk(error))
    with BaseRun(DEMO, [[1, 2]]) as base:
        with pytest.raises(OptionError, match="cannot write logits to .*: (it is full|No space)"):
            base.write(np.zeros(8, np.float32))


def test_no_folder_for_temporary_files_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.TemporaryFile", fail)
    with pytest.raises(OptionError, match="temporary file: .*No usable temporary directory"):
        BaseRun(DEMO, [[1, 2]])


# two runs, with an engine that follows a script


class ScriptedEngine:
    """Its logits favour the token that comes, by more or less; counts who is open."""

    log: list[Any]
    n_open = 0
    warnings = ("There is no GPU.",)
    n_vocab = 16

    def __init__(
        self, path: Path, config: EngineConfig, on_progress: Any, cancelled: Callable[[], bool]
    ) -> None:
        assert ScriptedEngine.n_open == 0, "two engines at a time"
        ScriptedEngine.n_open += 1
        ScriptedEngine.log.append(config)
        on_progress("reading weights", 1, 1)
        self._gain = 1.0 if config.buddy == "off" else 0.5
        self._recorder = StatsRecorder(1, (4,))

    def close(self) -> None:
        ScriptedEngine.n_open -= 1

    def reset(self) -> None:
        ScriptedEngine.log.append("reset")

    def decode(self, token: int) -> np.ndarray:
        ScriptedEngine.log.append(token)
        plan = RoutingPlan(
            np.zeros((1, 2), np.int32), (), (), 1, 1, 0,
            weight=ServedWeight(0.75, 0.25, 0.0, 0.0, 0.0),
        )  # fmt: skip
        self._recorder.record_batch(1, (plan,), 500_000_000, 1, 1, is_prompt=False)
        self._recorder.record_read(0, 100, 1)
        logits = np.zeros(self.n_vocab, np.float32)
        logits[(token + 1) % self.n_vocab] = self._gain
        return logits

    def snapshot(self) -> StatsSnapshot:
        return self._recorder.snapshot(0, 64)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    ScriptedEngine.log, ScriptedEngine.n_open = [], 0
    monkeypatch.setattr(module, "Engine", ScriptedEngine)
    return ScriptedEngine.log


WINDOWS = [[0, 5, 6, 7], [0, 8]]


def test_every_token_but_the_last_of_a_window_is_decoded_from_an_empty_context(
    script: list[Any],
) -> None:
    record_base("model", CACHE, WINDOWS).close()
    assert script[1:] == ["reset", 0, 5, 6, "reset", 0]


def test_the_first_run_is_exact_and_both_have_the_same_cache_and_count_weight(
    script: list[Any],
) -> None:
    config = replace(CACHE, buddy="router", n_ctx=99, context_shift=True, verify_every=64)
    with record_base("model", config, WINDOWS) as base:
        compare(base, config)
    first, second = (entry for entry in script if isinstance(entry, EngineConfig))
    assert first == replace(second, buddy="off")
    expected = replace(CACHE, buddy="router", n_ctx=4, counts_weight=True)
    assert second == expected
    assert ScriptedEngine.n_open == 0


def test_the_figures_are_those_of_the_scored_tokens(script: list[Any]) -> None:
    config = replace(CACHE, buddy="router")
    with record_base("model", config, WINDOWS) as base:
        found = compare(base, config)
    divergence = found.divergence
    logs = {
        gain: [gain * (is_next) - math.log(math.exp(gain) + 15) for is_next in (0, 1, 1, 0)]
        for gain in (1.0, 0.5)
    }  # 0 -> 5 is not what the engine favours, 5 -> 6 and 6 -> 7 are, 0 -> 8 is not
    assert divergence.n_tokens == 4
    assert divergence.ppl_base == pytest.approx(math.exp(-sum(logs[1.0]) / 4))
    assert divergence.ppl == pytest.approx(math.exp(-sum(logs[0.5]) / 4))
    p, q = ([math.exp(g) / (math.exp(g) + 15), 1 / (math.exp(g) + 15)] for g in (1.0, 0.5))
    kl = p[0] * math.log(p[0] / q[0]) + 15 * p[1] * math.log(p[1] / q[1])
    assert divergence.kl_mean == pytest.approx(kl) == pytest.approx(divergence.kl_max)
    assert divergence.top1_agreement == 1.0
    assert (found.n_windows, found.n_ctx, found.moe_cache_slots) == (2, 4, 4)
    assert (found.run.seconds, found.run.tokens_per_s) == (2.0, 2.0)
    assert (found.run.bytes_read, found.base.bytes_read, found.bytes_read_ratio) == (400, 400, 1.0)
    assert (found.run.hit_share, found.run.hit_weight_share) == (0.5, 0.75)
    assert (found.run.loaded_share, found.run.loaded_weight_share) == (0.5, 0.25)


def test_one_exact_run_serves_many_comparisons(script: list[Any]) -> None:
    with record_base("model", CACHE, WINDOWS) as base:
        found = [
            compare(base, replace(CACHE, buddy=buddy)).divergence.kl_mean
            for buddy in ("router", "off", "prior")
        ]
    assert found[0] == found[2] > found[1] == 0.0
    assert sum(isinstance(entry, EngineConfig) for entry in script) == 4


def test_scores_of_every_token_can_be_had(script: list[Any]) -> None:
    scores = Scores(4)
    with record_base("model", CACHE, WINDOWS) as base:
        compare(base, CACHE, scores=scores)
    assert scores.nll.tolist() == scores.nll_base.tolist() and len(scores.nll) == 4


def test_progress_tells_both_runs_and_every_window_of_the_second(
    script: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_REPORT_EVERY_S", 0.0)
    events: list[Any] = []
    stages: list[Any] = []
    listeners = Listeners(lambda *stage: stages.append(stage), events.append)
    with record_base("model", CACHE, WINDOWS, listeners) as base:
        compare(base, replace(CACHE, buddy="router"), listeners)
    assert stages == [("reading weights", 1, 1)] * 2
    shown = [
        f"window {event.number}: {event.divergence.n_tokens}"
        if isinstance(event, WindowDone)
        else (event.is_base, event.n_done, event.n_total)
        for event in events
    ]
    assert shown == [
        (True, 1, 4), (True, 2, 4), (True, 3, 4), (True, 4, 4),
        (False, 1, 4), (False, 2, 4), (False, 3, 4), "window 1: 3", (False, 4, 4), "window 2: 4",
    ]  # fmt: skip
    progress = [event for event in events if isinstance(event, RunProgress)]
    assert [event.warnings for event in progress if event.n_done == 1] == [
        ("There is no GPU.",), ("There is no GPU.",),
    ]  # fmt: skip
    assert not any(event.warnings for event in progress if event.n_done > 1)
    last = progress[-1]
    assert last.kl_mean > 0 and last.ppl > 1


@pytest.mark.parametrize("after", [0, 2, 5])
def test_a_cancelled_run_ends_at_once_and_closes_everything(
    after: int, script: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []
    monkeypatch.setattr(BaseRun, "close", lambda base: closed.append(True))
    calls = iter(range(after))
    listeners = Listeners(cancelled=lambda: next(calls, None) is None)
    with pytest.raises(CancelledError):
        with record_base("model", CACHE, WINDOWS, listeners) as base:
            compare(base, CACHE, listeners)
    assert ScriptedEngine.n_open == 0 and closed == [True]
    assert sum(isinstance(entry, int) for entry in script) == after


def test_what_nobody_counts_is_a_hit_of_full_weight() -> None:
    recorder = StatsRecorder(1)
    plan = RoutingPlan(np.zeros((1, 2), np.int32), (), (), 2, 0, 0)
    recorder.record_batch(1, (plan,), 1, 1, 1, is_prompt=False)
    cost = cost_of(recorder.snapshot(0, 8))
    assert (cost.hit_share, cost.hit_weight_share) == (1.0, 1.0)
    assert (cost.loaded_weight_share, cost.substituted_weight_share) == (0.0, 0.0)


def test_dropped_weight_counts_as_substituted() -> None:
    recorder = StatsRecorder(1, (4,))
    weight = ServedWeight(0.5, 0.125, 0.0, 0.25, 0.125)
    plan = RoutingPlan(np.zeros((1, 4), np.int32), (), (), 1, 1, 0, 1, 1, weight=weight)
    recorder.record_batch(1, (plan,), 1, 1, 1, is_prompt=False)
    cost = cost_of(recorder.snapshot(0, 8))
    assert (cost.substituted_weight_share, cost.dropped_weight_share) == (0.375, 0.125)
    assert (cost.substituted_share, cost.dropped_share) == (0.25, 0.25)
    assert cost.hit_weight_share + cost.loaded_weight_share + cost.on_host_weight_share == 0.625


# the real engine


STORY = (DEMO.parent.parent.parent / "tests" / "data" / "held_out" / "story.txt").read_text()


def test_two_exact_runs_differ_by_nothing_at_all() -> None:
    found = evaluate(wanted_of(STORY, engine=replace(CACHE, n_ctx=64), max_tokens=150))
    divergence = found.divergence
    assert (divergence.kl_max, divergence.ppl_ratio, divergence.top1_agreement) == (0.0, 1.0, 1.0)
    assert divergence.delta_p_max == divergence.delta_p_min == 0.0
    assert (divergence.n_tokens, found.n_windows, found.n_ctx) == (150, 3, 64)
    assert 0.4 < found.run.hit_share < 0.9
    assert found.run.hit_share == found.base.hit_share
    assert found.run.hit_share + found.run.loaded_share == pytest.approx(1.0)
    assert found.run.hit_weight_share + found.run.loaded_weight_share == pytest.approx(1.0)
    assert found.run.bytes_read == found.base.bytes_read > 0
    assert found.texts == ("text0",)


def test_stand_ins_cost_something_and_every_pair_is_in_one_share() -> None:
    config = replace(CACHE, n_ctx=64, buddy="router", buddy_budget=1.0)
    found = evaluate(wanted_of(STORY, engine=config, max_tokens=150))
    run = found.run
    assert found.policy == "router" and found.buddy_budget == 1.0
    assert run.substituted_share > 0.05 and found.divergence.kl_mean > 0
    assert found.base.substituted_share == 0
    assert found.bytes_read_ratio < 1
    shares = (run.hit_share, run.substituted_share, run.loaded_share, run.on_host_share,
              run.dropped_share)  # fmt: skip
    weights = (run.hit_weight_share, run.substituted_weight_share, run.loaded_weight_share,
               run.on_host_weight_share)  # fmt: skip
    assert sum(shares) == pytest.approx(1.0) == pytest.approx(sum(weights))


def test_perplexity_is_llama_cpps_token_by_token(tokenizer: Tokenizer) -> None:
    wanted = wanted_of(STORY, max_tokens=140)
    windows = windows_of_texts(wanted, tokenizer, 64)
    scores = Scores(140)
    with record_base(DEMO, replace(CACHE, n_ctx=64), windows) as base:
        mine = np.array([row.copy() for row in base.rows()])
        found = compare(base, CACHE, scores=scores)
    with LlamaCpp(DEMO, n_ctx=256) as llama:
        assert llama.tokenize(STORY, add_special=True)[:64] == windows[0]
        theirs = np.concatenate([llama.teacher_forced(window[:-1]) for window in windows])
    assert mine.shape == theirs.shape == (140, tokenizer.n_vocab)
    assert np.array_equal(mine, theirs), "the same operations in the same order"
    right = [token for window in windows for token in window[1:]]
    shifted = theirs.astype(np.float64) - theirs.max(axis=1, keepdims=True)
    normal = np.log(np.exp(shifted).sum(axis=1))
    nll = normal - shifted[np.arange(len(right)), right]
    assert np.abs(scores.nll_base - nll).max() < 1e-12
    assert found.divergence.ppl_base == pytest.approx(math.exp(nll.mean()), rel=1e-12)


def test_a_session_closes_its_model_before_the_first_run(
    script: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ScriptedEngine, "n_vocab", 4096)
    session = Session()
    session.load(
        str(DEMO), EngineConfig(n_ctx=64, n_threads=1), None, lambda *_: None, lambda: False
    )
    closed: list[object] = []
    owners = session._loaded().owners
    owners.callback(lambda: closed.append(list(script)))
    session.perplexity(wanted_of("Some words."), lambda *_: None, lambda event: None, lambda: False)
    assert closed == [[]]  # nothing was open then
    with pytest.raises(OptionError, match="no model is loaded"):
        session.snapshot()
