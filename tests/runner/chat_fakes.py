"""A client and a reader that follow a script, for tests of the chat without an engine."""

import io
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from runner.chat import Chat
from runner.config import GenerateRequest
from runner.engine_client import Client
from runner.protocol import GenerateResult, ModelInfo, PromptProgress, TextPiece
from runner.terminal.chat_view import ChatView
from runner.terminal.conversation import ChatSettings, Conversation
from runner.terminal.history import LineHistory

INFO = ModelInfo(
    path="/models/fake.gguf", name="Fake \x1b[31m8x1B", description="llama 8x1B Q8_0",
    architecture="llama", file_type="Q8_0", n_params=8_000_000_000, size_bytes=8_500_000_000,
    n_layer=32, n_expert=8, n_expert_used=2, n_ctx=8192, n_ctx_train=32768, n_threads=2,
    n_batch=512, cache_type_k="f16", cache_type_v="f16", chat_template="{{ template }}",
    device="CPU", load_s=0.5, ggml_version="0.9", notes=("The context is capped.",),
)  # fmt: skip

Step = str | PromptProgress | GenerateResult | BaseException | Callable[[], None]


def result(stop_reason: str = "eos", n_past: int = 1200, n_ctx: int = 8192) -> GenerateResult:
    """Figures that give 41.2 and 9.8 tokens/s."""
    return GenerateResult(stop_reason, 512, 100, 98, 10.0, 10.0, n_past, n_ctx, 7)


def press_ctrl_c() -> None:
    """What the terminal does at Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)


class FakeClient:
    """Answers with the next turn of the script; a turn without a result gets a usual one."""

    def __init__(self, turns: Sequence[Sequence[Step]] = (), restarts: Sequence[Any] = ()) -> None:
        self._turns = list(turns)
        self._restarts = list(restarts)
        self.requests: list[GenerateRequest] = []
        self.n_cancels = 0
        self.n_restarts = 0
        self.snapshot: dict[str, Any] = {"n_past": 7, "hit": [1, 2]}

    log = "the last words of the engine"

    def generate(
        self, request: GenerateRequest
    ) -> Iterator[TextPiece | PromptProgress | GenerateResult]:
        self.requests.append(request)
        last: GenerateResult = result()
        for number, step in enumerate(self._turns.pop(0)):
            if isinstance(step, BaseException):
                raise step
            if isinstance(step, GenerateResult):
                last = step
            elif isinstance(step, PromptProgress):
                yield step
            elif isinstance(step, str):
                yield TextPiece(step, number)
            else:
                step()
            if self.n_cancels:
                last = result("cancelled")
                break
        self.n_cancels = 0
        yield last

    def cancel(self) -> None:
        self.n_cancels += 1

    def restart(self, on_progress: Any = None) -> ModelInfo:
        self.n_restarts += 1
        outcome = self._restarts.pop(0) if self._restarts else INFO
        if isinstance(outcome, BaseException):
            raise outcome
        return cast(ModelInfo, outcome)

    def stats(self) -> dict[str, Any]:
        return self.snapshot


class FakeReader:
    """Gives the lines of the script, then the end."""

    def __init__(self, lines: Sequence[str | BaseException]) -> None:
        self._lines = list(lines)
        self.history = LineHistory(None)

    def read(self) -> str:
        if not self._lines:
            raise EOFError
        line = self._lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line


class ScriptedChat:
    """A chat with fakes on all sides; `run` returns what was printed."""

    def __init__(
        self,
        lines: Sequence[str | BaseException],
        turns: Sequence[Sequence[Step]] = (),
        restarts: Sequence[Any] = (),
        settings: ChatSettings | None = None,
        is_terminal: bool = True,
        has_color: bool = False,
    ) -> None:
        self.client = FakeClient(turns, restarts)
        self.conversation = Conversation(settings or ChatSettings())
        self.out = io.StringIO()
        self.err = io.StringIO()
        view = ChatView(self.out, self.err, is_terminal, has_color)
        self.chat = Chat(
            cast(Client, self.client), INFO, self.conversation, view, FakeReader(lines)
        )

    def run(self, first_message: str = "", is_single_turn: bool = False) -> str:
        self.chat.run(first_message, is_single_turn)
        return self.out.getvalue()

    @property
    def contents(self) -> list[str]:
        return [message["content"] for message in self.conversation.messages]
