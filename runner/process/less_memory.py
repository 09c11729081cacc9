"""What to load a model with after the memory of a GPU ran out. Knows no process, loads nothing."""

from dataclasses import replace

from runner.byte_sizes import flag_text
from runner.config import MOE_CACHE_AUTO, MOE_CACHE_OFF, EngineConfig
from runner.protocol import ModelInfo

_FEWER = 0.85  # of the slots, or of their memory, that was too much
_WIDER = 2  # times the margin that was too small
_LEAST_MARGIN_BYTES = 1 << 30


def with_less_memory(
    engine: EngineConfig, info: ModelInfo | None
) -> tuple[EngineConfig, str] | None:
    """Settings that take less of the GPU, and what to tell the user; None when nothing can be less.

    info: of the last load that succeeded, None if none did yet: how many slots were tried nobody
    knows then, unless the settings say so.
    """
    if info is not None and info.device_memory is None:
        return None
    n_slots = engine.moe_cache_slots
    if info is not None:  # the settings may have fewer than it: they were tried after it
        n_loaded = min(info.moe_cache_slots, default=0)
        n_slots = min(n_slots or n_loaded, n_loaded)
    if n_slots:
        return _with_fewer_slots(engine, n_slots)
    return _with_less_room(engine) if info is None else None


def _with_fewer_slots(engine: EngineConfig, n_slots: int) -> tuple[EngineConfig, str] | None:
    if n_slots < 2:
        return None
    fewer = max(1, min(n_slots - 1, int(n_slots * _FEWER)))
    text = f"The GPU's memory ran out: {fewer} slots per layer now instead of {n_slots}. "
    text += "A larger --fit-margin avoids that."
    return replace(engine, moe_cache_slots=fewer, moe_cache_bytes=MOE_CACHE_AUTO), text


def _with_less_room(engine: EngineConfig) -> tuple[EngineConfig, str]:
    """A smaller cache, or a wider margin where that alone decides how many slots there are."""
    text = "The GPU's memory ran out while the model was loaded, so that was done again with "
    if engine.moe_cache_bytes not in (MOE_CACHE_AUTO, MOE_CACHE_OFF):
        smaller = int(engine.moe_cache_bytes * _FEWER)
        text += f"--moe-cache {flag_text(smaller)}."
        return replace(engine, moe_cache_bytes=smaller), text
    wider = max(_WIDER * engine.fit_margin_bytes, _LEAST_MARGIN_BYTES)
    return replace(engine, fit_margin_bytes=wider), text + f"--fit-margin {flag_text(wider)}."
