"""The sampler against llama.cpp's own, on the demo model's logits; and what it refuses."""

import ctypes
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as api
import numpy as np
import pytest

from runner.config import SamplingConfig
from runner.errors import BuddyrunError, OptionError
from runner.sampler import Sampler
from runner.tokenizer import Tokenizer
from tests.runner.vocab_gguf import write_spm

DEMO = Path(__file__).parents[2] / "runner" / "demo" / "buddy-demo-q8_0.gguf"
PROMPT = "<|im_start|>user\nTell me a story about a cat.<|im_end|>\n<|im_start|>assistant\n"
N_TOKENS = 64
BREAKERS = [b"\n", b":", b'"', b"*"]
YES_OR_NO = 'root ::= "Yes" | "No"'


class Context:
    """llama.cpp running the demo model, one token at a time."""

    def __init__(self) -> None:
        params = api.llama_model_default_params()
        self.model = api.llama_model_load_from_file(str(DEMO).encode(), params)
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_threads, settings.n_threads_batch = 256, 2, 2
        self.handle = api.llama_init_from_model(self.model, settings)

    def restart(self, tokens: list[int]) -> None:
        api.llama_memory_clear(api.llama_get_memory(self.handle), True)
        self.decode(tokens)

    def decode(self, tokens: list[int]) -> None:
        data = (ctypes.c_int32 * len(tokens))(*tokens)
        assert api.llama_decode(self.handle, api.llama_batch_get_one(data, len(tokens))) == 0

    def logits(self, n_vocab: int) -> np.ndarray:
        pointer = api.llama_get_logits_ith(self.handle, -1)
        return np.ctypeslib.as_array(pointer, (n_vocab,)).copy()

    def close(self) -> None:
        api.llama_free(self.handle)
        api.llama_model_free(self.model)


@pytest.fixture(scope="module")
def demo() -> Iterator[Tokenizer]:
    with Tokenizer(DEMO) as tokenizer:
        yield tokenizer


@pytest.fixture(scope="module")
def context() -> Iterator[Context]:
    running = Context()
    yield running
    running.close()


@pytest.fixture(scope="module")
def prompt(demo: Tokenizer) -> list[int]:
    return demo.tokenize(PROMPT, add_special=True, parse_special=True)


def random_logits(n_vocab: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(n_vocab) * 3).astype(np.float32)


def dry(vocab: Any, multiplier: float, last_n: int) -> Any:
    texts = (ctypes.c_char_p * 4)(*BREAKERS)
    return api.llama_sampler_init_dry(vocab, multiplier, 1.75, 2, last_n, texts, 4)


def penalties(last_n: int, repeat: float, frequency: float, presence: float) -> Any:
    return api.llama_sampler_init_penalties(4096, last_n, repeat, frequency, presence)


def truncation(temperature: float = 0.8) -> list[Any]:
    """llama.cpp's default top_k, top_p, min_p and temperature, then its random choice."""
    return [
        api.llama_sampler_init_top_k(40),
        api.llama_sampler_init_top_p(0.95, 0),
        api.llama_sampler_init_min_p(0.05, 0),
        api.llama_sampler_init_temp_ext(temperature, 0.0, 1.0),
        api.llama_sampler_init_dist(42),
    ]


Parts = Callable[[Any], list[Any]]
CASES: dict[str, tuple[dict[str, Any], Parts]] = {
    "the defaults": ({}, lambda _: truncation()),
    "greedy": ({"temperature": 0.0}, lambda _: [api.llama_sampler_init_greedy()]),
    "a negative temperature": (
        {"temperature": -1.0},
        lambda _: [api.llama_sampler_init_greedy()],
    ),
    "penalties": (
        {
            "repeat_penalty": 1.3,
            "frequency_penalty": 0.2,
            "presence_penalty": 0.4,
            "repeat_last_n": 32,
        },
        lambda _: [penalties(32, 1.3, 0.2, 0.4), *truncation()],
    ),
    "greedy with a repeat penalty": (
        {"repeat_penalty": 1.5, "temperature": 0.0},
        lambda _: [penalties(64, 1.5, 0.0, 0.0), *truncation(0.0)],
    ),
    "a repeat penalty over the whole context": (
        {"repeat_penalty": 1.2, "repeat_last_n": -1},
        lambda _: [penalties(1000, 1.2, 0.0, 0.0), *truncation()],
    ),
    "dry": (
        {"dry_multiplier": 0.8, "dry_penalty_last_n": 128},
        lambda vocab: [dry(vocab, 0.8, 128), *truncation()],
    ),
    "xtc": (
        {"xtc_probability": 0.7, "xtc_threshold": 0.1, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        lambda _: [
            api.llama_sampler_init_xtc(0.7, 0.1, 0, 42),
            api.llama_sampler_init_temp_ext(0.8, 0.0, 1.0),
            api.llama_sampler_init_dist(42),
        ],
    ),
    "typical": (
        {"typical_p": 0.7},
        lambda _: [
            api.llama_sampler_init_top_k(40),
            api.llama_sampler_init_typical(0.7, 0),
            *truncation()[1:],
        ],
    ),
    "top n sigma": (
        {"top_n_sigma": 1.0},
        lambda _: [api.llama_sampler_init_top_n_sigma(1.0), *truncation()],
    ),
    "a hot dynamic temperature": (
        {"temperature": 1.5, "dynatemp_range": 0.5, "top_k": 0},
        lambda _: [
            api.llama_sampler_init_top_p(0.95, 0),
            api.llama_sampler_init_min_p(0.05, 0),
            api.llama_sampler_init_temp_ext(1.5, 0.5, 1.0),
            api.llama_sampler_init_dist(42),
        ],
    ),
    "another order": (
        {"samplers": ("temperature", "min_p"), "temperature": 1.2},
        lambda _: [
            api.llama_sampler_init_temp_ext(1.2, 0.0, 1.0),
            api.llama_sampler_init_min_p(0.05, 0),
            api.llama_sampler_init_dist(42),
        ],
    ),
    "mirostat 1": (
        {"mirostat": 1},
        lambda _: [
            api.llama_sampler_init_temp(0.8),
            api.llama_sampler_init_mirostat(4096, 42, 5.0, 0.1, 100),
        ],
    ),
    "mirostat 2": (
        {"mirostat": 2, "mirostat_ent": 3.0, "mirostat_lr": 0.2},
        lambda _: [
            api.llama_sampler_init_temp(0.8),
            api.llama_sampler_init_mirostat_v2(42, 3.0, 0.2),
        ],
    ),
    "no end of generation": (
        {"ignore_eos": True, "temperature": 1.5},
        lambda _: [
            api.llama_sampler_init_logit_bias(
                4096, 2, (api.llama_logit_bias * 2)((0, -math.inf), (2, -math.inf))
            ),
            *truncation(1.5),
        ],
    ),
    "a grammar, greedily": (
        {"grammar": 'root ::= [A-Z] [a-z ,.]*', "temperature": 0.0},
        lambda vocab: [
            api.llama_sampler_init_grammar(vocab, b'root ::= [A-Z] [a-z ,.]*', b"root"),
            api.llama_sampler_init_greedy(),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_llama_cpps_own_chain(
    name: str, demo: Tokenizer, context: Context, prompt: list[int]
) -> None:
    settings, parts = CASES[name]
    chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
    for part in parts(demo.vocab):
        api.llama_sampler_chain_add(chain, part)
    if "grammar" not in settings:
        for token in prompt:
            api.llama_sampler_accept(chain, token)
    ours, theirs = [], []
    context.restart(prompt)
    with Sampler(demo, SamplingConfig(seed=42, **settings), prompt) as sampler:
        for _ in range(N_TOKENS):
            ours.append(sampler.sample(context.logits(demo.n_vocab)))
            theirs.append(api.llama_sampler_sample(chain, context.handle, -1))
            if ours[-1] != theirs[-1] or demo.is_end_of_generation(theirs[-1]):
                break
            context.decode([theirs[-1]])
    api.llama_sampler_free(chain)
    assert ours == theirs
    assert len(ours) > 8


def test_a_refused_token_is_sampled_again_as_llama_cpp_does_it(demo: Tokenizer) -> None:
    grammar = "root ::= [a-z ]+"
    chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
    for part in truncation():
        api.llama_sampler_chain_add(chain, part)
    checker = api.llama_sampler_init_grammar(demo.vocab, grammar.encode(), b"root")

    def choose(logits: np.ndarray, by_grammar: bool) -> int:
        data = (api.llama_token_data * demo.n_vocab)(*[(i, v, 0) for i, v in enumerate(logits)])
        array = api.llama_token_data_array(data, demo.n_vocab, -1, False)
        if by_grammar:
            api.llama_sampler_apply(checker, ctypes.byref(array))
        api.llama_sampler_apply(chain, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def is_allowed(token: int) -> bool:
        one = api.llama_token_data(token, 1.0, 0.0)
        array = api.llama_token_data_array(ctypes.pointer(one), 1, -1, False)
        api.llama_sampler_apply(checker, ctypes.byref(array))
        return not math.isinf(one.logit)

    n_again = 0
    with Sampler(demo, SamplingConfig(seed=42, grammar=grammar), []) as sampler:
        for step in range(N_TOKENS):
            logits = random_logits(demo.n_vocab, step)
            logits[[0, 2]] = -20.0
            theirs = choose(logits, by_grammar=False)
            if not is_allowed(theirs):
                theirs, n_again = choose(logits, by_grammar=True), n_again + 1
            api.llama_sampler_accept(checker, theirs)
            assert sampler.sample(logits) == theirs
    assert 0 < n_again < N_TOKENS
    api.llama_sampler_free(checker)
    api.llama_sampler_free(chain)


def test_the_first_of_equally_likely_tokens_is_taken_greedily(demo: Tokenizer) -> None:
    logits = np.zeros(demo.n_vocab, np.float32)
    logits[[700, 300, 900]] = 5.0
    with Sampler(demo, SamplingConfig(temperature=0.0), []) as sampler:
        assert sampler.sample(logits) == 300


def test_a_seed_of_minus_one_is_new_each_time_and_can_be_used_again(demo: Tokenizer) -> None:
    logits = random_logits(demo.n_vocab)
    config = SamplingConfig(seed=-1, temperature=2.0)
    with Sampler(demo, config, []) as first, Sampler(demo, config, []) as second:
        assert first.seed != second.seed and 0 <= first.seed < 2**32 - 1
        drawn = [first.sample(logits) for _ in range(20)]
        assert drawn != [second.sample(logits) for _ in range(20)]
    with Sampler(demo, replace(config, seed=first.seed), []) as again:
        assert [again.sample(logits) for _ in range(20)] == drawn


def test_the_logits_given_are_not_changed(demo: Tokenizer) -> None:
    logits = random_logits(demo.n_vocab)
    before = logits.copy()
    config = SamplingConfig(ignore_eos=True, repeat_penalty=1.5, grammar="root ::= [a-z]+")
    with Sampler(demo, config, [5, 6, 7]) as sampler:
        sampler.sample(logits)
    assert np.array_equal(logits, before)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_numbers_are_refused(
    demo: Tokenizer, value: float, temperature: float
) -> None:
    logits = np.full(demo.n_vocab, value, np.float32)
    with (
        Sampler(demo, SamplingConfig(temperature=temperature), []) as sampler,
        pytest.raises(BuddyrunError, match="not a number"),
    ):
        sampler.sample(logits)
    one = random_logits(demo.n_vocab)
    one[1234] = math.nan
    with (
        Sampler(demo, SamplingConfig(temperature=temperature), []) as sampler,
        pytest.raises(BuddyrunError, match="not a number"),
    ):
        sampler.sample(one)


def test_a_tiny_temperature_is_greedy(demo: Tokenizer) -> None:
    logits = random_logits(demo.n_vocab)
    with Sampler(demo, SamplingConfig(temperature=1e-40), []) as sampler:
        assert sampler.sample(logits) == int(logits.argmax())


def answer(tokenizer: Tokenizer, config: SamplingConfig, n_tokens: int = 600) -> tuple[str, bool]:
    """The text of an answer from random logits, and whether it ended by itself."""
    stream = tokenizer.detokenizer(keep_leading_space=True)
    text = ""
    with Sampler(tokenizer, config, []) as sampler:
        for step in range(n_tokens):
            logits = random_logits(tokenizer.n_vocab, step)
            logits[[3 + ord(c) for c in '"}']] += 4.0  # texts and objects end some day
            token = sampler.sample(logits)
            if tokenizer.is_end_of_generation(token):
                return text + stream.flush(), True
            text += stream.push(token)
    return text, False


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_an_answer_ends_with_its_grammar(
    demo: Tokenizer, temperature: float, ignore_eos: bool
) -> None:
    config = SamplingConfig(
        seed=1, grammar=YES_OR_NO, temperature=temperature, ignore_eos=ignore_eos
    )
    text, has_ended = answer(demo, config)
    assert text in ("Yes", "No") and has_ended


def test_answers_follow_a_json_schema(tmp_path: Path) -> None:
    schema = json.dumps(
        {
            "type": "object",
            "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
            "required": ["name", "age"],
        }
    )
    words = ['"', "{", "}", "a", "b", "name", "age", "1", "7", ":", ",", "▁"]
    with Tokenizer(write_spm(tmp_path / "spm.gguf", words)) as tokenizer:
        for seed in range(5):
            text, has_ended = answer(tokenizer, SamplingConfig(seed=seed, json_schema=schema))
            value = json.loads(text)
            assert has_ended and set(value) == {"name", "age"} and isinstance(value["age"], int)


def test_characters_built_of_bytes_obey_a_grammar(tmp_path: Path) -> None:
    with Tokenizer(write_spm(tmp_path / "spm.gguf")) as tokenizer:
        grammar = "root ::= [ࠀ-￿]{12}"
        for seed in range(5):
            text, has_ended = answer(tokenizer, SamplingConfig(seed=seed, grammar=grammar))
            assert has_ended and len(text) == 12
            assert all("\u0800" <= character <= "\uffff" for character in text)


def test_a_grammar_that_asks_for_what_cannot_be_spelled_is_refused(tmp_path: Path) -> None:
    path = write_spm(tmp_path / "spm.gguf", ["a", "b"], byte_tokens=["<0x0A>"])
    with (
        Tokenizer(path) as tokenizer,
        Sampler(tokenizer, SamplingConfig(grammar='root ::= "a" "z"', seed=1), []) as sampler,
    ):
        logits = random_logits(tokenizer.n_vocab)
        assert tokenizer.piece(sampler.sample(logits)) == b"a"
        with pytest.raises(OptionError, match="cannot spell"):
            sampler.sample(logits)


def test_a_grammar_with_too_many_readings_is_given_up_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.sampler._GRAMMAR_S", 0.02)
    grammar = (
        'root ::= ( | "é" | [ࠀ-￿] d{1,} "漢"?){2}\na ::= root* "a"\nc ::= d c?\nd ::= "a"* root{1,}'
    )
    with (
        Tokenizer(write_spm(tmp_path / "spm.gguf")) as tokenizer,
        Sampler(tokenizer, SamplingConfig(grammar=grammar, ignore_eos=True), []) as sampler,
        pytest.raises(OptionError, match="in too many ways"),
    ):
        for step in range(200):
            sampler.sample(random_logits(tokenizer.n_vocab, step))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -2}, "seed must be a whole number from -1"),
        ({"seed": 2**32}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"temperature": math.nan}, "temperature must be a number"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 2**31}, "top_k"),
        ({"top_p": 1.1}, "top_p must be from 0 to 1, not 1.1"),
        ({"min_p": -0.1}, "min_p"),
        ({"typical_p": 2.0}, "typical_p"),
        ({"repeat_penalty": 0.0}, "repeat_penalty"),
        ({"repeat_penalty": math.inf}, "repeat_penalty"),
        ({"repeat_last_n": -2}, "repeat_last_n"),
        ({"dry_multiplier": -1.0}, "dry_multiplier"),
        ({"dry_sequence_breakers": ("",)}, "dry_sequence_breakers"),
        ({"xtc_probability": 1.5}, "xtc_probability"),
        ({"mirostat": 3}, "mirostat must be a whole number from 0 to 2"),
        ({"samplers": ("top_k", "magic")}, "samplers must be among"),
        ({"samplers": ("top_k", "top_k")}, "each once"),
        ({"grammar": YES_OR_NO, "json_schema": "{}"}, "together"),
        ({"grammar": "root ::= ("}, "ends inside parentheses"),
        ({"grammar": 'root ::= ("a"? ){2000}'}, "grammar cannot be used"),
        ({"json_schema": "{"}, "is not JSON"),
    ],
)
def test_bad_settings_are_refused(demo: Tokenizer, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Sampler(demo, SamplingConfig(**settings), [])


def test_texts_made_by_a_schema_hold_no_control_characters(tmp_path: Path) -> None:
    with Tokenizer(write_spm(tmp_path / "spm.gguf")) as tokenizer:
        config = SamplingConfig(seed=1, json_schema='{"type": "string"}')
        texts = {answer(tokenizer, replace(config, seed=seed))[0] for seed in range(20)}
    assert len(texts) > 1 and all(isinstance(json.loads(text), str) for text in texts)


def test_closing_twice_is_harmless(demo: Tokenizer) -> None:
    sampler = Sampler(demo, SamplingConfig(grammar=YES_OR_NO), [])
    sampler.close()
    sampler.close()
    assert sampler.seed >= 0
