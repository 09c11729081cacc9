"""BuddyTable: how well each expert of a model stands in for each other one, and its file.

The file is a numpy .npz with a JSON header. Nothing in it is trusted: sizes are bounded before
anything is read, nothing is unpickled, and every array is checked. Knows no policy and no engine.
"""

import io
import json
import math
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from runner.errors import ProfileError

FORMAT, VERSION = "buddyrun-buddies", 1
MAX_BYTES = 1 << 30  # of the whole table
N_PERCENTILES = 101

_HEADER = "header.json"
_MAX_HEADER_BYTES = 1 << 20
_MAX_NPY_HEAD_BYTES = 4096
_COUNTS, _FLOATS = np.dtype("<i8"), np.dtype("<f4")
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "uses": _COUNTS, "coactivation": _COUNTS, "scale": _FLOATS, "error": _FLOATS,
    "tae_percentiles": _FLOATS, "gram": _FLOATS, "power": _FLOATS,
}  # fmt: skip
_NUMBER_OF_SHARD = re.compile(r"-\d{5}(-of-\d{5})$")


@dataclass(frozen=True, slots=True)
class PolicyEstimate:
    """What a policy would cost with this model, computed from the profile's own tokens."""

    policy: str
    n_slots: int  # per layer
    budget: float  # share of the router's weight that stand-ins may carry
    harm: float  # ||change of the layers' outputs||^2 / ||residual stream||^2, all layers' sum
    miss_share: float  # of all pairs: what is still read or computed on the host
    opening: float  # how readily it gave pairs away when the budget was kept, see `Opening`


@dataclass(frozen=True, slots=True, eq=False)
class BuddyTable:
    """The profile of one model; arrays are copied and cannot be written to."""

    model_hash: str  # hex, of `model_hash`
    n_tokens: int  # that were counted
    uses: np.ndarray  # (n_layer, n_expert) int64, tokens that chose an expert
    coactivation: np.ndarray  # (n_layer, n_expert, n_expert) int64, tokens that chose both
    scale: np.ndarray  # same shape, float32: [layer, e, b] the best factor of b's output for e's
    error: np.ndarray  # same shape, float32: ||f_e - scale f_b||^2 / ||f_e||^2 over e's tokens
    tae_percentiles: np.ndarray  # (n_layer, 101) float32, of the tokens' activating entropy
    gram: np.ndarray  # (n_layer, n_expert, n_expert) float32, mean products of experts' outputs
    power: np.ndarray  # (n_layer,) float32, mean squared norm of the residual behind the layer
    estimates: tuple[PolicyEstimate, ...] = ()

    def __post_init__(self) -> None:
        for name, dtype in _DTYPES.items():
            array = np.array(getattr(self, name), dtype, order="C")
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    @property
    def n_layer(self) -> int:
        return int(self.uses.shape[0])

    @property
    def n_expert(self) -> int:
        return int(self.uses.shape[1])

    def ranked(self, layer: int) -> np.ndarray:
        """Buddies of each expert, the lowest error first: (n_expert, n_expert - 1) int32.

        Of equal ones first the one that was chosen together with it more often, then the lower.
        """
        n = self.n_expert
        error = self.error[layer].astype(np.float64)
        np.fill_diagonal(error, np.inf)  # nobody is its own buddy
        numbers = np.broadcast_to(np.arange(n), (n, n))
        order = np.lexsort((numbers, -self.coactivation[layer], error), axis=-1)
        return order[:, : n - 1].astype(np.int32)

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all.

        Raises ProfileError when it cannot be written or the table is not a sound one.
        """
        problem = _problem_of(self)
        if problem:
            raise ProfileError(
                f"{path} was not written: the table {problem}, so some of the model's weights must "
                "be no finite numbers"
            )
        target = Path(os.path.realpath(path))
        draft = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with draft.open("wb") as file:
                _write(self, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, target)
        except OSError as error:
            with suppress(OSError):
                draft.unlink()
            raise ProfileError(f"cannot write {path}: {_reason(error)}") from error

    @classmethod
    def load(cls, path: str | Path, model_hash: str, n_layer: int, n_expert: int) -> Self:
        """Read the profile of the model with this hash and shape.

        Raises ProfileError: cannot be read, damaged, of another version or of another model.
        """
        try:
            if os.path.exists(path) and not os.path.isfile(path):
                raise _Unsound("it is no regular file")
            with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
                members = _members(archive, file)
                header = _read_header(archive, members)
                _check_model(header, model_hash, n_layer, n_expert)
                arrays = {
                    name: _read_array(archive, members, name, _shape_of(name, n_layer, n_expert))
                    for name in _DTYPES
                }
            table = cls(header["model_hash"], header["n_tokens"], **arrays, estimates=header["est"])
            problem = _problem_of(table)
            if problem:
                raise _Unsound(f"it {problem}")
        except _Unsound as error:
            raise _refusal(path, str(error)) from error
        except OSError as error:
            raise ProfileError(f"cannot read {path}: {_reason(error)}") from error
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
            raise _refusal(path, f"it is damaged ({error})") from error
        return table


def default_path(model: str | Path) -> Path:
    """Where the profile of a model lies: beside it, or beside the first file of a split one."""
    path = Path(model)
    stem = _NUMBER_OF_SHARD.sub(r"-00001\1", path.name.removesuffix(".gguf"))
    return path.with_name(f"{stem}.buddies.npz")


# soundness


def _problem_of(table: BuddyTable) -> str:
    """What a table must not have; "" when it is sound."""
    n_layer, n_expert = table.n_layer, table.n_expert
    for name in _DTYPES:
        shape = _shape_of(name, n_layer, n_expert)
        found = getattr(table, name).shape
        assert found == shape, f"{name}: {found}, not {shape}"
    uses, pairs = table.uses, table.coactivation
    own = np.arange(n_expert)
    tae = table.tae_percentiles
    rules = {
        "uses outside 0 to n_tokens": (uses >= 0) & (uses <= table.n_tokens),
        "coactivation below 0": pairs >= 0,
        "an asymmetric coactivation": pairs == pairs.transpose(0, 2, 1),
        "an expert that is chosen together with itself": pairs[:, own, own] == 0,
        "a scale that is no number": np.isfinite(table.scale),
        "an error outside 0 to 1": (table.error >= 0) & (table.error <= 1),  # false for NaN
        "an expert that differs from itself": table.error[:, own, own] == 0,
        "an entropy outside 0 to 1": (tae >= 0) & (tae <= 1),
        "percentiles that fall": tae[:, 1:] >= tae[:, :-1],
        "a product that is no number": np.isfinite(table.gram),
        "asymmetric products": table.gram == table.gram.transpose(0, 2, 1),
        "a square below 0": table.gram[:, own, own] >= 0,
        "a residual without power": np.isfinite(table.power) & (table.power > 0),
    }
    broken = [text for text, is_kept in rules.items() if not is_kept.all()]
    return f"has {broken[0]}" if broken else ""


def _shape_of(name: str, n_layer: int, n_expert: int) -> tuple[int, ...]:
    if name == "uses":
        return n_layer, n_expert
    if name == "power":
        return (n_layer,)
    return (n_layer, N_PERCENTILES) if name == "tae_percentiles" else (n_layer, n_expert, n_expert)


# the file


class _Unsound(Exception):
    """What is wrong with a file, in words."""


def _refusal(path: str | Path, problem: str) -> ProfileError:
    return ProfileError(
        f"{path} cannot be used as a profile of buddies: {problem}. `buddyrun profile MODEL` makes "
        "a new one; `--buddy-profile off` runs without"
    )


def _write(table: BuddyTable, file: Any) -> None:
    header = {
        "format": FORMAT, "version": VERSION, "model_hash": table.model_hash,
        "n_layer": table.n_layer, "n_expert": table.n_expert, "n_tokens": table.n_tokens,
        "estimates": [asdict(estimate) for estimate in table.estimates],
    }  # fmt: skip
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        # With fixed dates the same table always makes the same bytes.
        archive.writestr(_entry(_HEADER), json.dumps(header, indent=1, allow_nan=False))
        for name in _DTYPES:
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, getattr(table, name), allow_pickle=False)
            archive.writestr(_entry(f"{name}.npy"), buffer.getvalue())


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    return entry


def _members(archive: zipfile.ZipFile, file: io.BufferedReader) -> Mapping[str, zipfile.ZipInfo]:
    """The entries of the archive, which claim no more bytes than a table can have."""
    if os.fstat(file.fileno()).st_size > MAX_BYTES:
        raise _Unsound(f"it has more than {MAX_BYTES >> 20} MiB")
    members = {info.filename: info for info in archive.infolist()}
    for name in (_HEADER, *(f"{name}.npy" for name in _DTYPES)):
        info = members.get(name)
        if info is None:
            raise _Unsound(f"it has no entry {name}")
        if info.flag_bits & 1 or info.compress_type not in (
            zipfile.ZIP_STORED,
            zipfile.ZIP_DEFLATED,
        ):
            raise _Unsound(f"its entry {name} is packed in an unknown way")
    return members


def _read_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo, n_max_bytes: int) -> bytes:
    """All bytes of an entry, checked by its CRC; what claims more is not unpacked."""
    if info.file_size > n_max_bytes:
        raise _Unsound(
            f"its entry {info.filename} unpacks to {info.file_size} bytes, more than {n_max_bytes}"
        )
    with archive.open(info) as entry:
        return entry.read()  # no more than file_size


def _read_header(
    archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]
) -> dict[str, Any]:
    """The checked header; `est` are its estimates."""
    data = _read_entry(archive, members[_HEADER], _MAX_HEADER_BYTES)
    try:
        header = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _Unsound("its header is not JSON") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise _Unsound(f"its header lacks 'format': '{FORMAT}'")
    version = header.get("version")
    if type(version) is not int or version != VERSION:
        is_newer = type(version) is int and version > VERSION
        raise _Unsound(
            f"its version is {version!r:.20}; expected {VERSION}"
            + (", since a newer buddyrun wrote it" if is_newer else "")
        )
    for name, kind in {"model_hash": str, "n_layer": int, "n_expert": int, "n_tokens": int}.items():
        if type(header.get(name)) is not kind:
            raise _Unsound(f"its header has no {name}, or one of a wrong type")
    if not 0 < header["n_tokens"] < 1 << 62:
        raise _Unsound(f"its header says n_tokens = {header['n_tokens']!r:.40}")
    header["est"] = _parse_estimates(header.get("estimates"))
    return header


def _parse_estimates(values: object) -> tuple[PolicyEstimate, ...]:
    kinds = {f.name: f.type for f in fields(PolicyEstimate)}
    if not isinstance(values, list):
        raise _Unsound("its estimates are no list")
    for value in values:
        if not isinstance(value, dict) or {k: type(v) for k, v in value.items()} != kinds:
            raise _Unsound("an estimate in its header has wrong fields")
        if not _is_possible(PolicyEstimate(**value)):
            raise _Unsound("an estimate in its header is no number, or none that can be")
    return tuple(PolicyEstimate(**value) for value in values)


def _is_possible(estimate: PolicyEstimate) -> bool:
    e = estimate
    shares = e.budget, e.miss_share, e.opening
    is_share = all(0.0 <= share <= 1.0 for share in shares)  # false for NaN
    return is_share and e.budget > 0.0 and 0 < e.n_slots < 1 << 31 and 0.0 <= e.harm < math.inf


def _check_model(header: dict[str, Any], model_hash: str, n_layer: int, n_expert: int) -> None:
    if header["model_hash"] != model_hash:
        raise _Unsound(
            "it belongs to another model, or to another quantization of it "
            f"({header['model_hash'][:12]!r}; this one is {model_hash[:12]!r})"
        )
    found = header["n_layer"], header["n_expert"]
    if found != (n_layer, n_expert):
        raise _Unsound(
            f"it has {found[0]} layers of {found[1]} experts, not {n_layer} of {n_expert}"
        )


def _read_array(
    archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], name: str,
    shape: tuple[int, ...],
) -> np.ndarray:  # fmt: skip
    """An array of exactly this shape and of its name's type."""
    dtype = _DTYPES[name]
    n_bytes = math.prod(shape) * dtype.itemsize
    data = _read_entry(archive, members[f"{name}.npy"], n_bytes + _MAX_NPY_HEAD_BYTES)
    values = 10 + int.from_bytes(data[8:10], "little")  # where they begin, in version 1.0
    head = data[10:values].decode("latin-1").strip()
    expected = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
    if not data.startswith(b"\x93NUMPY\x01\x00") or head != expected:
        raise _Unsound(f"its array {name} is {head[:80]!r}; expected {expected!r}")
    if len(data) - values != n_bytes:
        raise _Unsound(f"its array {name} has {len(data) - values} bytes; expected {n_bytes}")
    array: np.ndarray = np.frombuffer(data, dtype, offset=values).reshape(shape)
    return array


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
