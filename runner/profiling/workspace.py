"""The folder where an unfinished profile lies, so that an interrupted run can be continued.

Every file appears whole or not at all. Only one run works in it at a time, and what belongs to
another model or text is thrown away. Knows no model and no torch.

    header.json             what the folder belongs to
    context-0003/           what every layer did with one context: four arrays, see `ContextTrace`
    gram-0007.npy           the sampled tokens' expert outputs of one layer, see `LayerRecord`
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from runner.errors import ProfileError
from runner.profiling.calibration import Calibration
from runner.profiling.statistics import LayerRecord

_FORMAT, _VERSION = "buddyrun-unfinished-profile", 1
_HEADER, _LOCK, _NEW = "header.json", "lock", ".new"


@dataclass(frozen=True)
class ContextTrace:
    """What all layers did with the counted tokens of one context."""

    expert_ids: np.ndarray  # (n_layer, n, n_expert_used) int32
    weights: np.ndarray  # (n_layer, n, n_expert_used) float32
    scores: np.ndarray  # (n_layer, n, n_expert) float32
    residual_power: np.ndarray  # (n_layer, n) float32
    ffn_input: np.ndarray  # (n_layer, n_sampled, n_embd) float16: only of the sampled tokens


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that the arrays depend on."""

    n_layer: int
    n_expert: int
    n_expert_used: int
    n_embd: int


class Workspace:
    """The working folder of one profile; `with` it, since it is locked meanwhile."""

    def __init__(
        self, folder: Path, model_hash: str, shape: Shape, calibration: Calibration
    ) -> None:
        """Make the folder or continue it.

        Raises ProfileError: it cannot be written, is something else, or another run works in it.
        """
        self.folder = folder
        self._shape = shape
        self._calibration = calibration
        key = {
            "format": _FORMAT, "version": _VERSION, "model_hash": model_hash,
            "calibration": calibration.digest,
        }  # fmt: skip
        try:
            self._open(key)
        except OSError as error:
            raise self.problem(error) from error

    def problem(self, error: OSError) -> ProfileError:
        """What an error of the file system means here."""
        return ProfileError(
            f"cannot keep the unfinished profile in {self.folder}: {error.strerror or error}; "
            "-o FILE puts it elsewhere"
        )

    def check_room(self) -> None:
        """Raise ProfileError when the disk has too little room for what is still to come."""
        shape, calibration = self._shape, self._calibration
        n_missing = sum(not self.has_context(i) for i in range(len(calibration.contexts)))
        per_token = shape.n_layer * (8 * shape.n_expert_used + 4 * shape.n_expert + 4)
        per_sampled = shape.n_layer * (2 * shape.n_embd + 4 * shape.n_expert**2)
        n_bytes = calibration.n_tokens * per_token + len(calibration.sampled) * per_sampled
        n_bytes = n_bytes * n_missing // len(calibration.contexts)
        n_free = shutil.disk_usage(self.folder).free
        if n_bytes > n_free:
            raise ProfileError(
                f"the unfinished profile takes {n_bytes / 1e6:.0f} MB in {self.folder.parent}, and "
                f"{n_free / 1e6:.0f} MB are free there; -o FILE puts it elsewhere"
            )

    def close(self) -> None:
        """Let others work in the folder."""
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def remove(self) -> None:
        """Delete the folder; it is not needed any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # contexts

    def has_context(self, number: int) -> bool:
        """Whether the context was traced, and all of it is there."""
        return self._context(number) is not None

    def save_context(self, number: int, trace: ContextTrace) -> None:
        """Keep what the layers did with a context. Raises OSError."""
        folder = self._folder_of(number)
        draft = folder.with_name(folder.name + _NEW)
        for old in (draft, folder):
            if old.exists():
                shutil.rmtree(old)
        draft.mkdir()
        for name in _names(ContextTrace):
            _write(draft / f"{name}.npy", getattr(trace, name))
        os.replace(draft, folder)

    def routing(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A layer's expert_ids, weights and scores of all counted tokens."""
        traces = self._all_contexts()
        return (
            np.concatenate([trace.expert_ids[layer] for trace in traces]),
            np.concatenate([trace.weights[layer] for trace in traces]),
            np.concatenate([trace.scores[layer] for trace in traces]),
        )

    def residual_power(self, layer: int) -> float:
        """The mean square of the residual stream's norm before a layer's experts."""
        parts = [trace.residual_power[layer] for trace in self._all_contexts()]
        return float(np.concatenate(parts).mean(dtype=np.float64))

    def ffn_input(self, layer: int) -> np.ndarray:
        """What a layer's experts got, of the sampled tokens: (n_sampled, n_embd) float32."""
        parts = [trace.ffn_input[layer] for trace in self._all_contexts()]
        return np.concatenate(parts).astype(np.float32)

    # layers

    def has_gram(self, layer: int) -> bool:
        """Whether the layer's experts were compared."""
        return self._gram(layer) is not None

    def save_gram(self, layer: int, gram: np.ndarray) -> None:
        """Keep a layer's expert outputs, (n_sampled, n_expert, n_expert). Raises OSError."""
        path = self._gram_path(layer)
        draft = path.with_name(path.name + _NEW)
        _write(draft, gram)
        os.replace(draft, path)

    def record_of(self, layer: int) -> LayerRecord:
        """What a finished layer did with the sampled tokens."""
        gram = self._gram(layer)
        assert gram is not None, f"layer {layer} is not finished"
        sampled = self._calibration.sampled
        expert_ids, weights, scores = (array[sampled] for array in self.routing(layer))
        return LayerRecord(expert_ids, weights, scores, np.array(gram))

    # inside

    def _open(self, key: Mapping[str, object]) -> None:
        if self.folder.is_symlink() or (self.folder.exists() and not _is_ours(self.folder)):
            raise ProfileError(
                f"{self.folder} is in the way: an unfinished profile would lie there; move it, "
                "or name another file with -o FILE"
            )
        self.folder.mkdir(exist_ok=True)
        self._lock = _locked(self.folder / _LOCK)
        try:
            if _read_header(self.folder) != key:
                _empty(self.folder)
                draft = self.folder / (_HEADER + _NEW)
                draft.write_text(json.dumps(key))
                os.replace(draft, self.folder / _HEADER)
        except BaseException:
            os.close(self._lock)
            raise

    def _folder_of(self, number: int) -> Path:
        return self.folder / f"context-{number:04d}"

    def _gram_path(self, layer: int) -> Path:
        return self.folder / f"gram-{layer:04d}.npy"

    def _gram(self, layer: int) -> np.ndarray | None:
        n, n_expert = len(self._calibration.sampled), self._shape.n_expert
        return _read(self._gram_path(layer), np.float32, (n, n_expert, n_expert))

    def _all_contexts(self) -> Sequence[ContextTrace]:
        traces = [self._context(number) for number in range(len(self._calibration.contexts))]
        found = [trace for trace in traces if trace is not None]
        assert len(found) == len(traces), "not all contexts are traced"
        return found

    def _context(self, number: int) -> ContextTrace | None:
        """A context's arrays, mapped; None when one is missing or is not as it must be."""
        shape, n = self._shape, len(self._calibration.contexts[number]) - 1
        n_sampled = len(self._calibration.sampled_in(number))
        expected: dict[str, tuple[type, tuple[int, ...]]] = {
            "expert_ids": (np.int32, (shape.n_layer, n, shape.n_expert_used)),
            "weights": (np.float32, (shape.n_layer, n, shape.n_expert_used)),
            "scores": (np.float32, (shape.n_layer, n, shape.n_expert)),
            "residual_power": (np.float32, (shape.n_layer, n)),
            "ffn_input": (np.float16, (shape.n_layer, n_sampled, shape.n_embd)),
        }
        arrays = {}
        for name, (dtype, array_shape) in expected.items():
            array = _read(self._folder_of(number) / f"{name}.npy", dtype, array_shape)
            if array is None:
                return None
            arrays[name] = array
        return ContextTrace(**arrays)


def folder_for(output: Path) -> Path:
    """The working folder of the profile that becomes `output`."""
    return output.with_name(output.name + ".partial")


def _names(cls: Any) -> list[str]:
    return [f.name for f in fields(cls)]


def _write(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray | None:
    """An array of this type and shape, mapped; None for anything else."""
    try:
        array: np.ndarray = np.load(path, mmap_mode="r" if all(shape) else None)
    except (OSError, ValueError, EOFError):
        return None
    return array if array.dtype == dtype and array.shape == shape else None


def _read_header(folder: Path) -> object:
    try:
        return json.loads((folder / _HEADER).read_bytes())
    except (OSError, ValueError):
        return None


def _is_ours(folder: Path) -> bool:
    """Whether what is there may be thrown away: an unfinished profile, or the very start of one."""
    if not folder.is_dir():
        return False
    header = _read_header(folder)
    if isinstance(header, dict) and header.get("format") == _FORMAT:
        return True
    return {path.name for path in folder.iterdir()} <= {_LOCK, _HEADER + _NEW}


def _empty(folder: Path) -> None:
    """Delete all but the lock; the header goes last, so that the rest is known to be ours."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == _HEADER):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def _locked(path: Path) -> int:
    """An open file that no other run has; the system lets go of it when this process ends."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    with suppress(ImportError):  # Windows has other locks; there two runs are not kept apart
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise ProfileError(
                f"another `buddyrun profile` is at work in {path.parent}; wait for it, or name "
                "another file with -o FILE"
            ) from error
    return handle
