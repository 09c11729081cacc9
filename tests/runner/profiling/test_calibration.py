"""Which tokens a profile is made from."""

import numpy as np
import pytest

from runner.errors import OptionError
from runner.profiling.calibration import CONTEXT_TOKENS, MIN_TOKENS, Calibration, calibrate

BOS = 10**6


def text(n: int, start: int = 0) -> list[int]:
    """A text whose tokens are their own places."""
    return list(range(start, start + n))


def counted(calibration: Calibration) -> list[int]:
    return [token for context in calibration.contexts for token in context[1:]]


@pytest.mark.parametrize("bos", [BOS, None])
@pytest.mark.parametrize("n_text", [5000, 2100, 2300, 100_000])
def test_contexts_are_spread_over_the_whole_text(n_text: int, bos: int | None) -> None:
    calibration = calibrate([text(n_text)], bos, 2048, 1024)
    tokens = counted(calibration)
    assert len(tokens) == calibration.n_tokens == 2048
    assert len(set(tokens)) == 2048 and tokens == sorted(tokens)
    assert all(len(context) <= CONTEXT_TOKENS for context in calibration.contexts)
    starts = [context[1] for context in calibration.contexts]
    gaps = np.diff([0, *starts, n_text])
    assert gaps[1:-1].max() - gaps[1:-1].min() <= 2
    assert gaps[0] <= gaps[1] // 2 + 1 and gaps[-1] <= gaps[1] + CONTEXT_TOKENS


def test_the_first_token_of_a_context_does_not_count() -> None:
    with_bos = calibrate([text(400)], BOS, 400, 400)
    assert {context[0] for context in with_bos.contexts} == {BOS}
    assert counted(with_bos) == text(400)
    without = calibrate([text(400)], None, 400, 400)
    assert len(without.contexts) == 2 and without.n_tokens == 398
    assert [context[0] for context in without.contexts] == [0, 200]


@pytest.mark.parametrize("bos", [BOS, None])
@pytest.mark.parametrize("n_text", range(250, 262))
def test_all_of_a_short_text_is_used_and_nothing_beyond_it(n_text: int, bos: int | None) -> None:
    calibration = calibrate([text(n_text)], bos, 2048, 1024)
    assert calibration.n_tokens >= n_text - 2
    assert n_text - 2 <= counted(calibration)[-1] < n_text
    assert len(calibration.sampled) == calibration.n_tokens


def test_every_text_gets_the_same_share_or_all_that_it_has() -> None:
    calibration = calibrate([text(9000), text(100, 10_000), text(9000, 20_000)], BOS, 1000, 10)
    places = np.array(counted(calibration)) // 10_000
    assert np.bincount(places).tolist() == [450, 100, 450]
    assert calibration.n_tokens == 1000


def test_an_empty_text_beside_another_one_is_left_out() -> None:
    assert calibrate([[], text(300)], BOS, 128, 8).n_tokens == 128


def test_sampled_tokens_are_spread_evenly_and_known_per_context() -> None:
    calibration = calibrate([text(5000)], BOS, 1020, 100)
    assert len(calibration.sampled) == 100
    assert set(np.diff(calibration.sampled)) <= {10, 11}
    found = [
        token
        for number, context in enumerate(calibration.contexts)
        for token in np.array(context[1:])[calibration.sampled_in(number)]
    ]
    assert found == np.array(counted(calibration))[calibration.sampled].tolist()


def test_a_text_that_is_too_short_is_refused() -> None:
    for texts in ([], [[]], [text(MIN_TOKENS - 1)]):
        with pytest.raises(OptionError, match=r"the text has \d+ tokens; a profile needs at least"):
            calibrate(texts, BOS, 2048, 1024)
    assert calibrate([text(MIN_TOKENS)], BOS, 2048, 1024).n_tokens == MIN_TOKENS


def test_other_tokens_have_another_digest() -> None:
    base = calibrate([text(500)], BOS, 300, 100)
    again = calibrate([text(500)], BOS, 300, 100)
    others = [
        calibrate([text(500)], BOS, 300, 99), calibrate([text(500)], BOS, 301, 100),
        calibrate([text(700)], BOS, 300, 100), calibrate([text(500)], None, 300, 100),
    ]  # fmt: skip
    assert again.digest == base.digest
    assert len({base.digest, *(other.digest for other in others)}) == 5
