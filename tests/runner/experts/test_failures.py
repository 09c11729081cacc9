"""The model's file fails or changes while experts are read from it.

No wrong weight is computed with: logits come only from the file that was opened, or an error comes
that names it. A file that was put right works again.
"""

import errno
import gc
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from itertools import count, cycle, islice
from pathlib import Path

import numpy as np
import pytest

from quant.gguf_file import GGUFFile
from runner.config import MOE_CACHE_OFF, EngineConfig, GenerateRequest, SamplingConfig
from runner.engine import Engine
from runner.engine_client import Client
from runner.errors import BuddyrunError, GGUFError, ModelError, WorkerDiedError
from runner.experts.expert_runner import ExpertRunner
from runner.experts.slot_table import EMPTY
from runner.process import worker_process
from runner.protocol import TextPiece
from tests.chat_memory import anonymous_megabytes
from tests.paths import DEMO

TOKENS = [0, *map(int, np.random.default_rng(3).integers(300, 4000, 69))]
N_PROMPT, N_BEFORE = 24, 30
CONFIG = EngineConfig(n_threads=1, n_batch=16, n_ctx=512, moe_cache_slots=3, moe_miss="load")
OFF = replace(CONFIG, moe_cache_slots=0, moe_cache_bytes=MOE_CACHE_OFF)
SLOW = pytest.mark.slow
LINUX_ONLY = pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc")

Change = Callable[[Path], None]


@pytest.fixture(params=["buffered", "direct"])
def reads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Reads go past the page cache on a machine with little memory."""
    if request.param == "direct":
        monkeypatch.setattr("runner.placement.available_memory_bytes", lambda: 64 << 20)
    return str(request.param)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of its own that looks old: some systems' clocks for files stand still meanwhile."""
    path = tmp_path / "model.gguf"
    shutil.copy(DEMO, path)
    os.utime(path, (0, 0))
    return path


@pytest.fixture
def engine(path: Path, reads: str) -> Iterator[Engine]:
    """An engine in the middle of an answer."""
    engine = Engine(path, CONFIG)
    assert engine._cache is not None
    if engine._cache.store.is_direct != (reads == "direct"):
        engine.close()
        pytest.skip("this file system has no direct reads")
    engine.prefill(TOKENS[:N_PROMPT])
    for token in TOKENS[N_PROMPT:N_BEFORE]:
        engine.decode(token)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def expected() -> list[np.ndarray]:
    """The logits of every step of the whole answer, without a cache."""
    engine = Engine(DEMO, OFF)
    logits = answer(engine, len(TOKENS))
    engine.close()
    return logits


def answer(engine: Engine, n_tokens: int = 40) -> list[np.ndarray]:
    logits = [engine.prefill(TOKENS[:N_PROMPT]).copy()]
    return logits + [engine.decode(token).copy() for token in TOKENS[N_PROMPT:n_tokens]]


def is_same(ours: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    """Whether these are the first of the expected logits, bit for bit."""
    assert 0 < len(ours) <= len(expected)
    return all(a.tobytes() == b.tobytes() for a, b in zip(ours, expected, strict=False))


# the ways in which a file changes


def cut_last_experts(path: Path) -> None:
    """Behind everything that is used where it is mapped, whose pages would be gone."""
    with GGUFFile.open(DEMO) as file:
        last = max(file.tensors.values(), key=lambda tensor: tensor.offset)
    assert "exps" in last.name
    os.truncate(path, last.offset + last.n_bytes // 8 + 100)


def overwrite_experts(path: Path) -> None:
    """Half of every tensor of experts becomes zeros, in place."""
    with GGUFFile.open(DEMO) as file, path.open("r+b") as target:
        for tensor in file.tensors.values():
            if "exps" in tensor.name:
                target.seek(tensor.offset)
                target.write(bytes(tensor.n_bytes // 2))


def overwrite_one_byte(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, b"\0", 3)
    os.close(fd)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def write_anew(path: Path) -> None:
    """What `cp other.gguf model.gguf` does: the same file, emptied and filled."""
    overwrite_experts(path)
    path.write_bytes(path.read_bytes())


CHANGES = [
    cut_last_experts,
    overwrite_experts,
    pytest.param(overwrite_one_byte, marks=SLOW),
    pytest.param(append, marks=SLOW),
]


def replace_by_other(path: Path) -> None:
    other = path.with_name("other.gguf")
    shutil.copy(path, other)
    overwrite_experts(other)
    os.replace(other, path)


def delete(path: Path) -> None:
    path.unlink()


def move_away(path: Path) -> None:
    path.rename(path.with_name("moved.gguf"))


def forbid(path: Path) -> None:
    path.chmod(0)


# what must be true


@cache
def demo_bytes() -> bytes:
    return DEMO.read_bytes()


def assert_slots_are_sound(engine: Engine) -> None:
    """No slot waits for a read or is held, and every resident expert has the first file's bytes."""
    cache = engine._cache
    assert cache is not None
    table = cache.table
    assert (table._filling == EMPTY).all() and not cache._under_way
    good = demo_bytes()
    n_resident = 0
    for layer, residents in enumerate(engine.snapshot().residency):
        for slot, expert in enumerate(residents):
            if expert == EMPTY:
                continue
            n_resident += 1
            assert table.slot_of[layer, expert] == slot
            ranges = cache.store.ranges(layer, expert).parts
            for part, range in zip(cache._memory.parts(layer, slot), ranges, strict=True):
                assert bytes(part.matrix) == good[range.offset : range.offset + range.n_bytes]
    assert n_resident == np.count_nonzero(table.slot_of != EMPTY) > 0


def assert_refuses(engine: Engine, path: Path) -> None:
    """Nothing is computed any more, in whatever way it is asked for."""
    n_past = engine.n_past
    for ask in (
        lambda: engine.decode(7),
        lambda: engine.prefill([*TOKENS[:20], 9, 9]),
        lambda: list(engine.generate(TOKENS[:10], np.argmax, 3, lambda token: False)),
    ):
        with pytest.raises(ModelError, match=str(path)):
            ask()
    assert engine.n_past <= n_past
    assert_slots_are_sound(engine)


def assert_works_when_put_right(path: Path, expected: list[np.ndarray]) -> None:
    shutil.copy(DEMO, path)
    engine = Engine(path, CONFIG)
    assert is_same(answer(engine), expected)
    engine.close()


# changes between two steps


@pytest.mark.parametrize("change", [*CHANGES, pytest.param(write_anew, marks=SLOW)])
def test_a_file_that_changed_stops_the_answer_at_once(
    change: Change, engine: Engine, path: Path, expected: list[np.ndarray]
) -> None:
    change(path)
    with pytest.raises(BuddyrunError, match=str(path)):
        engine.decode(TOKENS[N_BEFORE])
    assert engine.n_past == N_BEFORE
    assert_slots_are_sound(engine)
    assert_refuses(engine, path)
    assert_works_when_put_right(path, expected)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_an_answer_that_is_being_generated_ends_with_the_error(
    change: Change, engine: Engine, path: Path
) -> None:
    steps = engine.generate(TOKENS[: N_BEFORE + 1], lambda row: 300, -1, lambda token: False)
    for _ in range(5):
        next(steps)
    change(path)
    with pytest.raises(BuddyrunError, match=str(path)):
        next(steps)
    assert list(steps) == []
    assert_slots_are_sound(engine)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        replace_by_other,
        delete,
        pytest.param(move_away, marks=SLOW),
        pytest.param(forbid, marks=SLOW),
    ],
)
def test_a_file_that_only_lost_its_name_is_read_on(
    change: Change, engine: Engine, path: Path, expected: list[np.ndarray]
) -> None:
    before = engine.snapshot()
    change(path)
    ours = [engine.decode(token).copy() for token in TOKENS[N_BEFORE:50]]
    assert is_same(ours, expected[N_BEFORE - N_PROMPT + 1 :])
    assert sum(engine.snapshot().bytes_read) > sum(before.bytes_read), "experts were read since"
    assert_slots_are_sound(engine)


# changes within a step


@contextmanager
def at_layer(engine: Engine, layer: int, do: Callable[[], None]) -> Iterator[None]:
    """Do something once, when the router of this layer has chosen."""
    runner, is_done = engine._experts, threading.Event()
    assert runner is not None

    def look(graph, routed: int, expert_ids: np.ndarray):  # type: ignore[no-untyped-def]
        if routed == layer and not is_done.is_set():
            is_done.set()
            do()
        return ExpertRunner.serve(runner, graph, routed, expert_ids)

    runner.serve = look  # type: ignore[method-assign]
    yield
    del runner.serve  # type: ignore[method-assign]
    assert is_done.is_set()


Read = Callable[[], int]  # the system's own


@contextmanager
def at_read(
    number: int, instead: Callable[[Read], int], is_sure: bool = True
) -> Iterator[list[int]]:
    """Do something in the place of one read, counted from 1; yields the offsets of all reads."""
    real = os.preadv
    offsets: list[int] = []

    def look(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if len(buffers[0]) == 1:  # only asks whether a page is in memory
            return real(fd, buffers, offset, flags)
        offsets.append(offset)
        if len(offsets) != number:
            return real(fd, buffers, offset)
        return instead(lambda: real(fd, buffers, offset))

    with pytest.MonkeyPatch.context() as m:
        m.setattr(os, "preadv", look)
        yield offsets
    assert len(offsets) >= number or not is_sure, f"there were only {len(offsets)} reads"


@contextmanager
def every_nth_read(n: int, instead: Callable[[Read], int]) -> Iterator[None]:
    real, numbers = os.preadv, count(1)

    def look(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if next(numbers) % n:
            return real(fd, buffers, offset, flags)
        return instead(lambda: real(fd, buffers, offset))

    with pytest.MonkeyPatch.context() as m:
        m.setattr(os, "preadv", look)
        yield


def before_it(change: Change, path: Path) -> Callable[[Read], int]:
    def instead(read: Read) -> int:
        change(path)
        return read()

    return instead


def behind_it(change: Change, path: Path) -> Callable[[Read], int]:
    def instead(read: Read) -> int:
        n = read()
        change(path)
        return n

    return instead


@pytest.mark.slow
@pytest.mark.parametrize("layer", [pytest.param(0, marks=SLOW), 4, pytest.param(7, marks=SLOW)])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_between_two_layers_gives_no_logits(
    change: Change, layer: int, engine: Engine, path: Path
) -> None:
    with at_layer(engine, layer, lambda: change(path)):
        with pytest.raises(BuddyrunError, match=str(path)):
            engine.decode(TOKENS[N_BEFORE])
    assert engine.n_past == N_BEFORE
    assert_slots_are_sound(engine)


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(1, marks=SLOW), 2, pytest.param(30, marks=SLOW)])
@pytest.mark.parametrize("when", [before_it, behind_it])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_around_a_read_leaves_no_expert_of_it(
    change: Change,
    when: Callable[[Change, Path], Callable[[Read], int]],
    number: int,
    engine: Engine,
    path: Path,
) -> None:
    with at_read(number, when(change, path)), pytest.raises(BuddyrunError, match=str(path)):
        engine.prefill([*TOKENS[:10], *TOKENS[40:]])
    assert engine.n_past in (10, 26)
    assert_slots_are_sound(engine)
    assert_refuses(engine, path)


@pytest.mark.slow
def test_a_file_that_loses_its_name_around_a_read_is_read_on(
    engine: Engine, path: Path, expected: list[np.ndarray]
) -> None:
    engine.reset()
    with at_read(2, before_it(replace_by_other, path)):
        assert is_same(answer(engine), expected)
    assert_slots_are_sound(engine)


# reads that fail, of a file that is as it was


def fail_with_eio(read: Read) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def find_the_end(read: Read) -> int:
    return 0


def come_short(read: Read) -> int:
    read()
    return 1000


def run_out_of_memory(read: Read) -> int:
    raise MemoryError("no memory for this")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fail", "words"),
    [(fail_with_eio, "reading byte .*: input/output error"), (find_the_end, "only 0 of")],
)
@pytest.mark.parametrize("number", [pytest.param(1, marks=SLOW), pytest.param(3, marks=SLOW), 20])
def test_a_read_error_in_a_prompt_names_the_file_and_the_next_try_goes_on(
    number: int,
    fail: Callable[[Read], int],
    words: str,
    engine: Engine,
    path: Path,
    expected: list[np.ndarray],
) -> None:
    engine.reset()
    with at_read(number, fail), pytest.raises(GGUFError, match=f"{path}: .*{words}"):
        engine.prefill(TOKENS[:N_PROMPT])
    assert engine.n_past in (0, 16)
    assert_slots_are_sound(engine)
    assert is_same(answer(engine), expected)
    assert_slots_are_sound(engine)


@pytest.mark.slow
def test_read_errors_in_an_answer_name_the_file_and_the_next_try_goes_on(
    engine: Engine, path: Path, expected: list[np.ndarray]
) -> None:
    errors: list[str] = []
    numbers = cycle([1, 2, 3, 0])  # of the read that fails, 0 = none

    def decode(token: int) -> np.ndarray:
        while True:
            try:
                with at_read(next(numbers), fail_with_eio, is_sure=False):
                    return engine.decode(token).copy()
            except GGUFError as error:
                assert_slots_are_sound(engine)
                errors.append(str(error))

    ours = [decode(token) for token in TOKENS[N_BEFORE:]]
    assert is_same(ours, expected[N_BEFORE - N_PROMPT + 1 :])
    assert len(errors) > 20 and all(str(path) in error for error in errors)


@pytest.mark.slow
def test_a_direct_read_that_comes_short_is_an_error_and_a_buffered_one_is_gone_on_with(
    engine: Engine, path: Path, reads: str, expected: list[np.ndarray]
) -> None:
    engine.reset()
    with at_read(5, come_short):
        if reads == "direct":
            with pytest.raises(GGUFError, match=f"{path}: .*only 1000 of"):
                engine.prefill(TOKENS[:N_PROMPT])
        assert is_same(answer(engine), expected)
    assert_slots_are_sound(engine)


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(1, marks=SLOW), 20])
def test_any_other_error_in_the_reading_thread_reaches_the_caller(
    number: int, engine: Engine, expected: list[np.ndarray]
) -> None:
    engine.reset()
    with at_read(number, run_out_of_memory), pytest.raises(MemoryError):
        engine.prefill(TOKENS[:N_PROMPT])
    assert_slots_are_sound(engine)
    assert is_same(answer(engine), expected)


@pytest.mark.slow
@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_a_read_error_while_loading_is_an_error_and_leaves_nothing_open(
    projection: str, path: Path, reads: str
) -> None:
    with at_read(0, fail_with_eio) as offsets:
        Engine(path, CONFIG).close()
    with GGUFFile.open(path) as file:  # the first expert is read, to know what reading costs
        offset = file.tensors[f"blk.0.ffn_{projection}_exps.weight"].offset
    number = 1 + next(i for i, o in enumerate(offsets) if o in (offset, offset - offset % 4096))
    before = threading.active_count(), len(os.listdir("/dev/fd"))
    with at_read(number, fail_with_eio), pytest.raises(GGUFError, match=str(path)):
        Engine(path, CONFIG)
    assert (threading.active_count(), len(os.listdir("/dev/fd"))) == before


# while slots are filled ahead of the first batch


@pytest.fixture
def hurried(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine that was loaded this moment, with a slot for nearly every expert."""
    monkeypatch.setattr("runner.placement.available_memory_bytes", lambda: 64 << 20)
    engine = Engine(path, replace(CONFIG, moe_cache_slots=7))
    yield engine
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_right_after_loading_gives_no_logits(
    change: Change, hurried: Engine, path: Path
) -> None:
    change(path)
    with pytest.raises(BuddyrunError, match=str(path)):
        hurried.decode(0)
    assert_slots_are_sound(hurried)


@pytest.mark.slow
def test_slots_that_could_not_be_filled_ahead_are_filled_when_they_are_needed(
    path: Path, expected: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.placement.available_memory_bytes", lambda: 64 << 20)
    engine = Engine(path, replace(CONFIG, moe_cache_slots=7))
    with every_nth_read(2, fail_with_eio):
        with suppress(GGUFError):
            engine.decode(0)
    engine.reset()
    assert is_same(answer(engine), expected)
    assert_slots_are_sound(engine)
    engine.close()


@pytest.mark.slow
def test_an_engine_that_is_closed_while_slots_are_filled_reads_no_further(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a large model that would be gigabytes."""
    monkeypatch.setattr("runner.placement.available_memory_bytes", lambda: 64 << 20)
    measured, goes_on = 3, threading.Event()
    offsets: list[int] = []
    real = os.preadv

    def look(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if threading.current_thread() is not threading.main_thread():
            offsets.append(offset)
            if len(offsets) > measured:
                goes_on.wait()
        return real(fd, buffers, offset, flags)

    def join(thread: threading.Thread, timeout: float | None = None) -> None:
        goes_on.set()  # whoever waits has said what it had to say
        real_join(thread, timeout)

    real_join = threading.Thread.join
    monkeypatch.setattr(os, "preadv", look)
    engine = Engine(path, replace(CONFIG, moe_cache_slots=7))
    monkeypatch.setattr(threading.Thread, "join", join)
    engine.close()
    assert len(offsets) <= measured + 3, "only the expert under way is read to its end"


# memory


@pytest.mark.slow
@LINUX_ONLY
def test_loading_and_closing_gives_all_memory_back(path: Path, reads: str) -> None:
    """At once, not when the garbage collector finds it: the next model needs the memory."""
    used = []
    gc.disable()
    try:
        for _ in range(6):
            engine = Engine(path, replace(CONFIG, moe_cache_slots=8))
            answer(engine)
            engine.close()
            used.append(anonymous_megabytes("self"))
    finally:
        gc.enable()
    assert max(used[2:]) - used[1] < 3, used


# through the client and the worker


LONG = GenerateRequest(
    prompt="Once upon a time", sampling=SamplingConfig(temperature=0, ignore_eos=True)
)
SHORT = replace(LONG, n_predict=48)
CLIENT_CONFIG = replace(CONFIG, n_ctx=2048)


@pytest.fixture(scope="module")
def story() -> str:
    """How the answer begins that every good file gives."""
    with Client.start() as client:
        client.load(DEMO, replace(OFF, n_ctx=2048))
        return text_of(client.generate(SHORT))


@pytest.fixture
def client() -> Iterator[Client]:
    with Client.start() as client:
        yield client


def text_of(items: Iterable[object]) -> str:
    return "".join(item.text for item in items if isinstance(item, TextPiece))


def first_pieces(answer: Iterator[object], n: int = 4) -> list[object]:
    """The answer is longer than what is read of it, so the worker is in the middle of it."""
    return list(islice((item for item in answer if isinstance(item, TextPiece)), n))


def text_until_error(
    answer: Iterator[object], kinds: type[Exception] | tuple[type[Exception], ...]
) -> tuple[str, str]:
    """What came of an answer and the text of the error that ended it."""
    items: list[object] = []
    with pytest.raises(kinds) as caught:
        items.extend(answer)
    return text_of(items), str(caught.value)


def is_beginning(text: str, story: str) -> bool:
    return text.startswith(story) or story.startswith(text)


@pytest.mark.slow
@LINUX_ONLY
@pytest.mark.parametrize("miss", ["load", "host"])
def test_a_model_cut_in_half_in_an_answer_is_explained_and_a_good_one_answers(
    miss: str, client: Client, path: Path, story: str
) -> None:
    client.load(path, replace(CLIENT_CONFIG, moe_miss=miss))
    answer = client.generate(LONG)
    start = text_of(first_pieces(answer))
    os.truncate(path, path.stat().st_size // 2)
    rest, message = text_until_error(answer, (WorkerDiedError, ModelError, GGUFError))
    assert str(path) in message
    assert is_beginning(start + rest, story)
    with pytest.raises(GGUFError, match=str(path)):
        client.restart()
    shutil.copy(DEMO, path)
    client.restart()
    assert text_of(client.generate(SHORT)) == story


@pytest.mark.slow
@pytest.mark.parametrize("miss", ["load", "host", "auto"])
def test_a_model_overwritten_in_an_answer_is_an_error_that_the_worker_survives(
    miss: str, client: Client, path: Path, story: str
) -> None:
    client.load(path, replace(CLIENT_CONFIG, moe_miss=miss))
    worker = client.pid
    answer = client.generate(LONG)
    start = text_of(first_pieces(answer))
    overwrite_experts(path)
    rest, message = text_until_error(answer, ModelError)
    assert str(path) in message and "load the model again" in message
    assert is_beginning(start + rest, story)
    with pytest.raises(ModelError, match=str(path)):
        list(client.generate(SHORT))
    shutil.copy(DEMO, path)
    with pytest.raises(ModelError, match=str(path)):  # it was written to, well or badly
        list(client.generate(SHORT))
    client.load(path, CLIENT_CONFIG)
    assert text_of(client.generate(SHORT)) == story
    assert client.pid == worker and client.log == ""


@pytest.mark.slow
def test_a_model_replaced_in_an_answer_is_read_on_to_the_end(
    client: Client, path: Path, story: str
) -> None:
    client.load(path, CLIENT_CONFIG)
    answer = client.generate(replace(LONG, n_predict=200))
    start = text_of(first_pieces(answer))
    replace_by_other(path)
    assert (start + text_of(answer)).startswith(story)
    assert text_of(client.generate(SHORT)) == story
    assert client.log == ""


BAD_DISK = """
import errno, os
real = os.preadv
def preadv(fd, buffers, offset, flags=0):
    if len(buffers[0]) > 1 and os.path.exists({flag!r}):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return real(fd, buffers, offset, flags)
os.preadv = preadv
from runner.worker import main
main()
"""


@pytest.mark.slow
def test_a_disk_that_fails_for_a_while_ends_an_answer_and_not_the_worker(
    path: Path, story: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = path.with_name("the disk is bad")
    monkeypatch.setattr(worker_process, "PROGRAM", BAD_DISK.format(flag=str(flag)))
    with Client.start() as client:
        client.load(path, CLIENT_CONFIG)
        worker = client.pid
        for _ in range(2):
            answer = client.generate(LONG)
            start = text_of(first_pieces(answer))
            flag.touch()
            rest, message = text_until_error(answer, GGUFError)
            assert f"{path}: reading byte" in message and "input/output error" in message
            assert is_beginning(start + rest, story)
            flag.unlink()
            assert text_of(client.generate(SHORT)) == story
        assert client.pid == worker and client.log == ""
