"""runner.buddies: the table of who stands in for whom, and every way in which its file is wrong."""

import io
import json
import os
import pickle
import zipfile
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest

from quant.gguf_file import GGUFFile
from runner.buddies import BuddyTable, PolicyEstimate, default_path
from runner.errors import ProfileError
from runner.model_hash import model_hash
from tests.random_model import RandomModel, write_random_model

HASH = "ab" * 32
ESTIMATES = (
    PolicyEstimate("router", 4, 0.05, 0.01, 0.25, 0.3),
    PolicyEstimate("drop", 4, 1.0, 0.5, 0.0, 1.0),
)
ARRAYS = ("uses", "coactivation", "scale", "error", "tae_percentiles", "gram", "power")


def make_table(n_layer: int = 3, n_expert: int = 4, seed: int = 0) -> BuddyTable:
    rng = np.random.default_rng(seed)
    pairs = np.triu(rng.integers(0, 50, (n_layer, n_expert, n_expert)), 1)
    pairs += pairs.transpose(0, 2, 1)
    error = rng.uniform(0, 1, pairs.shape).astype(np.float32)
    error[:, np.arange(n_expert), np.arange(n_expert)] = 0
    scale = rng.standard_normal(pairs.shape).astype(np.float32)
    tae = np.sort(rng.uniform(0, 1, (n_layer, 101))).astype(np.float32)
    outputs = rng.standard_normal((n_layer, n_expert, 8))
    gram = np.einsum("lix,ljx->lij", outputs, outputs).astype(np.float32)
    gram = (gram + gram.transpose(0, 2, 1)) / 2
    power = rng.uniform(1, 9, n_layer).astype(np.float32)
    uses = pairs.sum(axis=2)
    return BuddyTable(HASH, 1000, uses, pairs, scale, error, tae, gram, power, ESTIMATES)


def are_equal(a: BuddyTable, b: BuddyTable) -> bool:
    same = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ARRAYS)
    return same and (a.model_hash, a.n_tokens, a.estimates) == (
        b.model_hash,
        b.n_tokens,
        b.estimates,
    )


def load(path: Path) -> BuddyTable:
    return BuddyTable.load(path, HASH, 3, 4)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.buddies.npz"
    make_table().save(path)
    return path


def rewrite(path: Path, change) -> None:  # type: ignore[no-untyped-def]
    """Write the archive again after `change` of its entries, {name: bytes}."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def set_array(path: Path, name: str, array: np.ndarray, pickled: bool = False) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=pickled)
    rewrite(path, lambda entries: entries.update({f"{name}.npy": buffer.getvalue()}))


def set_header(path: Path, **values: object) -> None:
    def change(entries: dict[str, bytes]) -> None:
        header = json.loads(entries["header.json"]) | values
        entries["header.json"] = json.dumps(header).encode()

    rewrite(path, change)


# the table


def test_what_was_saved_is_loaded(path: Path) -> None:
    table = load(path)
    assert are_equal(table, make_table())
    assert (table.n_layer, table.n_expert) == (3, 4)
    assert table.uses.dtype == table.coactivation.dtype == np.int64
    assert table.scale.dtype == table.error.dtype == table.tae_percentiles.dtype == np.float32


def test_nothing_in_a_table_can_be_changed(path: Path) -> None:
    uses = make_table().uses.copy()
    for table in (load(path), replace(make_table(), uses=uses)):
        for name in ARRAYS:
            with pytest.raises(ValueError, match="read-only"):
                getattr(table, name)[0] = 0
        with pytest.raises(FrozenInstanceError):
            table.n_tokens = 1  # type: ignore[misc]
    uses[:] = 7  # the array that was given is still its owner's


def test_buddies_are_ranked_by_error_then_by_coactivation_then_by_number() -> None:
    error = np.array([[0, 0.5, 0.2, 0.5], [0.3, 0, 0.3, 0.3], [1, 1, 0, 1], [0.1, 0.2, 0.3, 0]])
    pairs = np.array([[0, 1, 0, 9], [1, 0, 1, 1], [0, 1, 0, 2], [9, 1, 2, 0]])
    table = replace(
        make_table(), uses=np.full((1, 4), 9), coactivation=pairs[None], scale=np.ones((1, 4, 4)),
        error=error[None], tae_percentiles=np.zeros((1, 101)),
        gram=np.ones((1, 4, 4)), power=np.ones(1),
    )  # fmt: skip
    ranked = table.ranked(0)
    assert ranked.dtype == np.int32
    assert ranked.tolist() == [[2, 3, 1], [0, 2, 3], [3, 1, 0], [0, 1, 2]]


def test_a_model_with_one_expert_has_no_buddies() -> None:
    assert make_table(2, 1).ranked(1).shape == (1, 0)


def test_the_same_table_makes_the_same_bytes(tmp_path: Path) -> None:
    make_table().save(tmp_path / "a")
    make_table().save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_numpy_reads_the_file_without_unpickling(path: Path) -> None:
    with np.load(path, allow_pickle=False) as arrays:
        assert np.array_equal(arrays["error"], make_table().error)


def test_a_profile_is_written_whole_or_not_at_all(path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ProfileError, match=r"cannot write .*: No space left"):
        make_table(seed=1).save(path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_table_of_no_numbers_is_not_written(tmp_path: Path) -> None:
    error = make_table().error.copy()
    error[1, 0, 1] = np.nan
    with pytest.raises(ProfileError, match="an error outside 0 to 1.*finite"):
        replace(make_table(), error=error).save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


# files that are wrong


def assert_refused(path: Path, text: str) -> None:
    with pytest.raises(ProfileError, match=text) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert "`buddyrun profile MODEL` makes a new one" in message
    assert "`--buddy-profile off` runs without" in message


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"cannot read .*none: No such file"):
        load(tmp_path / "none")


def test_a_folder_or_a_pipe_is_no_profile(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        assert_refused(path, "no regular file")


@pytest.mark.parametrize("data", [b"", b"GGUF", b"PK\x05\x06", b"\x93NUMPY" + bytes(200)])
def test_something_that_is_no_archive_is_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    assert_refused(path, "damaged")


def test_a_truncated_file_is_refused_wherever_it_ends(path: Path) -> None:
    data = path.read_bytes()
    for n in range(0, len(data), 37):
        path.write_bytes(data[:n])
        assert_refused(path, "damaged")


@pytest.mark.parametrize("name", ["header.json", *(f"{name}.npy" for name in ARRAYS)])
def test_a_missing_entry_is_named(path: Path, name: str) -> None:
    rewrite(path, lambda entries: entries.pop(name))
    assert_refused(path, f"no entry {name}")


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_of_another_type_or_shape_is_refused(path: Path, name: str) -> None:
    right = getattr(make_table(), name)
    for wrong in (
        right.astype(np.float64), right.astype(np.int32), right.astype(right.dtype.newbyteorder()),
        right[:2], right[..., :-1], right[None], np.asfortranarray(right), right[:, None],
    ):  # fmt: skip
        if wrong.dtype == right.dtype and wrong.shape == right.shape and right.ndim == 1:
            continue  # one row has only one order
        set_array(path, name, wrong)
        assert_refused(path, f"its array {name} is")


def test_pickled_objects_are_never_unpickled(path: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return os.mkdir, (str(tmp_path / "sprung"),)

    set_array(path, "uses", np.array([[Trap()] * 4] * 3, object), pickled=True)
    assert_refused(path, "its array uses is .*O")
    rewrite(path, lambda entries: entries.update({"uses.npy": pickle.dumps(Trap())}))
    assert_refused(path, "its array uses is")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("n_bytes", [-1, 1, 8])
def test_an_array_that_is_too_short_or_too_long_is_refused(path: Path, n_bytes: int) -> None:
    def change(entries: dict[str, bytes]) -> None:
        data = entries["error.npy"]
        entries["error.npy"] = data + bytes(n_bytes) if n_bytes > 0 else data[:n_bytes]

    rewrite(path, change)
    assert_refused(path, r"its array error has \d+ bytes; expected 192")


BROKEN_VALUES = [
    ("uses", (0, 0), -1, "uses outside"), ("uses", (0, 0), 1001, "uses outside"),
    ("coactivation", (1, 0, 2), 77, "asymmetric"), ("coactivation", (1, 2, 2), 1, "with itself"),
    ("coactivation", (slice(None), [0, 1], [1, 0]), -5, "below 0"),
    ("scale", (0, 1, 2), np.nan, "no number"), ("scale", (0, 1, 2), -np.inf, "no number"),
    ("error", (2, 0, 3), np.nan, "error outside"), ("error", (2, 0, 3), 1.01, "error outside"),
    ("error", (2, 0, 3), -0.01, "error outside"), ("error", (2, 1, 1), 0.5, "from itself"),
    ("tae_percentiles", (0, 100), 1.5, "entropy outside"),
    ("tae_percentiles", (0, 50), np.nan, "entropy outside"),
    ("tae_percentiles", (0, 0), 1.0, "percentiles that fall"),
    ("gram", (0, 1, 2), np.nan, "no number"), ("gram", (0, 1, 2), 9.0, "asymmetric products"),
    ("gram", (0, 1, 1), -1.0, "square below 0"), ("power", 0, 0.0, "without power"),
    ("power", 2, np.inf, "without power"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "at", "value", "text"), BROKEN_VALUES)
def test_values_that_cannot_be_are_refused(  # type: ignore[no-untyped-def]
    path: Path, name: str, at, value: float, text: str
) -> None:
    array = getattr(make_table(), name).copy()
    array[at] = value
    set_array(path, name, array)
    assert_refused(path, f"it has .*{text}")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"format": "buddyrun-expert-uses"}, "lacks 'format'"),
        ({"format": None}, "lacks 'format'"),
        ({"version": 2}, "its version is 2; expected 1, since a newer buddyrun wrote it"),
        ({"version": 0}, "its version is 0; expected 1"),
        ({"version": "1"}, "its version is '1'"),
        ({"version": True}, "its version is True"),
        ({"model_hash": "cd" * 32}, "belongs to another model"),
        ({"model_hash": 7}, "no model_hash"),
        ({"n_layer": 4}, "4 layers of 4 experts, not 3 of 4"),
        ({"n_expert": 1 << 40}, "3 layers of 1099511627776 experts"),
        ({"n_expert": 4.0}, "no n_expert"),
        ({"n_tokens": 0}, "n_tokens = 0"),
        ({"n_tokens": 1 << 70}, "n_tokens = 1180"),
        ({"n_tokens": True}, "no n_tokens"),
        ({"estimates": None}, "estimates are no list"),
        ({"estimates": [{}]}, "wrong fields"),
        ({"estimates": [["router", 4, 0.05, 0.01, 0.25]]}, "wrong fields"),
    ],
)
def test_a_header_that_is_wrong_is_refused(
    path: Path, values: dict[str, object], text: str
) -> None:
    set_header(path, **values)
    assert_refused(path, text)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [("n_slots", 4.0, "wrong fields"), ("policy", 1, "wrong fields"), ("more", 1, "wrong fields"),
     ("harm", float("nan"), "no number"), ("budget", float("inf"), "no number")],
)  # fmt: skip
def test_an_estimate_that_is_wrong_is_refused(
    path: Path, field: str, value: object, text: str
) -> None:
    estimate = {
        "policy": "router", "n_slots": 4, "budget": 0.1, "harm": 0.1, "miss_share": 0.1,
        "opening": 0.5,
    }  # fmt: skip
    set_header(path, estimates=[estimate | {field: value}])
    assert_refused(path, text)


@pytest.mark.parametrize("data", [b"", b"[]", b"nonsense", b"\xff\xfe", b"[" * 100_000])
def test_a_header_that_is_no_json_object_is_refused(path: Path, data: bytes) -> None:
    rewrite(path, lambda entries: entries.update({"header.json": data}))
    assert_refused(path, "header")


def test_a_zip_bomb_is_refused_before_it_is_unpacked(path: Path) -> None:
    for name, text in (
        ("header.json", "header.json unpacks to"),
        ("error.npy", "unpacks to 100663296"),
    ):
        make_table().save(path)
        rewrite(path, lambda entries, name=name: entries.update({name: bytes(96 << 20)}))
        assert path.stat().st_size < 2 << 20
        assert_refused(path, text)


def test_a_bomb_that_lies_about_its_size_unpacks_no_more_than_it_says(path: Path) -> None:
    real_bytes = 50 << 20
    rewrite(path, lambda entries: entries.update({"error.npy": bytes(real_bytes)}))
    lie = path.read_bytes().replace(real_bytes.to_bytes(4, "little"), (320).to_bytes(4, "little"))
    path.write_bytes(lie)
    assert_refused(path, "damaged|its array error")


def test_an_archive_with_a_password_or_another_packing_is_refused(path: Path) -> None:
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")
    for at, value in ((8, 1), (10, 12), (10, 14), (10, 99)):
        changed = data.copy()
        changed[entry + at] = value
        path.write_bytes(changed)
        assert_refused(path, "packed in an unknown way")


def test_a_flipped_byte_changes_nothing_or_is_refused(path: Path) -> None:
    data, rng = path.read_bytes(), np.random.default_rng(5)
    n_refused = 0
    for at in rng.choice(len(data), 200, replace=False):
        changed = bytearray(data)
        changed[at] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        try:
            table = load(path)
        except ProfileError as error:
            n_refused += 1
            assert "\n" not in str(error)
        else:
            assert are_equal(table, make_table()), at
    assert n_refused > 150


# which file, which model


def test_the_profile_lies_beside_the_model_and_beside_the_first_file_of_a_split_one() -> None:
    assert default_path("/m/mixtral-v0.1.Q4_K_M.gguf") == Path("/m/mixtral-v0.1.Q4_K_M.buddies.npz")
    assert default_path("/m/blob-1.2") == Path("/m/blob-1.2.buddies.npz")
    for shard in ("00001", "00003"):
        expected = Path("/m/big-00001-of-00004.buddies.npz")
        assert default_path(f"/m/big-{shard}-of-00004.gguf") == expected


def hash_of(path: Path) -> str:
    with GGUFFile.open(path) as file:
        return model_hash(file)


def test_a_model_keeps_its_hash_under_another_name(tmp_path: Path) -> None:
    one = write_random_model(tmp_path / "one.gguf", RandomModel())
    two = tmp_path / "two.gguf"
    two.write_bytes(one.read_bytes())
    assert hash_of(one) == hash_of(two) and len(hash_of(one)) == 64


def test_another_model_quantization_or_key_has_another_hash(tmp_path: Path, demo_in) -> None:  # type: ignore[no-untyped-def]
    base = RandomModel()
    variants = [base, replace(base, seed=2), replace(base, metadata={"rope.freq_base": 10001.0})]
    paths = [write_random_model(tmp_path / f"{i}.gguf", m) for i, m in enumerate(variants)]
    paths += [demo_in("Q8_0"), demo_in("Q4_0")]
    assert len({hash_of(path) for path in paths}) == len(paths)


def test_an_edit_anywhere_in_a_small_model_changes_the_hash(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "m.gguf", RandomModel(n_layer=1))
    data, before = path.read_bytes(), hash_of(path)
    with GGUFFile.open(path) as file:
        places = [t.offset + t.n_bytes // 2 for t in file.tensors.values()]
    for at in places:
        changed = bytearray(data)
        changed[at] ^= 1
        path.write_bytes(changed)
        assert hash_of(path) != before, at


def test_every_part_of_a_split_model_counts(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "m.gguf", RandomModel(n_layer=1, tensors_per_shard=4))
    before, shards = hash_of(path), sorted(tmp_path.glob("*.gguf"))
    with GGUFFile.open(path) as file:
        by_size = sorted(file.tensors.values(), key=lambda tensor: tensor.n_bytes)
    places = {tensor.shard: tensor.offset + tensor.n_bytes // 2 for tensor in by_size}
    assert len(shards) == len(places) > 2 and hash_of(shards[-1]) == before
    for number, shard in enumerate(shards):
        data = bytearray(shard.read_bytes())
        data[places[number]] ^= 1
        shard.write_bytes(data)
        changed = hash_of(path)
        assert changed != before, shard
        before = changed
