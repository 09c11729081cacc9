"""The tensor types of ggml and the file types of llama.cpp: names and sizes. Reads no file."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class GGMLType:
    """How ggml stores numbers of one type: blocks of `block_size` elements, `type_bytes` each."""

    id: int
    name: str
    block_size: int  # elements
    type_bytes: int  # bytes per block

    @property
    def is_quantized(self) -> bool:
        return self.block_size > 1

    def row_bytes(self, n: int) -> int:
        """Bytes of a row of `n` elements; `n` must be a multiple of the block size."""
        assert n % self.block_size == 0, f"{n} elements are no whole blocks of {self.name}"
        return n // self.block_size * self.type_bytes


_TYPES = (
    GGMLType(0, "F32", 1, 4),
    GGMLType(1, "F16", 1, 2),
    GGMLType(2, "Q4_0", 32, 18),
    GGMLType(3, "Q4_1", 32, 20),
    GGMLType(6, "Q5_0", 32, 22),
    GGMLType(7, "Q5_1", 32, 24),
    GGMLType(8, "Q8_0", 32, 34),
    GGMLType(9, "Q8_1", 32, 36),
    GGMLType(10, "Q2_K", 256, 84),
    GGMLType(11, "Q3_K", 256, 110),
    GGMLType(12, "Q4_K", 256, 144),
    GGMLType(13, "Q5_K", 256, 176),
    GGMLType(14, "Q6_K", 256, 210),
    GGMLType(15, "Q8_K", 256, 292),
    GGMLType(16, "IQ2_XXS", 256, 66),
    GGMLType(17, "IQ2_XS", 256, 74),
    GGMLType(18, "IQ3_XXS", 256, 98),
    GGMLType(19, "IQ1_S", 256, 50),
    GGMLType(20, "IQ4_NL", 32, 18),
    GGMLType(21, "IQ3_S", 256, 110),
    GGMLType(22, "IQ2_S", 256, 82),
    GGMLType(23, "IQ4_XS", 256, 136),
    GGMLType(24, "I8", 1, 1),
    GGMLType(25, "I16", 1, 2),
    GGMLType(26, "I32", 1, 4),
    GGMLType(27, "I64", 1, 8),
    GGMLType(28, "F64", 1, 8),
    GGMLType(29, "IQ1_M", 256, 56),
    GGMLType(30, "BF16", 1, 2),
    GGMLType(34, "TQ1_0", 256, 54),
    GGMLType(35, "TQ2_0", 256, 66),
    GGMLType(39, "MXFP4", 32, 17),
    GGMLType(40, "NVFP4", 64, 36),
    GGMLType(41, "Q1_0", 128, 18),
    GGMLType(42, "Q2_0", 64, 18),
)

GGML_TYPES: Mapping[int, GGMLType] = MappingProxyType({t.id: t for t in _TYPES})
GGML_TYPES_BY_NAME: Mapping[str, GGMLType] = MappingProxyType({t.name: t for t in _TYPES})

REMOVED_TYPES: Mapping[int, str] = MappingProxyType(
    {
        4: "Q4_2",
        5: "Q4_3",
        31: "Q4_0_4_4",
        32: "Q4_0_4_8",
        33: "Q4_0_8_8",
        36: "IQ4_NL_4_4",
        37: "IQ4_NL_4_8",
        38: "IQ4_NL_8_8",
    }
)

_FILE_TYPES: Mapping[int, str] = MappingProxyType(
    {
        0: "all F32",
        1: "F16",
        2: "Q4_0",
        3: "Q4_1",
        7: "Q8_0",
        8: "Q5_0",
        9: "Q5_1",
        10: "Q2_K - Medium",
        11: "Q3_K - Small",
        12: "Q3_K - Medium",
        13: "Q3_K - Large",
        14: "Q4_K - Small",
        15: "Q4_K - Medium",
        16: "Q5_K - Small",
        17: "Q5_K - Medium",
        18: "Q6_K",
        19: "IQ2_XXS - 2.0625 bpw",
        20: "IQ2_XS - 2.3125 bpw",
        21: "Q2_K - Small",
        22: "IQ3_XS - 3.3 bpw",
        23: "IQ3_XXS - 3.0625 bpw",
        24: "IQ1_S - 1.5625 bpw",
        25: "IQ4_NL - 4.5 bpw",
        26: "IQ3_S - 3.4375 bpw",
        27: "IQ3_S mix - 3.66 bpw",
        28: "IQ2_S - 2.5 bpw",
        29: "IQ2_M - 2.7 bpw",
        30: "IQ4_XS - 4.25 bpw",
        31: "IQ1_M - 1.75 bpw",
        32: "BF16",
        36: "TQ1_0 - 1.69 bpw ternary",
        37: "TQ2_0 - 2.06 bpw ternary",
        38: "MXFP4 MoE",
        39: "NVFP4",
        40: "Q1_0",
        41: "Q2_0",
    }
)

# The file type llama.cpp guesses from the commonest tensor type when the file names none.
_GUESSES: Mapping[str, int] = MappingProxyType(
    {"F32": 0, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17}
    | {name.split(" ")[0]: id for id, name in _FILE_TYPES.items() if id not in range(10, 18)}
    | {"Q2_K": 10, "IQ3_S": 26}
)


def file_type_name(file_type: int) -> str:
    """`general.file_type` in llama.cpp's words, as "Q4_K - Medium"."""
    return _FILE_TYPES.get(file_type, "unknown, may not work")


def guessed_file_type_name(commonest: GGMLType) -> str:
    """What llama.cpp says of a file without `general.file_type`, from its commonest tensor type."""
    return "(guessed) " + file_type_name(_GUESSES.get(commonest.name, 0))
