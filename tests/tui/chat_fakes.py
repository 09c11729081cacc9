"""A client for tests of the chat screen: answers with a script, has frames, can die and hang."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from runner.client import (
    ChatRequest,
    ChatSettings,
    Client,
    Conversation,
    Frame,
    GenerateRequest,
    GenerateResult,
    LineHistory,
    ModelInfo,
    PromptProgress,
    RunSettings,
    TextPiece,
    WorkerDiedError,
)
from tests.runner.chat_fakes import INFO, Step, result

_PATIENCE_S = 20.0


@dataclass
class Hold:
    """A step of a script: waits until the test lets it go on, or the answer is cancelled."""

    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


class FakeClient:
    """Answers with the next turn of its script."""

    log = "the last words of the engine"

    def __init__(self, turns: Sequence[Sequence[Step | Hold]] = ()) -> None:
        self._turns = list(turns)
        self.requests: list[GenerateRequest] = []
        self.n_restarts = 0
        self.n_frames = 0
        self.settings: RunSettings | None = None
        self.is_dead = False
        self.restart_hold: Hold | None = None
        self._cancelled = threading.Event()

    def generate(
        self, request: GenerateRequest
    ) -> Iterator[TextPiece | PromptProgress | GenerateResult]:
        self.requests.append(request)
        self._cancelled.clear()
        last = result()
        for number, step in enumerate(self._turns.pop(0)):
            match step:
                case BaseException():
                    raise step
                case GenerateResult():
                    last = step
                case PromptProgress():
                    yield step
                case str():
                    yield TextPiece(step, number)
                case Hold():
                    self._wait(step)
                case _:
                    step()
            if self._cancelled.is_set():
                last = result("cancelled")
                break
        yield last

    def _wait(self, hold: Hold) -> None:
        hold.reached.set()
        until_s = time.monotonic() + _PATIENCE_S
        while not (hold.released.wait(0.005) or self._cancelled.is_set()):
            assert time.monotonic() < until_s, "nobody let it go on"

    def cancel(self) -> None:
        self._cancelled.set()

    def restart(self, on_progress: Any = None) -> ModelInfo:
        self.n_restarts += 1
        if self.restart_hold is not None:
            on_progress("reading weights", 1, 4)
            self._wait(self.restart_hold)
        self.is_dead = False
        return INFO

    def stats(self) -> dict[str, Any]:
        return {"n_past": 7}

    def frame(self) -> Frame:
        if self.is_dead:
            raise WorkerDiedError("The engine was killed (SIGKILL).")
        self.n_frames += 1
        return Frame(
            pid=1,
            owner_pid=2,
            version="0",
            time_s=self.n_frames / 5,
            phase="ready",
            settings=self.settings,
        )

    def change(self, **_: Any) -> None:
        raise AssertionError("nobody asked for a change")


def request(
    client: FakeClient,
    first_message: str = "",
    history: LineHistory | None = None,
    settings: ChatSettings | None = None,
    is_ascii: bool = False,
) -> ChatRequest:
    """A chat with it."""
    return ChatRequest(
        client=cast(Client, client),
        info=INFO,
        conversation=Conversation(settings or ChatSettings()),
        history=history or LineHistory(None),
        first_message=first_message,
        is_ascii=is_ascii,
    )
