"""Which policy a run gets, from its settings and the profile beside the model."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from quant.gguf_file import GGUFFile
from runner.buddies import BuddyTable, PolicyEstimate, default_path
from runner.checks.read_model import read_model
from runner.config import (
    BUDDY_POLICIES,
    BUDGET_WITHOUT_PROFILE,
    DEFAULT_BUDDY_BUDGET,
    EngineConfig,
)
from runner.errors import OptionError, ProfileError
from runner.model_hash import model_hash
from runner.standins.choose_policy import ChosenPolicy, choose_policy
from runner.standins.make_policy import NEEDS_PROFILE
from tests.random_model import RandomModel, write_random_model
from tests.runner.standins.streams import random_routing
from tests.runner.test_buddies import make_table, set_header

N_LAYER, N_EXPERT, N_USED = 2, 8, 2
AUTO = EngineConfig(buddy="auto")
SMALL = (2, 2)  # slots
HALF = (4, 4)


def estimated(
    policy: str, n_slots: int, budget: float, harm: float, opening: float = 0.5
) -> PolicyEstimate:
    return PolicyEstimate(policy, n_slots, budget, harm, 0.1, opening)


ESTIMATES = (
    estimated("blend", 2, 0.02, 0.01, 0.11),
    estimated("router", 2, 0.02, 0.02, 0.12),
    estimated("blend", 2, 0.08, 0.05, 0.21),
    estimated("router", 2, 0.08, 0.04, 0.22),
    estimated("blend", 4, 0.02, 0.003, 0.31),
    estimated("router", 4, 0.02, 0.002, 0.32),
    estimated("prior", 4, 0.02, 0.001, 0.33),
    estimated("blend", 4, 0.08, 0.006, 0.41),
    estimated("router", 4, 0.08, 0.007, 0.42),
)


@dataclass(frozen=True)
class Model:
    """A model in a folder of its own, and where its profile would lie."""

    file: GGUFFile

    @property
    def profile(self) -> Path:
        return default_path(self.file.paths[0])

    def choose(self, config: EngineConfig = AUTO, n_slots: tuple[int, ...] = SMALL) -> ChosenPolicy:
        return choose_policy(config, self.file, read_model(self.file), n_slots)

    def table(self, *estimates: PolicyEstimate) -> BuddyTable:
        table = make_table(N_LAYER, N_EXPERT)
        return replace(table, model_hash=model_hash(self.file), estimates=estimates)


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Model]:
    shape = RandomModel(
        n_layer=N_LAYER, n_expert=N_EXPERT, n_expert_used=N_USED, n_embd=32, n_ff=32, n_head=1,
        n_head_kv=1,
    )  # fmt: skip
    with GGUFFile.open(write_random_model(tmp_path / "model.gguf", shape)) as file:
        yield Model(file)


@pytest.fixture
def profiled(model: Model) -> Model:
    model.table(*ESTIMATES).save(model.profile)
    return model


def bounded(budget: float | None) -> EngineConfig:
    return replace(AUTO, buddy_budget=budget)


# what a profile recommends


@pytest.mark.parametrize(
    ("n_slots", "budget", "name"),
    [
        (SMALL, 0.02, "blend"),
        (SMALL, 0.08, "router"),
        (HALF, 0.02, "prior"),
        (HALF, 0.08, "blend"),
    ],
)
def test_auto_takes_the_policy_that_does_the_least_harm_with_these_slots_and_this_budget(
    n_slots: tuple[int, ...], budget: float, name: str, profiled: Model
) -> None:
    chosen = profiled.choose(bounded(budget), n_slots)
    assert (chosen.name, chosen.budget, chosen.notes) == (name, budget, ())
    assert chosen.profile == str(profiled.profile)
    assert chosen.uses is not None and chosen.uses.tolist() == profiled.table().uses.tolist()


@pytest.mark.parametrize(
    ("n_slots", "budget", "name"),
    [
        ((3, 2), 0.02, "blend"),  # 2.5 slots
        ((2, 6), 0.02, "prior"),  # 4
        ((7, 7), 0.08, "blend"),
        (SMALL, 0.0001, "blend"),
        (SMALL, 0.03, "blend"),  # half as much again, the other is more than twice
        (SMALL, 0.045, "router"),
        (SMALL, 1.0, "router"),
        ((5, 7), 0.001, "prior"),
    ],
)
def test_the_most_similar_cache_and_of_these_the_most_similar_budget_count(
    n_slots: tuple[int, ...], budget: float, name: str, profiled: Model
) -> None:
    assert profiled.choose(bounded(budget), n_slots).name == name


def test_a_similar_cache_counts_more_than_a_similar_budget(model: Model) -> None:
    estimates = estimated("prior", 2, 0.02, 0.5), estimated("blend", 4, 0.08, 0.1)
    model.table(*estimates).save(model.profile)
    assert model.choose(bounded(0.08), SMALL).name == "prior"
    assert model.choose(bounded(0.02), HALF).name == "blend"


@pytest.mark.parametrize(
    ("buddy", "n_slots", "budget", "opening"),
    [
        ("auto", SMALL, 0.08, 0.22),
        ("blend", SMALL, 0.08, 0.21),
        ("blend", HALF, 0.02, 0.31),
        ("prior", SMALL, 0.08, 0.33),  # known with other slots and another budget only
        ("resident", SMALL, 0.08, 0.2),  # not known at all
        ("blend", SMALL, 1.0, 1.0),
    ],
)
def test_a_policy_begins_as_wide_open_as_it_was_in_the_profile(
    buddy: str, n_slots: tuple[int, ...], budget: float, opening: float, profiled: Model
) -> None:
    chosen = profiled.choose(replace(bounded(budget), buddy=buddy), n_slots)
    assert chosen.policy is not None and chosen.policy.opening.value == opening


def test_a_profile_without_estimates_still_says_who_is_alike(model: Model) -> None:
    model.table().save(model.profile)
    assert model.choose().name == "router"
    assert model.choose(replace(AUTO, buddy="similar")).name == "similar"


def test_estimates_of_policies_that_are_not_known_here_do_not_count(model: Model) -> None:
    """A later buddyrun may have more of them."""
    model.table(estimated("perfect", 2, 0.08, 0.0), estimated("prior", 4, 0.5, 0.1)).save(
        model.profile
    )
    assert model.choose().name == "prior"
    model.table(estimated("perfect", 2, 0.08, 0.0)).save(model.profile)
    assert model.choose().name == "router"


@pytest.mark.parametrize(
    "wrong",
    [
        {"budget": 0.0},
        {"budget": -0.1},
        {"budget": 1.1},
        {"n_slots": 0},
        {"n_slots": 10**400},
        {"harm": -1.0},
        {"opening": 2.0},
        {"miss_share": -0.5},
    ],
)
def test_estimates_that_cannot_be_are_refused(wrong: dict[str, float], profiled: Model) -> None:
    fields = {
        "policy": "router", "n_slots": 2, "budget": 0.1, "harm": 0.1, "miss_share": 0.1,
        "opening": 0.1,
    }  # fmt: skip
    set_header(profiled.profile, estimates=[fields])
    assert profiled.choose().name == "router"
    set_header(profiled.profile, estimates=[fields, fields | wrong])
    with pytest.raises(ProfileError, match="an estimate in its header"):
        profiled.choose()


# budgets


def test_without_a_budget_it_depends_on_whether_there_is_a_profile(profiled: Model) -> None:
    assert profiled.choose(bounded(None)).budget == DEFAULT_BUDDY_BUDGET
    without = replace(AUTO, buddy_profile="off")
    assert profiled.choose(without).budget == BUDGET_WITHOUT_PROFILE
    assert profiled.choose(replace(without, buddy_budget=0.3)).budget == 0.3
    assert profiled.choose(replace(without, buddy="drop")).budget == BUDGET_WITHOUT_PROFILE


# nobody stands in


@pytest.mark.parametrize(
    ("config", "n_slots"),
    [
        (replace(AUTO, buddy="off"), SMALL),
        (replace(AUTO, buddy="off", buddy_profile="/no/such/file"), SMALL),
        (replace(AUTO, buddy_budget=0.0), SMALL),
        (replace(AUTO, buddy="blend", buddy_budget=0.0), SMALL),
        (AUTO, ()),
        (replace(AUTO, buddy="blend"), ()),
        (AUTO, (N_EXPERT, N_EXPERT)),
    ],
)
def test_where_nobody_can_stand_in_nothing_is_read(
    config: EngineConfig, n_slots: tuple[int, ...], model: Model
) -> None:
    model.profile.write_bytes(b"no profile")
    chosen = model.choose(config, n_slots)
    assert (chosen.policy, chosen.name, chosen.budget, chosen.profile) == (None, "", 0.0, "")
    assert (chosen.notes, chosen.uses) == ((), None)


def test_a_layer_without_a_slot_for_every_expert_is_enough(model: Model) -> None:
    assert model.choose(AUTO, (N_EXPERT, N_EXPERT - 1)).name == "router"


# without a profile


@pytest.mark.parametrize("setting", ["", "off"])
def test_auto_without_a_profile_trusts_the_router_and_says_what_would_help(
    setting: str, model: Model
) -> None:
    chosen = model.choose(replace(AUTO, buddy_profile=setting))
    assert (chosen.name, chosen.profile, chosen.uses) == ("router", "", None)
    (note,) = chosen.notes
    assert "`buddyrun profile MODEL`" in note


@pytest.mark.parametrize("name", BUDDY_POLICIES)
def test_a_policy_by_name_is_taken_or_says_which_command_makes_what_it_needs(
    name: str, model: Model
) -> None:
    config = replace(AUTO, buddy=name)
    if name in NEEDS_PROFILE:
        for setting in ("", "off"):
            with pytest.raises(OptionError) as error:
                model.choose(replace(config, buddy_profile=setting))
            assert f"--buddy {name} needs a profile" in str(error.value)
            assert f"`buddyrun profile MODEL` makes {model.profile}" in str(error.value)
    else:
        assert (model.choose(config).name, model.choose(config).notes) == (name, ())
    model.table(*ESTIMATES).save(model.profile)
    assert model.choose(config).name == name


# a profile that cannot be used


def spoil(kind: str, model: Model) -> None:
    table = model.table(*ESTIMATES)
    if kind == "of another model":
        replace(table, model_hash="12" * 32).save(model.profile)
    elif kind == "of another shape":
        replace(make_table(N_LAYER, 4), model_hash=table.model_hash).save(model.profile)
    elif kind == "folder":
        model.profile.mkdir()
    else:
        table.save(model.profile)
        data = model.profile.read_bytes()
        if kind == "cut":
            model.profile.write_bytes(data[: len(data) // 2])
        elif kind == "garbled":
            model.profile.write_bytes(data.replace(b"header", b"reader"))
        elif kind == "newer":
            set_header(model.profile, version=2)
        else:
            model.profile.write_bytes(b"")


@pytest.mark.parametrize(
    "kind",
    ["of another model", "of another shape", "folder", "cut", "garbled", "newer", "empty"],
)
def test_a_profile_beside_the_model_that_cannot_be_used_is_an_error_and_can_be_left_out(
    kind: str, model: Model
) -> None:
    spoil(kind, model)
    for name in ("auto", "router", "blend"):
        with pytest.raises(ProfileError) as error:
            model.choose(replace(AUTO, buddy=name))
        assert str(model.profile) in str(error.value)
        assert "--buddy-profile off" in str(error.value)
    assert model.choose(replace(AUTO, buddy_profile="off")).name == "router"


def test_a_profile_of_the_model_before_it_was_changed_is_refused(
    profiled: Model, tmp_path: Path
) -> None:
    path = profiled.file.paths[0]
    data = bytearray(path.read_bytes())
    data[-5000] ^= 1
    path.unlink()  # the open file stays as it is
    path.write_bytes(data)
    with GGUFFile.open(path) as file, pytest.raises(ProfileError, match="another quantization"):
        Model(file).choose()


def test_a_profile_may_lie_elsewhere(model: Model, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "some.npz"
    elsewhere.parent.mkdir()
    model.table(*ESTIMATES).save(elsewhere)
    model.profile.write_bytes(b"not looked at")
    chosen = model.choose(replace(AUTO, buddy_profile=str(elsewhere), buddy_budget=0.02))
    assert (chosen.name, chosen.profile) == ("blend", str(elsewhere))


def test_a_profile_that_is_asked_for_and_is_not_there_is_an_error(profiled: Model) -> None:
    with pytest.raises(ProfileError, match=r"cannot read .*none\.npz: No such file"):
        profiled.choose(replace(AUTO, buddy_profile=str(profiled.profile.with_name("none.npz"))))


# settings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"buddy": "Router"}, "--buddy 'Router': expected off, auto, blend"),
        ({"buddy": ""}, "--buddy ''"),
        ({"buddy_budget": -0.01}, "--buddy-budget -0.01: expected a share from 0 to 1"),
        ({"buddy_budget": 1.01}, "--buddy-budget 1.01"),
        ({"buddy_budget": float("nan")}, "--buddy-budget nan"),
        ({"buddy_min_rank": 0}, "--buddy-min-rank 0: ranks count from 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused_also_where_nobody_stands_in(
    changes: dict[str, object], words: str, model: Model
) -> None:
    for base in (AUTO, replace(AUTO, buddy="off")):
        if base.buddy == "off" and "buddy" in changes:
            continue
        with pytest.raises(OptionError) as error:
            model.choose(replace(base, **changes), ())  # type: ignore[arg-type]
        assert words in str(error.value)


def choices(chosen: ChosenPolicy) -> list[np.ndarray]:
    rng, policy = np.random.default_rng(1), chosen.policy
    assert policy is not None
    policy.begin(1)
    routings = [random_routing(rng, 1, n_resident=5, n_expert=N_EXPERT) for _ in range(30)]
    return [policy.choose(0, routing).experts - routing.expert_ids for routing in routings]


def test_seed_and_protected_ranks_reach_the_policy(model: Model) -> None:
    config = replace(AUTO, buddy="random", buddy_budget=1.0)

    def with_(**changes: int) -> list[np.ndarray]:
        return choices(model.choose(replace(config, **changes)))  # type: ignore[arg-type]

    assert np.array_equal(with_(), with_(buddy_seed=0))
    assert not np.array_equal(with_(), with_(buddy_seed=1))
    assert not np.array(with_())[:, :, 0].any() and np.array(with_())[:, :, 1].any()
    assert np.array(with_(buddy_min_rank=1))[:, :, 0].any()
    assert not np.array(with_(buddy_min_rank=3))[:, :, :2].any()
