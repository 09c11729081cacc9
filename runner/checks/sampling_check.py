"""The ranges of the fields of a SamplingConfig, and their check. Knows no llama.cpp."""

import math

from runner.config import DEFAULT_SAMPLERS, SamplingConfig
from runner.errors import OptionError

RANDOM_SEED = 2**32 - 1  # llama.cpp's own word for "a new one each time", like our -1
MAX_INT = 2**31 - 1
_MAX_BREAKERS = 64

WHOLE_NUMBERS = {
    "seed": (-1, RANDOM_SEED),
    "top_k": (-1, MAX_INT),
    "repeat_last_n": (-1, MAX_INT),
    "dry_allowed_length": (0, MAX_INT),
    "dry_penalty_last_n": (-1, MAX_INT),
    "mirostat": (0, 2),
}
NUMBERS = {
    "temperature": (-math.inf, 1e6),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "top_n_sigma": (-1.0, 1e6),
    "repeat_penalty": (0.001, 1e6),
    "presence_penalty": (-1e6, 1e6),
    "frequency_penalty": (-1e6, 1e6),
    "dry_multiplier": (0.0, 1e6),
    "dry_base": (0.0, 1e6),
    "xtc_probability": (0.0, 1.0),
    "xtc_threshold": (0.0, 1.0),
    "dynatemp_range": (0.0, 1e6),
    "dynatemp_exponent": (0.0, 1e6),
    "mirostat_lr": (0.0, 1e6),
    "mirostat_ent": (0.0, 1e6),
}


def check_sampling(config: SamplingConfig) -> None:
    """Raise OptionError naming the first field that cannot work, and its range."""
    for name, (low, high) in WHOLE_NUMBERS.items():
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise OptionError(f"{name} must be a whole number from {low} to {high}, not {value!r}.")
    for name, (least, most) in NUMBERS.items():
        value = getattr(config, name)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise OptionError(f"{name} must be a number, not {value!r}.")
        if not least <= value <= most:
            raise OptionError(f"{name} must be from {least:g} to {most:g}, not {value!r}.")
    _check_texts(config)


def _check_texts(config: SamplingConfig) -> None:
    unknown = [name for name in config.samplers if name not in DEFAULT_SAMPLERS]
    if unknown or len(set(config.samplers)) < len(config.samplers):
        raise OptionError(f"samplers must be among {', '.join(DEFAULT_SAMPLERS)}, each once.")
    breakers = config.dry_sequence_breakers
    if len(breakers) > _MAX_BREAKERS or any(not text or "\0" in text for text in breakers):
        raise OptionError(
            f"dry_sequence_breakers must be at most {_MAX_BREAKERS} texts, none empty, without NUL."
        )
    if config.grammar and config.json_schema:
        raise OptionError("grammar and json_schema cannot be used together.")
