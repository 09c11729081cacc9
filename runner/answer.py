"""One answer while it is made, from the request to its last piece of text. Knows no socket."""

import time
from collections.abc import Callable

from runner.config import GenerateRequest
from runner.errors import OptionError
from runner.loaded_model import LoadedModel
from runner.protocol import GenerateResult, PromptProgress, TextPiece
from runner.sampler import Sampler

_THINK = "<think>"

Cancelled = Callable[[], bool]
Emit = Callable[[TextPiece | PromptProgress], None]


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


def prompt_text(model: LoadedModel, request: GenerateRequest) -> str:
    """The raw prompt, or the messages as the model's template has them. Raises OptionError,
    TemplateError."""
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


def opening_of(prompt: str, request: GenerateRequest) -> str:
    """What to put before the answer: the tag of a thinking section that the chat template began,
    so that the answer lacks it. An answer that must follow a grammar begins with that grammar."""
    is_free = not (request.sampling.grammar or request.sampling.json_schema)
    is_open = request.prompt is None and is_free and prompt.rstrip().endswith(_THINK)
    return f"{_THINK}\n" if is_open else ""
