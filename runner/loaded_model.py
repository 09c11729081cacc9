"""Everything that belongs to one loaded model, and what is told of it. Loads nothing itself."""

import re
from contextlib import ExitStack
from dataclasses import dataclass

from runner.chat_template import MERGED_SYSTEM_NOTE, ChatTemplate
from runner.engine import Engine
from runner.errors import TemplateError
from runner.model_sizes import ModelSizes, model_sizes
from runner.protocol import ModelInfo
from runner.run_control import RunControl
from runner.tokenizer import Tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """What belongs to one model; closed together."""

    engine: Engine
    tokenizer: Tokenizer
    template: ChatTemplate
    control: RunControl
    owners: ExitStack


def describe(path: str, model: LoadedModel, load_s: float) -> ModelInfo:
    """What a client is told of a model that was loaded from `path` in load_s seconds."""
    engine, config = model.engine, model.engine.model_config
    sizes = model_sizes(engine.file, config)
    template_notes = (MERGED_SYSTEM_NOTE,) if _merges_system(model.template) else ()
    return ModelInfo(
        path=path,
        name=config.name,
        description=f"{config.architecture} {_size_label(engine, sizes)} {config.file_type}",
        architecture=config.architecture,
        file_type=config.file_type,
        n_params=sizes.n_params,
        size_bytes=sizes.n_bytes,
        n_layer=config.n_layer,
        n_expert=config.n_expert,
        n_expert_used=config.n_expert_used,
        n_ctx=engine.n_ctx,
        n_ctx_train=config.n_ctx_train,
        n_threads=engine.n_threads,
        n_batch=engine.config.n_batch,
        cache_type_k=engine.config.cache_type_k,
        cache_type_v=engine.config.cache_type_v,
        chat_template=model.template.source,
        device=engine.device_name,
        load_s=load_s,
        ggml_version=engine.ggml_version,
        moe_cache_bytes=engine.cache_plan.n_bytes,
        moe_cache_slots=engine.cache_plan.n_slots,
        moe_cache_policy=engine.config.moe_cache_policy if engine.cache_plan.n_slots else "",
        buddy=engine.buddies.name,
        buddy_budget=engine.buddies.budget,
        buddy_profile=engine.buddies.profile,
        backend=engine.backend.device.backend,
        device_memory=engine.device_memory(),
        warnings=engine.warnings,
        notes=engine.notes + template_notes,
    )


def _size_label(engine: Engine, sizes: ModelSizes) -> str:
    """The usual name of the size, "8x7B": with experts, what one dense model of them would have."""
    label = engine.file.metadata.get("general.size_label")
    if isinstance(label, str) and re.fullmatch(r"[\w.]{1,16}", label):
        return label
    n_expert = engine.model_config.n_expert
    if not n_expert:
        return _short(sizes.n_params)
    return f"{n_expert}x{_short(sizes.n_params_one_expert)}"


def _merges_system(template: ChatTemplate) -> bool:
    try:
        return template.merges_system
    except TemplateError:
        return False  # a broken template is reported when a conversation needs it


def _short(n: int) -> str:
    return f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.1f}M"
