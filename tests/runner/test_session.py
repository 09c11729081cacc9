"""Session with the demo model, in this process."""

from dataclasses import replace

import pytest

from runner.config import EngineConfig, GenerateRequest, SamplingConfig
from runner.errors import CancelledError, ContextFullError, GGUFError, OptionError, TemplateError
from runner.protocol import BenchTest, PromptProgress, TextPiece
from runner.session import Session
from runner.stats_recorder import StatsRecorder
from tests.paths import DEMO

GREEDY = SamplingConfig(temperature=0)
HI = ({"role": "user", "content": "hi"},)


def never():
    return False


def after(n_calls):
    """A `cancelled` that becomes true at its n-th call."""
    calls = iter(range(n_calls))
    return lambda: next(calls, None) is None


def load(session, path=DEMO, config=None, chat_template=None, cancelled=never):
    stages = []
    info = session.load(
        str(path),
        config or EngineConfig(n_ctx=512, n_batch=16, n_threads=1),
        chat_template,
        lambda *stage: stages.append(stage),
        cancelled,
    )
    assert stages
    return info


@pytest.fixture(scope="module")
def shared_session():
    session = Session()
    load(session)
    yield session
    session.close()


@pytest.fixture
def session(shared_session):
    shared_session._loaded().engine.reset()
    return shared_session


@pytest.fixture
def empty_session():
    session = Session()
    yield session
    session.close()


def answer(session, messages=HI, prompt=None, n_predict=-1, cancelled=never, sampling=GREEDY):
    """The text, the prompt's progress and the result of one answer."""
    events = []
    request = GenerateRequest(
        messages=messages, prompt=prompt, n_predict=n_predict, sampling=sampling
    )
    result = session.generate(request, events.append, cancelled)
    pieces = [event for event in events if isinstance(event, TextPiece)]
    assert [piece.n_tokens for piece in pieces] == sorted({piece.n_tokens for piece in pieces})
    progress = [event for event in events if isinstance(event, PromptProgress)]
    return "".join(piece.text for piece in pieces), progress, result


def n_prompt_tokens(session, text):
    return len(session._loaded().tokenizer.tokenize(text, add_special=True, parse_special=True))


def test_load_describes_the_model(empty_session):
    info = load(empty_session, config=EngineConfig(n_ctx=256, n_batch=64, cache_type_k="q8_0"))
    assert (info.architecture, info.file_type, info.name) == ("llama", "Q8_0", "Buddy Demo 29M MoE")
    assert (info.n_layer, info.n_expert, info.n_expert_used) == (8, 8, 2)
    assert (info.n_ctx, info.n_ctx_train, info.n_batch) == (256, 1024, 64)
    assert (info.cache_type_k, info.cache_type_v) == ("q8_0", "f16")
    assert info.description == "llama 8x6.8M Q8_0"
    assert 28e6 < info.n_params < 30e6
    assert info.n_params < info.size_bytes < DEMO.stat().st_size
    assert "<|im_start|>" in info.chat_template
    assert 0 < info.load_s < 10


def test_an_answer_to_messages_ends_at_the_models_own_end(session):
    text, _, result = answer(session)
    assert text.startswith("Hello!")
    assert "<|im_end|>" not in text
    assert result.stop_reason == "eos"
    assert result.n_past == result.n_prompt + result.n_generated
    assert result.n_ctx == 512
    assert result.prompt_s > 0
    assert result.generation_s > 0


def test_the_template_is_applied_and_makes_no_second_bos(session, empty_session):
    _, _, result = answer(session, n_predict=1)
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert result.n_prompt == n_prompt_tokens(session, rendered)
    load(empty_session, chat_template="{{ bos_token }}{{ messages[0]['content'] }}")
    _, _, with_bos = answer(empty_session, n_predict=1)
    assert with_bos.n_prompt == n_prompt_tokens(empty_session, "hi")


THINKING = "{{ messages[0]['content'] }}<|im_end|>\n<|im_start|>assistant\n<think>\n"


def test_a_thinking_section_opened_by_the_template_begins_the_answer(empty_session):
    load(empty_session, chat_template=THINKING)
    text, _, result = answer(empty_session, n_predict=4)
    assert text.startswith("<think>\n")
    assert len(text) > len("<think>\n")
    assert result.n_generated == 4


def test_an_answer_without_a_word_has_no_thinking_section(empty_session):
    load(empty_session, chat_template=THINKING)
    assert answer(empty_session, n_predict=0)[0] == ""
    assert answer(empty_session, cancelled=after(0))[0] == ""


@pytest.mark.parametrize(
    "constraint", [{"grammar": 'root ::= "a"'}, {"json_schema": '{"const": "a"}'}]
)
def test_an_answer_that_follows_a_grammar_has_no_thinking_section(empty_session, constraint):
    load(empty_session, chat_template=THINKING)
    text, _, _ = answer(empty_session, sampling=SamplingConfig(temperature=0, **constraint))
    assert text.strip('"') == "a"


def test_a_raw_prompt_that_ends_in_the_tag_gets_no_second_one(session):
    text, _, _ = answer(session, messages=(), prompt="<think>", n_predict=4)
    assert text
    assert "<think>" not in text


@pytest.mark.parametrize("n_predict", [0, 1, 5])
def test_n_predict_limits_the_answer(session, n_predict):
    text, _, result = answer(session, n_predict=n_predict)
    assert (result.stop_reason, result.n_generated) == ("length", n_predict)
    assert bool(text) == bool(n_predict)


def test_a_raw_prompt_is_continued_without_the_template(session):
    text, _, result = answer(session, messages=(), prompt="Once upon a time", n_predict=8)
    assert result.n_prompt == n_prompt_tokens(session, "Once upon a time")
    assert text.startswith((" ", ",", "\n"))


def test_the_prompts_progress_is_told_batch_by_batch(session):
    _, progress, result = answer(session, messages=(), prompt="word " * 40, n_predict=1)
    assert [event.done for event in progress] == [*range(0, result.n_prompt, 16), result.n_prompt]
    assert {event.total for event in progress} == {result.n_prompt}


def test_the_next_turn_computes_only_what_is_new(session):
    text, _, first = answer(session)
    messages = (*HI, {"role": "assistant", "content": text}, {"role": "user", "content": "bye"})
    _, progress, second = answer(session, messages=messages, n_predict=4)
    assert second.n_cached >= first.n_past
    assert progress[0].done == progress[0].n_cached == second.n_cached


def test_the_same_seed_gives_the_same_answer_and_the_seed_is_told(session):
    def story(seed):
        sampling = SamplingConfig(seed=seed, temperature=2)
        text, _, result = answer(
            session, messages=(), prompt="Once upon", n_predict=24, sampling=sampling
        )
        assert result.seed == seed
        return text

    assert story(7) == story(7) != story(8)


def test_cancel_during_the_prompt_ends_before_the_first_word(session):
    whole = answer(session)[0]
    text, progress, result = answer(session, messages=(), prompt="word " * 200, cancelled=after(20))
    assert (text, result.stop_reason, result.n_generated) == ("", "cancelled", 0)
    assert progress[-1].done < progress[-1].total
    assert answer(session)[0] == whole


def test_cancel_in_the_middle_of_an_answer_keeps_the_text_so_far(session):
    whole = answer(session)[0]
    text, _, result = answer(session, cancelled=after(8))
    assert result.stop_reason == "cancelled"
    assert 0 < len(text) < len(whole)
    assert whole.startswith(text)
    assert answer(session)[0] == whole


def test_a_prompt_that_does_not_fit_is_refused_with_counts_and_the_session_goes_on(session):
    with pytest.raises(ContextFullError, match="512"):
        answer(session, messages=(), prompt="word " * 600)
    assert answer(session)[0].startswith("Hello!")


def test_an_answer_that_fills_the_context_stops_there(empty_session):
    load(empty_session, config=EngineConfig(n_ctx=64, n_threads=1))
    _, _, result = answer(
        empty_session, sampling=SamplingConfig(temperature=0, ignore_eos=True), n_predict=500
    )
    assert result.stop_reason == "context"
    assert result.n_past == 64


@pytest.mark.parametrize(("messages", "prompt"), [((), None), ((), ""), (HI, "")])
def test_an_empty_prompt_is_refused(session, messages, prompt):
    with pytest.raises(OptionError, match="empty|nothing to answer"):
        answer(session, messages=messages, prompt=prompt)


def test_a_message_without_a_role_is_refused(session):
    with pytest.raises(OptionError, match="role"):
        answer(session, messages=({"content": "hi"},))


def test_without_a_model_everything_is_refused(empty_session):
    for request in (
        empty_session.snapshot,
        lambda: answer(empty_session),
        lambda: empty_session.bench([BenchTest(1, 1)], 1, "text", print, never),
    ):
        with pytest.raises(OptionError, match="no model is loaded"):
            request()


def test_a_load_that_fails_leaves_no_model_and_the_next_one_works(empty_session, tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(DEMO.read_bytes()[:5000])
    load(empty_session)
    with pytest.raises(GGUFError):
        load(empty_session, bad)
    with pytest.raises(OptionError, match="no model"):
        empty_session.snapshot()
    with pytest.raises(TemplateError):
        load(empty_session, chat_template="{% for %}")
    with pytest.raises(CancelledError):
        load(empty_session, cancelled=lambda: True)
    load(empty_session)
    assert answer(empty_session, n_predict=1)[0]


def test_a_snapshot_counts_what_was_computed(session):
    before = session.snapshot()
    _, _, result = answer(session, n_predict=4)
    now = session.snapshot()
    assert now.n_tokens_prompt - before.n_tokens_prompt == result.n_prompt
    assert now.n_past == result.n_past


class RecordingEngine:
    """Counts what a benchmark asks for."""

    n_ctx = 64

    def __init__(self):
        self.calls = []

    def snapshot(self):
        return StatsRecorder(1).snapshot(0, self.n_ctx)

    def reset(self):
        self.calls.append("reset")

    def prefill(self, tokens, cancelled):
        self.calls.append(("prefill", list(tokens)))

    def decode(self, token):
        self.calls.append(("decode", token))


@pytest.fixture
def recorded(session, monkeypatch):
    engine = RecordingEngine()
    model = session._loaded()
    monkeypatch.setattr(session, "_model", replace(model, engine=engine))
    return session, engine


def bench(session, tests, repetitions=2, text="The quick brown fox jumps.", cancelled=never):
    samples = []
    session.bench(tests, repetitions, text, samples.append, cancelled)
    return samples


def test_each_benchmark_run_starts_empty_after_a_warm_up_of_one_token(recorded):
    session, engine = recorded
    tokens = session._loaded().tokenizer.tokenize("The quick brown fox jumps.", True, False)
    (sample,) = bench(session, [BenchTest(2, 3)])
    warm_up = ["reset", ("prefill", tokens[:2]), ("decode", tokens[2])]
    run = ["reset", ("prefill", tokens[:2]), *(("decode", token) for token in tokens[2:5])]
    assert engine.calls == [*warm_up, *run, *run, "reset"]
    assert (sample.n_prompt, sample.n_gen, len(sample.samples_ns)) == (2, 3, 2)


def test_a_generation_benchmark_has_no_prompt_and_a_prompt_benchmark_no_generation(recorded):
    session, engine = recorded
    bench(session, [BenchTest(0, 2)], repetitions=1)
    assert [call[0] for call in engine.calls if call != "reset"] == ["decode"] * 3
    engine.calls.clear()
    bench(session, [BenchTest(4, 0)], repetitions=1)
    assert [call[0] for call in engine.calls if call != "reset"] == ["prefill"] * 2


def test_a_short_text_is_repeated_without_a_second_bos(recorded):
    session, engine = recorded
    bench(session, [BenchTest(40, 0)], repetitions=1, text="fox")
    tokens = engine.calls[1][1]
    bos = session._loaded().tokenizer.bos
    assert len(tokens) == 40
    assert tokens[0] == bos
    assert bos not in tokens[1:]


@pytest.mark.parametrize(
    ("tests", "repetitions", "text", "named"),
    [
        ([BenchTest(500, 13)], 1, "a", "513 tokens do not fit the context of 512"),
        ([BenchTest(0, 0)], 1, "a", "at least 1 token"),
        ([BenchTest(-1, 4)], 1, "a", "at least 1 token"),
        ([BenchTest(1, 1)], 0, "a", "-r 0"),
        ([BenchTest(1, 1)], 1, "", "text to measure with is empty"),
    ],
)
def test_a_benchmark_that_cannot_be_run_is_refused(session, tests, repetitions, text, named):
    with pytest.raises(OptionError, match=named):
        bench(session, tests, repetitions, text)


@pytest.mark.slow
def test_a_benchmark_on_the_model_gives_times_and_leaves_an_empty_context(session):
    samples = bench(session, [BenchTest(32, 0), BenchTest(0, 8), BenchTest(500, 12)])
    assert [(sample.n_prompt, sample.n_gen) for sample in samples] == [(32, 0), (0, 8), (500, 12)]
    assert all(ns > 0 for sample in samples for ns in sample.samples_ns)
    assert session.snapshot().n_past == 0


def test_a_cancelled_benchmark_ends_early_without_a_half_measured_test(session):
    assert bench(session, [BenchTest(0, 100)], cancelled=after(30)) == []
    assert session.snapshot().n_past == 0
