"""Random programs for ExpertCache, with real memory and a file on disk.

Reads are late and fail as a program says. After every operation each resident expert has the file's
bytes, which the gguf package reads, not buddyrun.
"""

import threading
from collections.abc import Callable
from contextlib import closing
from math import inf
from pathlib import Path
from random import Random
from typing import Any

import gguf
import numpy as np
import pytest

from quant.devices import Device
from quant.ggml import Backend, Tensor
from quant.gguf_file import GGUFFile
from runner import miss_policy
from runner.checks.read_model import read_model
from runner.config import CACHE_POLICIES
from runner.errors import GGUFError
from runner.experts.expert_cache import ExpertCache
from runner.experts.expert_store import ExpertStore
from runner.experts.prefetcher import Load
from runner.experts.slot_memory import Parts
from runner.experts.slot_table import EMPTY, SlotTable
from runner.experts.uploads import Piece
from runner.model_config import ModelConfig
from tests.random_model import RandomModel, write_random_model
from tests.runner.experts.slot_model import TableProgram

Bytes3 = tuple[bytes, bytes, bytes]  # gate, up, down
SPOILED = "spoiled by the test"

# Matrices of 15360 bytes lie unlike within the blocks of a file, those of 4096 all alike.
SHAPES = {
    "alike": RandomModel(n_embd=32, n_ff=64, n_layer=3, n_expert=6),
    "two": RandomModel(n_embd=32, n_ff=64, n_layer=3, n_expert=2),
    "many": RandomModel(n_embd=32, n_ff=64, n_layer=3, n_expert=16),
    "unlike": RandomModel(n_embd=96, n_ff=80, n_layer=3, n_expert=6),
    "scattered": RandomModel(n_embd=96, n_ff=80, n_expert=5, old_layout=True, scattered=True),
}


class NoDirectFile(GGUFFile):
    """A file of a system that reads through its page cache only."""

    def open_direct(self) -> bool:
        return False


class OpenModel:
    """A model's file for the code under test, and its experts as the gguf package reads them."""

    def __init__(
        self,
        folder: Path,
        shape: RandomModel,
        file_type: type[GGUFFile] = GGUFFile,
        device: Device | None = None,
    ) -> None:
        """device: where the slots are; None = the CPU."""
        folder.mkdir(exist_ok=True)
        self.path = write_random_model(folder / "model.gguf", shape)
        self.file = file_type.open(self.path)
        self.config = read_model(self.file)
        self.backend = Backend.cpu(1) if device is None else Backend.on(device)
        self._tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(self.path).tensors}
        self.experts = [
            [self._expert(layer, expert) for expert in range(self.config.n_expert)]
            for layer in range(self.config.n_layer)
        ]

    def close(self) -> None:
        self.backend.close()
        self.file.close()

    def bytes_in_slot(self, cache: ExpertCache, layer: int, slot: int) -> Bytes3:
        """A slot's bytes as ggml finds them when it computes."""
        slabs = cache.slabs[layer]
        gate, up, down = (
            self._bytes_of(tensor, slot)
            for tensor in (slabs.ffn_gate_exps, slabs.ffn_up_exps, slabs.ffn_down_exps)
        )
        return gate, up, down

    def _bytes_of(self, tensor: Tensor, slot: int) -> bytes:
        seen = np.empty(tensor.strides[1] * tensor.shape[1], np.uint8)
        self.backend.ggml.backend_tensor_get(
            tensor.pointer, seen.ctypes.data, slot * tensor.strides[2], seen.nbytes
        )
        return seen.tobytes()

    def _expert(self, layer: int, expert: int) -> Bytes3:
        if self.config.has_merged_experts:
            names = [f"blk.{layer}.ffn_{name}_exps.weight" for name in ("gate", "up", "down")]
            gate, up, down = (self._tensors[name][expert].tobytes() for name in names)
        else:
            names = [f"blk.{layer}.ffn_{name}.{expert}.weight" for name in ("gate", "up", "down")]
            gate, up, down = (self._tensors[name].tobytes() for name in names)
        return gate, up, down


class OpenModels:
    """Models that tests share; each is written and opened once."""

    def __init__(self, folder: Path, device: Device | None = None) -> None:
        self._folder, self._device = folder, device
        self._opened: dict[tuple[str, type[GGUFFile]], OpenModel] = {}

    def get(self, name: str, file_type: type[GGUFFile] = GGUFFile) -> OpenModel:
        key = name, file_type
        if key not in self._opened:
            folder = self._folder / f"{name}-{file_type.__name__}"
            self._opened[key] = OpenModel(folder, SHAPES[name], file_type, self._device)
        return self._opened[key]

    def close(self) -> None:
        for model in self._opened.values():
            model.close()


class CommandedStore(ExpertStore):
    """Reads when it is allowed to, and spoils the reads that it is told to; all in order."""

    def __init__(self, file: GGUFFile, config: ModelConfig, has_room: bool) -> None:
        super().__init__(file, config, has_room)
        self.reads: list[tuple[int, int]] = []  # layer and expert of all that were begun
        self.spoiled: dict[int, str] = {}  # number of the read, from 0 -> how
        self._pieces = Random(1)  # how far each read ahead comes
        self._prices = Random(2)
        self._n_allowed: float = inf
        self._n_ended = self._n_ahead = 0
        self._turn = threading.Condition()
        self._how = ""  # the read under way is spoiled, where it is one in pieces
        self._n_bytes_left = 0  # of that
        self._first_pieces = {
            (ranges.gate.shard, ranges.gate.offset): (layer, expert)
            for layer, row in enumerate(self._ranges)
            for expert, ranges in enumerate(row)
        }

    def allow(self, n_reads: float) -> None:
        """Let this many reads in all go on; those behind wait."""
        with self._turn:
            self._n_allowed = n_reads
            self._turn.notify_all()

    def wait_until_begun(self, n_reads: int) -> None:
        """Return when this many reads were begun."""
        with self._turn:
            self._turn.wait_for(lambda: len(self.reads) >= n_reads)

    def wait_until_ended(self, n_reads: int) -> None:
        """Return when this many reads have ended, well or not."""
        with self._turn:
            self._turn.wait_for(lambda: self._n_ended >= n_reads)

    def wait_until_read_ahead(self, n_guesses: int) -> None:
        """Return when this many guesses have ended, well or not."""
        with self._turn:
            self._turn.wait_for(lambda: self._n_ahead >= n_guesses)

    def read(self, layer: int, expert: int, parts: Parts, *ready: int) -> None:
        how = self._begin(layer, expert)
        try:
            self._read(how, layer, expert, parts, *ready)
        finally:
            self._end()

    def read_piece(self, piece: Piece, memory: memoryview) -> memoryview:
        """The first piece of an expert begins a read; `check` or an error ends it."""
        first_of = self._first_pieces.get((piece.shard, piece.offset))
        if first_of is not None:
            self._how = self._begin(*first_of)
            self._n_bytes_left = self.n_bytes(first_of[0])
        is_late = self._n_bytes_left < self._ranges[0][0].n_bytes // 2  # alike in all layers
        if self._how == "at once" or (self._how == "half" and is_late):
            self._end()
            raise GGUFError(f"this piece was {SPOILED}")
        self._n_bytes_left -= piece.n_bytes
        try:
            return super().read_piece(piece, memory)
        except GGUFError:
            self._end()
            raise

    def check(self) -> None:
        self._end()
        if self._how:
            raise GGUFError(f"this read was {SPOILED}")
        super().check()

    def _begin(self, layer: int, expert: int) -> str:
        """Wait for leave to read; returns how the read is to be spoiled."""
        with self._turn:
            number = len(self.reads)
            self.reads.append((layer, expert))
            self._turn.notify_all()
            self._turn.wait_for(lambda: number < self._n_allowed)
        return self.spoiled.get(number, "")

    def _end(self) -> None:
        with self._turn:
            self._n_ended += 1
            self._turn.notify_all()

    def _read(self, how: str, layer: int, expert: int, parts: Parts, *ready: int) -> None:
        if how in ("", "late"):
            super().read(layer, expert, parts, *ready)
        if how == "half":
            for part in parts:
                part.matrix[: part.n_bytes // 2] = bytes(part.n_bytes // 2)
        if how:
            raise GGUFError(f"this read of expert {expert} was {SPOILED}")

    def read_ahead(
        self, layer: int, expert: int, parts: Parts, is_wanted: Callable[[], bool]
    ) -> int:
        """As many pieces as chance says, not as many as there is time for."""
        n_pieces = iter(range(self._pieces.randrange(20)))
        try:
            if self._pieces.random() < 0.1:
                raise GGUFError(f"this read ahead was {SPOILED}")
            return super().read_ahead(
                layer, expert, parts, lambda: next(n_pieces, None) is not None
            )
        finally:
            with self._turn:
                self._n_ahead += 1
                self._turn.notify_all()

    def is_cheaper_on_host(self, layer: int, expert: int, n_pairs: int = 1) -> bool:
        return self._prices.random() < 0.5


WAYS_TO_SPOIL = ("at once", "half", "late")  # before any byte, after half of them, after all


class CacheProgram(TableProgram):
    """Loads that are late, fail and end in any order, next to the operations of the table."""

    operations = (
        *("start",) * 8, *("finish",) * 6, *("upload",) * 2, *("settle_uploads",) * 2, "allow",
        *("guess",) * 2, "plan", "use", "use", "hold", "hold_only", "release", "release", "pin",
        "unpin", "unpin", "expect",
    )  # fmt: skip
    ends = ("finish",)
    begins = "start"
    on_all_layers = ("expect", "settle_uploads")

    def __init__(
        self,
        model: OpenModel,
        rng: Random,
        cache_type: type[ExpertCache] = ExpertCache,
        table_type: type[SlotTable] = SlotTable,
        store_type: type[CommandedStore] = CommandedStore,
    ) -> None:
        config = model.config
        n_slots = tuple(rng.randint(1, config.n_expert) for _ in range(config.n_layer))
        policy = rng.choice(CACHE_POLICIES)
        self.store = store_type(model.file, config, has_room=rng.random() < 0.3)
        self.store.allow(0)
        self.cache = cache_type(model.backend, model.file, config, self.store, n_slots, policy)
        self.cache.table = table_type(n_slots, config.n_expert, policy)
        self._begin(rng, self.cache.table)
        self.model = model
        self.number_of: dict[Load, int] = {}  # loads under way -> their places in the row
        self.upload_number_of: dict[Load, int] = {}  # those that nobody waits for
        self.n_started = self.n_allowed = self.n_guesses = 0

    def close(self) -> None:
        """With loads under way, one of which may be waiting."""
        self.store.allow(inf)
        self.cache.close()

    # operations

    def start(self, layer: int) -> None:
        expert = self._some_expert(layer)
        if self._can_start(layer) and expert in self.layers[layer].missing():
            self._start(layer, expert)
        else:
            with pytest.raises(AssertionError):
                self.cache.start_load(layer, expert)

    def finish(self, layer: int) -> None:
        """End one of the layer's loads, whenever the others end."""
        loads = [load for load in self.number_of if load.layer == layer]
        if not loads:  # only uploads are under way
            return
        load = self.rng.choice(loads)
        number = self.number_of.pop(load)
        is_spoiled = number in self.store.spoiled
        self._allow(number + 1)
        if self.rng.random() < 0.5:
            self.cache.settle(load)
        elif is_spoiled:
            with pytest.raises(GGUFError, match=SPOILED) as raised:
                self.cache.finish(load)
            assert raised.value is load.error
        else:
            self.cache.finish(load)
        self._note_end(load, is_spoiled)

    def upload(self, layer: int) -> None:
        """Begin a load that nobody waits for."""
        expert = self._some_expert(layer)
        if self._can_start(layer) and expert in self.layers[layer].missing():
            self._spoil_some()
            self.cache.start_upload(layer, expert)
            load = self.cache._uploads[-1]
            self._note_start(load, self.upload_number_of)

    def settle_uploads(self, layer: int) -> None:
        """As before the layer is served: what it waits for is there, and what came of others."""
        awaited = [load for load in self.upload_number_of if load.layer == layer]
        self._allow(max((self.upload_number_of[load] + 1 for load in awaited), default=0))
        settled = self.cache.settle_uploads(layer)
        assert set(awaited) <= set(settled), "an upload of this layer is still under way"
        for load in settled:
            self._note_end(load, self.upload_number_of.pop(load) in self.store.spoiled)
        assert self.cache.n_uploads == len(self.upload_number_of)
        self.n_done["uploads settled"] += len(settled)

    def allow(self, layer: int) -> None:
        """Let some of the loads be read while other things happen."""
        self._allow(self.rng.randint(self.n_allowed, self.n_started))

    def guess(self, layer: int) -> None:
        """Read ahead for a while, and use what was read."""
        expert = self._some_expert(layer)
        guess = self.cache.start_guess(layer, expert)
        if guess is None:
            return
        self._allow(self.n_started)
        self.n_guesses += 1
        self.store.wait_until_read_ahead(self.n_guesses)
        self.cache.stop_guess(guess)
        self.n_done["guess failed"] += guess.error is not None
        is_missing = expert in self.layers[layer].missing()
        if guess.error is None and is_missing and self._can_start(layer):
            self._start(layer, expert, guess)
            self.n_done["guess used"] += 1

    def plan(self, layer: int) -> None:
        """What is not there yet is no hit."""
        ids = np.array([self.rng.sample(range(self.n_expert), 2) for _ in range(3)], np.int32)
        plan = miss_policy.exact_plan(ids, self.table.slot_of[layer])
        resident = set(self.layers[layer].resident.values())
        n_hit = sum(expert in resident for expert in ids.ravel().tolist())
        assert plan.n_hit == n_hit, "a hit that is none"
        assert set(plan.loads) == set(ids.ravel().tolist()) - resident

    def _can_start(self, layer: int) -> bool:
        can_start = bool(self.layers[layer].free())
        assert self.cache.can_load(layer) == can_start, "can_load is wrong"
        return can_start

    def _start(self, layer: int, expert: int, guess: Load | None = None) -> None:
        self._spoil_some()
        load = self.cache.start_load(layer, expert, guess)
        self._note_start(load, self.number_of)

    def _spoil_some(self) -> None:
        if self.rng.random() < 0.3:
            self.store.spoiled[self.n_started] = self.rng.choice(WAYS_TO_SPOIL)

    def _note_start(self, load: Load, numbers: dict[Load, int]) -> None:
        self.layers[load.layer].take(load.expert, load.slot)
        numbers[load] = self.n_started
        self.n_started += 1

    def _note_end(self, load: Load, is_spoiled: bool) -> None:
        assert load.is_done and (load.error is not None) == is_spoiled
        layer = self.layers[load.layer]
        (layer.fail if is_spoiled else layer.commit)(load.slot)

    def _allow(self, n_reads: int) -> None:
        self.n_allowed = max(self.n_allowed, n_reads)
        self.store.allow(self.n_allowed)

    def check(self) -> None:
        super().check()
        check_contents(self.model, self.cache)


def check_contents(model: OpenModel, cache: ExpertCache) -> None:
    """Every resident expert has its bytes of the file, as ggml sees them."""
    for layer, experts in enumerate(cache.table.expert_in.tolist()):
        for slot, expert in enumerate(experts):
            if expert != EMPTY:
                seen = model.bytes_in_slot(cache, layer, slot)
                assert seen == model.experts[layer][expert], "a slot has other bytes"


class TimedCache(ExpertCache):
    """Each read ends as soon as it is asked for, or begins only when somebody waits for it."""

    store: CommandedStore

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.is_late = False
        self.place_of: dict[Load, int] = {}  # counted from 1, in the order of the reads
        self.n_guesses = 0

    def start_load(self, layer: int, expert: int, guess: Load | None = None) -> Load:
        load = super().start_load(layer, expert, guess)
        self.place_of[load] = len(self.place_of) + 1
        if not self.is_late:
            self.store.wait_until_ended(self.place_of[load])
        return load

    def settle(self, load: Load) -> None:
        if self.is_late:
            self.store.allow(self.place_of[load])
        super().settle(load)

    def start_guess(self, layer: int, expert: int) -> Load | None:
        guess = super().start_guess(layer, expert)
        self.n_guesses += guess is not None
        return guess

    def stop_guess(self, guess: Load) -> None:
        self.store.wait_until_read_ahead(self.n_guesses)
        super().stop_guess(guess)


def make_cache(
    model: OpenModel, *n_slots: int, policy: str = "lru", has_room: bool = False
) -> TimedCache:
    store = CommandedStore(model.file, model.config, has_room)
    return TimedCache(model.backend, model.file, model.config, store, n_slots, policy)


def reads_directly(models: OpenModels) -> bool:
    with closing(make_cache(models.get("alike"), 1, 1, 1)) as cache:
        return cache.store.is_direct
