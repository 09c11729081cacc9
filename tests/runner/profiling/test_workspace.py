"""The folder of an unfinished profile: kept, continued, or in the way."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from runner.errors import ProfileError
from runner.profiling.calibration import Calibration, calibrate
from runner.profiling.workspace import ContextTrace, Shape, Workspace, folder_for

SHAPE = Shape(n_layer=3, n_expert=4, n_expert_used=2, n_embd=5)
CALIBRATION = calibrate([list(range(400))], 7, 300, 50)


def make_trace(number: int) -> ContextTrace:
    rng = np.random.default_rng(number)
    n, n_sampled = len(CALIBRATION.contexts[number]) - 1, len(CALIBRATION.sampled_in(number))
    return ContextTrace(
        rng.integers(0, 4, (3, n, 2)).astype(np.int32),
        rng.uniform(0, 1, (3, n, 2)).astype(np.float32),
        rng.standard_normal((3, n, 4)).astype(np.float32),
        rng.uniform(1, 2, (3, n)).astype(np.float32),
        rng.standard_normal((3, n_sampled, 5)).astype(np.float16),
    )


def open_work(
    folder: Path, model_hash: str = "aa", calibration: Calibration = CALIBRATION
) -> Workspace:
    return Workspace(folder, model_hash, SHAPE, calibration)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_for(tmp_path / "model.buddies.npz")


@pytest.fixture
def kept(folder: Path) -> Path:
    """With both contexts and the middle layer finished."""
    with open_work(folder) as work:
        for number in range(2):
            work.save_context(number, make_trace(number))
        work.save_gram(1, np.ones((50, 4, 4), np.float32))
    return folder


def test_the_folder_lies_beside_the_profile(folder: Path) -> None:
    assert folder.name == "model.buddies.npz.partial"


def test_what_is_finished_is_there_in_the_next_run(kept: Path) -> None:
    with open_work(kept) as work:
        assert [work.has_context(number) for number in range(2)] == [True, True]
        assert [work.has_gram(layer) for layer in range(3)] == [False, True, False]
        traces = [make_trace(number) for number in range(2)]
        expert_ids, _, scores = work.routing(2)
        assert np.array_equal(expert_ids, np.concatenate([t.expert_ids[2] for t in traces]))
        assert np.array_equal(scores, np.concatenate([t.scores[2] for t in traces]))
        ffn_input = work.ffn_input(1)
        assert ffn_input.dtype == np.float32 and ffn_input.shape == (50, 5)
        record = work.record_of(1)
        assert record.gram.shape == (50, 4, 4)
        assert np.array_equal(record.weights, work.routing(1)[1][CALIBRATION.sampled])
        work.remove()
    assert not kept.exists()


def test_an_unfinished_file_does_not_count(kept: Path) -> None:
    os.rename(kept / "context-0001", kept / "context-0001.new")
    os.rename(kept / "gram-0001.npy", kept / "gram-0001.npy.new")
    with open_work(kept) as work:
        assert work.has_context(0) and not work.has_context(1) and not work.has_gram(1)
        work.save_context(1, make_trace(1))
        work.save_gram(1, np.ones((50, 4, 4), np.float32))
        assert work.has_context(1) and work.has_gram(1)


@pytest.mark.parametrize("name", ["expert_ids", "weights", "scores", "ffn_input"])
@pytest.mark.parametrize("damage", ["cut", "gone", "empty", "other type", "other shape", "text"])
def test_a_damaged_context_is_made_again(kept: Path, name: str, damage: str) -> None:
    path = kept / "context-0000" / f"{name}.npy"
    array = np.load(path)
    match damage:
        case "cut":
            path.write_bytes(path.read_bytes()[:-1])
        case "gone":
            path.unlink()
        case "other type":
            np.save(path, array.astype(np.float64))
        case "other shape":
            np.save(path, array[:-1])
        case _:
            path.write_bytes(b"" if damage == "empty" else b"not an array" * 99)
    with open_work(kept) as work:
        assert not work.has_context(0) and work.has_context(1)
        work.save_context(0, make_trace(0))
        assert work.has_context(0)


@pytest.mark.parametrize("foreign", ["model", "text", "version", "damaged", "nothing"])
def test_what_belongs_to_something_else_is_thrown_away(kept: Path, foreign: str) -> None:
    header = kept / "header.json"
    if foreign == "version":
        header.write_text(json.dumps(json.loads(header.read_text()) | {"version": 2}))
    elif foreign == "nothing":
        for path in kept.glob("**/*.npy"):
            path.unlink()
        for path in [*kept.glob("context-*"), header]:
            path.rmdir() if path.is_dir() else path.unlink()
    elif foreign == "damaged":
        header.write_text(header.read_text()[:-1])
        with pytest.raises(ProfileError, match="is in the way"):
            open_work(kept)
        return
    calibration = calibrate([list(range(400))], 8, 300, 50) if foreign == "text" else CALIBRATION
    with open_work(kept, "bb" if foreign == "model" else "aa", calibration) as work:
        assert not any(work.has_context(number) for number in range(2)) and not work.has_gram(1)
        assert sorted(path.name for path in kept.iterdir()) == ["header.json", "lock"]


@pytest.mark.parametrize("kind", ["file", "folder of somebody", "link"])
def test_what_is_not_ours_is_in_the_way_and_stays(folder: Path, kind: str) -> None:
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    if kind == "file":
        folder.write_text("precious")
    elif kind == "link":
        folder.symlink_to(elsewhere)
    else:
        folder.mkdir()
        (folder / "precious").touch()
    with pytest.raises(ProfileError, match=r"partial is in the way: .* -o FILE"):
        open_work(folder)
    assert folder.exists() and elsewhere.exists()


def test_two_runs_do_not_work_in_one_folder(kept: Path) -> None:
    with open_work(kept):
        for name in ("aa", "bb"):
            with pytest.raises(ProfileError, match="another `buddyrun profile` is at work"):
                open_work(kept, name)
    with open_work(kept) as work:
        assert work.has_context(0), "the one that was refused left everything"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for parent in ("gone", "file"):
        with pytest.raises(ProfileError, match=r"cannot keep .*partial.*-o FILE"):
            open_work(folder_for(tmp_path / parent / "x.npz"))


def test_a_full_disk_is_told_before_anything_is_computed(kept: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with open_work(kept) as work:
        work.check_room()  # all contexts are there
    (kept / "context-0000" / "weights.npy").unlink()
    with open_work(kept) as work:
        with pytest.raises(ProfileError, match=r"takes 0 MB in .* 0 MB are free there; -o FILE"):
            work.check_room()
