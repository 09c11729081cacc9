"""Files that are no GGUF, or whose header lies about counts, lengths, types or places."""

import struct
from collections.abc import Callable
from dataclasses import replace

from tests.gguf_writer import (
    ARR,
    STR,
    TYPE_F32,
    TYPE_Q4_0,
    U8,
    U32,
    U64,
    Array,
    Gguf,
    Tensor,
    key_entry,
    packed_string,
    small_mixtral,
)
from tests.malformed_cases import Cases

_MIB, _GIB = 1 << 20, 1 << 30
_HUGE = {
    "2_31": 2**31,
    "2_32": 2**32,
    "2_63_minus_1": 2**63 - 1,
    "2_63": 2**63,
    "2_64_minus_1": 2**64 - 1,
}


def add_header_cases(cases: Cases) -> None:
    _add_preamble_cases(cases)
    _add_truncations(cases)
    _add_key_cases(cases)
    _add_tensor_cases(cases)
    _add_sparse_cases(cases)


def _add_preamble_cases(cases: Cases) -> None:
    cases.add("empty_file", lambda: b"")
    cases.add("only_the_magic", lambda: b"GGUF")
    cases.add("a_text_file", lambda: b"This is no model.\n" * 100)
    cases.add("a_zip_file", lambda: b"PK\x03\x04" + bytes(200))
    cases.add("all_zeros", lambda: bytes(4096))
    cases.add("old_ggml_magic", _patched(0, b"tjgg"))
    cases.add("big_endian_magic", _patched(0, b"FUGG"))
    cases.add("version_0", _patched(4, struct.pack("<I", 0)))
    cases.add("version_1", _patched(4, struct.pack("<I", 1)))
    cases.add("version_4", _patched(4, struct.pack("<I", 4)))
    cases.add("version_big_endian", _patched(4, struct.pack(">I", 3)))
    for name, n in _HUGE.items():
        cases.add(f"tensor_count_{name}", _patched(8, struct.pack("<Q", n)))
        cases.add(f"key_count_{name}", _patched(16, struct.pack("<Q", n)))
    cases.add("tensor_count_one_too_many", lambda: replace(small_mixtral(), n_tensors=99))
    cases.add("key_count_one_too_many", lambda: replace(small_mixtral(), n_keys=21 + 2))
    cases.add("no_keys_no_tensors", lambda: Gguf())


def _add_truncations(cases: Cases) -> None:
    cases.add("cut_in_the_version", _cut(lambda _: 6))
    cases.add("cut_in_the_counts", _cut(lambda _: 12))
    cases.add("cut_in_the_first_key", _cut(lambda _: 30))
    cases.add("cut_in_the_tokens", _cut(lambda g: len(g.header()) // 3))
    cases.add("cut_in_the_tensor_entries", _cut(lambda g: len(g.header()) - 50))
    cases.add("cut_after_the_header", _cut(lambda g: len(g.header())))
    cases.add("cut_at_the_first_tensor", _cut(lambda g: len(g.header()) + len(g.padding())))
    cases.add("cut_in_the_middle_of_the_data", _cut(lambda g: len(g.packed()) // 2))
    cases.add("cut_one_byte_before_the_end", _cut(lambda g: len(g.packed()) - 1))


def _add_key_cases(cases: Cases) -> None:
    def raw_key(name: str, *entries: bytes) -> None:
        cases.add(name, lambda: replace(small_mixtral(), extra_keys=entries))

    raw_key("duplicate_key", key_entry("general.name", STR, "again"))
    raw_key("empty_key", key_entry("", U32, 1))
    raw_key("key_not_utf8", key_entry(b"\xff\xfe\xfd", U32, 1))
    raw_key("key_of_100_kB", key_entry("k" * 100_000, U32, 1))
    raw_key("unknown_value_type", packed_string("x") + struct.pack("<II", 13, 0))
    raw_key("huge_value_type", packed_string("x") + struct.pack("<II", 2**32 - 1, 0))
    raw_key("nested_array", packed_string("x") + struct.pack("<IIQIQ", ARR, ARR, 1, U8, 0))
    raw_key("unknown_element_type", packed_string("x") + struct.pack("<IIQ", ARR, 77, 1))
    for name, n in _HUGE.items():
        raw_key(f"key_length_{name}", struct.pack("<Q", n) + b"abc")
        raw_key(f"string_length_{name}", packed_string("x") + struct.pack("<IQ", STR, n) + b"abc")
        raw_key(f"array_of_{name}_bytes", packed_string("x") + struct.pack("<IIQ", ARR, U8, n))
        raw_key(f"array_of_{name}_u64", packed_string("x") + struct.pack("<IIQ", ARR, U64, n))
        raw_key(f"array_of_{name}_strings", packed_string("x") + struct.pack("<IIQ", ARR, STR, n))
    inner = struct.pack("<IIQ", ARR, STR, 2) + packed_string("a") + struct.pack("<Q", 2**64 - 1)
    raw_key("string_in_array_of_2_64_bytes", packed_string("x") + inner)
    for value in (0, 1, 3, 48, 2**31, 2**32 - 1):
        cases.add_key(f"alignment_{value}", "general.alignment", U32, value)
    cases.add_key("alignment_u64", "general.alignment", U64, 32)
    cases.add_key("alignment_text", "general.alignment", STR, "32")
    cases.add_key("alignment_array", "general.alignment", ARR, Array(U32, (32,)))


def _add_tensor_cases(cases: Cases) -> None:
    cases.add_tensor("tensor_zero_dimensions", n_dims=0, shape=())
    cases.add_tensor("tensor_five_dimensions", shape=(32, 1, 1, 1, 1))
    cases.add_tensor("tensor_2_32_dimensions", n_dims=2**32 - 1)
    cases.add_tensor("tensor_dimension_zero", shape=(32, 0))
    cases.add_tensor("tensor_dimension_2_63", shape=(2**63,))
    cases.add_tensor("tensor_dimension_2_64_minus_1", shape=(2**64 - 1,))
    cases.add_tensor("tensor_product_wraps_to_zero", shape=(2**32, 2**32))
    cases.add_tensor("tensor_product_wraps_to_its_size", shape=(32, 2**61 + 1))
    cases.add_tensor("tensor_product_of_four_overflows", shape=(2**31,) * 4)
    cases.add_tensor("tensor_larger_than_the_file", shape=(32, 10**6))
    cases.add_tensor("tensor_type_unknown", type=4711)
    cases.add_tensor("tensor_type_removed", type=4)
    cases.add_tensor("tensor_type_repacked", type=31)
    cases.add_tensor("tensor_type_2_32_minus_1", type=2**32 - 1)
    cases.add_tensor("tensor_row_no_whole_blocks", type=TYPE_Q4_0, shape=(33,))
    cases.add_tensor("tensor_name_of_64_bytes", name="n" * 64)
    cases.add_tensor("tensor_name_of_a_megabyte", name="n" * _MIB)
    cases.add_tensor("tensor_name_empty", name="")
    cases.add_tensor("tensor_name_not_utf8", name=b"blk.\xc3\x28")
    cases.add_tensor("tensor_name_twice", name="blk.0.ffn_norm.weight")
    cases.add_tensor("tensor_offset_misaligned", offset=33)
    cases.add_tensor("tensor_offset_overlaps", offset=0)
    cases.add_tensor("tensor_offset_leaves_a_gap", offset=64 * _MIB)
    cases.add_tensor("tensor_offset_out_of_the_file", offset=2**40)
    cases.add_tensor("tensor_offset_wraps", offset=2**64 - 32)
    cases.add_tensor("first_tensor_at_2_63", "token_embd.weight", offset=2**63)


def _add_sparse_cases(cases: Cases) -> None:
    def with_array(element_type: int, n: int) -> bytes:
        array = packed_string("x") + struct.pack("<IIQ", ARR, element_type, n)
        return replace(small_mixtral(), keys={}, tensors=(), n_keys=1, extra_keys=(array,)).packed()

    cases.add_sparse("sparse_array_of_2_30_strings", lambda: with_array(STR, 2**30), 16 * _GIB)
    cases.add_sparse(
        "sparse_array_of_1500000_strings", lambda: with_array(STR, 1_500_000), 16 * _GIB
    )
    cases.add_sparse("sparse_array_of_8_GB", lambda: with_array(U64, 2**30), 16 * _GIB)
    counts = struct.pack("<4sIQQ", b"GGUF", 3, 30_000, 0)
    cases.add_sparse("sparse_zeros_as_30000_tensors", lambda: counts, 16 * _GIB)
    keys = struct.pack("<4sIQQ", b"GGUF", 3, 0, 16_000)
    cases.add_sparse("sparse_zeros_as_16000_keys", lambda: keys, 16 * _GIB)
    long = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + packed_string("x")
    long += struct.pack("<IQ", STR, 8 * _GIB)
    cases.add_sparse("sparse_string_of_8_GB", lambda: long, 16 * _GIB)
    cases.add("many_keys_of_60_kB", lambda: _many_keys(600, 60_000))
    cases.add("sixteen_thousand_keys", lambda: _many_keys(16_384, 20))
    cases.add("thirty_thousand_tensors", _many_tensors)


def _many_keys(n: int, length: int) -> Gguf:
    entries = tuple(key_entry(f"{i:0{length}d}", U8, 1) for i in range(n))
    return Gguf(extra_keys=entries)


def _many_tensors() -> Gguf:
    tensors = tuple(Tensor(f"t{i}", (1,), TYPE_F32, bytes(4)) for i in range(30_000))
    return replace(small_mixtral(), tensors=tensors)


def _patched(at: int, raw: bytes) -> Callable[[], bytes]:
    def build() -> bytes:
        good = small_mixtral().packed()
        return good[:at] + raw + good[at + len(raw) :]

    return build


def _cut(n_bytes: Callable[[Gguf], int]) -> Callable[[], bytes]:
    return lambda: small_mixtral().packed()[: n_bytes(small_mixtral())]
