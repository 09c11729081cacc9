"""Entropy and repeats of answers that are made by hand."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from runner.quality.quality_meter import N_REPEATS, QualityMeter

CERTAIN = np.array([0, 200, 0, 0], np.float32)
EVEN = np.zeros(4, np.float32)


def meter_of(tokens: Sequence[int], logits: np.ndarray = EVEN) -> QualityMeter:
    meter = QualityMeter()
    for token in tokens:
        meter.observe(logits, token)
    return meter


def share_of_repeats(tokens: Sequence[int]) -> float:
    """By the definition: each 4-gram is looked for among those in front of it."""
    last = tokens[-N_REPEATS:]
    grams = [tuple(last[i : i + 4]) for i in range(len(last) - 3)]
    return sum(gram in grams[:i] for i, gram in enumerate(grams)) / len(grams)


def test_nothing_is_known_before_the_first_token() -> None:
    meter = QualityMeter()
    assert (meter.output_entropy, meter.repeated_4grams) == (0.0, 0.0)


def test_an_even_choice_among_n_has_the_entropy_ln_n() -> None:
    assert meter_of([0], EVEN).output_entropy == pytest.approx(math.log(4))
    assert meter_of([0], np.full(32000, 7, np.float32)).output_entropy == pytest.approx(
        math.log(32000), rel=1e-5
    )


def test_a_choice_of_one_to_three_has_the_entropy_on_paper() -> None:
    logits = np.log(np.array([1, 3], np.float32)) + np.float32(50)
    expected = math.log(4) - 0.75 * math.log(3)
    assert meter_of([1], logits).output_entropy == pytest.approx(expected, abs=1e-5)


def test_a_certain_choice_has_no_entropy() -> None:
    assert meter_of([1], CERTAIN).output_entropy == 0.0


def test_float32_is_as_good_as_float64_for_a_large_vocabulary() -> None:
    logits = (np.random.default_rng(0).standard_normal(151_936) * 4).astype(np.float32)
    p = np.exp(logits.astype(np.float64) - logits.max())
    p /= p.sum()
    expected = -(p * np.log(p)).sum()
    assert meter_of([0], logits).output_entropy == pytest.approx(expected, rel=1e-4)


def test_the_entropy_is_the_mean_of_the_last_64_tokens() -> None:
    meter = meter_of([0] * 10, CERTAIN)
    for _ in range(32):
        meter.observe(EVEN, 0)
    assert meter.output_entropy == pytest.approx(math.log(4) * 32 / 42)
    for _ in range(32):
        meter.observe(EVEN, 0)
    assert meter.output_entropy == pytest.approx(math.log(4))


def test_numbers_that_overflowed_are_left_out() -> None:
    meter = meter_of([0, 0], EVEN)
    with np.errstate(invalid="ignore"):
        meter.observe(np.array([0, np.nan, 0, 0], np.float32), 0)
    assert meter.output_entropy == pytest.approx(math.log(4))


def test_the_logits_are_not_changed() -> None:
    logits = np.array([3, 1, 2, 0], np.float32)
    meter_of([0], logits)
    assert logits.tolist() == [3, 1, 2, 0]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([5, 5, 5], 0.0),  # too short for a 4-gram
        ([1, 2, 3, 4], 0.0),
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),  # the first comes again
        ([7] * 10, 6 / 7),  # the first of seven is new
        ([1, 2] * 5, 5 / 7),
        (list(range(256)), 0.0),
    ],
)
def test_the_share_of_repeats_on_paper(tokens: list[int], expected: float) -> None:
    assert meter_of(tokens).repeated_4grams == pytest.approx(expected)


def test_repeats_are_looked_for_in_the_last_256_tokens_only() -> None:
    repeats = [1, 2, 3, 4] * 64
    assert meter_of(repeats).repeated_4grams == 249 / 253
    news = list(range(10, 266))
    assert meter_of(repeats + news).repeated_4grams == 0.0
    assert meter_of(news + news).repeated_4grams == 0.0  # the first time is out of sight


@pytest.mark.parametrize("n_vocab", [1, 2, 4, 9])
def test_the_share_of_repeats_is_that_of_its_definition(n_vocab: int) -> None:
    tokens: list[int] = np.random.default_rng(n_vocab).integers(0, n_vocab, 600).tolist()
    meter = QualityMeter()
    for n, token in enumerate(tokens, 1):
        meter.observe(EVEN, token)
        if n in (4, 5, 100, 256, 257, 258, 400, 600):
            assert meter.repeated_4grams == pytest.approx(share_of_repeats(tokens[:n])), n


def test_an_answer_does_not_repeat_the_one_before_it() -> None:
    meter = meter_of([1, 2, 3, 4, 1, 2, 3, 4], CERTAIN)
    meter.begin()
    assert (meter.output_entropy, meter.repeated_4grams) == (0.0, 0.0)
    for token in (3, 4, 1, 2, 3):
        meter.observe(EVEN, token)
    assert meter.repeated_4grams == 0.0
    assert meter.output_entropy == pytest.approx(math.log(4))
