"""Speed tests as llama-bench runs them: the context is empty, neither text nor sampling counts."""

import time
from collections.abc import Callable, Sequence

from runner.engine import Engine
from runner.errors import CancelledError, OptionError
from runner.protocol import BenchSample, BenchTest
from runner.tokenizer import Tokenizer

Cancelled = Callable[[], bool]


def check(tests: Sequence[BenchTest], repetitions: int, n_ctx: int) -> None:
    """Raise OptionError for a test that cannot run in a context of n_ctx tokens."""
    if repetitions < 1:
        raise OptionError(f"-r {repetitions}: expected at least 1 repetition")
    for test in tests:
        _check_test(test, n_ctx)


def _check_test(test: BenchTest, n_ctx: int) -> None:
    n_tokens = test.n_prompt + test.n_gen
    if test.n_prompt < 0 or test.n_gen < 0 or n_tokens == 0:
        raise OptionError(f"-p {test.n_prompt} -n {test.n_gen}: expected at least 1 token in all")
    if n_tokens > n_ctx:
        raise OptionError(
            f"-p {test.n_prompt} -n {test.n_gen}: {n_tokens} tokens do not fit the context of"
            f" {n_ctx}; use a larger -c"
        )


def tokens_of(tokenizer: Tokenizer, text: str, n_tokens: int) -> list[int]:
    """The first `n_tokens` tokens of the text, with BOS if the model wants it."""
    tokens = tokenizer.tokenize(text, add_special=True, parse_special=False)
    again = tokenizer.tokenize(text, add_special=False, parse_special=False)
    if not again:
        raise OptionError("the text to measure with is empty")
    while len(tokens) < n_tokens:
        tokens += again
    return tokens[:n_tokens]


def measure(
    engine: Engine, test: BenchTest, tokens: list[int], repetitions: int, cancelled: Cancelled
) -> BenchSample:
    """The times and counts of one test after a warm-up run. Raises CancelledError."""
    _run_test(engine, BenchTest(test.n_prompt, min(test.n_gen, 1)), tokens, cancelled)  # warm-up
    before = engine.snapshot()
    samples_ns = []
    for _ in range(repetitions):
        samples_ns.append(_run_test(engine, test, tokens, cancelled))
    counted = engine.snapshot().counted_since(before)
    return BenchSample(
        n_prompt=test.n_prompt,
        n_gen=test.n_gen,
        samples_ns=tuple(samples_ns),
        n_hit=sum(counted.hit),
        n_loaded=sum(counted.loaded),
        n_on_host=sum(counted.on_host),
        n_substituted=sum(counted.substituted),
        n_dropped=sum(counted.dropped),
        load_bytes=sum(counted.bytes_read),
    )


def _run_test(engine: Engine, test: BenchTest, tokens: list[int], cancelled: Cancelled) -> int:
    """The nanoseconds that the test takes from an empty context."""
    engine.reset()
    start = time.perf_counter_ns()
    if test.n_prompt:
        engine.prefill(tokens[: test.n_prompt], cancelled)
    for token in tokens[test.n_prompt : test.n_prompt + test.n_gen]:
        if cancelled():
            raise CancelledError
        engine.decode(token)
    return time.perf_counter_ns() - start
