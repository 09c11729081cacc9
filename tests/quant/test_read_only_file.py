"""quant.read_only_file: reads past the page cache, and what is said about that cache."""

import errno
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from quant.errors import GGUFError
from quant.read_only_file import BLOCK_BYTES, ReadOnlyFile, round_up
from tests.page_cache import (
    cached_pages,
    can_read_direct,
    tells_what_is_cached,
    write_to_disk,
)

N_BYTES = 300 * BLOCK_BYTES + 1234
FILLING = 0xA5


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file whose end is no block's end, of which the system has every page on the disk."""
    data = np.random.default_rng(0).integers(0, 256, N_BYTES, np.uint8)
    return write_to_disk(tmp_path / "model.gguf", data.tobytes())


@pytest.fixture
def file(path: Path) -> Iterator[ReadOnlyFile]:
    with ReadOnlyFile(path) as file:
        yield file


@pytest.fixture
def direct(file: ReadOnlyFile) -> ReadOnlyFile:
    if not can_read_direct(file.path):
        pytest.skip("this file system has no direct reads")
    assert file.open_direct()
    return file


@pytest.fixture
def cold(file: ReadOnlyFile) -> ReadOnlyFile:
    """The file with none of its pages in memory."""
    if not tells_what_is_cached(file.path):
        pytest.skip("this system does not tell which pages it has in memory")
    forget(file, 0, N_BYTES)
    if cached_pages(file.path):
        pytest.skip("this file system keeps pages that it was told to drop")
    return file


def forget(file: ReadOnlyFile, offset: int, n_bytes: int) -> None:
    """Until it is done: the system leaves a page alone that it is busy with at the moment."""
    for _ in range(20):
        file.forget(offset, n_bytes)


def blocks(n: int) -> memoryview:
    """Aligned memory of n blocks that holds something."""
    memory = mmap.mmap(-1, n * BLOCK_BYTES)
    memory[:] = bytes([FILLING]) * len(memory)
    return memoryview(memory)


# direct reads


def test_direct_reads_bring_the_files_bytes_from_any_block(direct: ReadOnlyFile) -> None:
    data, rng = direct.path.read_bytes(), np.random.default_rng(1)
    for _ in range(200):
        first = int(rng.integers(0, 300))
        n = int(rng.integers(1, 301 - first))
        into = blocks(n)
        direct.read_direct(first * BLOCK_BYTES, into)
        assert into == data[first * BLOCK_BYTES : (first + n) * BLOCK_BYTES]


def test_a_direct_read_over_the_end_brings_what_is_there_and_keeps_to_its_memory(
    direct: ReadOnlyFile,
) -> None:
    data = direct.path.read_bytes()
    for first, n in [(300, 1), (300, 5), (298, 3), (290, 20), (0, 301)]:
        memory = blocks(n + 2)
        direct.read_direct(first * BLOCK_BYTES, memory[BLOCK_BYTES:-BLOCK_BYTES])
        end = N_BYTES - first * BLOCK_BYTES
        assert memory[BLOCK_BYTES : BLOCK_BYTES + end] == data[first * BLOCK_BYTES :]
        assert set(memory[:BLOCK_BYTES]) == set(memory[-BLOCK_BYTES:]) == {FILLING}


def test_a_direct_read_behind_the_end_brings_nothing(direct: ReadOnlyFile) -> None:
    into = blocks(2)
    direct.read_direct(301 * BLOCK_BYTES, into)
    assert set(into) == {FILLING}


def test_a_file_smaller_than_a_block_can_be_read_direct(tmp_path: Path) -> None:
    path = write_to_disk(tmp_path / "small.gguf", b"GGUF")
    with ReadOnlyFile(path) as file:
        if not file.open_direct():
            pytest.skip("this file system has no direct reads")
        into = blocks(1)
        file.read_direct(0, into)
        assert into[:4] == b"GGUF"


def test_direct_reads_leave_the_page_cache_alone(cold: ReadOnlyFile) -> None:
    if not cold.open_direct():
        pytest.skip("this file system has no direct reads")
    forget(cold, 0, N_BYTES)
    cold.read_direct(0, blocks(301))
    assert cached_pages(cold.path) == []


def test_a_direct_read_sees_what_was_written_and_is_not_on_the_disk_yet(
    direct: ReadOnlyFile,
) -> None:
    with direct.path.open("r+b") as file:
        file.seek(7 * BLOCK_BYTES)
        file.write(b"new")
    into = blocks(1)
    direct.read_direct(7 * BLOCK_BYTES, into)
    assert into[:3] == b"new"


def test_several_threads_may_read_at_once(direct: ReadOnlyFile) -> None:
    data = direct.path.read_bytes()

    def read(first: int) -> bool:
        into, plain = blocks(7), bytearray(7 * BLOCK_BYTES)
        direct.read_direct(first * BLOCK_BYTES, into)
        direct.read_into(first * BLOCK_BYTES, plain)
        return bytes(into) == plain == data[first * BLOCK_BYTES : (first + 7) * BLOCK_BYTES]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(290)))


# direct reads that fail


def test_a_direct_read_in_pieces_goes_on_behind_each(
    direct: ReadOnlyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, real = direct.path.read_bytes(), os.preadv
    offsets = []

    def one_block(fd: int, buffers: list[memoryview], offset: int) -> int:
        offsets.append(offset // BLOCK_BYTES)
        return real(fd, [buffers[0][:BLOCK_BYTES]], offset)

    monkeypatch.setattr(os, "preadv", one_block)
    into = blocks(5)
    direct.read_direct(297 * BLOCK_BYTES, into)
    assert into[: N_BYTES - 297 * BLOCK_BYTES] == data[297 * BLOCK_BYTES :]
    assert offsets == [297, 298, 299, 300]


@pytest.mark.parametrize("n_short", [0, 1, 511, BLOCK_BYTES - 1, BLOCK_BYTES + 512])
def test_a_direct_read_that_comes_short_is_refused_with_the_files_name(
    n_short: int, direct: ReadOnlyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: n_short)
    words = rf"model\.gguf: the file was truncated or replaced: only {n_short} of 12288 bytes"
    with pytest.raises(GGUFError, match=words):
        direct.read_direct(5 * BLOCK_BYTES, blocks(3))


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL, errno.ESTALE])
@pytest.mark.parametrize("how", ["read_direct", "read_into"])
def test_a_read_that_the_system_refuses_names_the_file_and_the_byte(
    how: str, number: int, direct: ReadOnlyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "preadv", fail)
    reason = os.strerror(number)[1:]
    with pytest.raises(GGUFError, match=rf"model\.gguf: reading byte 20480: .{reason}"):
        getattr(direct, how)(5 * BLOCK_BYTES, blocks(3))


@pytest.mark.parametrize("n_left", [0, 2 * BLOCK_BYTES, 5 * BLOCK_BYTES + 1, N_BYTES - 1])
def test_a_file_truncated_under_direct_reads_is_refused_where_bytes_are_missing(
    n_left: int, direct: ReadOnlyFile
) -> None:
    os.truncate(direct.path, n_left)
    with pytest.raises(GGUFError, match=r"model\.gguf: the file was truncated or replaced"):
        direct.read_direct(0, blocks(301))


def test_the_blocks_before_a_cut_are_still_read(direct: ReadOnlyFile) -> None:
    data = direct.path.read_bytes()
    os.truncate(direct.path, 5 * BLOCK_BYTES + 1)
    into = blocks(5)
    direct.read_direct(0, into)
    assert into == data[: 5 * BLOCK_BYTES]


# where there are no direct reads


def test_a_system_without_direct_reads_says_so(
    file: ReadOnlyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    assert not file.open_direct()
    assert file.read(0, 4) == file.path.read_bytes()[:4]


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no direct reads on this system")
def test_a_file_system_that_refuses_to_open_for_direct_reads_says_so(
    file: ReadOnlyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags)

    monkeypatch.setattr(os, "open", refuse)
    assert not file.open_direct()


def test_a_file_system_that_opens_but_does_not_read_direct_says_so_and_leaves_no_descriptor(
    direct: ReadOnlyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ReadOnlyFile(direct.path) as file:
        before = n_descriptors()

        def fail(*_: object) -> int:
            raise OSError(errno.EINVAL, "Invalid argument")

        with monkeypatch.context() as m:
            m.setattr(os, "preadv", fail)
            assert not file.open_direct()
        assert n_descriptors() == before
        assert file.open_direct(), "asked again it may work"


def test_the_memory_file_system_says_truly_whether_it_reads_direct() -> None:
    folder = Path("/dev/shm")
    if not os.access(folder, os.W_OK):
        pytest.skip("no memory file system here")
    path = write_to_disk(folder / f"buddyrun-test-{os.getpid()}", bytes(2 * BLOCK_BYTES))
    try:
        with ReadOnlyFile(path) as file:
            assert file.open_direct() == can_read_direct(path)
            if file.open_direct():
                into = blocks(2)
                file.read_direct(0, into)
                assert into == bytes(2 * BLOCK_BYTES)
    finally:
        path.unlink()


def n_descriptors() -> int:
    return len(os.listdir("/dev/fd"))


# the file of direct reads is the file that was opened


@pytest.mark.parametrize("is_deleted", [False, True])
def test_a_file_whose_name_another_one_took_is_not_opened_for_direct_reads(
    is_deleted: bool, file: ReadOnlyFile
) -> None:
    before = n_descriptors()
    file.path.unlink()
    if not is_deleted:
        write_to_disk(file.path, bytes(N_BYTES))
    assert not file.open_direct()
    assert n_descriptors() == before


def test_direct_reads_keep_to_the_old_file_when_its_name_is_taken_later(
    direct: ReadOnlyFile,
) -> None:
    data = direct.path.read_bytes()
    other = write_to_disk(direct.path.with_name("other"), bytes(N_BYTES))
    os.replace(other, direct.path)
    into = blocks(3)
    direct.read_direct(0, into)
    assert into == data[: 3 * BLOCK_BYTES]
    change = direct.find_change()
    assert change is not None and change.is_data_intact


def test_close_gives_both_descriptors_back_and_can_be_repeated(path: Path) -> None:
    before = n_descriptors()
    file = ReadOnlyFile(path)
    file.open_direct()
    file.open_direct()
    file.close()
    file.close()
    assert n_descriptors() == before


# the page cache


def test_a_page_is_cached_when_it_was_read_and_not_when_it_was_forgotten(
    cold: ReadOnlyFile,
) -> None:
    """Asking may bring a page in, sometimes at once: one no of many tells enough."""
    places = range(N_BYTES - 1, 0, -20 * BLOCK_BYTES)
    assert not all(cold.is_cached(offset) for offset in places)
    cold.read(0, N_BYTES)
    assert all(cold.is_cached(offset) for offset in range(0, N_BYTES, 99))
    forget(cold, 0, N_BYTES)
    assert cached_pages(cold.path) == []
    assert not all(cold.is_cached(offset) for offset in places)


def test_only_whole_pages_are_forgotten(cold: ReadOnlyFile) -> None:
    cold.read(0, N_BYTES)
    forget(cold, 10 * BLOCK_BYTES + 1, 20 * BLOCK_BYTES)
    assert set(range(301)) - set(cached_pages(cold.path)) == set(range(11, 30))
    assert cold.is_cached(10 * BLOCK_BYTES + 1)


def test_nothing_behind_the_end_is_cached(file: ReadOnlyFile) -> None:
    file.read(0, N_BYTES)
    assert not file.is_cached(N_BYTES + BLOCK_BYTES)


def test_a_system_that_cannot_say_says_no(
    file: ReadOnlyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)
    assert not file.is_cached(0)


def test_rounding_up_goes_to_the_next_multiple() -> None:
    sizes = [0, 1, 4095, 4096, 4097, 8191]
    assert [round_up(n, BLOCK_BYTES) for n in sizes] == [0, 4096, 4096, 4096, 8192, 8192]
