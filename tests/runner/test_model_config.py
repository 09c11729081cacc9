"""runner.model_config: shapes, rope, experts and tokenizers, as llama.cpp understands them."""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quant.gguf_file import GGUFFile
from runner.byte_sizes import bytes_text, count_text
from runner.checks.model_tensors import check_norms
from runner.checks.read_model import read_model
from runner.errors import ModelError
from runner.model_config import ModelConfig, RopeConfig
from runner.model_sizes import expert_ranges, kv_bytes_per_token, model_sizes
from runner.show import describe, format_text
from tests.gguf_writer import (
    ARR,
    BOOL,
    F32,
    I32,
    STR,
    TYPE_F32,
    TYPE_Q8_0,
    U32,
    Array,
    Gguf,
    Tensor,
    small_mixtral,
    split_gguf,
    write_shards,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def load(path: Path, made: Gguf) -> tuple[GGUFFile, ModelConfig]:
    path.write_bytes(made.packed())
    file = GGUFFile.open(path)
    return file, read_model(file)


def config_of(path: Path, made: Gguf) -> ModelConfig:
    file, config = load(path, made)
    file.close()
    return config


def with_tensor_added(made: Gguf, name: str, values: NDArray[Any]) -> Gguf:
    data = values.astype(np.float32).tobytes()
    return replace(made, tensors=(*made.tensors, Tensor(name, values.shape, TYPE_F32, data)))


def test_a_mixtral_is_read(path: Path) -> None:
    config = config_of(path, small_mixtral())
    assert (config.architecture, config.name) == ("llama", "small mixtral")
    assert (config.n_layer, config.n_embd, config.n_vocab) == (2, 32, 300)
    assert (config.n_head, config.n_head_kv, config.n_embd_head) == (4, 2, 8)
    assert (config.n_expert, config.n_expert_used, config.n_ff_exp) == (4, 2, 64)
    assert config.is_moe and config.has_merged_experts
    assert config.attention_scale == pytest.approx(1 / math.sqrt(8))
    assert (config.file_type, config.sliding_window, config.notes) == ("F16", 0, ())


def test_a_dense_llama_is_read(path: Path) -> None:
    config = config_of(path, small_mixtral(n_expert=0))
    assert not config.is_moe
    assert (config.n_expert, config.n_expert_used, config.n_ff, config.n_ff_exp) == (0, 0, 64, 0)


def test_a_single_expert_is_still_an_expert(path: Path) -> None:
    assert config_of(path, small_mixtral(n_expert=1, n_expert_used=1)).n_expert == 1


def test_without_head_count_kv_every_head_has_its_own_keys(path: Path) -> None:
    made = small_mixtral(n_head_kv=4).without_key("llama.attention.head_count_kv")
    assert config_of(path, made).n_head_kv == 4


def test_arrays_with_one_value_per_layer_are_read_when_all_agree(path: Path) -> None:
    made = small_mixtral().with_key("llama.attention.head_count", ARR, Array(U32, (4, 4)))
    made = made.with_key("llama.feed_forward_length", ARR, Array(I32, (64, 64)))
    config = config_of(path, made)
    assert (config.n_head, config.n_ff) == (4, 64)


def test_a_head_may_be_longer_than_its_share_of_the_embedding(path: Path) -> None:
    made = small_mixtral(n_head=2, n_head_kv=2)
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        made = made.with_key(f"llama.{key}", U32, 24)
    for layer in range(2):
        for name, shape in {
            "q": (32, 48),
            "k": (32, 48),
            "v": (32, 48),
            "output": (48, 32),
        }.items():
            tensor = f"blk.{layer}.attn_{name}.weight"
            made = made.with_tensor(tensor, shape=shape, data=bytes(2 * 32 * 48))
    config = config_of(path, made)
    assert (config.n_embd_head, config.n_embd_q, config.rope.n_rot) == (24, 48, 24)


def test_a_model_without_an_output_matrix_is_accepted(path: Path) -> None:
    tied = config_of(path, small_mixtral().without_tensor("output.weight"))
    assert tied == config_of(path, small_mixtral())


def test_the_file_type_is_guessed_when_the_file_names_none(path: Path) -> None:
    made = small_mixtral(matrix_type=TYPE_Q8_0).without_key("general.file_type")
    assert config_of(path, made).file_type == "(guessed) Q8_0"


def test_biases_are_accepted_and_checked(path: Path) -> None:
    made = with_tensor_added(small_mixtral(), "blk.0.attn_q.bias", np.zeros(32))
    assert config_of(path, made).n_layer == 2
    made = with_tensor_added(small_mixtral(), "blk.0.attn_k.bias", np.zeros(32))
    with pytest.raises(ModelError, match=r"'blk.0.attn_k.bias': found shape 32; expected 16"):
        config_of(path, made)


def test_the_sliding_window_is_read_when_declared(path: Path) -> None:
    made = small_mixtral().with_key("llama.attention.sliding_window", U32, 64)
    assert config_of(path, made).sliding_window == 64


def test_keys_that_llama_cpp_ignores_are_noted(path: Path) -> None:
    [note] = config_of(path, small_mixtral().with_key("llama.attention.scale", F32, 2.0)).notes
    assert "llama.attention.scale" in note and "ignored" in note


def rope_of(path: Path, **keys: tuple[int, Any]) -> RopeConfig:
    made = small_mixtral()
    for name, (type_, value) in keys.items():
        made = made.with_key("llama.rope." + name.replace("__", "."), type_, value)
    return config_of(path, made).rope


def test_rope_without_scaling_is_plain(path: Path) -> None:
    rope = rope_of(path)
    assert (rope.n_rot, rope.freq_base, rope.freq_scale, rope.n_ctx_orig) == (8, 10000.0, 1.0, 256)
    assert (rope.ext_factor, rope.attn_factor) == (0.0, 1.0)
    assert (rope.beta_fast, rope.beta_slow) == (32.0, 1.0)


def test_linear_scaling_divides_the_frequencies(path: Path) -> None:
    factor = (F32, 4.0)
    assert rope_of(path, scaling__factor=factor).freq_scale == 0.25
    assert rope_of(path, scale_linear=factor).freq_scale == 0.25, "the key's old name"
    assert rope_of(path, scaling__factor=(F32, 0.0)).freq_scale == 1.0
    assert rope_of(path, scaling__factor=factor, scaling__type=(STR, "none")).freq_scale == 1.0


def test_yarn_cancels_the_magnitude_that_ggml_applies_itself(path: Path) -> None:
    keys = {
        "scaling__type": (STR, "yarn"),
        "scaling__factor": (F32, 8.0),
        "scaling__original_context_length": (U32, 32),
    }
    rope = rope_of(path, **keys)
    assert (rope.ext_factor, rope.freq_scale, rope.n_ctx_orig) == (1.0, 0.125, 32)
    assert rope.attn_factor == pytest.approx(1.0, abs=1e-6)
    rope = rope_of(path, **keys, scaling__attn_factor=(F32, 1.5))
    assert rope.attn_factor == pytest.approx(1.5, abs=1e-6)


def test_a_shrinking_yarn_factor_has_no_magnitude_of_its_own(path: Path) -> None:
    rope = rope_of(path, scaling__type=(STR, "yarn"), scaling__factor=(F32, 0.5))
    assert rope.attn_factor == pytest.approx(1 / (1 + 0.1 * math.log(0.5)), abs=1e-6)


def test_longrope_has_factors_for_short_and_for_long_contexts(path: Path) -> None:
    made = small_mixtral().with_key("llama.rope.scaling.type", STR, "longrope")
    made = made.with_key("llama.rope.scaling.original_context_length", U32, 64)
    for length in ("long", "short"):
        made = with_tensor_added(made, f"rope_factors_{length}.weight", np.ones(4))
    file, config = load(path, made)
    with file:
        assert config.rope_factors_tensor(file, 64) == "rope_factors_short.weight"
        assert config.rope_factors_tensor(file, 65) == "rope_factors_long.weight"


def test_llama_3_factors_apply_to_every_context(path: Path) -> None:
    made = with_tensor_added(small_mixtral(), "rope_freqs.weight", np.full(4, 8.0))
    file, config = load(path, made)
    with file:
        assert config.rope_factors_tensor(file, 10**6) == "rope_freqs.weight"


@pytest.mark.parametrize("old_layout", [False, True])
def test_the_ranges_of_an_expert_hold_its_weights(path: Path, old_layout: bool) -> None:
    merged = {tensor.name: tensor for tensor in small_mixtral().tensors}
    file, config = load(path, small_mixtral(old_layout=old_layout))
    assert config.has_merged_experts != old_layout
    with file:
        for layer in range(2):
            for expert in range(4):
                ranges = expert_ranges(file, config, layer, expert)
                for projection in ("gate", "up", "down"):
                    range_ = getattr(ranges, projection)
                    into = bytearray(range_.n_bytes)
                    file.read(range_, into)
                    data = merged[f"blk.{layer}.ffn_{projection}_exps.weight"].data
                    assert into == data[expert * 4096 : (expert + 1) * 4096]


def test_experts_of_a_split_file_lie_in_their_shards(tmp_path: Path) -> None:
    first = write_shards(tmp_path / "m.gguf", split_gguf(small_mixtral(), 4))
    with GGUFFile.open(first) as file:
        config = read_model(file)
        shards = {expert_ranges(file, config, layer, 0).down.shard for layer in range(2)}
        assert len(shards) == 2


def test_sizes_add_up(path: Path) -> None:
    file, config = load(path, small_mixtral())
    with file:
        sizes = model_sizes(file, config)
        assert sizes.expert_bytes == (3 * 32 * 64 * 2,) * 2
        assert sizes.all_experts_bytes == 2 * 4 * 3 * 32 * 64 * 2
        n_bytes = sum(info.n_bytes for info in file.tensors.values())
        assert sizes.all_experts_bytes + sizes.non_expert_bytes == n_bytes
        assert sizes.n_params - sizes.n_params_active == 2 * 2 * 3 * 32 * 64
        assert kv_bytes_per_token(config) == 2 * 2 * 16 * 2


def test_a_norm_with_a_nan_is_named(path: Path) -> None:
    file, config = load(path, small_mixtral())
    info = file.tensors["blk.1.ffn_norm.weight"]
    with path.open("r+b") as stream:
        stream.seek(info.offset + 20)
        stream.write(np.float32(np.nan).tobytes())
    with file, pytest.raises(ModelError, match=r"'blk.1.ffn_norm.weight': .* nan at index 5"):
        check_norms(file, config)


def test_scores_and_types_may_be_longer_than_the_vocabulary(path: Path) -> None:
    made = small_mixtral().with_key("tokenizer.ggml.scores", ARR, Array(F32, (0.0,) * 400))
    assert config_of(path, made).n_vocab == 300


def test_a_padding_token_outside_the_vocabulary_is_left_to_llama_cpp(path: Path) -> None:
    made = small_mixtral().with_key("tokenizer.ggml.padding_token_id", U32, 2**32 - 1)
    assert config_of(path, made).n_vocab == 300


def bpe_mixtral(**keys: tuple[int, Any]) -> Gguf:
    letters = [chr(c) for c in range(0x100, 0x100 + 299)]
    made = small_mixtral().with_key("tokenizer.ggml.model", STR, "gpt2")
    made = made.with_key("tokenizer.ggml.pre", STR, "default")
    made = made.with_key("tokenizer.ggml.tokens", ARR, Array(STR, (*letters, "<end>")))
    made = made.with_key("tokenizer.ggml.merges", ARR, Array(STR, ("Ā ā",)))
    made = made.with_key("tokenizer.ggml.token_type", ARR, Array(I32, (1,) * 300))
    for name, (type_, value) in keys.items():
        made = made.with_key(f"tokenizer.ggml.{name}", type_, value)
    return made


def test_a_bpe_vocabulary_needs_no_byte_tokens(path: Path) -> None:
    assert config_of(path, bpe_mixtral()).n_vocab == 300


def test_a_bos_token_that_must_be_added_must_exist(path: Path) -> None:
    made = bpe_mixtral(pre=(STR, "glm4")).without_key("tokenizer.ggml.bos_token_id")
    assert config_of(path, made).n_vocab == 300
    with pytest.raises(ModelError, match="bos_token_id: found no such metadata key"):
        config_of(path, made.with_key("tokenizer.ggml.add_bos_token", BOOL, 1))


def test_show_prints_sections_of_aligned_lines_and_maps_nothing(path: Path) -> None:
    made = small_mixtral().with_key("tokenizer.chat_template", STR, "{{ messages }}\nend")
    file, config = load(path, made)
    with file:
        description = describe(file, config, template=True)
        text = format_text(description)
        assert not file.is_mapped
    lines = text.splitlines()
    assert "    architecture      llama" in lines
    assert "    layers x experts  2 x 4" in lines
    assert "    one expert        12.3 kB" in lines
    assert "    KV cache f16      128 B per token, 32.8 kB for 256" in lines
    assert "    F16               16 tensors, 149 kB" in lines
    assert "    {{ messages }}" in lines and "    end" in lines
    assert not any("q8_0" in line for line in lines), "heads of 8 are no whole blocks"
    assert json.loads(json.dumps(asdict(description)))["n_expert"] == 4


def test_show_leaves_out_what_a_dense_model_has_not(path: Path) -> None:
    file, config = load(path, small_mixtral(n_expert=0))
    with file:
        text = format_text(describe(file, config))
    assert "Experts" not in text and "Shards" not in text and "Chat template" not in text


def test_show_lists_the_shards(tmp_path: Path) -> None:
    first = write_shards(tmp_path / "m.gguf", split_gguf(small_mixtral(), 3))
    with GGUFFile.open(first) as file:
        text = format_text(describe(file, read_model(file)))
    assert "m-00003-of-00003.gguf" in text


@pytest.mark.parametrize(
    ("n", "as_bytes", "as_count"),
    [(0, "0 B", "0"), (999, "999 B", "999"), (107_000_000, "107 MB", "107.0 M")],
)
def test_numbers_are_short(n: int, as_bytes: str, as_count: str) -> None:
    assert (bytes_text(n), count_text(n)) == (as_bytes, as_count)


def llama_cpp_loads(path: Path, vocab_only: bool) -> list[int]:
    """Load in a process of its own, because llama.cpp may abort; the tokens of a text."""
    code = (
        "import sys, llama_cpp\n"
        f"model = llama_cpp.Llama(sys.argv[1], vocab_only={vocab_only}, verbose=False, n_ctx=64)\n"
        "print(model.tokenize(b'the \\xc3\\xa9', add_bos=True, special=False))\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr[-2000:]
    tokens: list[int] = json.loads(done.stdout)
    return tokens


def test_llama_cpp_agrees_that_the_small_model_is_good(path: Path) -> None:
    path.write_bytes(small_mixtral().packed())
    tokens = llama_cpp_loads(path, vocab_only=False)
    assert tokens[0] == 1 and tokens[-2:] == [3 + 0xC3, 3 + 0xA9]


@pytest.mark.parametrize(
    "made",
    [
        small_mixtral(old_layout=True),
        small_mixtral().with_key("tokenizer.ggml.padding_token_id", U32, 2**32 - 1),
        bpe_mixtral(),
    ],
    ids=["old layout", "bad padding token", "bpe"],
)
def test_llama_cpp_reads_the_vocabularies_that_we_accept(path: Path, made: Gguf) -> None:
    assert config_of(path, made).n_vocab == 300
    assert llama_cpp_loads(path, vocab_only=True)


def test_llama_cpp_reads_the_vocabulary_of_a_split_file(tmp_path: Path) -> None:
    first = write_shards(tmp_path / "m.gguf", split_gguf(small_mixtral(), 3))
    assert llama_cpp_loads(first, vocab_only=True)[0] == 1
