"""What `buddyrun show MODEL` says: a description as values, and the same as text. Maps nothing."""

from collections import Counter
from dataclasses import dataclass

from quant.gguf_file import GGUFFile
from runner.byte_sizes import bytes_text, count_text, range_text
from runner.checks.model_keys import ModelKeys
from runner.config import EngineConfig
from runner.engine_limits import choose_limits
from runner.experts.cache_plan import plan_cache
from runner.experts.device_plan import plan_device
from runner.experts.other_memory import device_memory, other_memory
from runner.hardware import available_memory_bytes, total_memory_bytes
from runner.model_config import ModelConfig
from runner.model_sizes import ModelSizes, kv_bytes_per_token, model_sizes

_CACHE_TYPES = ("f16", "q8_0")
_INDENT = "    "


@dataclass(frozen=True)
class TensorTypeCount:
    """How much of the model is stored in one type."""

    type: str
    n_tensors: int
    n_bytes: int


@dataclass(frozen=True)
class CacheSize:
    """What the keys and values need with one cache type."""

    type: str  # "f16", "q8_0"
    bytes_per_token: int
    bytes_full_context: int


@dataclass(frozen=True)
class ExpertCache:
    """The expert cache that a run would have on this machine, and the memory around it."""

    n_slots: tuple[int, ...]  # per layer; empty = none, experts are used where the file is mapped
    n_bytes: int  # of all slots
    budget_bytes: int
    resident_share: float | None  # of all experts; None without a cache
    n_ctx: int
    n_batch: int
    available_bytes: int | None  # None where the system does not say
    weights_bytes: int
    kv_bytes: int  # of n_ctx tokens
    compute_bytes: int
    headroom_bytes: int
    left_bytes: int | None  # without a cache: for the file's experts
    notes: tuple[str, ...]
    device: str = ""  # whose memory it is; "" = the host's


@dataclass(frozen=True)
class ReportedDevice:
    """A GPU as the engine's process told of it."""

    name: str
    free_bytes: int
    total_bytes: int
    shares_host_memory: bool = False

    def memory_bytes(self) -> tuple[int, int]:
        """Free and total."""
        return self.free_bytes, self.total_bytes


@dataclass(frozen=True)
class ModelDescription:
    """Everything `show` prints; `dataclasses.asdict` of it is what `--json` prints."""

    path: str
    architecture: str
    name: str
    license: str
    file_type: str
    size_bytes: int
    shards: tuple[str, ...]
    n_params: int
    n_params_active: int  # per token
    n_layer: int
    n_expert: int
    n_expert_used: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_embd_head: int
    n_ctx_train: int
    sliding_window: int
    rope_freq_base: float
    rope_scaling_type: str
    rope_scaling_factor: float
    expert_bytes_min: int  # of one expert in a layer; layers may differ
    expert_bytes_max: int
    all_experts_bytes: int
    non_expert_bytes: int
    cache: tuple[CacheSize, ...]
    tensor_types: tuple[TensorTypeCount, ...]  # the largest first
    tokenizer_model: str
    tokenizer_pre: str
    n_vocab: int
    has_chat_template: bool
    chat_template: str | None  # the whole text, when it was asked for
    moe_cache: ExpertCache | None  # when it was asked for
    notes: tuple[str, ...]


def describe(
    file: GGUFFile,
    config: ModelConfig,
    template: bool = False,
    run_config: EngineConfig | None = None,
    device: ReportedDevice | None = None,
) -> ModelDescription:
    """Collect what there is to say of an open model; `template` adds the chat template's text.

    `run_config` adds the expert cache that a run with these settings would have, in the memory of
    `device` if that is given; then it raises OptionError as the run would.
    """
    keys = ModelKeys(file)
    sizes = model_sizes(file, config)
    chat_template = keys.text("tokenizer.chat_template", default="")
    return ModelDescription(
        path=str(file.paths[0]),
        architecture=config.architecture,
        name=config.name,
        license=_license(file),
        file_type=config.file_type,
        size_bytes=file.size_bytes,
        shards=tuple(str(path) for path in file.paths),
        n_params=sizes.n_params,
        n_params_active=sizes.n_params_active,
        n_layer=config.n_layer,
        n_expert=config.n_expert,
        n_expert_used=config.n_expert_used,
        n_embd=config.n_embd,
        n_ff=config.n_ff,
        n_head=config.n_head,
        n_head_kv=config.n_head_kv,
        n_embd_head=config.n_embd_head,
        n_ctx_train=config.n_ctx_train,
        sliding_window=config.sliding_window,
        rope_freq_base=config.rope.freq_base,
        rope_scaling_type=config.rope.scaling_type,
        rope_scaling_factor=1 / config.rope.freq_scale,
        expert_bytes_min=min(sizes.expert_bytes, default=0),
        expert_bytes_max=max(sizes.expert_bytes, default=0),
        all_experts_bytes=sizes.all_experts_bytes,
        non_expert_bytes=sizes.non_expert_bytes,
        cache=_cache_sizes(config),
        tensor_types=_tensor_types(file),
        tokenizer_model=keys.text("tokenizer.ggml.model"),
        tokenizer_pre=keys.text("tokenizer.ggml.pre", default=""),
        n_vocab=config.n_vocab,
        has_chat_template=bool(chat_template),
        chat_template=chat_template if template else None,
        moe_cache=_expert_cache(run_config, config, sizes, device) if run_config else None,
        notes=config.notes,
    )


def format_text(description: ModelDescription) -> str:
    """The description as sections of aligned lines, without a final line end.

    Names and templates come from the file: print the result through `terminal_text.visible`.
    """
    d = description
    sections = [
        ("Model", _model_rows(d)),
        ("Experts", _expert_rows(d)),
        ("Sizes", _size_rows(d)),
        ("Expert cache", _cache_rows(d, d.moe_cache) if d.moe_cache else []),
        ("Tensor types", [(t.type, _type_text(t)) for t in d.tensor_types]),
        ("Tokenizer", _tokenizer_rows(d)),
    ]
    if len(d.shards) > 1:
        sections.append(("Shards", [(str(i + 1), path) for i, path in enumerate(d.shards)]))
    blocks = [_section(title, rows) for title, rows in sections if rows]
    if d.chat_template:
        blocks.append("  Chat template\n" + _indented(d.chat_template))
    notes = d.notes + (d.moe_cache.notes if d.moe_cache else ())
    if notes:
        blocks.append("  Notes\n" + _indented("\n".join(notes)))
    return "\n\n".join(blocks)


def _license(file: GGUFFile) -> str:
    value = file.metadata.get("general.license", "")
    return value if isinstance(value, str) else "(a long text in the file)"


def _expert_cache(
    run_config: EngineConfig, config: ModelConfig, sizes: ModelSizes, device: ReportedDevice | None
) -> ExpertCache:
    available: int | None = available_memory_bytes()
    limits = choose_limits(run_config, config, is_on_host=device is None)
    n_ctx, n_batch = limits.n_ctx, limits.n_batch
    if device is None:
        plan = plan_cache(run_config, config, sizes, n_ctx, n_batch, available)
        other = other_memory(run_config, config, sizes, n_ctx, n_batch, available)
    else:
        settings = (run_config, config, sizes, n_ctx, n_batch)
        plan = plan_device(*settings, device, available, total_memory_bytes())
        other = device_memory(run_config, config, sizes, n_ctx, n_batch)
        available = plan.available_bytes
    n_experts = config.n_layer * config.n_expert
    return ExpertCache(
        n_slots=plan.n_slots,
        n_bytes=plan.n_bytes,
        budget_bytes=plan.budget_bytes,
        resident_share=sum(plan.n_slots) / n_experts if plan.n_slots else None,
        n_ctx=limits.n_ctx,
        n_batch=limits.n_batch,
        available_bytes=available,
        weights_bytes=other.weights_bytes,
        kv_bytes=other.kv_bytes,
        compute_bytes=other.compute_bytes,
        headroom_bytes=other.headroom_bytes,
        left_bytes=plan.left_bytes,
        notes=plan.notes,
        device="" if device is None else device.name,
    )


def _cache_sizes(config: ModelConfig) -> tuple[CacheSize, ...]:
    sizes = []
    for name in _CACHE_TYPES:
        if name == "q8_0" and config.n_embd_head % 32:
            continue  # heads are no whole blocks, so the cache cannot have this type
        n_bytes = kv_bytes_per_token(config, name, name)
        sizes.append(CacheSize(name, n_bytes, n_bytes * config.n_ctx_train))
    return tuple(sizes)


def _tensor_types(file: GGUFFile) -> tuple[TensorTypeCount, ...]:
    n_tensors: Counter[str] = Counter()
    n_bytes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        n_tensors[tensor.type.name] += 1
        n_bytes[tensor.type.name] += tensor.n_bytes
    return tuple(TensorTypeCount(name, n_tensors[name], n) for name, n in n_bytes.most_common())


def _model_rows(d: ModelDescription) -> list[tuple[str, str]]:
    scaling = ""
    if d.rope_scaling_type != "none" and d.rope_scaling_factor != 1:
        scaling = f", {d.rope_scaling_type} x {d.rope_scaling_factor:g}"
    rows = [
        ("architecture", d.architecture),
        ("name", d.name or "-"),
        ("license", d.license or "-"),
        ("file type", d.file_type),
        ("parameters", f"{count_text(d.n_params)}, {count_text(d.n_params_active)} per token"),
        ("layers", str(d.n_layer)),
        ("embedding", str(d.n_embd)),
        ("feed-forward", str(d.n_ff)),
        ("attention heads", f"{d.n_head} of {d.n_embd_head}, {d.n_head_kv} for keys and values"),
        ("context", f"{d.n_ctx_train} tokens"),
        ("rope", f"base {d.rope_freq_base:g}{scaling}"),
    ]
    if d.sliding_window:
        rows.append(("sliding window", f"{d.sliding_window} tokens"))
    return rows


def _expert_rows(d: ModelDescription) -> list[tuple[str, str]]:
    if not d.n_expert:
        return []
    least, most = bytes_text(d.expert_bytes_min), bytes_text(d.expert_bytes_max)
    return [
        ("layers x experts", f"{d.n_layer} x {d.n_expert}"),
        ("used per token", f"{d.n_expert_used} in each layer"),
        ("one expert", least if d.expert_bytes_min == d.expert_bytes_max else f"{least} to {most}"),
        ("all experts", bytes_text(d.all_experts_bytes)),
        ("all but experts", bytes_text(d.non_expert_bytes)),
    ]


def _size_rows(d: ModelDescription) -> list[tuple[str, str]]:
    rows = [("file", f"{bytes_text(d.size_bytes)} ({d.size_bytes} bytes)")]
    for cache in d.cache:
        text = f"{bytes_text(cache.bytes_per_token)} per token, "
        text += f"{bytes_text(cache.bytes_full_context)} for {d.n_ctx_train}"
        rows.append((f"KV cache {cache.type}", text))
    return rows


def _cache_rows(d: ModelDescription, c: ExpertCache) -> list[tuple[str, str]]:
    rows = [("slots", _no_cache_text(d, c))]
    if c.n_slots:
        share = f"{c.resident_share or 0:.1%}".replace("%", " % of all experts")
        rows = [
            ("slots per layer", f"{range_text(c.n_slots)} of {d.n_expert}"),
            ("all slots", f"{bytes_text(c.n_bytes)}, {share}"),
        ]
    free = f"free on {c.device}" if c.device else "memory available"
    return [
        *rows,
        ("other weights", bytes_text(c.weights_bytes)),
        ("KV cache", f"{bytes_text(c.kv_bytes)} for {c.n_ctx} tokens"),
        ("compute memory", f"{bytes_text(c.compute_bytes)} for batches of {c.n_batch}"),
        ("left to others" if c.device else "headroom", bytes_text(c.headroom_bytes)),
        (free, _memory_text(c.available_bytes)),
        ("left" if c.n_slots else "left for experts", _memory_text(c.left_bytes)),
    ]


def _no_cache_text(d: ModelDescription, c: ExpertCache) -> str:
    if not d.n_expert:
        return "none: the model has no experts"
    if c.left_bytes is not None and c.left_bytes >= d.all_experts_bytes:
        return "none: all experts fit, and are used where the file is mapped"
    return "none: experts are used where the file is mapped"


def _memory_text(n_bytes: int | None) -> str:
    if n_bytes is None:
        return "unknown"
    return bytes_text(n_bytes) if n_bytes >= 0 else f"nothing, {bytes_text(-n_bytes)} too little"


def _tokenizer_rows(d: ModelDescription) -> list[tuple[str, str]]:
    pre = f", {d.tokenizer_pre}" if d.tokenizer_pre else ""
    return [
        ("model", d.tokenizer_model + pre),
        ("vocabulary", f"{d.n_vocab} tokens"),
        ("chat template", "yes" if d.has_chat_template else "no"),
    ]


def _type_text(t: TensorTypeCount) -> str:
    return f"{t.n_tensors} tensors, {bytes_text(t.n_bytes)}"


def _section(title: str, rows: list[tuple[str, str]]) -> str:
    return "\n".join([f"  {title}", *(f"{_INDENT}{name:<18}{value}" for name, value in rows)])


def _indented(text: str) -> str:
    return "\n".join(_INDENT + line for line in text.splitlines())
