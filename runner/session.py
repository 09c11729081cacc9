"""A loaded model as the worker uses it: messages in, pieces of text out. Knows no socket."""

import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from runner import speed_test
from runner.chat_template import MERGED_SYSTEM_NOTE, ChatTemplate
from runner.config import EngineConfig, GenerateRequest
from runner.doctor import examine
from runner.doctor_report import DoctorReport
from runner.engine import Engine
from runner.errors import CancelledError, OptionError, TemplateError
from runner.evaluate import Listeners, evaluate
from runner.frames import RunSettings
from runner.frontier import FrontierEvent, measure_frontier
from runner.model_sizes import ModelSizes, model_sizes
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
    PromptProgress,
    TextPiece,
)
from runner.quality.evaluation import Evaluation, RunProgress, WindowDone
from runner.run_control import RunControl
from runner.sampler import Sampler
from runner.stats import StatsSnapshot
from runner.tokenizer import Tokenizer

_THINK = "<think>"

Cancelled = Callable[[], bool]
Emit = Callable[[TextPiece | PromptProgress], None]


@dataclass(frozen=True)
class LoadedModel:
    """What belongs to one model; closed together."""

    engine: Engine
    tokenizer: Tokenizer
    template: ChatTemplate
    control: RunControl
    owners: ExitStack


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
        return _describe(path, self._model, time.perf_counter() - started)

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
        text = _prompt_text(model, request)
        tokens = model.tokenizer.tokenize(text, add_special=True, parse_special=True)
        opening = _THINK + "\n" if _opens_thinking(text, request) else ""
        with Sampler(model.tokenizer, request.sampling, tokens) as sampler:
            answer = Answer(model, request, emit, opening)
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


class Answer:
    """One answer while it is made: the text that came and the time it took."""

    def __init__(
        self, model: LoadedModel, request: GenerateRequest, emit: Emit, opening: str
    ) -> None:
        """`opening` goes before the first text of the model; without any text it is left out."""
        self._model = model
        self._emit = emit
        self._opening = opening
        self._n_predict = request.n_predict
        continues_text = request.prompt is not None
        self._detokenizer = model.tokenizer.detokenizer(keep_leading_space=continues_text)
        self._n_cached = 0
        self._n_generated = 0
        self._paused_s = 0.0
        self._prompt_end = time.perf_counter()
        self._after_prompt = model.engine.snapshot()

    def make(
        self,
        tokens: list[int],
        sampler: Sampler,
        cancelled: Cancelled,
        between: Callable[[], None],
    ) -> GenerateResult:
        """Generate to the end; the text goes to `emit`, what it cost is returned. The time that
        `between` takes, which may be a pause, is nobody's."""
        engine, started = self._model.engine, time.perf_counter()
        stop_reason = self._generate(tokens, sampler, cancelled, between)
        self._emit_text(self._detokenizer.flush())
        counted = engine.snapshot().counted_since(self._after_prompt)
        return GenerateResult(
            stop_reason=stop_reason,
            n_prompt=len(tokens),
            n_cached=self._n_cached,
            n_generated=self._n_generated,
            prompt_s=self._prompt_end - started,
            generation_s=time.perf_counter() - self._prompt_end - self._paused_s,
            n_past=engine.n_past,
            n_ctx=engine.n_ctx,
            seed=sampler.seed,
            n_hit=sum(counted.hit),
            n_loaded=sum(counted.loaded),
            n_on_host=sum(counted.on_host),
            n_substituted=sum(counted.substituted),
            n_dropped=sum(counted.dropped),
            has_cache=bool(counted.n_slots),
            has_buddies=counted.buddy_budget > 0.0,
            repeated_4grams=counted.repeated_4grams,
            n_verified=counted.n_verified,
            verified_kl=counted.verified_kl,
            verified_agreement=counted.verified_agreement,
        )

    def _generate(
        self,
        tokens: list[int],
        sampler: Sampler,
        cancelled: Cancelled,
        between: Callable[[], None],
    ) -> str:
        steps = self._model.engine.generate(
            tokens,
            sampler.sample,
            self._n_predict,
            self._model.tokenizer.is_end_of_generation,
            cancelled,
            self._on_prompt,
        )
        stop_reason = "length"  # also when no token was asked for
        for step in steps:
            stop_reason = step.stop_reason or stop_reason
            if step.token >= 0 and step.stop_reason != "eos":
                self._n_generated += 1
                self._emit_text(self._detokenizer.push(step.token))
            if step.stop_reason is None:
                began_s = time.perf_counter()
                between()
                self._paused_s += time.perf_counter() - began_s
        return stop_reason

    def _on_prompt(self, done: int, total: int, n_cached: int) -> None:
        self._n_cached = n_cached
        self._prompt_end = time.perf_counter()
        self._after_prompt = self._model.engine.snapshot()
        self._emit(PromptProgress(done, total, n_cached))

    def _emit_text(self, text: str) -> None:
        if text and self._opening:
            self._emit(TextPiece(self._opening, 0))
            self._opening = ""
        if text:
            self._emit(TextPiece(text, self._n_generated))


def _prompt_text(model: LoadedModel, request: GenerateRequest) -> str:
    text = request.prompt
    if text is None:
        if not request.messages:
            raise OptionError("there is nothing to answer: no message and no prompt")
        for message in request.messages:
            if not {"role", "content"} <= message.keys():
                raise OptionError("a message must have a role and a content")
        text = model.template.render(request.messages)
    if not text:
        raise OptionError("the prompt is empty")
    return text


def _opens_thinking(prompt: str, request: GenerateRequest) -> bool:
    """Whether the chat template began the thinking section, so that the answer lacks its tag.

    An answer that must follow a grammar begins with that grammar, not with thinking.
    """
    is_free = not (request.sampling.grammar or request.sampling.json_schema)
    return request.prompt is None and is_free and prompt.rstrip().endswith(_THINK)


def _describe(path: str, model: LoadedModel, load_s: float) -> ModelInfo:
    engine, config = model.engine, model.engine.model_config
    sizes = model_sizes(engine.file, config)
    template_notes = (MERGED_SYSTEM_NOTE,) if _merges_system(model.template) else ()
    return ModelInfo(
        path=path,
        name=config.name,
        description=f"{config.architecture} {_size_label(engine, sizes)} {config.file_type}",
        architecture=config.architecture,
        file_type=config.file_type,
        n_params=sizes.n_params,
        size_bytes=sizes.n_bytes,
        n_layer=config.n_layer,
        n_expert=config.n_expert,
        n_expert_used=config.n_expert_used,
        n_ctx=engine.n_ctx,
        n_ctx_train=config.n_ctx_train,
        n_threads=engine.n_threads,
        n_batch=engine.config.n_batch,
        cache_type_k=engine.config.cache_type_k,
        cache_type_v=engine.config.cache_type_v,
        chat_template=model.template.source,
        device=engine.device_name,
        load_s=load_s,
        ggml_version=engine.ggml_version,
        moe_cache_bytes=engine.cache_plan.n_bytes,
        moe_cache_slots=engine.cache_plan.n_slots,
        moe_cache_policy=engine.config.moe_cache_policy if engine.cache_plan.n_slots else "",
        buddy=engine.buddies.name,
        buddy_budget=engine.buddies.budget,
        buddy_profile=engine.buddies.profile,
        backend=engine.backend.device.backend,
        device_memory=engine.device_memory(),
        warnings=engine.warnings,
        notes=engine.notes + template_notes,
    )


def _size_label(engine: Engine, sizes: ModelSizes) -> str:
    """The usual name of the size, "8x7B": with experts, what one dense model of them would have."""
    label = engine.file.metadata.get("general.size_label")
    if isinstance(label, str) and re.fullmatch(r"[\w.]{1,16}", label):
        return label
    n_expert = engine.model_config.n_expert
    if not n_expert:
        return _short(sizes.n_params)
    return f"{n_expert}x{_short(sizes.n_params_one_expert)}"


def _merges_system(template: ChatTemplate) -> bool:
    try:
        return template.merges_system
    except TemplateError:
        return False  # a broken template is reported when a conversation needs it


def _short(n: int) -> str:
    return f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.1f}M"
