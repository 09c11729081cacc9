"""What `buddyrun show MODEL` says: a description as values, and the same as text. Maps nothing."""

from collections import Counter
from dataclasses import dataclass

from quant.gguf_file import GGUFFile
from runner.checks.model_keys import ModelKeys
from runner.model_config import ModelConfig
from runner.model_sizes import kv_bytes_per_token, model_sizes

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
    notes: tuple[str, ...]


def describe(file: GGUFFile, config: ModelConfig, template: bool = False) -> ModelDescription:
    """Collect what there is to say of an open model; `template` adds the chat template's text."""
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
        ("Tensor types", [(t.type, _type_text(t)) for t in d.tensor_types]),
        ("Tokenizer", _tokenizer_rows(d)),
    ]
    if len(d.shards) > 1:
        sections.append(("Shards", [(str(i + 1), path) for i, path in enumerate(d.shards)]))
    blocks = [_section(title, rows) for title, rows in sections if rows]
    if d.chat_template:
        blocks.append("  Chat template\n" + _indented(d.chat_template))
    if d.notes:
        blocks.append("  Notes\n" + _indented("\n".join(d.notes)))
    return "\n\n".join(blocks)


def bytes_text(n_bytes: int) -> str:
    """As "26.4 GB" or "107 MB": three digits, powers of 1000."""
    value, units = float(n_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    digits = 0 if value >= 100 or units[0] == "B" else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {units[0]}"


def count_text(n: int) -> str:
    """As "46.7 B" or "28.9 M"."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= limit:
            return f"{n / limit:.1f} {unit}"
    return str(n)


def _license(file: GGUFFile) -> str:
    value = file.metadata.get("general.license", "")
    return value if isinstance(value, str) else "(a long text in the file)"


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
