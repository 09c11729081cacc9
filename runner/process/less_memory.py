"""What to load a model with after the memory of a GPU ran out. Knows no process, loads nothing."""

from dataclasses import replace

from runner.byte_sizes import flag_text
from runner.config import MOE_CACHE_AUTO, EngineConfig
from runner.protocol import ModelInfo

_FEWER_SLOTS = 0.85  # of those that were too many
_WIDER_MARGIN = 2  # times the one that was too small
_LEAST_MARGIN_BYTES = 1 << 30


def with_less_memory(
    engine: EngineConfig, info: ModelInfo | None
) -> tuple[EngineConfig, str] | None:
    """Settings that take less of the GPU, and what to tell the user; None when nothing can be less.

    info: of the load that succeeded, None when it ran out while the model was loaded.
    """
    if info is None:
        return _with_wider_margin(engine)
    n_slots = min(info.moe_cache_slots, default=0) if info.device_memory is not None else 0
    if n_slots < 2:
        return None
    fewer = max(1, min(n_slots - 1, int(n_slots * _FEWER_SLOTS)))
    text = f"The GPU's memory ran out: {fewer} slots per layer now instead of {n_slots}. "
    text += "A larger --fit-margin avoids that."
    return replace(engine, moe_cache_slots=fewer, moe_cache_bytes=MOE_CACHE_AUTO), text


def _with_wider_margin(engine: EngineConfig) -> tuple[EngineConfig, str] | None:
    """Where the slots take what the margin leaves them."""
    if engine.moe_cache_slots or engine.moe_cache_bytes != MOE_CACHE_AUTO:
        return None
    wider = max(_WIDER_MARGIN * engine.fit_margin_bytes, _LEAST_MARGIN_BYTES)
    text = "The GPU's memory ran out while the model was loaded, so that was done again with "
    text += f"--fit-margin {flag_text(wider)}."
    return replace(engine, fit_margin_bytes=wider), text
