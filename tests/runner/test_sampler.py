"""The sampler's tokens are those of llama.cpp's own chains, on the demo model's logits."""

import ctypes
import math
from collections.abc import Callable, Iterator
from typing import Any

import llama_cpp.llama_cpp as api
import numpy as np
import pytest

from runner.config import SamplingConfig
from runner.sampler import Sampler
from runner.tokenizer import Tokenizer
from tests.paths import DEMO

PROMPT = "<|im_start|>user\nTell me a story about a cat.<|im_end|>\n<|im_start|>assistant\n"
N_TOKENS = 64
BREAKERS = [b"\n", b":", b'"', b"*"]


class Context:
    """llama.cpp running the demo model, one token at a time."""

    def __init__(self) -> None:
        params = api.llama_model_default_params()
        self.model = api.llama_model_load_from_file(str(DEMO).encode(), params)
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_threads, settings.n_threads_batch = 256, 1, 1
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
                4096,
                2,
                (api.llama_logit_bias * 2)(
                    api.llama_logit_bias(0, -math.inf), api.llama_logit_bias(2, -math.inf)
                ),
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
        rows = [api.llama_token_data(i, value, 0.0) for i, value in enumerate(logits)]
        data = (api.llama_token_data * demo.n_vocab)(*rows)
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
