"""How many slots for experts the memory of a device buys. Allocates nothing."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from runner.byte_sizes import bytes_text, flag_text
from runner.config import MOE_CACHE_AUTO, MOE_CACHE_OFF, EngineConfig
from runner.errors import OptionError
from runner.experts.cache_plan import CachePlan, check_budget, check_flags, share_out
from runner.experts.other_memory import OtherMemory, device_memory, other_memory
from runner.model_config import ModelConfig
from runner.model_sizes import ModelSizes

_ALIGNMENT_BYTES = 4096  # a device may begin each slab at a round address
_MATRICES = 3
_SLOW_MISSES = (
    "The experts do not fit into the free memory beside the GPU's: those that are missing there "
    "come from disk."
)
_COLD_MISSES = (
    "The experts that are not on the GPU just fit into the free memory: at first they come from "
    "disk."
)
_FEWER = 0.9  # of the slots, after the device had less memory than it said


class DeviceLike(Protocol):
    """What a plan needs to know of a device: `quant.devices.Device` has it."""

    @property
    def name(self) -> str: ...

    @property
    def shares_host_memory(self) -> bool: ...

    def memory_bytes(self) -> tuple[int, int]:
        """Free and total."""


def plan_device(
    config: EngineConfig,
    model: ModelConfig,
    sizes: ModelSizes,
    n_ctx: int,
    n_batch: int,
    device: DeviceLike,
    host_available: int | None,
    host_total: int | None = None,
) -> CachePlan:
    """Give the slots what the other weights, keys and values and graphs leave of the device.

    `host_available`, `host_total`: free memory of the host, and all of it; None if unknown. A
    device in the host's memory takes no more than that has; one that tells of more than all of it
    has some of its own, set aside when the machine starts. Raises OptionError that says what takes
    the memory, and what to do.
    """
    check_flags(config, model, n_smallest=1)
    available, total = device.memory_bytes()
    other = device_memory(config, model, sizes, n_ctx, n_batch)
    host = other_memory(config, model, sizes, n_ctx, n_batch, host_available)
    left = None if host_available is None else max(0, host_available - host.headroom_bytes)
    has_own_memory = host_total is not None and total > host_total
    is_shared = device.shares_host_memory and not has_own_memory
    if is_shared and left is not None:
        available = min(available, left)
    plan = CachePlan((), 0, 0, available, other.n_bytes, is_on_device=True)
    if not sizes.expert_bytes:
        _check_fits(device, other, available)
        return replace(plan, notes=_notes(device, plan))
    if config.moe_cache_bytes == MOE_CACHE_OFF:
        raise OptionError(
            f"--moe-cache off: without slots for experts on {device.name} there is nothing to gain "
            "from it; use --device cpu, or leave the flag out"
        )
    budget = _budget(config, sizes, other, available)
    n_slots = (config.moe_cache_slots,) * model.n_layer
    if not config.moe_cache_slots:
        n_slots = share_out(budget, _costs(sizes), model.n_expert)
    plan = replace(plan, n_slots=n_slots, n_bytes=_n_bytes(n_slots, sizes), budget_bytes=budget)
    if min(n_slots) < 1:
        raise OptionError(_shortage(config, device, sizes, other, plan))
    _check_room(config, device, other, plan)
    if left is None:
        return replace(plan, notes=_notes(device, plan))
    if is_shared:  # what the slots hold, the file's pages cannot have
        left -= plan.n_bytes + other.n_bytes
    else:
        left -= host.compute_bytes + sizes.embedding_bytes
    return _beside_host(replace(plan, notes=_notes(device, plan)), device, sizes, left)


def _beside_host(plan: CachePlan, device: DeviceLike, sizes: ModelSizes, left: int) -> CachePlan:
    """With what `left` bytes of the host's memory hold of the experts: all, those that are not on
    the device, or too few."""
    n_bytes = sizes.all_experts_bytes
    if n_bytes < left:
        return plan
    is_apart = not device.shares_host_memory  # else slots may lie in what the pages need
    n_missing_bytes = max(0, n_bytes - plan.n_bytes)
    if not n_missing_bytes:  # whatever is uploaded is read once, and past the page cache
        return replace(plan, has_room_for_experts=False, fits_host=False)
    has_room = is_apart and n_missing_bytes < left
    notes = (*plan.notes, _COLD_MISSES if has_room else _SLOW_MISSES)
    return replace(plan, notes=notes, has_room_for_experts=has_room, fits_host=False)


def with_fewer_slots(plan: CachePlan, sizes: ModelSizes) -> CachePlan | None:
    """The plan to try when the device refused this one; None when there is no smaller."""
    if not plan.n_slots:
        return None
    n_slots = share_out(int(plan.n_bytes * _FEWER), _costs(sizes), max(plan.n_slots))
    if min(n_slots) < 1:
        return None
    refused = plan.refused_slots or plan.n_slots
    text = (
        f"The GPU had less memory than it said: {_per_layer(n_slots)} slots per layer instead of "
    )
    text += f"{_per_layer(refused)}."
    kept = [note for note in plan.notes if not note.startswith("The GPU had")]
    notes = (*(_SLOW_MISSES if note == _COLD_MISSES else note for note in kept), text)
    return replace(
        plan,
        n_slots=n_slots,
        n_bytes=_n_bytes(n_slots, sizes),
        notes=notes,
        refused_slots=refused,
        has_room_for_experts=plan.fits_host,  # more of them need it than was reckoned with
    )


def _per_layer(n_slots: Sequence[int]) -> str:
    """The mean, to a tenth."""
    return f"{round(sum(n_slots) / len(n_slots), 1):g}"


def _costs(sizes: ModelSizes) -> tuple[int, ...]:
    return tuple(n_bytes + _MATRICES * _ALIGNMENT_BYTES for n_bytes in sizes.expert_bytes)


def _n_bytes(n_slots: tuple[int, ...], sizes: ModelSizes) -> int:
    return sum(n * cost for n, cost in zip(n_slots, _costs(sizes), strict=True))


def _budget(config: EngineConfig, sizes: ModelSizes, other: OtherMemory, available: int) -> int:
    if config.moe_cache_bytes != MOE_CACHE_AUTO:
        return config.moe_cache_bytes
    if config.moe_cache_slots:
        return config.moe_cache_slots * sum(_costs(sizes))
    return max(0, available - other.n_bytes)


def _check_fits(device: DeviceLike, other: OtherMemory, available: int) -> None:
    """A model without experts is on the device as a whole, or not at all."""
    if other.n_bytes - other.headroom_bytes > available:
        raise OptionError(f"{_taken(device, other, available, '')}: use --device cpu")


def _shortage(
    config: EngineConfig, device: DeviceLike, sizes: ModelSizes, other: OtherMemory, plan: CachePlan
) -> str:
    smallest = sum(_costs(sizes))
    if config.moe_cache_bytes != MOE_CACHE_AUTO:
        return (
            f"--moe-cache: {bytes_text(plan.budget_bytes)} hold less than one expert a layer; "
            f"the smallest is --moe-cache {flag_text(smallest)} ({bytes_text(smallest)})"
        )
    taken = _taken(device, other, plan.available_bytes or 0, " besides its experts")
    return (
        f"{taken}; one expert of each layer takes {bytes_text(smallest)}: use a smaller -c, -b or "
        "--fit-margin, or --device cpu"
    )


def _taken(device: DeviceLike, other: OtherMemory, available: int, besides: str) -> str:
    return (
        f"{device.name} has {bytes_text(available)} of memory free and the model takes "
        f"{bytes_text(other.n_bytes)}{besides} (weights "
        f"{bytes_text(other.weights_bytes)}, keys and values {bytes_text(other.kv_bytes)}, "
        f"compute memory {bytes_text(other.compute_bytes)}, margin "
        f"{bytes_text(other.headroom_bytes)})"
    )


def _check_room(
    config: EngineConfig, device: DeviceLike, other: OtherMemory, plan: CachePlan
) -> None:
    """Refuse slots that cannot be had; what only cuts into the margin is the user's choice."""
    flag = check_budget(config, plan)
    room = (plan.available_bytes or 0) - (other.n_bytes - other.headroom_bytes)
    if plan.n_bytes > room:
        raise OptionError(
            f"{flag}: the slots take {bytes_text(plan.n_bytes)} and "
            f"{device.name} has {bytes_text(max(0, room))} for them: use a smaller one, or leave "
            "it out"
        )


def _notes(device: DeviceLike, plan: CachePlan) -> tuple[str, ...]:
    if plan.left_bytes is None or plan.left_bytes >= 0:
        return ()
    return (f"Less than --fit-margin of {device.name}'s memory is left free.",)
