"""How many slots for experts a memory budget buys, and in which layers. Allocates nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from quant.read_only_file import BLOCK_BYTES
from runner.byte_sizes import bytes_text, flag_text
from runner.config import MOE_CACHE_AUTO, MOE_CACHE_OFF, EngineConfig
from runner.errors import OptionError
from runner.experts.other_memory import OtherMemory, other_memory
from runner.model_config import ModelConfig
from runner.model_sizes import ModelSizes

_MATRICES = 3  # each with a gap of a block, so that whole blocks of the file can be read


@dataclass(frozen=True)
class CachePlan:
    """The slots of one model on this machine, and the memory around them."""

    n_slots: tuple[int, ...]  # per layer; () = no cache, experts are used where the file is mapped
    n_bytes: int  # of all slots, gaps included; 0 without a cache
    budget_bytes: int  # what the slots may take; 0 without a cache
    available_bytes: int | None  # memory of this machine before loading, control groups included
    other_bytes: int  # all but the experts: weights, full KV cache, compute memory, headroom
    notes: tuple[str, ...] = ()  # what the user should know, each one sentence
    is_on_device: bool = False  # the memory above is that of a device beside the CPU
    has_room_for_experts: bool = True  # besides, the host holds the file's that are on no device
    fits_host: bool = True  # or all of the file's
    refused_slots: tuple[int, ...] = ()  # per layer, the first that a device had no memory for

    @property
    def left_bytes(self) -> int | None:
        """Memory that nothing here takes; negative when there is too little."""
        if self.available_bytes is None:
            return None
        return self.available_bytes - self.n_bytes - self.other_bytes


def plan_cache(
    config: EngineConfig,
    model: ModelConfig,
    sizes: ModelSizes,
    n_ctx: int,
    n_batch: int,
    available: int | None,
) -> CachePlan:
    """Share out the memory that `config` allows, evenly over the layers.

    n_ctx and n_batch are those that the engine uses; `available` is the free memory before
    loading, None if unknown. Raises OptionError; a budget that is too small is answered with the
    smallest that works.
    """
    check_flags(config, model, model.n_expert_used)
    other = other_memory(config, model, sizes, n_ctx, n_batch, available)
    if not _needs_cache(config, sizes, other, available):
        return CachePlan((), 0, 0, available, other.n_bytes)
    costs = tuple(slot_bytes(n_bytes) for n_bytes in sizes.expert_bytes)
    budget = _budget(config, costs, other, available)
    n_slots = (config.moe_cache_slots,) * len(costs)
    if not config.moe_cache_slots:
        n_slots = share_out(budget, costs, model.n_expert)
    n_bytes = sum(n * cost for n, cost in zip(n_slots, costs, strict=True))
    plan = CachePlan(n_slots, n_bytes, budget, available, other.n_bytes)
    if min(n_slots) < model.n_expert_used:
        raise OptionError(_shortage(config, model, costs, other, plan))
    _check_room(config, plan)
    all_bytes = plan.n_bytes + plan.other_bytes + sizes.all_experts_bytes
    has_room = available is None or all_bytes <= available
    return replace(plan, notes=_notes(plan), has_room_for_experts=has_room)


def slot_bytes(expert_bytes: int) -> int:
    """Most memory of a slot for an expert of so many bytes, gaps included.

    Exact for the usual experts, whose matrices are whole blocks.
    """
    if expert_bytes % BLOCK_BYTES == 0:
        return expert_bytes + _MATRICES * BLOCK_BYTES
    return expert_bytes + _MATRICES * (2 * BLOCK_BYTES - 1)


def share_out(budget: int, costs: Sequence[int], n_expert: int) -> tuple[int, ...]:
    """Slots per layer for `budget` bytes, when a slot of layer l takes costs[l] bytes.

    The same number everywhere, then one more in as many layers as the rest buys, spread over the
    depth; at most n_expert.
    """
    n_everywhere = min(n_expert, budget // sum(costs))
    n_slots = [n_everywhere] * len(costs)
    rest = budget - n_everywhere * sum(costs)
    for n_more in range(len(costs) - 1, 0, -1):
        layers = [(2 * i + 1) * len(costs) // (2 * n_more) for i in range(n_more)]
        if n_everywhere < n_expert and sum(costs[layer] for layer in layers) <= rest:
            for layer in layers:
                n_slots[layer] += 1
            break
    return tuple(n_slots)


def check_flags(config: EngineConfig, model: ModelConfig, n_smallest: int) -> None:
    """Refuse what no amount of memory makes possible; n_smallest: slots of a layer at least."""
    n_slots, n_used, n_expert = config.moe_cache_slots, model.n_expert_used, model.n_expert
    flag = f"--moe-cache-slots {n_slots}" if n_slots else "--moe-cache"
    if not model.is_moe and (n_slots or config.moe_cache_bytes > 0):
        raise OptionError(f"{flag}: this model has no experts; leave the flag out")
    if n_slots and config.moe_cache_bytes == MOE_CACHE_OFF:
        raise OptionError(f"{flag} contradicts --moe-cache off: leave one of them out")
    if n_slots and not n_smallest <= n_slots <= n_expert:
        raise OptionError(
            f"{flag}: expected {n_smallest} to {n_expert}; a layer of this model has {n_expert} "
            f"experts and a token uses {n_used} of them"
        )


def _needs_cache(
    config: EngineConfig, sizes: ModelSizes, other: OtherMemory, available: int | None
) -> bool:
    if not sizes.expert_bytes or config.moe_cache_bytes == MOE_CACHE_OFF:
        return False
    if config.moe_cache_bytes != MOE_CACHE_AUTO or config.moe_cache_slots:
        return True
    return available is not None and sizes.all_experts_bytes + other.n_bytes > available


def _budget(
    config: EngineConfig, costs: Sequence[int], other: OtherMemory, available: int | None
) -> int:
    if config.moe_cache_bytes != MOE_CACHE_AUTO:
        return config.moe_cache_bytes
    if config.moe_cache_slots:
        return config.moe_cache_slots * sum(costs)
    assert available is not None, "then no cache is needed"
    return max(0, available - other.n_bytes)


def _shortage(
    config: EngineConfig,
    model: ModelConfig,
    costs: Sequence[int],
    other: OtherMemory,
    plan: CachePlan,
) -> str:
    smallest = model.n_expert_used * sum(costs)
    smallest_text = f"--moe-cache {flag_text(smallest)} ({bytes_text(smallest)})"
    need = f"a token needs {model.n_expert_used} of a layer's experts at once, and"
    hold = f"{bytes_text(plan.budget_bytes)} hold only {min(plan.n_slots)}"
    if config.moe_cache_bytes != MOE_CACHE_AUTO:
        return f"--moe-cache: {need} {hold}; the smallest that works is {smallest_text}"
    fits = smallest <= (plan.available_bytes or 0)
    enough = f". The smallest that works is {smallest_text}" if fits else ""
    return (
        f"--moe-cache auto: {bytes_text(plan.available_bytes or 0)} of memory are free and the "
        f"model takes {bytes_text(other.n_bytes)} besides its experts (weights "
        f"{bytes_text(other.weights_bytes)}, keys and values {bytes_text(other.kv_bytes)}, "
        f"compute memory {bytes_text(other.compute_bytes)}, headroom "
        f"{bytes_text(other.headroom_bytes)}); {need} the remaining {hold}: use a smaller -c or "
        f"-b{enough}; --moe-cache off reads experts from the mapped file, slowly"
    )


def check_budget(config: EngineConfig, plan: CachePlan) -> str:
    """Refuse more slots than --moe-cache allows; returns how to call what asks for them."""
    if not config.moe_cache_slots:
        return "--moe-cache"
    flag = f"--moe-cache-slots {config.moe_cache_slots}"
    if plan.n_bytes > plan.budget_bytes:
        raise OptionError(
            f"{flag} takes {bytes_text(plan.n_bytes)} and --moe-cache allows "
            f"{bytes_text(plan.budget_bytes)}: leave one of them out, or use --moe-cache "
            f"{flag_text(plan.n_bytes)}"
        )
    return flag


def _check_room(config: EngineConfig, plan: CachePlan) -> None:
    """Memory runs out only while experts are read: too late to find out then."""
    flag = check_budget(config, plan)
    if plan.available_bytes is not None and plan.n_bytes > plan.available_bytes:
        raise OptionError(
            f"{flag}: the slots take {bytes_text(plan.n_bytes)} and "
            f"{bytes_text(plan.available_bytes)} of memory are free: use a smaller one, or "
            "--moe-cache off, which reads experts from the mapped file, slowly"
        )


def _notes(plan: CachePlan) -> tuple[str, ...]:
    if plan.left_bytes is None or plan.left_bytes >= 0:
        return ()
    needed = bytes_text(plan.n_bytes + plan.other_bytes)
    return (
        f"The experts in memory and everything else take {needed}, and "
        f"{bytes_text(plan.available_bytes or 0)} are free: expect it to be slow.",
    )
