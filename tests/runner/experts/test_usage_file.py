"""The profile of expert uses: what it keeps, what it refuses, and what a run does with it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from quant.gguf_file import GGUFFile
from runner.checks.read_model import read_model
from runner.config import EngineConfig
from runner.engine import Engine
from runner.errors import OptionError
from runner.experts.eviction import LFU_HALF_LIFE, frequency_of
from runner.experts.slot_table import SlotTable
from runner.experts.usage_file import UsageFile
from tests.random_model import RandomModel, write_random_model


def usage_file(path: Path, model: Path) -> UsageFile:
    with GGUFFile.open(model) as file:
        return UsageFile(path, file, read_model(file))


def counts(n_layer: int = 8, n_expert: int = 8) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 1000, (n_layer, n_expert))


def test_a_file_that_does_not_exist_means_no_uses(tmp_path: Path, demo_path: Path) -> None:
    usage = usage_file(tmp_path / "uses.json", demo_path)
    assert usage.earlier.shape == (8, 8)
    assert not usage.earlier.any()
    assert not usage_file(tmp_path / "uses.json", demo_path).earlier.any(), "it was made, empty"


def test_uses_of_runs_add_up(tmp_path: Path, demo_path: Path) -> None:
    path, uses = tmp_path / "uses.json", counts()
    usage_file(path, demo_path).save(uses)
    usage_file(path, demo_path).save(uses)
    assert (usage_file(path, demo_path).earlier == 2 * uses).all()
    assert list(tmp_path.iterdir()) == [path]


def test_saving_twice_in_a_run_counts_once(tmp_path: Path, demo_path: Path) -> None:
    path, uses = tmp_path / "uses.json", counts()
    usage = usage_file(path, demo_path)
    usage.save(uses)
    usage.save(uses + 1)
    assert (usage_file(path, demo_path).earlier == uses + 1).all()


def test_the_profile_of_another_model_is_refused(tmp_path: Path, demo_path: Path) -> None:
    other = write_random_model(tmp_path / "other.gguf", RandomModel())
    path = tmp_path / "uses.json"
    usage_file(path, demo_path).save(counts())
    with pytest.raises(OptionError, match="belongs to another model"):
        usage_file(path, other)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d.pop("format"), "lacks 'format'"),
        (lambda d: d.update(version=2), "its version is 2"),
        (lambda d: d.pop("uses"), "counts are not"),
        (lambda d: d["uses"].pop(), "counts are not"),
        (lambda d: d["uses"][3].append(1), "counts are not"),
        (lambda d: d["uses"][3].__setitem__(2, -1), "counts are not"),
        (lambda d: d["uses"][3].__setitem__(2, 1.5), "counts are not"),
        (lambda d: d["uses"][3].__setitem__(2, True), "counts are not"),
        (lambda d: d["uses"][3].__setitem__(2, 1 << 70), "counts are not"),
    ],
)
def test_a_damaged_profile_is_refused_by_name(
    tmp_path: Path, demo_path: Path, change, reason: str
) -> None:
    path = tmp_path / "uses.json"
    usage_file(path, demo_path).save(counts())
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(OptionError, match=reason) as refused:
        usage_file(path, demo_path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"null"])
def test_what_is_no_profile_is_refused(tmp_path: Path, demo_path: Path, content: bytes) -> None:
    path = tmp_path / "uses.json"
    path.write_bytes(content)
    with pytest.raises(OptionError, match="no profile of this model"):
        usage_file(path, demo_path)
    assert path.read_bytes() == content


def test_a_place_that_cannot_be_written_is_named_at_once(tmp_path: Path, demo_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot write"):
        usage_file(tmp_path / "missing" / "uses.json", demo_path)


def test_a_pipe_is_no_profile(tmp_path: Path, demo_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OptionError, match="no small regular file"):
        usage_file(tmp_path / "pipe", demo_path)


def test_layers_that_have_every_expert_count_uses_too(tmp_path: Path, demo_path: Path) -> None:
    config = EngineConfig(
        n_threads=1, moe_cache_slots=8, moe_miss="load", moe_cache_profile=str(tmp_path / "uses")
    )
    engine = Engine(demo_path, config)
    try:
        engine.prefill(list(range(5, 205)))
        for token in range(300, 330):
            engine.decode(token)
        uses = engine._cache.table.n_uses.sum(axis=1)
        assert (uses[:-1] == 2 * 230).all()
        assert uses[-1] == 2 * 31
    finally:
        engine.close()


@pytest.mark.slow
def test_static_streams_while_favourites_become_pinned(tmp_path: Path, demo_path: Path) -> None:
    rng, path = np.random.default_rng(2), tmp_path / "uses.json"
    config = EngineConfig(
        n_threads=1,
        n_batch=64,
        moe_cache_slots=3,
        moe_miss="load",
        moe_cache_policy="static",
        moe_cache_profile=str(path),
    )
    for _ in range(12):
        path.unlink(missing_ok=True)
        usage_file(path, demo_path).save(rng.integers(1, 1000, (8, 8)))
        engine = Engine(demo_path, config)
        try:
            for n in (1, 2, 5, 9, 40):
                engine.prefill(rng.integers(300, 4000, n).tolist())
                engine.decode(300)
        finally:
            engine.close()


def test_a_long_run_ends_with_the_frequencies_that_its_profile_gives() -> None:
    table = SlotTable([4], 4, "lfu")
    rng = np.random.default_rng(3)
    for _ in range(40 * LFU_HALF_LIFE):
        table.record_use(0, rng.permuted([0, 1, 2, 3])[None, :2])
    now = 2.0 ** (40 - 1 / LFU_HALF_LIFE)  # what the last use counts
    expected = frequency_of(table.n_uses, n_expert_used=2)
    assert table.frequency.sum() / now == pytest.approx(expected.sum(), rel=0.01)


def test_a_short_prompt_fills_the_slots_with_what_earlier_runs_used(
    tmp_path: Path, demo_path: Path
) -> None:
    path = tmp_path / "uses.json"
    usage_file(path, demo_path).save(np.tile([7, 6, 5, 4, 3, 2, 1, 0], (8, 1)))
    config = EngineConfig(
        n_threads=1, moe_cache_slots=5, moe_miss="load", moe_cache_profile=str(path)
    )
    plain = EngineConfig(n_threads=1, moe_cache_bytes=0)
    engine, reference = Engine(demo_path, config), Engine(demo_path, plain)
    try:
        logits = engine.prefill([5, 6, 7])
        assert logits.tobytes() == reference.prefill([5, 6, 7]).tobytes()
        residency = engine.snapshot().residency[:-1]  # the last layer saw a single token
        assert all(-1 not in slots for slots in residency)
        uses = engine._cache.table.n_uses
        for slots, asked in zip(residency, uses, strict=False):
            wanted = set(np.flatnonzero(asked[: len(slots)])) | {0, 1, 2}
            assert len(wanted & set(slots)) >= 3
        engine.save_usage()
        saved = json.loads(path.read_text())["uses"]
        assert saved == (np.tile([7, 6, 5, 4, 3, 2, 1, 0], (8, 1)) + uses).tolist()
    finally:
        engine.close()
        reference.close()


def test_static_pins_the_favourites_of_the_profile(tmp_path: Path, demo_path: Path) -> None:
    path = tmp_path / "uses.json"
    usage_file(path, demo_path).save(np.tile([0, 1, 2, 3, 4, 5, 6, 7], (8, 1)))
    config = EngineConfig(
        n_threads=1,
        moe_cache_slots=4,
        moe_miss="load",
        moe_cache_policy="static",
        moe_cache_profile=str(path),
    )
    engine = Engine(demo_path, config)
    try:
        engine.prefill(list(range(5, 60)))
        for token in range(100, 140):
            engine.decode(token)
        table = engine._cache.table
        for layer in range(7):
            asked = {expert for expert in (5, 6, 7) if table.n_uses[layer, expert]}
            assert asked <= set(table.pinned(layer)) <= {5, 6, 7}
        assert sum(len(table.pinned(layer)) for layer in range(7)) >= 18
    finally:
        engine.close()
