"""The single steps of bringing a model into memory, in the order in which `placement.place` takes
them. Computes nothing."""

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np

from quant.ggml import Backend
from quant.gguf_file import GGUFFile
from runner.config import EngineConfig
from runner.device_state import DeviceState, EngineParts
from runner.engine_limits import EngineLimits
from runner.experts.cache_plan import CachePlan
from runner.experts.eviction import frequency_of
from runner.experts.expert_cache import ExpertCache
from runner.experts.expert_store import ExpertStore
from runner.experts.usage_file import UsageFile
from runner.kv_cache import KVCache
from runner.model_config import ModelConfig
from runner.model_sizes import is_expert_tensor
from runner.page_in import page_in
from runner.readback import Readback
from runner.residency import Residency
from runner.weights import Weights


def page_in_weights(
    file: GGUFFile,
    plan: CachePlan,
    report: Callable[[str, int, int], None],
    cancelled: Callable[[], bool],
) -> tuple[str, ...]:
    """Read what is used in place: everything, or all but the experts if they have slots; for a
    device, the experts that the host computes.

    Returns what the user should know. Raises CancelledError.
    """
    if plan.is_on_device and not plan.fits_host:
        return ()
    parts = [
        tensor.range
        for tensor in file.tensors.values()
        if plan.is_on_device == (bool(plan.n_slots) and is_expert_tensor(tensor.name))
    ]
    if page_in(file, parts, report, cancelled):
        return ()
    return ("The model is larger than the free memory: expect it to be slow.",)


def make_cache(
    backend: Backend, file: GGUFFile, model: ModelConfig, policy: str, plan: CachePlan
) -> ExpertCache | None:
    """The experts' slots, still empty; None where experts are used in place."""
    if not plan.n_slots:
        return None
    store = ExpertStore(file, model, plan.has_room_for_experts)
    return ExpertCache(backend, file, model, store, plan.n_slots, policy)


def open_usage(
    config: EngineConfig,
    file: GGUFFile,
    model: ModelConfig,
    cache: ExpertCache | None,
    uses: np.ndarray | None = None,
) -> UsageFile | None:
    """The file of expert uses, if one is named, and the cache told of it. Raises OptionError.

    uses (n_layer, n_expert): what the cache is told where there are no earlier uses.
    """
    if cache is None:
        return None
    usage = None
    if config.moe_cache_profile:
        usage = UsageFile(config.moe_cache_profile, file, model)
        uses = usage.earlier if usage.earlier.any() else uses
    if uses is not None:
        cache.table.expect(frequency_of(uses, model.n_expert_used))
    return usage


def allocate(
    backend: Backend,
    host: Backend,
    file: GGUFFile,
    model: ModelConfig,
    limits: EngineLimits,
    cache: ExpertCache | None,
    owned: ExitStack,
) -> EngineParts:
    """Memory of weights, context and state; `owned` closes them. `host` is the CPU.

    Raises OutOfMemoryError.
    """
    weights = Weights(file, model, backend, host, limits.n_ctx, copies_experts=cache is None)
    owned.callback(weights.close)
    kv = KVCache(backend, model, limits.n_ctx, limits.type_k, limits.type_v)
    owned.callback(kv.close)
    state = DeviceState(backend, model, limits.n_batch, limits.n_ctx, has_passes=cache is not None)
    owned.callback(state.close)
    in_place = tuple(layer.experts for layer in weights.layers)
    slabs = cache.slabs if cache is not None else in_place
    residency = readback = None
    if cache is not None and model.is_moe:
        residency = Residency(backend, model)
        owned.callback(residency.close)
        if not backend.is_host:
            readback = Readback(backend, state.slot_ids, state.ffn_input)
            owned.callback(readback.close)
    predicts = cache is not None and cache.reads_ahead
    parts = (backend, host, model, weights, slabs, kv, state, residency, readback)
    return EngineParts(*parts, predicts=predicts)


def scattered_notes(weights: Weights) -> tuple[str, ...]:
    """What the user should know of weights that could not be used in place."""
    if not weights.n_copied_bytes:
        return ()
    return (
        f"{weights.n_copied_bytes / 1e9:.1f} GB of experts lie scattered in this file and were "
        "copied to memory; converting it with a current llama.cpp avoids that.",
    )
