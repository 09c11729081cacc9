"""The scripted engine of the plain chat's tests, with frames."""

import os
import time
from collections.abc import Iterator

from runner.frames import Frame
from tests.runner.scripted_client import ScriptedClient
from tests.tui.hostile import KINDS


class ScriptedEngine(ScriptedClient):
    """Answers to the name of a hostile text with that text."""

    def frame(self) -> Frame:
        return Frame(os.getpid(), os.getpid(), "0", time.time(), "ready")

    def _answer(self, text: str) -> Iterator[str]:
        if os.environ.get("BREAK"):
            raise KeyError("a bug")
        if text not in KINDS:
            yield from super()._answer(text)
            return
        answer = KINDS[text](40_000)
        for begin in range(0, len(answer), 40):
            yield answer[begin : begin + 40]
