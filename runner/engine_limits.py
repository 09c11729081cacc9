"""Which context, threads and cache types a model gets from the user's settings. Owns nothing."""

from dataclasses import dataclass

from quant.ggml_types import GGML_TYPES_BY_NAME, GGMLType
from runner.config import DEFAULT_MAX_CTX, EngineConfig
from runner.errors import OptionError
from runner.hardware import n_physical_cores
from runner.model_config import ModelConfig

CACHE_TYPES = ("f16", "q8_0")

_MAX_CTX = 1 << 24
_MAX_BATCH = 1 << 16
_MAX_THREADS = 512


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


def choose_limits(config: EngineConfig, model: ModelConfig) -> EngineLimits:
    """Fill in defaults. Raises OptionError that names the flag and its range."""
    n_ctx, notes = _context(config, model)
    n_threads = config.n_threads or n_physical_cores()
    n_threads_batch = config.n_threads_batch or n_threads
    _check_range("-c", n_ctx, 2, _MAX_CTX)
    _check_range("-b", config.n_batch, 1, _MAX_BATCH)
    _check_range("-t", n_threads, 1, _MAX_THREADS)
    _check_range("-tb", n_threads_batch, 1, _MAX_THREADS)
    _check_range("--keep", config.n_keep, 0, _MAX_CTX)
    return EngineLimits(
        n_ctx=n_ctx,
        n_batch=min(config.n_batch, n_ctx),
        n_threads=n_threads,
        n_threads_batch=n_threads_batch,
        type_k=_cache_type("-ctk", config.cache_type_k, model),
        type_v=_cache_type("-ctv", config.cache_type_v, model),
        notes=notes,
    )


def _context(config: EngineConfig, model: ModelConfig) -> tuple[int, tuple[str, ...]]:
    trained = model.n_ctx_train
    if not config.n_ctx:
        n_ctx = min(trained, DEFAULT_MAX_CTX)
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


def _cache_type(flag: str, name: str, model: ModelConfig) -> GGMLType:
    if name not in CACHE_TYPES:
        raise OptionError(f"{flag} {name}: expected one of {', '.join(CACHE_TYPES)}")
    kind = GGML_TYPES_BY_NAME[name.upper()]
    if model.n_embd_head % kind.block_size:
        raise OptionError(
            f"{flag} {name} stores blocks of {kind.block_size} numbers, and this model's heads "
            f"have {model.n_embd_head}: use f16"
        )
    return kind
