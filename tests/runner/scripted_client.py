"""`python -m tests.runner.scripted_client ARGUMENTS`: the command line with a scripted engine.

What the model "answers" depends on the last message, so that a real terminal can be driven
through every case without an engine.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Self

from runner import engine_client
from runner.cli import main
from runner.config import EngineConfig, GenerateRequest
from runner.errors import ContextFullError, WorkerDiedError
from runner.protocol import (
    BenchSample,
    BenchTest,
    FrontierFields,
    GenerateResult,
    ModelInfo,
    PerplexityFields,
    PromptProgress,
    TextPiece,
)
from runner.quality.evaluation import Evaluation, RunProgress, WindowDone
from runner.quality.frontier import FrontierBase, FrontierPoint
from tests.runner.chat_fakes import INFO, result
from tests.runner.evaluation_fakes import EVALUATION
from tests.runner.frontier_fakes import FRONTIER_BASE

HEAVY = ("llama_cpp", "quant.ggml", "torch", "numpy", "textual", "gguf")


class ScriptedClient:
    """Stands in for `runner.engine_client.Client`."""

    log = "the last words of the engine"

    def __init__(self) -> None:
        self._cancelled = threading.Event()

    @classmethod
    def start(cls) -> "ScriptedClient":
        return cls()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(
        self, path: object, config: EngineConfig, template: Any, on_progress: Any
    ) -> ModelInfo:
        for done in range(3):
            on_progress("reading weights", done, 2)
        if "interrupt" in str(path):
            os.kill(os.getpid(), signal.SIGINT)
        if "bug" in str(path):
            raise KeyError("a bug")
        return replace(INFO, name="Scripted", n_ctx=config.n_ctx or 8192, n_batch=config.n_batch)

    def generate(
        self, request: GenerateRequest
    ) -> Iterator[TextPiece | PromptProgress | GenerateResult]:
        self._cancelled.clear()
        text = request.prompt if request.prompt is not None else request.messages[-1]["content"]
        for number, piece in enumerate(self._answer(text)):
            if self._cancelled.is_set():
                yield result("cancelled")
                return
            yield TextPiece(piece, number + 1)
        yield result("context" if text == "cut" else "eos")

    def _answer(self, text: str) -> Iterator[str]:
        match text:
            case "long":
                for number in range(10**6):
                    yield f"word{number} "
                    self._cancelled.wait(0.01)
            case "stuck":
                yield "stuck"
                threading.Event().wait(60)
            case "evil":
                yield from ("\x1b[2J\x1b]0;owned\x07", "\x1b[?1049h\u202eevil\x9b31m")
            case "raw":
                yield "\x1b[1mraw\x1b[0m"
            case "think":
                yield from ("<think>\nhm", "m</thi", "nk>\n\nYes.")
            case "full":
                raise ContextFullError("9000 tokens > ctx 8192")
            case "die":
                raise WorkerDiedError("The engine was killed (SIGKILL).")
            case "flood":
                yield from ("0123456789" * 100 for _ in range(10**5))
            case "modules":
                yield " ".join(name for name in HEAVY if name in sys.modules) or "light"
            case _:
                yield from ("You said ", ascii(text))

    def bench(
        self, tests: Sequence[BenchTest], repetitions: int, text: str
    ) -> Iterator[BenchSample]:
        for test in tests:
            yield BenchSample(test.n_prompt, test.n_gen, (10**9,) * repetitions)

    def perplexity(
        self, wanted: PerplexityFields, on_progress: Any = None
    ) -> Iterator[RunProgress | WindowDone | Evaluation]:
        on_progress("reading weights", 1, 2)
        if "die" in wanted.model:
            raise WorkerDiedError("The engine was killed (SIGKILL).")
        if "interrupt" in wanted.model:
            os.kill(os.getpid(), signal.SIGINT)
        yield RunProgress(True, 1, 4, 2.5)
        yield RunProgress(False, 1, 4, 2.6, 0.5)
        names = tuple(text.name for text in wanted.texts)
        evaluation = replace(EVALUATION, policy=wanted.engine.buddy, texts=names)
        yield WindowDone(1, evaluation.divergence)
        yield evaluation

    def frontier(
        self, wanted: FrontierFields, on_progress: Any = None
    ) -> Iterator[RunProgress | FrontierBase | FrontierPoint]:
        on_progress("reading weights", 1, 2)
        name = os.path.basename(wanted.model)
        if "die" in name:
            raise WorkerDiedError("The engine was killed (SIGKILL).")
        yield RunProgress(True, 1, 4, 2.5)
        yield replace(FRONTIER_BASE, model=name)
        for number, setting in enumerate(wanted.points):
            if "stop" in name and number == 3:
                os.kill(os.getpid(), signal.SIGINT)
            if "break" in name and number == 3:
                raise WorkerDiedError("The engine was killed (SIGKILL).")
            yield RunProgress(False, 1, 4, 2.6, 0.5)
            yield FrontierPoint(setting, EVALUATION)

    def stats(self) -> dict[str, Any]:
        return {}

    def cancel(self) -> None:
        self._cancelled.set()

    def restart(self, on_progress: Any = None) -> ModelInfo:
        return INFO

    def close(self) -> None:
        print("closed", file=sys.stderr) if os.environ.get("SHOW_CLOSE") else None


if __name__ == "__main__":
    engine_client.Client = ScriptedClient  # type: ignore[misc, assignment]
    sys.exit(main())
