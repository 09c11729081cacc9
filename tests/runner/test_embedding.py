"""Rows of the embedding against the gguf package's own conversions."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from quant.dequantize import dequantize
from quant.gguf_file import GGUFFile
from runner.embedding import Embedding
from tests.random_model import RandomModel, write_random_model

TOKENS = np.array([5, 0, 319, 5, 258, 31], np.int32)  # the first, the last, one twice


def rows_by_gguf(path: Path) -> np.ndarray:
    """The matrix as float32 (n_vocab, n_embd)."""
    tensors = [t for t in gguf.GGUFReader(path).tensors if t.name == "token_embd.weight"]
    data, kind = tensors[0].data, tensors[0].tensor_type
    if kind in (T.F32, T.F16):
        return data.astype(np.float32)
    rows: np.ndarray = gguf.quants.dequantize(data, kind)
    return rows


def assert_rows_are_the_files(path: Path, tokens: np.ndarray) -> None:
    expected = rows_by_gguf(path)
    with GGUFFile.open(path) as file:
        info = file.tensors["token_embd.weight"]
        blocks = np.empty(info.n_bytes, np.uint8)
        file.read(info.range, blocks)
        whole = dequantize(blocks, info.type).reshape(expected.shape)
        found = np.full((len(tokens), expected.shape[1]), np.nan, np.float32)
        Embedding(file).read(tokens, found)
    assert np.array_equal(found, whole[tokens])
    np.testing.assert_allclose(found, expected[tokens], rtol=2e-6, atol=1e-9)
    assert np.isfinite(found).all() and np.abs(found).max() > 0


@pytest.mark.parametrize(
    "name", ["F16", "Q8_0", pytest.param("Q6_K", marks=pytest.mark.slow), "Q4_K"]
)
def test_a_tokens_row_is_what_the_gguf_package_makes_of_it(  # type: ignore[no-untyped-def]
    demo_in, name: str
) -> None:
    path = demo_in(name)
    n_vocab = len(rows_by_gguf(path))
    assert_rows_are_the_files(path, np.array([0, 1, n_vocab - 1, 300, 300, 7], np.int32))


@pytest.mark.parametrize("kind", [T.F32, T.F16, T.BF16, T.Q4_0])
def test_other_types_have_rows_too(kind: T, tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "model.gguf", RandomModel(type=kind, n_ff=256))
    assert_rows_are_the_files(path, TOKENS)


def test_the_rows_of_a_split_file_are_found(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "m.gguf", RandomModel(tensors_per_shard=7))
    assert_rows_are_the_files(path, TOKENS)


def test_one_row_and_no_row_can_be_read(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "model.gguf", RandomModel())
    assert_rows_are_the_files(path, TOKENS[:1])
    with GGUFFile.open(path) as file:
        nothing = np.empty((0, 128), np.float32)
        Embedding(file).read(TOKENS[:0], nothing)


def test_rows_are_written_where_they_belong_and_nowhere_else(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "model.gguf", RandomModel())
    room = np.full((4, 128), 7.0, np.float32)
    with GGUFFile.open(path) as file:
        Embedding(file).read(TOKENS[:2], room[1:3])
    assert (room[[0, 3]] == 7.0).all() and (room[1:3] != 7.0).any()
