"""quant.gguf_file on good files: the same as the gguf package reads, lazily, and all shards."""

import os
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from quant.errors import GGUFError
from quant.gguf_file import ByteRange, GGUFFile, LongString, MetadataArray
from quant.read_only_file import ReadOnlyFile
from tests.gguf_writer import (
    ARR,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STR,
    TYPE_F32,
    U8,
    U16,
    U32,
    U64,
    Array,
    Gguf,
    Tensor,
    packed_string,
    small_mixtral,
    split_gguf,
    write_shards,
    write_small_mixtral,
)


@pytest.fixture
def good(tmp_path: Path) -> Iterator[GGUFFile]:
    with GGUFFile.open(write_small_mixtral(tmp_path / "good.gguf")) as file:
        yield file


def opened(path: Path, made: Gguf) -> GGUFFile:
    path.write_bytes(made.packed())
    return GGUFFile.open(path)


def array_of(file: GGUFFile, key: str) -> MetadataArray:
    value = file.metadata[key]
    assert isinstance(value, MetadataArray)
    return value


def tensor_bytes(file: GGUFFile, name: str) -> bytes:
    info = file.tensors[name]
    into = bytearray(info.n_bytes)
    file.read(info.range, into)
    return bytes(into)


def test_a_file_of_the_gguf_writer_is_read_as_the_gguf_reader_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_uint32("a.u32", 7)
    writer.add_int64("a.i64", -(2**40))
    writer.add_float32("a.f32", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "grüße ✓")
    writer.add_array("a.strings", ["x", "", "ÿ"])
    writer.add_array("a.numbers", [1, 2, 3])
    rng = np.random.default_rng(0)
    writer.add_tensor("one", rng.standard_normal((3, 5), np.float32))
    writer.add_tensor("two", rng.standard_normal((2, 3, 32)).astype(np.float16))
    quantized = rng.integers(0, 256, (4, 34), np.uint8)
    writer.add_tensor("three", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = gguf.GGUFReader(str(path))
    with GGUFFile.open(path) as file:
        assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
        for theirs in reader.tensors:
            ours = file.tensors[theirs.name]
            assert ours.shape == tuple(int(n) for n in theirs.shape)
            assert ours.offset == theirs.data_offset
            assert ours.n_bytes == theirs.n_bytes
            assert ours.type.name == theirs.tensor_type.name
            assert tensor_bytes(file, theirs.name) == theirs.data.tobytes()
        for key, value in file.metadata.items():
            field = reader.get_field(key)
            if not isinstance(value, MetadataArray):
                assert field is not None and value == field.contents(), key
        assert [s.decode() for s in array_of(file, "a.strings").strings()] == ["x", "", "ÿ"]
        assert array_of(file, "a.numbers").numbers().tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("type_", "value", "name"),
    [
        (U8, 255, "u8"),
        (I8, -128, "i8"),
        (U16, 65535, "u16"),
        (I16, -32768, "i16"),
        (U32, 2**32 - 1, "u32"),
        (I32, -(2**31), "i32"),
        (U64, 2**64 - 1, "u64"),
        (I64, -(2**63), "i64"),
        (F32, 0.5, "f32"),
        (F64, 0.1, "f64"),
        (STR, "text", "str"),
    ],
)
def test_every_scalar_keeps_its_value_and_its_type(
    tmp_path: Path, type_: int, value: object, name: str
) -> None:
    with opened(tmp_path / "a.gguf", Gguf({"k": (type_, value)})) as file:
        assert file.metadata["k"] == value
        assert file.metadata_types["k"] == name


def test_every_byte_but_zero_is_a_true_bool(tmp_path: Path) -> None:
    keys = {"yes": (BOOL, 7), "no": (BOOL, 0), "all": (ARR, Array(BOOL, (0, 1, 9)))}
    with opened(tmp_path / "a.gguf", Gguf(keys)) as file:
        assert file.metadata["yes"] is True and file.metadata["no"] is False
        assert array_of(file, "all").numbers().tolist() == [False, True, True]


def test_arrays_stay_in_the_file_until_they_are_read(tmp_path: Path) -> None:
    words = tuple(f"word {i}" for i in range(50_000))
    keys = {
        "words": (ARR, Array(STR, words)),
        "empty": (ARR, Array(STR, ())),
        "numbers": (ARR, Array(I16, (-1, 2))),
    }
    with opened(tmp_path / "a.gguf", Gguf(keys)) as file:
        array = array_of(file, "words")
        assert (array.element_type, array.n) == ("str", 50_000)
        assert [text.decode() for text in array.strings()] == list(words)
        assert list(array_of(file, "empty").strings()) == []
        assert array_of(file, "numbers").numbers().tolist() == [-1, 2]
        assert array_of(file, "numbers").numbers(1).tolist() == [-1]
        with pytest.raises(GGUFError, match="array of strings"):
            array.numbers()
        with pytest.raises(GGUFError, match="array of i16"):
            array_of(file, "numbers").strings()


def test_strings_longer_than_the_window_are_read_whole(tmp_path: Path) -> None:
    words = ("a", "b" * 200_000, "", "c" * 150_000, "d")
    with opened(tmp_path / "a.gguf", Gguf({"w": (ARR, Array(STR, words))})) as file:
        assert [text.decode() for text in array_of(file, "w").strings()] == list(words)
        with pytest.raises(GGUFError, match="200000 bytes"):
            list(array_of(file, "w").strings(max_bytes=1000))


def test_a_very_long_text_stays_in_the_file_until_it_is_read(tmp_path: Path) -> None:
    text = "ß" * 3_000_000
    with opened(tmp_path / "a.gguf", Gguf({"long": (STR, text), "after": (U8, 5)})) as file:
        long = file.metadata["long"]
        assert isinstance(long, LongString) and long.read() == text
        assert file.metadata["after"] == 5


def test_text_that_is_no_utf8_is_shown_with_replacement_characters(tmp_path: Path) -> None:
    with opened(tmp_path / "a.gguf", Gguf({"k": (STR, b"a\xffb")})) as file:
        assert file.metadata["k"] == "a\ufffdb"


def test_version_2_is_read_like_version_3(tmp_path: Path) -> None:
    with opened(tmp_path / "a.gguf", replace(small_mixtral(), version=2)) as file:
        assert file.version == 2
        assert len(file.tensors) == 23


def test_a_declared_alignment_is_used(tmp_path: Path) -> None:
    tensors = (Tensor("a", (3,), TYPE_F32, bytes(12)), Tensor("b", (1,), TYPE_F32, b"\1\2\3\4"))
    made = Gguf({"general.alignment": (U32, 4096)}, tensors, alignment=4096)
    with opened(tmp_path / "a.gguf", made) as file:
        assert file.alignment == 4096
        assert [info.offset for info in file.tensors.values()] == [4096, 8192]
        assert tensor_bytes(file, "b") == b"\1\2\3\4"


def test_the_padding_after_the_last_tensor_may_be_missing_or_longer(tmp_path: Path) -> None:
    tensors = (Tensor("a", (3,), TYPE_F32, b"abcdefghijkl"),)
    whole = Gguf(tensors=tensors).packed()
    for data in (whole, whole[:-20], whole + bytes(1000)):
        (tmp_path / "a.gguf").write_bytes(data)
        with GGUFFile.open(tmp_path / "a.gguf") as file:
            assert tensor_bytes(file, "a") == b"abcdefghijkl"


def test_opening_and_reading_map_nothing(good: GGUFFile) -> None:
    tensor_bytes(good, "output_norm.weight")
    assert not good.is_mapped
    good.mapping(0)
    assert good.is_mapped


def test_the_mapping_is_the_file_and_cannot_be_written(good: GGUFFile) -> None:
    mapping = good.mapping(0)
    assert mapping.shape == (good.size_bytes,)
    assert mapping.tobytes() == good.paths[0].read_bytes()
    with pytest.raises(ValueError, match="read-only"):
        mapping[0] = 1


def test_an_array_over_the_mapping_outlives_the_file(tmp_path: Path) -> None:
    file = GGUFFile.open(write_small_mixtral(tmp_path / "a.gguf"))
    mapping = file.mapping(0)
    file.close()
    assert mapping[:4].tobytes() == b"GGUF"


def test_bytes_are_read_into_an_array_of_any_type(good: GGUFFile) -> None:
    norm = np.empty(32, np.float32)
    good.read(good.tensors["output_norm.weight"].range, norm)
    assert (norm == 1).all()


def test_reading_a_file_that_was_truncated_names_it(good: GGUFFile) -> None:
    os.truncate(good.paths[0], 20_000)
    with pytest.raises(GGUFError, match=r"good\.gguf: the file was truncated or replaced"):
        good.read(ByteRange(0, 19_000, 5000), bytearray(5000))


def test_changes_of_the_open_file_are_told_apart(tmp_path: Path) -> None:
    def change_after(act: Callable[[Path], object]) -> tuple[str, bool]:
        path = write_small_mixtral(tmp_path / "m.gguf")
        with GGUFFile.open(path) as file:
            assert file.find_change() is None
            act(path)
            change = file.find_change()
            assert change is not None and change.path == path
            return change.description, change.is_data_intact

    def write_same_size(path: Path) -> None:
        with path.open("r+b") as stream:
            stream.write(b"GGUF")
        os.utime(path, (1, 1))

    def put_another_in_its_place(path: Path) -> None:
        write_small_mixtral(path.with_name("other.gguf")).replace(path)

    size = len(small_mixtral().packed())
    truncated = change_after(lambda path: os.truncate(path, 4))
    assert truncated == (f"was truncated from {size} to 4 bytes", False)
    assert change_after(write_same_size) == ("was written to", False)
    assert change_after(Path.unlink) == ("was deleted or moved away", True)
    assert change_after(put_another_in_its_place) == ("was replaced by another file", True)


def test_a_deleted_file_can_still_be_read(good: GGUFFile) -> None:
    good.paths[0].unlink()
    assert tensor_bytes(good, "output_norm.weight") == np.ones(32, np.float32).tobytes()


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    file = GGUFFile.open(write_small_mixtral(tmp_path / "a.gguf"))
    file.close()
    file.close()
    with pytest.raises(GGUFError):
        file.read(ByteRange(0, 0, 4), bytearray(4))


@pytest.mark.parametrize("named", [0, 1, 2])
def test_a_split_file_is_opened_as_one_from_any_shard(tmp_path: Path, named: int) -> None:
    model = small_mixtral()
    first = write_shards(tmp_path / "m.gguf", split_gguf(model, 3))
    path = first.with_name(f"m-{named + 1:05d}-of-00003.gguf")
    with GGUFFile.open(path) as file:
        assert [p.name for p in file.paths] == [f"m-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
        assert file.metadata["general.name"] == "small mixtral"
        assert file.size_bytes == sum(p.stat().st_size for p in file.paths)
        assert {info.shard for info in file.tensors.values()} == {0, 1, 2}
        for tensor in model.tensors:
            assert tensor_bytes(file, str(tensor.name)) == tensor.data, tensor.name


def test_a_first_shard_without_tensors_is_fine(tmp_path: Path) -> None:
    whole, empty = split_gguf(small_mixtral(), 1)[0], split_gguf(small_mixtral(), 1)[0]
    keys = {"split.no": (U16, 0), "split.count": (U16, 2)}
    parts = [replace(empty, keys=empty.keys | keys, tensors=())]
    keys = {"split.no": (U16, 1), "split.count": (U16, 2)}
    parts.append(Gguf(keys, whole.tensors))
    with GGUFFile.open(write_shards(tmp_path / "m.gguf", parts)) as file:
        assert len(file.tensors) == 23


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shards: list[Gguf | None] = list(split_gguf(small_mixtral(), 3))
    shards[1] = None
    first = write_shards(tmp_path / "m.gguf", shards)
    with pytest.raises(GGUFError, match=r"m-00002-of-00003\.gguf: .* number 2 of 3, is missing"):
        GGUFFile.open(first)


def test_files_that_are_open_already_must_be_one_whole_set(tmp_path: Path) -> None:
    first = write_shards(tmp_path / "m.gguf", split_gguf(small_mixtral(), 3))
    shards = [ReadOnlyFile(path) for path in sorted(first.parent.iterdir())]
    whole = ReadOnlyFile(write_small_mixtral(tmp_path / "whole.gguf"))
    assert len(GGUFFile.of_files(shards).tensors) == len(GGUFFile.of_files([whole]).tensors)
    for files, text in (
        (shards[:1], "found one of 3 shards; expected all"),
        (shards[:2], "expected shard 1 of 2"),
        (shards[::-1], "expected shard 1 of 3"),
        ([whole, *shards[1:]], "found no metadata key 'split.no'"),
    ):
        with pytest.raises(GGUFError, match=text):
            GGUFFile.of_files(files)
    for file in (*shards, whole):
        file.close()


def test_no_file_stays_open_after_a_refusal(tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("needs /proc")
    shards: list[Gguf | None] = list(split_gguf(small_mixtral(), 3))
    shards[2] = None
    first = write_shards(tmp_path / "m.gguf", shards)
    before = len(list(descriptors.iterdir()))
    with pytest.raises(GGUFError):
        GGUFFile.open(first)
    assert len(list(descriptors.iterdir())) == before


def test_a_large_vocabulary_with_merges_opens_quickly(tmp_path: Path) -> None:
    def strings(n: int, text: bytes) -> bytes:
        return struct.pack("<IIQ", ARR, STR, n) + packed_string(text) * n

    tokens = packed_string("tokens") + strings(150_000, b"a token")
    merges = packed_string("merges") + strings(280_000, b"some merge")
    path = tmp_path / "large.gguf"
    path.write_bytes(Gguf(extra_keys=(tokens, merges)).packed())
    start = time.process_time()
    with GGUFFile.open(path) as file:
        took_s = time.process_time() - start
        assert array_of(file, "merges").n == 280_000
    assert took_s < 0.5
