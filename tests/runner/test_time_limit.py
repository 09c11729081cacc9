"""The time limit ends what runs too long and leaves no trace of itself."""

import contextlib
import signal
import sys
import threading
import time

import pytest

from runner.time_limit import TimeLimitError, time_limit


def loop() -> None:
    while True:
        with contextlib.suppress(Exception):  # a block that swallows what it can
            sum(range(100))


def test_a_loop_is_ended_in_the_main_thread() -> None:
    start_s = time.monotonic()
    with pytest.raises(TimeLimitError), time_limit(0.1):
        loop()
    assert time.monotonic() - start_s < 2


def test_one_long_operation_is_ended_in_the_main_thread() -> None:
    exponent = 10**7
    with pytest.raises(TimeLimitError), time_limit(0.05):
        _ = 9 ** (exponent * 10)


def test_a_loop_is_ended_in_another_thread() -> None:
    ended = []

    def run() -> None:
        try:
            with time_limit(0.1):
                loop()
        except TimeLimitError:
            ended.append(sys.gettrace() is None)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert ended == [True]


def test_handler_and_timer_are_as_before_afterwards() -> None:
    handler = signal.getsignal(signal.SIGALRM)
    signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        with pytest.raises(TimeLimitError), time_limit(0.05):
            loop()
        with time_limit(5):
            pass
        assert signal.getsignal(signal.SIGALRM) is handler
        assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def test_code_in_time_is_left_alone() -> None:
    with time_limit(5):
        done = sum(range(1000))
    assert done == 499500


def test_errors_of_the_code_pass_through() -> None:
    with pytest.raises(KeyError), time_limit(5):
        raise KeyError("x")
