"""quant.dequantize against the gguf package's own conversions, on real and on random blocks."""

import gguf
import numpy as np
import pytest

from quant.dequantize import dequantize
from quant.errors import BackendError
from quant.ggml_types import GGML_TYPES, GGML_TYPES_BY_NAME, GGMLType
from quant.gguf_file import GGUFFile
from tests.llama_cpp_oracle import FILE_TYPES

# What the gguf package converts as well.
KNOWN_TO_GGUF = {
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
    "Q6_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS", "IQ1_M",
    "TQ1_0", "TQ2_0", "MXFP4",
}  # fmt: skip
FLOATS_OF_BLOCKS = {  # where a block of this type has its float16 scales, in bytes
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ2_XXS": (0,),
    "IQ2_XS": (0,), "IQ3_XXS": (0,), "IQ1_S": (0,), "IQ4_NL": (0,), "IQ3_S": (0,), "IQ2_S": (0,),
    "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip


def by_gguf(blocks: np.ndarray, type: GGMLType) -> np.ndarray:
    kind = gguf.GGMLQuantizationType(type.id)
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        return blocks.view(np.float32 if kind == 0 else np.float16).astype(np.float32)
    values: np.ndarray = gguf.quants.dequantize(blocks.reshape(1, -1), kind)
    return values.reshape(-1)


def random_blocks(type: GGMLType, n: int) -> np.ndarray:
    rng = np.random.default_rng(type.id)
    blocks = rng.integers(0, 256, (n, type.type_bytes), np.uint8)
    for at in FLOATS_OF_BLOCKS.get(type.name, ()):
        scale = rng.uniform(-2, 2, n).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8).reshape(n, 2)
    if type.name in ("F32", "F16", "BF16"):
        values = rng.standard_normal(n).astype(np.float32)
        halves = values.view(np.uint32) >> 16 if type.name == "BF16" else values
        blocks = halves.astype({"F32": "f4", "F16": "f2", "BF16": "u2"}[type.name])
    if type.name == "IQ1_M":  # its scale is spread over the top bits of four fields
        scale = int(np.float16(0.5).view(np.uint16))
        for i in range(4):
            blocks[:, 49 + 2 * i] = (blocks[:, 49 + 2 * i] & 0x0F) | ((scale >> 4 * i & 15) << 4)
    if type.name == "MXFP4":
        blocks[:, 0] = rng.integers(120, 136, n)
    return np.ascontiguousarray(blocks).view(np.uint8).reshape(-1)


@pytest.mark.parametrize("name", sorted(KNOWN_TO_GGUF))
def test_random_blocks_become_the_numbers_that_the_gguf_package_makes(name: str) -> None:
    type = GGML_TYPES_BY_NAME[name]
    blocks = random_blocks(type, 64)
    expected = by_gguf(blocks, type)
    found = dequantize(blocks, type)
    assert found.dtype == np.float32 and found.shape == (64 * type.block_size,)
    assert np.isfinite(expected).all() and np.abs(expected).max() > 0
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-9)


EVERY_DAY = ("F16", "Q8_0", "Q4_K")  # llama.cpp's quantizer takes long for the others


@pytest.mark.parametrize(
    "name", [n if n in EVERY_DAY else pytest.param(n, marks=pytest.mark.slow) for n in FILE_TYPES]
)
def test_a_quantized_model_becomes_what_the_gguf_package_makes_of_it(  # type: ignore[no-untyped-def]
    demo_in, name: str
) -> None:
    types = set()
    with GGUFFile.open(demo_in(name)) as file:
        for tensor in file.tensors.values():
            if "blk.1." in tensor.name:
                blocks = np.empty(tensor.n_bytes, np.uint8)
                file.read(tensor.range, blocks)
                np.testing.assert_allclose(
                    dequantize(blocks, tensor.type), by_gguf(blocks, tensor.type), rtol=1e-6
                )
                types.add(tensor.type.name)
    assert name in types and "F32" in types


def test_bfloat16_keeps_every_bit_also_of_odd_numbers() -> None:
    halves = np.array([0x3F80, 0xC000, 0x0001, 0x7F7F, 0x8000], "<u2")
    found = dequantize(halves.view(np.uint8), GGML_TYPES_BY_NAME["BF16"])
    assert (found.view(np.uint32) >> 16 == halves).all() and found[0] == 1.0 and found[1] == -2.0


def test_numbers_can_be_written_to_memory_that_is_there() -> None:
    type = GGML_TYPES_BY_NAME["Q8_0"]
    blocks = random_blocks(type, 4)
    room = np.full(256, np.nan, np.float32)
    assert np.shares_memory(dequantize(blocks, type, room[:128]), room)
    assert (room[:128] == dequantize(blocks, type)).all() and np.isnan(room[128:]).all()


def test_every_type_is_converted_or_refused_in_words() -> None:
    refused = set()
    for type in GGML_TYPES.values():
        blocks = np.zeros(4 * type.type_bytes, np.uint8)
        try:
            assert dequantize(blocks, type).shape == (4 * type.block_size,)
        except BackendError as error:
            assert "cannot convert" in str(error) and "ggml 0." in str(error)
            refused.add(type.name)
    assert refused == {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}


@pytest.mark.parametrize("n_bytes", [1, 33, 35, 34 * 3 + 1])
def test_broken_blocks_are_our_own_mistake_and_never_reach_ggml(n_bytes: int) -> None:
    with pytest.raises(AssertionError, match="no whole blocks"):
        dequantize(np.zeros(n_bytes, np.uint8), GGML_TYPES_BY_NAME["Q8_0"])


def test_memory_that_does_not_fit_is_our_own_mistake() -> None:
    blocks = np.zeros(34, np.uint8)
    for room in (np.zeros(31, np.float32), np.zeros((32, 1), np.float32), np.zeros(32)):
        with pytest.raises(AssertionError):
            dequantize(blocks, GGML_TYPES_BY_NAME["Q8_0"], room)  # type: ignore[arg-type]


def test_nothing_becomes_nothing() -> None:
    assert dequantize(np.zeros(0, np.uint8), GGML_TYPES_BY_NAME["Q4_K"]).shape == (0,)
