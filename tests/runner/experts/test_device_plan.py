"""How many slots a device's memory buys: answers known on paper, on devices of any size."""

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant.devices import Device
from runner.byte_sizes import parse_bytes
from runner.config import MOE_CACHE_OFF, EngineConfig
from runner.errors import OptionError
from runner.experts.cache_plan import CachePlan
from runner.experts.device_plan import plan_device, with_fewer_slots
from runner.experts.other_memory import device_memory, other_memory
from runner.model_config import ModelConfig
from runner.model_sizes import ModelSizes
from tests.runner.experts.test_cache_plan import DENSE, DENSE_SIZES, EXPERT, MODEL, SIZES, SLOT

MARGIN = 10_000_000
CONFIG = EngineConfig(fit_margin_bytes=MARGIN)
OTHER = device_memory(CONFIG, MODEL, SIZES, 512, 64).n_bytes  # the margin included
PLENTY = 1 << 34


@dataclass(frozen=True)
class SomeDevice(Device):
    """A device that says it has this much memory free."""

    free_bytes: int = 0

    def memory_bytes(self) -> tuple[int, int]:
        return self.free_bytes, PLENTY


def device(free_bytes: int) -> SomeDevice:
    return SomeDevice(1, "Some0", "some device", "Some", "gpu", True, True, free_bytes)


def plan(
    free: int = PLENTY,
    model: ModelConfig = MODEL,
    sizes: ModelSizes = SIZES,
    host: int | None = PLENTY,
    config: EngineConfig = CONFIG,
) -> CachePlan:
    return plan_device(config, model, sizes, 512, 64, device(free), host)


def test_a_device_in_the_hosts_memory_takes_no_more_than_the_host_has() -> None:
    own = device(PLENTY)
    shared = replace(own, kind="igpu")
    some_bytes = sum(SIZES.expert_bytes) * MODEL.n_expert // 2 + OTHER
    half = some_bytes + other_memory(CONFIG, MODEL, SIZES, 512, 64, some_bytes).headroom_bytes
    plans = [
        plan_device(CONFIG, MODEL, SIZES, 512, 64, some, some_host, total)
        for some, some_host, total in (
            (own, half, PLENTY),
            (shared, half, PLENTY),
            (shared, 4 * PLENTY, 4 * PLENTY),
            (shared, None, None),
            (shared, half, PLENTY - 1),  # of memory that was set aside
        )
    ]
    assert min(plans[0].n_slots) == MODEL.n_expert
    headroom = other_memory(CONFIG, MODEL, SIZES, 512, 64, half).headroom_bytes
    assert plans[1].n_bytes + OTHER + headroom <= half and max(plans[1].n_slots) < MODEL.n_expert
    assert not plans[1].has_room_for_experts and not plans[1].fits_host
    assert plans[2].n_slots == plans[3].n_slots == plans[4].n_slots == plans[0].n_slots
    assert plans[2].has_room_for_experts


def with_cache(n_bytes: int) -> EngineConfig:
    return replace(CONFIG, moe_cache_bytes=n_bytes)


def with_slots(n_slots: int) -> EngineConfig:
    return replace(CONFIG, moe_cache_slots=n_slots)


# what is left is for slots


@pytest.mark.parametrize(
    ("n_affordable", "n_slots"),
    [
        (4, (1, 1, 1, 1)),
        (8, (2, 2, 2, 2)),
        (13, (3, 3, 4, 3)),
        (14, (3, 4, 3, 4)),
        (31, (8, 7, 8, 8)),
        (32, (8, 8, 8, 8)),
        (99, (8, 8, 8, 8)),
    ],
)
def test_slots_get_what_the_rest_leaves_of_the_device(
    n_affordable: int, n_slots: tuple[int, ...]
) -> None:
    for free in (OTHER + n_affordable * SLOT, OTHER + n_affordable * SLOT + SLOT - 1):
        made = plan(free)
        assert made.n_slots == n_slots
        assert made.n_bytes == sum(n_slots) * SLOT
        assert (made.available_bytes, made.budget_bytes) == (free, free - OTHER)
        assert (made.other_bytes, made.notes, made.is_on_device) == (OTHER, (), True)


def test_a_device_that_holds_every_expert_gets_every_expert() -> None:
    made = plan()
    assert made.n_slots == (8, 8, 8, 8) and made.n_bytes == 32 * SLOT
    assert made.left_bytes == PLENTY - OTHER - 32 * SLOT


def test_the_margin_is_left_free() -> None:
    free = OTHER + 9 * SLOT
    wider = replace(CONFIG, fit_margin_bytes=MARGIN + 4 * SLOT)
    assert plan(free).n_slots == (2, 2, 3, 2)
    assert plan(free, config=wider).n_slots == (1, 1, 2, 1)
    assert plan(free, config=replace(CONFIG, fit_margin_bytes=0)).n_bytes == 18 * SLOT


def test_a_layer_with_larger_experts_costs_more() -> None:
    sizes = replace(SIZES, expert_bytes=(EXPERT, EXPERT, EXPERT, 3 * EXPERT))
    large = 3 * EXPERT + 3 * 4096
    made = plan(OTHER + 2 * (3 * SLOT + large) + SLOT, sizes=sizes)
    assert made.n_slots == (2, 2, 3, 2)
    assert made.n_bytes == 7 * SLOT + 2 * large


def test_the_embedding_takes_nothing_of_the_device_unless_it_is_the_output_as_well() -> None:
    apart = replace(SIZES, embedding_bytes=2_000_000)
    assert plan().other_bytes - plan(sizes=apart).other_bytes == 2_000_000


@given(st.integers(0, 60 * SLOT), st.integers(0, 8))
def test_a_plan_never_takes_more_than_the_device_has_beside_the_rest(
    n_more: int, n_slots: int
) -> None:
    config = with_slots(n_slots)
    free = OTHER - MARGIN + n_more
    try:
        made = plan(free, config=config)
    except OptionError:
        assert n_more < (n_slots * 4 * SLOT if n_slots else 4 * SLOT + MARGIN)
        return
    assert made.n_bytes == sum(made.n_slots) * SLOT <= n_more
    assert min(made.n_slots) >= 1 and max(made.n_slots) <= 8
    assert bool(made.notes) == (made.n_bytes > n_more - MARGIN)


# the host beside it


HOST = 1_000_000_000


def sizes_of(n_more: int) -> ModelSizes:
    """Experts that take so many bytes more than the host's memory has for them."""
    other = other_memory(CONFIG, MODEL, SIZES, 512, 64, HOST)
    taken = other.headroom_bytes + other.compute_bytes + SIZES.embedding_bytes
    return replace(SIZES, all_experts_bytes=HOST - taken + n_more)


@pytest.mark.parametrize(
    ("n_more", "fits", "has_room", "words"),
    [
        (-1, True, True, ""),
        (0, False, True, "at first they come from disk"),
        (9 * SLOT - 1, False, True, "at first they come from disk"),
        (9 * SLOT, False, False, "those that are missing there come from disk"),
    ],
)
def test_the_host_has_room_for_the_experts_or_for_those_that_are_not_on_the_device(
    n_more: int, fits: bool, has_room: bool, words: str
) -> None:
    made = plan(OTHER + 9 * SLOT, host=HOST, sizes=sizes_of(n_more))
    assert made.n_bytes == 9 * SLOT
    assert (made.fits_host, made.has_room_for_experts) == (fits, has_room)
    assert bool(made.notes) == bool(words) and words in " ".join(made.notes)
    unknown = plan(OTHER + 9 * SLOT, host=None, sizes=sizes_of(n_more))
    assert unknown.fits_host and unknown.has_room_for_experts, "unknown is not too little"


def test_of_experts_that_are_all_on_the_device_none_is_kept_beside_it() -> None:
    sizes = replace(SIZES, all_experts_bytes=32 * SLOT)
    made = plan(host=1, sizes=sizes)
    assert made.n_slots == (8, 8, 8, 8) and made.n_bytes == 32 * SLOT
    assert (made.fits_host, made.has_room_for_experts, made.notes) == (False, False, ())


def test_with_fewer_slots_the_host_may_have_too_little_room() -> None:
    made = plan(OTHER + 9 * SLOT, host=HOST, sizes=sizes_of(9 * SLOT - 1))
    fewer = with_fewer_slots(made, SIZES)
    assert fewer is not None and made.has_room_for_experts and not fewer.has_room_for_experts
    assert "those that are missing there come from disk" in " ".join(fewer.notes)
    roomy = with_fewer_slots(plan(OTHER + 9 * SLOT), SIZES)
    assert roomy is not None and roomy.has_room_for_experts


def test_what_the_host_has_does_not_change_the_slots() -> None:
    free = OTHER + 9 * SLOT
    assert plan(free, host=1).n_slots == plan(free, host=None).n_slots == plan(free).n_slots


# flags


def test_slots_can_be_counted() -> None:
    for n_slots in (1, 2, 8):
        made = plan(config=with_slots(n_slots))
        assert made.n_slots == (n_slots,) * 4
        assert made.budget_bytes == made.n_bytes == 4 * n_slots * SLOT


def test_fewer_slots_than_a_token_needs_are_enough() -> None:
    assert MODEL.n_expert_used == 2
    assert plan(config=with_slots(1)).n_slots == (1, 1, 1, 1)


@pytest.mark.parametrize("n_slots", [9, 100])
def test_more_slots_than_experts_are_refused(n_slots: int) -> None:
    with pytest.raises(OptionError, match=f"--moe-cache-slots {n_slots}: expected 1 to 8"):
        plan(config=with_slots(n_slots))


def test_a_size_buys_slots_and_no_more() -> None:
    assert plan(config=with_cache(9 * SLOT)).n_slots == (2, 2, 3, 2)
    assert plan(config=with_cache(9 * SLOT)).budget_bytes == 9 * SLOT
    assert plan(config=with_cache(parse_bytes("1TiB"))).n_slots == (8, 8, 8, 8)


def test_a_size_and_a_count_must_agree() -> None:
    both = replace(with_slots(3), moe_cache_bytes=12 * SLOT)
    assert plan(config=both).n_slots == (3, 3, 3, 3)
    with pytest.raises(OptionError) as refused:
        plan(config=replace(both, moe_cache_bytes=12 * SLOT - 1))
    text = str(refused.value)
    assert "--moe-cache-slots 3 takes 12.2 MB and --moe-cache allows 12.2 MB" in text
    named = parse_bytes(text.rsplit(maxsplit=1)[-1])
    assert plan(config=replace(both, moe_cache_bytes=named)).n_slots == (3, 3, 3, 3)


@pytest.mark.parametrize(
    ("config", "flag"),
    [(with_slots(3), "--moe-cache-slots 3"), (with_cache(12 * SLOT), "--moe-cache")],
)
def test_slots_that_the_device_has_no_room_for_are_refused(config: EngineConfig, flag: str) -> None:
    room = 12 * SLOT - 1
    words = f"^{flag}: the slots take 12.2 MB and Some0 has 12.2 MB for them: use a smaller one"
    with pytest.raises(OptionError, match=words):
        plan(OTHER - MARGIN + room, config=config)
    assert plan(OTHER - MARGIN + room + 1, config=config).n_slots == (3, 3, 3, 3)


def test_a_device_that_is_full_already_has_no_room_at_all() -> None:
    with pytest.raises(OptionError, match="Some0 has 0 B for them"):
        plan(1000, config=with_slots(1))


@pytest.mark.parametrize("config", [with_slots(3), with_cache(12 * SLOT)])
def test_who_cuts_into_the_margin_is_told(config: EngineConfig) -> None:
    made = plan(OTHER + 12 * SLOT - 1, config=config)
    assert made.n_slots == (3, 3, 3, 3) and made.left_bytes == -1
    assert made.notes == ("Less than --fit-margin of Some0's memory is left free.",)
    assert plan(OTHER + 12 * SLOT, config=config).notes == ()


def test_experts_that_stay_on_the_host_need_no_device() -> None:
    with pytest.raises(OptionError, match=r"--moe-cache off: .* Some0 .* use --device cpu"):
        plan(config=with_cache(MOE_CACHE_OFF))
    with pytest.raises(OptionError, match="--moe-cache-slots 3 contradicts --moe-cache off"):
        plan(config=replace(with_slots(3), moe_cache_bytes=MOE_CACHE_OFF))


# too little


def test_a_device_that_is_too_small_says_what_takes_the_memory_and_what_to_do() -> None:
    needed = OTHER + 4 * SLOT
    assert plan(needed).n_slots == (1, 1, 1, 1)
    with pytest.raises(OptionError) as refused:
        plan(needed - 1)
    text = str(refused.value)
    other = device_memory(CONFIG, MODEL, SIZES, 512, 64)
    assert text.startswith(f"Some0 has {(needed - 1) / 1e6:.1f} MB of memory free")
    assert f"takes {OTHER / 1e6:.1f} MB besides its experts" in text
    assert "weights 5.00 MB, keys and values 1.05 MB" in text  # 512 tokens of 4 x 2 x 256 bytes
    assert f"compute memory {other.compute_bytes / 1e6:.2f} MB, margin 10.0 MB" in text
    assert "one expert of each layer takes 4.06 MB" in text
    assert text.endswith("use a smaller -c, -b or --fit-margin, or --device cpu")


@pytest.mark.parametrize("free", [0, OTHER - MARGIN, OTHER])
def test_a_device_without_room_for_one_slot_is_refused(free: int) -> None:
    with pytest.raises(OptionError, match=r"^Some0 has .* one expert of each layer takes 4.06 MB"):
        plan(free)


# without experts


def test_a_dense_model_is_on_the_device_as_a_whole_or_refused() -> None:
    other = device_memory(CONFIG, DENSE, DENSE_SIZES, 512, 64)
    needed = other.n_bytes - MARGIN
    made = plan(needed, DENSE, DENSE_SIZES)
    assert (made.n_slots, made.n_bytes, made.is_on_device) == ((), 0, True)
    assert made.other_bytes == other.n_bytes
    with pytest.raises(OptionError, match=r"^Some0 has .*weights 5.00 MB.*: use --device cpu$"):
        plan(needed - 1, DENSE, DENSE_SIZES)


def test_a_dense_model_refuses_flags_about_experts() -> None:
    for config in (with_slots(2), with_cache(SLOT)):
        with pytest.raises(OptionError, match="this model has no experts; leave the flag out"):
            plan(PLENTY, DENSE, DENSE_SIZES, config=config)


# a device that had less than it said


def test_every_plan_after_a_refusal_is_smaller_until_there_is_none() -> None:
    made: CachePlan | None = plan()
    taken = []
    while made is not None:
        taken.append(made.n_bytes)
        assert made.n_bytes == sum(made.n_slots) * SLOT
        assert min(made.n_slots) >= 1 and max(made.n_slots) <= min(made.n_slots) + 1
        assert made.is_on_device and made.available_bytes == PLENTY
        assert len(made.notes) == (len(taken) > 1)
        made = with_fewer_slots(made, SIZES)
    assert taken == sorted(set(taken), reverse=True)
    assert taken[0] == 32 * SLOT and taken[-1] == 4 * SLOT
    for before, after in pairwise(taken):
        assert after <= 0.9 * before


def test_fewer_slots_are_a_tenth_less_and_it_is_said_once() -> None:
    first = with_fewer_slots(plan(), SIZES)
    assert first is not None and first.n_slots == (7, 7, 7, 7)
    assert first.notes == ("The GPU had less memory than it said: 7 slots per layer instead of 8.",)
    second = with_fewer_slots(first, SIZES)
    assert second is not None and sum(second.n_slots) == 25
    assert second.notes == (
        "The GPU had less memory than it said: 6.2 slots per layer instead of 8.",
    )


def test_other_notes_stay() -> None:
    tight = plan(OTHER + 12 * SLOT - 1, config=with_slots(3))
    fewer = with_fewer_slots(tight, SIZES)
    assert fewer is not None and fewer.notes[0] == tight.notes[0] and len(fewer.notes) == 2


def test_there_is_no_smaller_plan_than_one_slot() -> None:
    assert with_fewer_slots(plan(config=with_slots(1)), SIZES) is None


def test_a_dense_model_has_no_smaller_plan() -> None:
    assert with_fewer_slots(plan(PLENTY, DENSE, DENSE_SIZES), DENSE_SIZES) is None


def test_a_size_that_buys_no_slot_is_told_by_its_flag() -> None:
    with pytest.raises(OptionError) as refused:
        plan(PLENTY, config=with_cache(3 * SLOT))
    text = str(refused.value)
    assert (
        text.startswith("--moe-cache") and "smaller -c" not in text and "--device cpu" not in text
    )


def test_a_dense_model_is_not_told_of_its_experts() -> None:
    with pytest.raises(OptionError) as refused:
        plan(1_000_000, DENSE, DENSE_SIZES)
    assert "experts" not in str(refused.value)


def test_a_dense_model_that_cuts_into_the_margin_is_told() -> None:
    made = plan(PLENTY, DENSE, DENSE_SIZES)
    tight = plan(made.other_bytes - 1, DENSE, DENSE_SIZES)
    assert tight.left_bytes == -1 and "--fit-margin" in " ".join(tight.notes)
