"""The tokenizer against llama.cpp itself, on the demo model and on small SentencePiece files."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.errors import ModelError
from runner.llama_library import llama_library
from runner.tokenizer import Tokenizer
from tests.paths import DEMO
from tests.runner.vocab_gguf import BYTES, WORDS, write_spm

TEXT = 'Once upon a time, Zoë\'s 2 cats (漢字 😀) said:\n\t"hi"  <|im_end|> ok'


@pytest.fixture(scope="module")
def demo() -> Iterator[Tokenizer]:
    with Tokenizer(DEMO) as tokenizer:
        yield tokenizer


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    with Tokenizer(write_spm(tmp_path_factory.mktemp("spm") / "spm.gguf")) as tokenizer:
        yield tokenizer


def whole(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """The text of a whole answer, as llama.cpp renders it."""
    return tokenizer._detokenize(np.array(tokens, np.int32)).decode("utf-8", "replace")


def streamed(tokenizer: Tokenizer, tokens: list[int], keep: bool = False) -> str:
    stream = tokenizer.detokenizer(keep_leading_space=keep)
    return "".join([stream.push(token) for token in tokens]) + stream.flush()


def test_the_demo_model_says_which_tokens_are_special(demo: Tokenizer) -> None:
    assert (demo.n_vocab, demo.bos, demo.eos, demo.add_bos) == (4096, 0, 2, True)
    assert (demo.bos_text, demo.eos_text) == ("<|endoftext|>", "<|im_end|>")
    assert demo.end_of_generation_tokens == (0, 2)
    assert demo.is_end_of_generation(2) and not demo.is_end_of_generation(1)
    assert demo.chat_template is not None and "<|im_start|>" in demo.chat_template


def test_no_weight_is_mapped(demo: Tokenizer) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the system does not list its mappings")
    assert demo.n_vocab > 0
    assert not [line for line in maps.read_text().splitlines() if line.endswith(DEMO.name)]


def test_tokens_are_those_of_llama_cpp_python(demo: Tokenizer) -> None:
    from llama_cpp import Llama

    reference = Llama(str(DEMO), vocab_only=True, verbose=False)
    for add_special in (False, True):
        for parse_special in (False, True):
            ours = demo.tokenize(TEXT, add_special, parse_special)
            assert ours == reference.tokenize(TEXT.encode(), add_special, parse_special)
    reference.close()


def test_special_tokens_are_read_only_when_asked_for(demo: Tokenizer) -> None:
    assert demo.tokenize("<|im_end|>", add_special=False, parse_special=True) == [2]
    assert len(demo.tokenize("<|im_end|>", add_special=False, parse_special=False)) > 1


def test_there_is_one_bos_whether_or_not_the_text_begins_with_it(demo: Tokenizer) -> None:
    plain = demo.tokenize("hi", add_special=True, parse_special=True)
    assert plain[0] == demo.bos and plain.count(demo.bos) == 1
    assert demo.tokenize(demo.bos_text + "hi", add_special=True, parse_special=True) == plain


def test_an_empty_text_has_no_tokens_but_the_bos(demo: Tokenizer) -> None:
    assert demo.tokenize("", add_special=False, parse_special=True) == []
    assert demo.tokenize("", add_special=True, parse_special=True) == [demo.bos]
    assert whole(demo, []) == ""


def test_nul_characters_survive(demo: Tokenizer, spm: Tokenizer) -> None:
    for tokenizer in (demo, spm):
        tokens = tokenizer.tokenize("a\0b", add_special=False, parse_special=False)
        assert whole(tokenizer, tokens) == "a\0b"


def test_lone_surrogates_become_replacement_characters(demo: Tokenizer) -> None:
    undecodable = b"caf\xe9 \xff".decode("utf-8", "surrogateescape")
    tokens = demo.tokenize(undecodable, add_special=False, parse_special=False)
    assert whole(demo, tokens) == "caf\ufffd \ufffd"
    pair = demo.tokenize("\ud83d\ude00", add_special=False, parse_special=False)
    assert whole(demo, pair) == "😀"


def test_a_text_with_more_tokens_than_expected_is_complete(tmp_path: Path) -> None:
    # A space prefix, BOS and byte tokens make more tokens than the text has bytes.
    with Tokenizer(write_spm(tmp_path / "spm.gguf", words=["▁"])) as tokenizer:
        tokens = tokenizer.tokenize(" " * 50, add_special=True, parse_special=False)
        assert len(tokens) > 50 and whole(tokenizer, tokens).strip(" ") == ""


def test_a_long_text_is_tokenized_whole(demo: Tokenizer) -> None:
    text = "All the cats said hello. " * 20_000
    tokens = demo.tokenize(text, add_special=False, parse_special=False)
    assert whole(demo, tokens) == text


def test_a_character_split_over_tokens_is_held_back_until_it_is_whole(spm: Tokenizer) -> None:
    tokens = [3 + byte for byte in "é😀".encode()]
    stream = spm.detokenizer()
    assert [stream.push(token) for token in tokens] == ["", "é", "", "", "", "😀"]
    assert stream.flush() == ""


def test_an_unfinished_character_is_replaced_at_the_end(spm: Tokenizer) -> None:
    stream = spm.detokenizer()
    assert stream.push(3 + 0xF0) == "" and stream.push(3 + 0x9F) == ""
    assert stream.flush() == "\ufffd"


def test_invalid_bytes_are_replaced_where_they_stand(spm: Tokenizer) -> None:
    tokens = [3 + 0xFF, 3 + ord("a"), 3 + 0xC3, 3 + ord("b")]
    assert streamed(spm, tokens) == "\ufffda\ufffdb"


def test_special_tokens_are_not_rendered(demo: Tokenizer) -> None:
    tokens = demo.tokenize("<|im_start|>user<|im_end|>", add_special=True, parse_special=True)
    assert streamed(demo, tokens) == "user" == whole(demo, tokens)


def test_a_sentencepiece_answer_loses_its_first_space_only(spm: Tokenizer) -> None:
    tokens = spm.tokenize("Hello world", add_special=False, parse_special=False)
    assert tokens[0] == 259 + WORDS.index("▁Hello")
    assert streamed(spm, tokens) == "Hello world" == whole(spm, tokens)
    assert streamed(spm, tokens, keep=True) == " Hello world"


def test_no_space_is_dropped_where_the_vocabulary_adds_none(tmp_path: Path) -> None:
    with Tokenizer(write_spm(tmp_path / "spm.gguf", add_space_prefix=False)) as tokenizer:
        tokens = tokenizer.tokenize(" Hello", add_special=False, parse_special=False)
        assert streamed(tokenizer, tokens) == " Hello" == whole(tokenizer, tokens)


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, 258 + len(WORDS)), max_size=30))
def test_streamed_pieces_are_the_detokenized_whole(spm: Tokenizer, tokens: list[int]) -> None:
    assert streamed(spm, tokens) == whole(spm, tokens)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_comes_back_from_its_tokens(demo: Tokenizer, text: str) -> None:
    tokens = demo.tokenize(text, add_special=False, parse_special=False)
    assert streamed(demo, tokens) == text == whole(demo, tokens)


def test_an_unknown_kind_of_vocabulary_is_refused(tmp_path: Path) -> None:
    path = write_spm(tmp_path / "spm.gguf", model="gpt2-like")
    with pytest.raises(ModelError, match="unknown tokenizer: 'gpt2-like'"):
        Tokenizer(path)


def test_a_file_that_is_no_gguf_is_refused_in_llama_cpps_words(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model at all")
    with pytest.raises(ModelError, match=r"cannot be loaded\. llama\.cpp says: .*magic"):
        Tokenizer(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        Tokenizer(tmp_path / "none.gguf")


def test_a_file_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    path = write_spm(tmp_path / "none.gguf", model="no_vocab")
    with pytest.raises(ModelError, match="no tokenizer"):
        Tokenizer(path)


def test_what_a_device_says_before_it_aborts_the_process_is_on_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    library = llama_library()
    for level, line in ((4, b"CUDA error: out of memory\n"), (4, b"failed to load model\n")):
        library._on_log(level, line, None)
    assert capsys.readouterr() == ("", "CUDA error: out of memory\n")
    library.forget()


def test_llama_cpp_writes_nothing_to_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Tokenizer(DEMO):
        pass
    with pytest.raises(ModelError):
        Tokenizer(tmp_path / "none.gguf")
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_a_token_outside_the_vocabulary_does_not_reach_llama_cpp(demo: Tokenizer) -> None:
    for token in (-1, demo.n_vocab):
        with pytest.raises(AssertionError):
            demo.piece(token)
        with pytest.raises(AssertionError):
            demo.is_end_of_generation(token)
    assert demo.token_text(-1) == ""


def test_closing_twice_is_harmless() -> None:
    tokenizer = Tokenizer(DEMO)
    tokenizer.close()
    tokenizer.close()
    with pytest.raises(AssertionError, match="closed"):
        _ = tokenizer.vocab


def test_byte_tokens_stand_where_the_tests_expect_them(spm: Tokenizer) -> None:
    assert [spm.token_text(3 + byte) for byte in range(256)] == BYTES
