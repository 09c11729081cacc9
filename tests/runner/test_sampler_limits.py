"""What the sampler takes, refuses and bounds: seeds, odd logits, grammars, bad settings."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runner.config import SamplingConfig
from runner.errors import BuddyrunError, OptionError
from runner.sampler import Sampler
from runner.tokenizer import Tokenizer
from tests.paths import DEMO
from tests.runner.vocab_gguf import write_spm

YES_OR_NO = 'root ::= "Yes" | "No"'


@pytest.fixture(scope="module")
def demo() -> Iterator[Tokenizer]:
    with Tokenizer(DEMO) as tokenizer:
        yield tokenizer


def random_logits(n_vocab: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(n_vocab) * 3).astype(np.float32)


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
    monkeypatch.setattr("runner.sampler._GRAMMAR_S", 1e-5)  # any real grammar step takes longer
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
