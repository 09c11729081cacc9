"""Opens a model's file, chooses where it runs, and makes everything that a run computes with, step
by step (`loading.py`), or again with fewer slots. Computes no token."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from quant.ggml import Backend
from quant.gguf_file import GGUFFile
from runner import loading
from runner.checks.read_model import read_model
from runner.config import EngineConfig
from runner.device_memory import DeviceMemory
from runner.device_state import BatchShape, EngineParts
from runner.devices import choose_device
from runner.engine_limits import EngineLimits, choose_limits
from runner.errors import OutOfMemoryError
from runner.experts.cache_plan import CachePlan, plan_cache
from runner.experts.device_plan import plan_device, with_fewer_slots
from runner.experts.expert_cache import ExpertCache
from runner.experts.expert_runner import ExpertRunner
from runner.experts.miss_planner import MissPlanner
from runner.experts.usage_file import UsageFile
from runner.graph_cache import GraphCache
from runner.hardware import available_memory_bytes, total_memory_bytes
from runner.kv_cache import padded_context
from runner.model_config import ModelConfig
from runner.model_sizes import ModelSizes, model_sizes
from runner.standins.choose_policy import ChosenPolicy, choose_policy
from runner.stats_recorder import StatsRecorder
from runner.warm_up import warm_up

Progress = Callable[[str, int, int], None]
Cancelled = Callable[[], bool]


@dataclass(frozen=True, eq=False)
class OpenedModel:
    """A file that was checked, and what it is to run on; nothing of it is in memory yet."""

    file: GGUFFile
    model: ModelConfig
    sizes: ModelSizes
    config: EngineConfig
    limits: EngineLimits
    host: Backend  # the CPU
    backend: Backend  # what computes: `host` itself where there is no other device
    warnings: tuple[str, ...]  # of the device
    notes: tuple[str, ...]  # what the user should know, each one sentence


@dataclass(frozen=True, eq=False)
class PlacedModel:
    """Everything that has memory, and who decides over it."""

    plan: CachePlan
    standins: ChosenPolicy
    stats: StatsRecorder
    parts: EngineParts
    graphs: GraphCache
    cache: ExpertCache | None  # None where experts are used in place; then none of these
    usage: UsageFile | None
    planner: MissPlanner | None
    experts: ExpertRunner | None
    notes: tuple[str, ...]

    def device_memory(self) -> DeviceMemory | None:
        """Where a GPU's memory went; None on the CPU."""
        backend = self.parts.backend
        if backend.is_host:
            return None
        return DeviceMemory(
            name=backend.device.name,
            weights_bytes=self.parts.weights.n_device_bytes,
            kv_bytes=self.parts.kv.n_bytes,
            compute_bytes=self.graphs.n_bytes + self.parts.state.n_bytes,
            slots_bytes=self.cache.n_bytes if self.cache is not None else 0,
            free_before_bytes=self.plan.available_bytes or 0,
            free_bytes=backend.device.memory_bytes()[0],
        )


def open_model(path: str | Path, config: EngineConfig, owned: ExitStack) -> OpenedModel:
    """Check a file and choose where it runs; `owned` closes both.

    Raises GGUFError, ModelError, BackendError or OptionError.
    """
    file = owned.enter_context(GGUFFile.open(path))
    model = read_model(file)
    chosen = choose_device(config.device)
    limits = choose_limits(config, model, is_on_host=chosen.device.kind == "cpu")
    host = owned.enter_context(Backend.cpu(limits.n_threads))
    backend = host
    if chosen.device.kind != "cpu":
        backend = owned.enter_context(Backend.on(chosen.device))
    return OpenedModel(
        file=file,
        model=model,
        sizes=model_sizes(file, model),
        config=config,
        limits=limits,
        host=host,
        backend=backend,
        warnings=chosen.notes,
        notes=model.notes + limits.notes,
    )


def place(
    opened: OpenedModel, report: Progress, cancelled: Cancelled, owned: ExitStack
) -> PlacedModel:
    """Bring the model into memory, with fewer slots than planned when a device has less memory
    than it said; `owned` closes what was made.

    Raises OutOfMemoryError, OptionError, ProfileError, ModelError; CancelledError.
    """
    plan = _plan(opened)
    while True:
        try:
            with ExitStack() as made:
                placed = _place(opened, plan, made, report, cancelled)
                owned.enter_context(made.pop_all())
            return placed
        except OutOfMemoryError:
            fewer = with_fewer_slots(plan, opened.sizes) if plan.is_on_device else None
            if fewer is None:
                raise
            plan = fewer


def _plan(opened: OpenedModel) -> CachePlan:
    """How many slots for experts the memory takes, of the device or of the host."""
    available = available_memory_bytes()
    limits = opened.limits
    settings = (opened.config, opened.model, opened.sizes, limits.n_ctx, limits.n_batch)
    if opened.backend.is_host:
        return plan_cache(*settings, available)
    return plan_device(*settings, opened.backend.device, available, total_memory_bytes())


def _place(
    opened: OpenedModel,
    plan: CachePlan,
    owned: ExitStack,
    report: Progress,
    cancelled: Cancelled,
) -> PlacedModel:
    """Make everything that has memory by this plan, slots for experts first."""
    config, file, model, backend = opened.config, opened.file, opened.model, opened.backend
    standins = choose_policy(config, file, model, plan.n_slots)
    notes = plan.notes + standins.notes
    notes += loading.page_in_weights(file, plan, report, cancelled)
    stats = StatsRecorder(
        model.n_layer, plan.n_slots, standins.name, standins.budget, model.n_expert
    )
    cache = loading.make_cache(backend, file, model, config.moe_cache_policy, plan)
    if cache is not None:
        owned.callback(cache.close)
    usage = loading.open_usage(config, file, model, cache, standins.uses)
    parts = loading.allocate(backend, opened.host, file, model, opened.limits, cache, owned)
    parts.weights.upload(backend, report, cancelled)
    notes += loading.scattered_notes(parts.weights)
    largest = BatchShape(opened.limits.n_batch, padded_context(opened.limits.n_ctx))
    graphs = GraphCache(parts, largest)
    owned.callback(graphs.close)
    planner = experts = None
    if cache is not None:
        planner = MissPlanner(
            cache, graphs.passes, config.moe_miss, standins.policy, config.counts_weight
        )
        sizes = (model.n_expert_used, opened.limits.n_batch)
        experts = ExpertRunner(cache, graphs.passes, stats, planner, *sizes, usage is not None)
        experts.measure_costs()
    if config.warmup and not backend.is_host:
        slot = int(cache.table.slot_of[0].max()) if cache is not None else None
        warm_up(parts, graphs, opened.limits.n_batch, slot, report, cancelled)
    if experts is not None:
        experts.start_filling()
    return PlacedModel(plan, standins, stats, parts, graphs, cache, usage, planner, experts, notes)
