"""At most one loaded model, as the worker uses it: messages in, text out. Knows no socket."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

from runner import speed_test
from runner.answer import Answer, Cancelled, Emit, opening_of, prompt_text
from runner.chat_template import ChatTemplate
from runner.config import EngineConfig, GenerateRequest
from runner.doctor import examine
from runner.doctor_report import DoctorReport
from runner.engine import Engine
from runner.errors import CancelledError, OptionError
from runner.evaluate import Listeners, evaluate
from runner.frames import RunSettings
from runner.frontier import FrontierEvent, measure_frontier
from runner.loaded_model import LoadedModel, describe
from runner.profile import make_profile
from runner.protocol import (
    BenchSample,
    BenchTest,
    ChangeFields,
    DoctorFields,
    FrontierFields,
    GenerateResult,
    ModelInfo,
    PerplexityFields,
    ProfileFields,
    ProfileResult,
)
from runner.quality.evaluation import Evaluation, RunProgress, WindowDone
from runner.run_control import RunControl
from runner.sampler import Sampler
from runner.stats import StatsSnapshot
from runner.tokenizer import Tokenizer


class Session:
    """At most one loaded model, and the conversations with it."""

    def __init__(self) -> None:
        self._model: LoadedModel | None = None

    def load(
        self,
        path: str,
        config: EngineConfig,
        chat_template: str | None,
        on_progress: Callable[[str, int, int], None],
        cancelled: Cancelled,
    ) -> ModelInfo:
        """Load a model in the place of any other; the file is checked before native code sees it.

        Raises BuddyrunError, or CancelledError; then no model is loaded.
        """
        started = time.perf_counter()
        self.close()
        with ExitStack() as owners:
            engine = Engine(path, config, on_progress, cancelled)
            owners.callback(engine.close)
            tokenizer = owners.enter_context(Tokenizer(engine.file.paths[0]))
            source = tokenizer.chat_template if chat_template is None else chat_template
            template = ChatTemplate(source, tokenizer.bos_text, tokenizer.eos_text)
            control = RunControl(engine)
            self._model = LoadedModel(engine, tokenizer, template, control, owners.pop_all())
        return describe(path, self._model, time.perf_counter() - started)

    def close(self) -> None:
        """Free the model."""
        model, self._model = self._model, None
        if model is not None:
            model.owners.close()

    def snapshot(self, with_experts: bool = False) -> StatsSnapshot:
        """The engine's counters; from any thread."""
        return self._loaded().engine.snapshot(with_experts)

    @property
    def settings(self) -> RunSettings | None:
        """What the owner may change, None without a model; from any thread."""
        model = self._model
        return model.control.settings if model is not None else None

    def change(self, wanted: ChangeFields) -> RunSettings:
        """Change it, between two tokens. Raises OptionError, ProfileError."""
        return self._loaded().control.change(wanted)

    def generate(
        self,
        request: GenerateRequest,
        emit: Emit,
        cancelled: Cancelled,
        between: Callable[[], None] = lambda: None,
    ) -> GenerateResult:
        """Make one answer and emit it as it comes; `between` is called before every token.

        Raises OptionError, TemplateError, ContextFullError.
        """
        model = self._loaded()
        text = prompt_text(model, request)
        tokens = model.tokenizer.tokenize(text, add_special=True, parse_special=True)
        with Sampler(model.tokenizer, request.sampling, tokens) as sampler:
            answer = Answer(model, request, emit, opening_of(text, request))
            result = answer.make(tokens, sampler, cancelled, between)
        with suppress(OptionError):  # told when the model was loaded; the answer counts more
            model.engine.save_usage()
        return result

    def bench(
        self,
        tests: Sequence[BenchTest],
        repetitions: int,
        text: str,
        emit: Callable[[BenchSample], None],
        cancelled: Cancelled,
    ) -> None:
        """Time each test `repetitions` times on the tokens of `text`, repeated when too short.

        As llama-bench does: the context is empty before each run, a warm-up run comes first, and
        neither tokenization nor sampling counts. Cancelled, it returns early.
        """
        model = self._loaded()
        speed_test.check(tests, repetitions, model.engine.n_ctx)
        try:
            for test in tests:
                tokens = speed_test.tokens_of(model.tokenizer, text, test.n_prompt + test.n_gen)
                emit(speed_test.measure(model.engine, test, tokens, repetitions, cancelled))
        except CancelledError:
            pass
        finally:
            model.engine.reset()

    def perplexity(
        self,
        wanted: PerplexityFields,
        on_progress: Callable[[str, int, int], None],
        emit: Callable[[RunProgress | WindowDone], None],
        cancelled: Cancelled,
    ) -> Evaluation:
        """Judge settings by the exact run of the same file; no model is loaded after it.

        Raises BuddyrunError, CancelledError.
        """
        self.close()
        return evaluate(wanted, Listeners(on_progress, emit, cancelled))

    def profile(
        self,
        wanted: ProfileFields,
        on_progress: Callable[[str, int, int], None],
        cancelled: Cancelled,
    ) -> ProfileResult:
        """Make a model's profile of buddies; no model is loaded after it.

        Raises BuddyrunError, CancelledError.
        """
        self.close()
        return make_profile(wanted, on_progress, cancelled)

    def frontier(
        self,
        wanted: FrontierFields,
        on_progress: Callable[[str, int, int], None],
        emit: Callable[[FrontierEvent], None],
        cancelled: Cancelled,
    ) -> None:
        """Emit what policies and budgets cost and bring; no model is loaded after it.

        Raises BuddyrunError, CancelledError.
        """
        self.close()
        measure_frontier(wanted, on_progress, emit, cancelled)

    def doctor(
        self,
        wanted: DoctorFields,
        on_progress: Callable[[str, int, int], None],
        cancelled: Cancelled,
    ) -> DoctorReport:
        """Tell what this machine can compute on; no model is loaded after it.

        Raises CancelledError.
        """
        self.close()
        return examine(wanted.measure, on_progress, cancelled)

    def _loaded(self) -> LoadedModel:
        if self._model is None:
            raise OptionError("no model is loaded")
        return self._model
