"""quant.ggml_types against the tables of the gguf package and of ggml itself."""

import ctypes
from importlib.util import find_spec
from pathlib import Path

import gguf
import pytest

from quant.ggml_types import (
    GGML_TYPES,
    GGML_TYPES_BY_NAME,
    REMOVED_TYPES,
    file_type_name,
    guessed_file_type_name,
)


@pytest.fixture(scope="module")
def libggml() -> ctypes.CDLL:
    spec = find_spec("llama_cpp")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "lib"
    [path, *_] = sorted(folder.glob("*ggml-base.*"))
    library = ctypes.CDLL(str(path))
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_type_size.restype = ctypes.c_size_t
    library.ggml_blck_size.restype = ctypes.c_int64
    library.ggml_is_quantized.restype = ctypes.c_bool
    return library


def test_every_type_has_the_name_and_sizes_that_ggml_gives_it(libggml: ctypes.CDLL) -> None:
    for id, type_ in GGML_TYPES.items():
        assert libggml.ggml_type_name(id).decode().upper() == type_.name.upper()
        assert libggml.ggml_blck_size(id) == type_.block_size, type_.name
        assert libggml.ggml_type_size(id) == type_.type_bytes, type_.name
        assert libggml.ggml_is_quantized(id) == type_.is_quantized, type_.name


def test_no_type_of_ggml_is_missing(libggml: ctypes.CDLL) -> None:
    known = set(GGML_TYPES) | set(REMOVED_TYPES)
    assert known == set(range(max(known) + 1))
    assert all(libggml.ggml_blck_size(id) == 0 for id in REMOVED_TYPES)


def test_sizes_agree_with_the_gguf_package() -> None:
    for their_type, sizes in gguf.GGML_QUANT_SIZES.items():
        ours = GGML_TYPES[int(their_type)]
        assert ours.name == their_type.name
        if ours.name != "Q8_1":  # the package still has the size that ggml gave up in 2023
            assert (ours.block_size, ours.type_bytes) == sizes, ours.name


def test_a_row_of_256_elements_in_q4_k_has_144_bytes() -> None:
    assert GGML_TYPES_BY_NAME["Q4_K"].row_bytes(256) == 144
    assert GGML_TYPES_BY_NAME["F16"].row_bytes(7) == 14


def test_a_row_of_broken_blocks_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        GGML_TYPES_BY_NAME["Q4_K"].row_bytes(255)


@pytest.mark.parametrize(
    ("file_type", "name"),
    [
        (0, "all F32"),
        (1, "F16"),
        (7, "Q8_0"),
        (15, "Q4_K - Medium"),
        (38, "MXFP4 MoE"),
        (999, "unknown, may not work"),
    ],
)
def test_file_types_are_named_in_llama_cpps_words(file_type: int, name: str) -> None:
    assert file_type_name(file_type) == name


def test_every_file_type_of_the_gguf_package_has_a_name() -> None:
    for file_type in gguf.LlamaFileType:
        if file_type.name != "GUESSED":
            quant = file_type.name.removeprefix("MOSTLY_").removeprefix("ALL_").split("_K")[0]
            name = file_type_name(int(file_type)).replace("IQ3_S mix", "IQ3_M")
            assert quant.replace("_MOE", "") in name


@pytest.mark.parametrize(
    ("type_name", "expected"),
    [
        ("Q4_K", "(guessed) Q4_K - Medium"),
        ("Q2_K", "(guessed) Q2_K - Medium"),
        ("Q3_K", "(guessed) Q3_K - Medium"),
        ("IQ3_S", "(guessed) IQ3_S - 3.4375 bpw"),
        ("F32", "(guessed) all F32"),
        ("Q6_K", "(guessed) Q6_K"),
        ("I8", "(guessed) all F32"),
    ],
)
def test_the_file_type_is_guessed_from_the_commonest_type(type_name: str, expected: str) -> None:
    assert guessed_file_type_name(GGML_TYPES_BY_NAME[type_name]) == expected
