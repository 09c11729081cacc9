"""Which context, threads and cache types a model gets from the user's settings. Owns nothing."""

from dataclasses import dataclass

from quant.ggml_types import GGML_TYPES_BY_NAME, GGMLType
from runner.config import (
    CACHE_POLICIES,
    DEFAULT_MAX_CTX,
    MAX_BATCH,
    MAX_CTX,
    MAX_MOE_CACHE_BYTES,
    MAX_MOE_CACHE_SLOTS,
    MAX_THREADS,
    MAX_VERIFY_EVERY,
    MISS_ACTIONS,
    MOE_CACHE_AUTO,
    EngineConfig,
)
from runner.errors import OptionError
from runner.hardware import available_memory_bytes, n_cores
from runner.model_config import ModelConfig
from runner.model_sizes import kv_bytes_per_token

CACHE_TYPES = ("f16", "q8_0")

_MIN_CTX = 2  # a token and its answer


@dataclass(frozen=True)
class EngineLimits:
    """Settings with every default filled in, checked against the model."""

    n_ctx: int  # tokens
    n_batch: int  # most tokens computed at once
    n_threads: int
    n_threads_batch: int
    type_k: GGMLType
    type_v: GGMLType
    notes: tuple[str, ...]  # what the user should know, each one sentence


def choose_limits(
    config: EngineConfig, model: ModelConfig, is_on_host: bool = True
) -> EngineLimits:
    """Fill in defaults. Raises OptionError that names the flag and its range.

    is_on_host: keys and values are in the host's memory; a device's is looked at in its plan.
    """
    n_ctx, notes = _context(config, model)
    n_threads = config.n_threads or n_cores()
    n_threads_batch = config.n_threads_batch or n_threads
    _check_range("-c", n_ctx, _MIN_CTX, MAX_CTX)
    _check_range("-b", config.n_batch, 1, MAX_BATCH)
    _check_range("-t", n_threads, 1, MAX_THREADS)
    _check_range("-tb", n_threads_batch, 1, MAX_THREADS)
    _check_range("--keep", config.n_keep, 0, MAX_CTX)
    _check_expert_settings(config)
    type_k = _cache_type("-ctk", config.cache_type_k, model)
    type_v = _cache_type("-ctv", config.cache_type_v, model)
    if is_on_host:
        _check_memory(config, model, n_ctx)
    return EngineLimits(
        n_ctx=n_ctx,
        n_batch=min(config.n_batch, n_ctx),
        n_threads=n_threads,
        n_threads_batch=n_threads_batch,
        type_k=type_k,
        type_v=type_v,
        notes=notes,
    )


def _context(config: EngineConfig, model: ModelConfig) -> tuple[int, tuple[str, ...]]:
    trained = model.n_ctx_train
    if not config.n_ctx:
        n_ctx = max(_MIN_CTX, min(trained, DEFAULT_MAX_CTX))
        shorter = f"The context is {n_ctx} of the model's {trained} tokens; -c sets it."
        return n_ctx, (shorter,) if n_ctx < trained else ()
    longer = (
        f"The model was trained on {trained} tokens of context; "
        f"beyond them (-c {config.n_ctx}) its answers may get worse."
    )
    return config.n_ctx, (longer,) if config.n_ctx > trained else ()


def _check_range(flag: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise OptionError(f"{flag} {value}: expected {low} to {high}")


def _check_expert_settings(config: EngineConfig) -> None:
    if config.moe_cache_bytes != MOE_CACHE_AUTO:
        _check_range("--moe-cache", config.moe_cache_bytes, 0, MAX_MOE_CACHE_BYTES)
    _check_range("--fit-margin", config.fit_margin_bytes, 0, MAX_MOE_CACHE_BYTES)
    _check_range("--moe-cache-slots", config.moe_cache_slots, 0, MAX_MOE_CACHE_SLOTS)
    _check_range("--verify-every", config.verify_every, 0, MAX_VERIFY_EVERY)
    _check_choice("--moe-cache-policy", config.moe_cache_policy, CACHE_POLICIES)
    _check_choice("--moe-miss", config.moe_miss, MISS_ACTIONS)


def _check_choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(f"{flag} {value}: expected one of {', '.join(choices)}")


def _check_memory(config: EngineConfig, model: ModelConfig, n_ctx: int) -> None:
    """Keys and values take memory only as the context fills: too late to find out then."""
    available = available_memory_bytes()
    n_bytes = kv_bytes_per_token(model, config.cache_type_k, config.cache_type_v) * n_ctx
    if available is not None and n_bytes > available:
        raise OptionError(
            f"-c {n_ctx}: the keys and values of so many tokens take {n_bytes / 1e9:.1f} GB and "
            f"{available / 1e9:.1f} GB of memory are free: use a smaller -c, or -ctk q8_0 -ctv q8_0"
        )


def _cache_type(flag: str, name: str, model: ModelConfig) -> GGMLType:
    _check_choice(flag, name, CACHE_TYPES)
    kind = GGML_TYPES_BY_NAME[name.upper()]
    if model.n_embd_head % kind.block_size:
        raise OptionError(
            f"{flag} {name} stores blocks of {kind.block_size} numbers, and this model's heads "
            f"have {model.n_embd_head}: use f16"
        )
    return kind
