"""What a model would be on this machine, from its header on the hub: before anything is fetched.

Runs nothing and fetches no weights. Sizes and slots are those of `show`, from the same functions.
"""

from dataclasses import dataclass, replace

from quant.errors import GGUFError
from quant.gguf_file import GGUFFile
from runner.byte_sizes import bytes_text, range_text
from runner.checks.read_model import read_shape
from runner.config import DEVICE_AUTO, DEVICE_CPU, EngineConfig
from runner.errors import ModelError, OptionError
from runner.hub.places import free_bytes
from runner.hub.pull import PullPlan
from runner.hub.remote_header import open_remote
from runner.hub.repository import Hub
from runner.model_config import ModelConfig
from runner.show import ExpertCache, ModelDescription, ReportedDevice, describe

DISK_RESERVE_BYTES = 256 << 20  # left free for the rest of the system
FAST, MIXED, PAGED, UNKNOWN = "fast", "mixed", "paged", "unknown"
_USUAL_DISK_BYTES_PER_S = 2e9  # an NVMe disk; said with every figure that is computed from it


@dataclass(frozen=True)
class SpeedClass:
    """What limits the speed: nothing but the processor, or reading experts."""

    name: str  # FAST, MIXED, PAGED or UNKNOWN
    read_bytes_per_token: int  # from the disk, when experts are used evenly and nobody stands in
    text: str


@dataclass(frozen=True)
class Preflight:
    """Whether a download makes sense; `refusals` say why not."""

    model: ModelDescription | None  # None when it cannot be run at all
    total_bytes: int
    missing_bytes: int
    free_bytes: int | None
    speed: SpeedClass | None
    refusals: tuple[str, ...]
    notes: tuple[str, ...]


def check(hub: Hub, plan: PullPlan, device: ReportedDevice | None) -> Preflight:
    """Judge a model by its header on the hub and this machine. Raises HubError."""
    free = free_bytes(plan.place.folder)
    result = Preflight(
        model=None,
        total_bytes=plan.variant.n_bytes,
        missing_bytes=plan.missing_bytes,
        free_bytes=free,
        speed=None,
        refusals=_disk_refusals(plan, free),
        notes=(),
    )
    try:
        with open_remote(hub, plan.contents, plan.variant) as header:
            return _with_model(result, header, read_shape(header), device)
    except (ModelError, GGUFError) as error:
        return replace(result, refusals=(f"buddyrun cannot run it: {error}", *result.refusals))


def _with_model(
    result: Preflight, header: GGUFFile, config: ModelConfig, device: ReportedDevice | None
) -> Preflight:
    run_config = EngineConfig(device=DEVICE_AUTO if device else DEVICE_CPU)
    try:
        model = describe(header, config, run_config=run_config, device=device)
    except OptionError as error:
        model = describe(header, config)
        refusals = (f"this machine's memory is too small: {error}", *result.refusals)
        return replace(result, model=model, refusals=refusals)
    notes = model.notes + (model.moe_cache.notes if model.moe_cache else ())
    if not model.n_expert:
        notes = ("It has no experts: it runs, and all of it has to fit into memory.", *notes)
    return replace(result, model=model, speed=speed_class(model), notes=notes)


def speed_class(model: ModelDescription) -> SpeedClass:
    """What to expect, by arithmetic alone."""
    cache = model.moe_cache
    if cache is None or cache.available_bytes is None:
        return SpeedClass(UNKNOWN, 0, "unknown: the system does not say how much memory is free")
    if not cache.n_slots:
        return _without_slots(model, cache)
    share = cache.resident_share or 0.0
    n_pairs = model.n_layer * model.n_expert_used
    mean_bytes = model.all_experts_bytes / (model.n_layer * model.n_expert)
    n_read = int(n_pairs * (1 - share) * mean_bytes)
    if not n_read:
        return SpeedClass(FAST, 0, f"fast: all experts fit on {cache.device or 'this machine'}")
    if cache.device:
        return SpeedClass(
            MIXED,
            0,
            f"mixed: {cache.device} holds {share:.0%} of the experts, and the processor computes"
            f" the others ({bytes_text(n_read)} of weights a token, if they are used evenly)",
        )
    per_s = _USUAL_DISK_BYTES_PER_S / n_read
    return SpeedClass(
        PAGED,
        n_read,
        f"paged: {bytes_text(n_read)} of experts are read per token if they are used evenly; a"
        f" disk of 2 GB/s brings that {per_s:.2g} times a second, stand-ins make it more",
    )


def _without_slots(model: ModelDescription, cache: ExpertCache) -> SpeedClass:
    left = cache.left_bytes if cache.left_bytes is not None else 0
    if left >= model.all_experts_bytes:
        return SpeedClass(FAST, 0, "fast: all of it fits into memory")
    return SpeedClass(PAGED, model.size_bytes, "slow: more than fits into memory is read per token")


def _disk_refusals(plan: PullPlan, free: int | None) -> tuple[str, ...]:
    if free is None or plan.missing_bytes == 0 or plan.missing_bytes + DISK_RESERVE_BYTES <= free:
        return ()
    return (
        f"{bytes_text(plan.missing_bytes)} are to come, and the disk of {plan.place.folder} has"
        f" {bytes_text(free)} free ({bytes_text(DISK_RESERVE_BYTES)} are to stay so): make room,"
        " or choose another disk with HF_HOME or --local-dir",
    )


def rows(preflight: Preflight) -> list[tuple[str, str]]:
    """What a person reads, as names and values."""
    p, found = preflight, []
    to_come = f", {bytes_text(p.missing_bytes)} to come" if p.missing_bytes < p.total_bytes else ""
    found.append(("size", bytes_text(p.total_bytes) + to_come))
    if p.free_bytes is not None:
        found.append(("disk", f"{bytes_text(p.free_bytes)} free"))
    if p.model is not None:
        found.append(("model", _model_text(p.model)))
        found.extend(_slot_rows(p.model))
    if p.speed is not None:
        found.append(("speed", p.speed.text))
    return found


def _model_text(model: ModelDescription) -> str:
    experts = "no experts"
    if model.n_expert:
        experts = f"{model.n_layer} layers x {model.n_expert} experts (top {model.n_expert_used})"
    return f"{model.name or '-'}: {model.architecture}, {experts}, {model.file_type}"


def _slot_rows(model: ModelDescription) -> list[tuple[str, str]]:
    cache = model.moe_cache
    if cache is None or not model.n_expert:
        return []
    where = f" on {cache.device}" if cache.device else ""
    memory = "unknown" if cache.available_bytes is None else bytes_text(cache.available_bytes)
    if not cache.n_slots:
        return [("memory", f"{memory} free{where}: no slots needed, experts are used in the file")]
    slots = f"{range_text(cache.n_slots)} of {model.n_expert} experts per layer{where}"
    return [("memory", f"{memory} free{where}: slots for {slots}")]
