"""`python -m tests.tui.key_times KIND [TOKENS_PER_S]`: how long a key takes while text streams in.

An answer of 10,000 tokens of four characters comes at the given speed (1,500 a second; 0: as fast
as it can) into a screen of 120 x 40, and a key is pressed twenty times a second. For each key the
processor time of the screen's thread and the time on the clock until the input has it are taken.
"""

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from textual.events import Key

from runner.client import GenerateRequest, GenerateResult, PromptProgress, TextPiece
from tests.runner.chat_fakes import result
from tests.tui.chat_fakes import FakeClient, request
from tests.tui.hostile import KINDS
from tui.chat_app import ChatApp

N_TOKENS, N_TOKEN_CHARS, N_TOKENS_PER_S = 10_000, 4, 1500.0
_PERIOD_S = 0.05


@dataclass(frozen=True)
class KeyTimes:
    """Milliseconds."""

    kind: str
    n_keys: int
    processor_median_ms: float
    processor_most_ms: float
    clock_median_ms: float
    clock_most_ms: float
    answer_s: float  # until all of it was on the screen
    n_lines: int


class StreamingClient(FakeClient):
    """Answers with one text at one speed."""

    def __init__(self, text: str, tokens_per_s: float) -> None:
        super().__init__()
        self._text = text
        self._tokens_per_s = tokens_per_s

    def generate(
        self, request: GenerateRequest
    ) -> Iterator[TextPiece | PromptProgress | GenerateResult]:
        began_s = time.perf_counter()
        for number, begin in enumerate(range(0, len(self._text), N_TOKEN_CHARS)):
            if self._tokens_per_s:
                ahead_s = number / self._tokens_per_s - (time.perf_counter() - began_s)
                if ahead_s > 0:
                    time.sleep(ahead_s)
            yield TextPiece(self._text[begin : begin + N_TOKEN_CHARS], number)
        yield result()


async def measure(kind: str, tokens_per_s: float = N_TOKENS_PER_S) -> KeyTimes:
    """Type while an answer of this kind comes."""
    n_chars = 100_000 if kind == "one line" else N_TOKENS * N_TOKEN_CHARS
    text = KINDS[kind](n_chars)[:n_chars]
    app = ChatApp(request(StreamingClient(text, tokens_per_s)))  # type: ignore[arg-type]
    processor: list[float] = []
    clock: list[float] = []
    async with app.run_test(size=(120, 40)) as pilot:
        while not app.pane.is_waiting:
            await pilot.pause(0.01)
        app.pane.input.insert("go")
        await pilot.press("enter")
        began_s = time.perf_counter()
        while not clock or not (app.pane.is_waiting and app.pane.feed.is_empty):
            n_before = len(app.pane.input.text)
            processor_s, clock_s = time.thread_time(), time.perf_counter()
            app.post_message(Key("x", "x"))
            while len(app.pane.input.text) == n_before:
                await asyncio.sleep(0.001)
            processor.append(1000 * (time.thread_time() - processor_s))
            clock.append(1000 * (time.perf_counter() - clock_s))
            await asyncio.sleep(_PERIOD_S)
        answer_s = time.perf_counter() - began_s
        n_lines = app.pane.log_view.virtual_size.height
    return KeyTimes(
        kind, len(clock), *_figures(processor), *_figures(clock), round(answer_s, 1), n_lines
    )


def _figures(times: list[float]) -> tuple[float, float]:
    return round(sorted(times)[len(times) // 2], 1), round(max(times), 1)


if __name__ == "__main__":
    speed = float(sys.argv[2]) if len(sys.argv) > 2 else N_TOKENS_PER_S
    print(json.dumps(asdict(asyncio.run(measure(sys.argv[1], speed)))))
