"""The flags about the memory of experts. Knows no command, runs nothing."""

import click

from runner.config import (
    CACHE_POLICIES,
    MAX_MOE_CACHE_SLOTS,
    MISS_ACTIONS,
    MOE_CACHE_AUTO,
    MOE_CACHE_OFF,
    EngineConfig,
)
from runner.terminal.buddy_options import BUDDY_FLAGS
from runner.terminal.cli_options import FILE, engine_config, flag, is_on_command_line
from runner.terminal.memory_size import MemorySize

_SIZE_WORDS = {"auto": MOE_CACHE_AUTO, "off": MOE_CACHE_OFF}
_ABOUT_DEVICE = ("device", "n_gpu_layers", "fit_margin_bytes")  # asks for it when it is typed

_SIZE_HELP = "K, M and G are powers of 1024, KB, MB and GB of 1000, a bare number is MiB"

_SLOTS_FLAG = flag(
    *("--moe-cache-slots", "moe_cache_slots"),
    help="Experts held in every layer; 0 = as many as the memory takes.",
    type=click.IntRange(0, MAX_MOE_CACHE_SLOTS),
    default=EngineConfig.moe_cache_slots,
)

EXPERT_FLAGS = (
    flag(
        *("--moe-cache", "moe_cache_bytes"),
        help="Memory that holds experts, of the GPU if one computes; the others are read, or"
        f" computed on the CPU, when they are needed. A size like 6GiB: {_SIZE_HELP}.",
        type=MemorySize(_SIZE_WORDS),
        default="auto",
    ),
    _SLOTS_FLAG,
    flag(
        *("--moe-cache-policy", "moe_cache_policy"),
        help="Which expert makes room: lru, the one unused for longest; lfu, the one used least"
        " lately; static: one slot of a layer changes, the others keep what came first.",
        type=click.Choice(CACHE_POLICIES),
        default=EngineConfig.moe_cache_policy,
    ),
    flag(
        *("--moe-cache-profile", "moe_cache_profile"),
        help="Begin with the experts that were used most in earlier runs with this file. It is"
        " made when it does not exist, and kept current.",
        type=FILE,
        default=EngineConfig.moe_cache_profile,
    ),
    flag(
        *("--moe-miss", "moe_miss"),
        help="A missing expert is read into memory, computed where the file is mapped (host), or"
        " whatever is faster.",
        type=click.Choice(MISS_ACTIONS),
        default=EngineConfig.moe_miss,
    ),
    *BUDDY_FLAGS,
)

# For a command that only says what would be: without them it says nothing of a cache.
EXPERT_PLAN_FLAGS = (
    flag(
        *("--moe-cache", "moe_cache_bytes"),
        help=f"Say what this memory for experts would hold here: {_SIZE_HELP}.",
        type=MemorySize(_SIZE_WORDS),
    ),
    _SLOTS_FLAG,
)


def planned_cache(context: click.Context) -> EngineConfig | None:
    """The settings whose expert cache is asked for; None when it is not."""
    params = context.params
    is_asked = params["moe_cache_bytes"] is not None or params["moe_cache_slots"]
    if not is_asked and not any(is_on_command_line(context, name) for name in _ABOUT_DEVICE):
        return None
    if params["moe_cache_bytes"] is None:
        params = {**params, "moe_cache_bytes": MOE_CACHE_AUTO}
    return engine_config(params)
