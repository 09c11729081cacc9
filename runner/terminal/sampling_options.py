"""The sampling parameters as a user writes them: names and help. Knows no command line.

The command line's flags and the chat's `/set` are made from the same table; the ranges are
`sampling_check`'s.
"""

import math
from dataclasses import dataclass

from runner.checks.sampling_check import MAX_INT, NUMBERS, WHOLE_NUMBERS
from runner.config import SamplingConfig
from runner.errors import OptionError

Value = int | float | str | bool


@dataclass(frozen=True)
class SamplingOption:
    """One parameter under llama.cpp's names; `low` and `high` are inclusive."""

    names: tuple[str, ...]  # without dashes, the one to show first
    field: str  # of SamplingConfig
    kind: type[int] | type[float] | type[str] | type[bool]
    help: str
    low: float = -math.inf
    high: float = math.inf
    short: str = ""  # "-s"

    @property
    def name(self) -> str:
        """The name to show."""
        return self.names[0]

    def parse(self, text: str) -> Value:
        """The value that `text` stands for. Raises OptionError naming the range."""
        if self.kind is str:
            return text
        if self.kind is bool:
            return self._parse_switch(text)
        try:
            value = int(text) if self.kind is int else float(text)
        except ValueError:
            value = math.nan
        if not self.low <= value <= self.high or not math.isfinite(value):
            raise OptionError(f"{self.name} must be {self._range()}, not {text!r}")
        return value

    def _parse_switch(self, text: str) -> bool:
        if text.lower() in {"on", "true", "yes", "1"}:
            return True
        if text.lower() in {"off", "false", "no", "0"}:
            return False
        raise OptionError(f"{self.name} must be on or off, not {text!r}")

    def _range(self) -> str:
        what = "a whole number" if self.kind is int else "a number"
        if self.high == MAX_INT:
            return f"{what}, at least {self.low:g}"
        return f"{what} from {self.low:.10g} to {self.high:.10g}"


def _whole(names: str, field: str, help: str, short: str = "") -> SamplingOption:
    low, high = WHOLE_NUMBERS[field]
    return SamplingOption(tuple(names.split()), field, int, help, low, high, short)


def _number(names: str, field: str, help: str, low: float | None = None) -> SamplingOption:
    least, high = NUMBERS[field]
    low = least if low is None else low
    return SamplingOption(tuple(names.split()), field, float, help, low, high)


N_PREDICT = SamplingOption(
    names=("n-predict", "predict"),
    field="n_predict",
    kind=int,
    help="Most tokens of an answer; -1 = no limit.",
    low=-1,
    high=MAX_INT,
    short="-n",
)

SAMPLING_OPTIONS: tuple[SamplingOption, ...] = (
    _whole("seed", "seed", "Seed; -1 = a new one each time.", "-s"),
    _number("temp temperature", "temperature", "Temperature; 0 = always the likeliest token.", 0),
    _whole("top-k", "top_k", "Keep the K likeliest tokens; 0 = all."),
    _number("top-p", "top_p", "Keep the likeliest tokens up to this probability; 1 = off."),
    _number("min-p", "min_p", "Drop tokens below this share of the likeliest; 0 = off."),
    _number("typical typical-p", "typical_p", "Locally typical sampling; 1 = off."),
    _number(
        "top-nsigma", "top_n_sigma", "Drop tokens this far below the best, in sigmas; -1 = off."
    ),
    _number("dynatemp-range", "dynatemp_range", "Temperature follows entropy, +- this; 0 = off."),
    _number("dynatemp-exp", "dynatemp_exponent", "How the temperature follows entropy."),
    _whole("repeat-last-n", "repeat_last_n", "Tokens the penalties look back at; -1 = all."),
    _number("repeat-penalty", "repeat_penalty", "Penalty of repeated tokens; 1 = off."),
    _number("presence-penalty", "presence_penalty", "Penalty of used tokens; 0 = off."),
    _number("frequency-penalty", "frequency_penalty", "Penalty for each use; 0 = off."),
    _number("dry-multiplier", "dry_multiplier", "DRY strength; 0 = off."),
    _number("dry-base", "dry_base", "DRY base."),
    _whole("dry-allowed-length", "dry_allowed_length", "Longest repeat that DRY allows."),
    _whole("dry-penalty-last-n", "dry_penalty_last_n", "Tokens DRY looks at; -1 = all."),
    _number("xtc-probability", "xtc_probability", "XTC probability; 0 = off."),
    _number("xtc-threshold", "xtc_threshold", "XTC threshold; above 0.5 = off."),
    _whole("mirostat", "mirostat", "Mirostat version, 1 or 2; 0 = off."),
    _number("mirostat-lr", "mirostat_lr", "Mirostat learning rate (eta)."),
    _number("mirostat-ent", "mirostat_ent", "Mirostat target entropy (tau)."),
    SamplingOption(("grammar",), "grammar", str, "GBNF grammar that answers must follow."),
    SamplingOption(
        ("json-schema",), "json_schema", str, "JSON schema that answers must follow.", short="-j"
    ),
    SamplingOption(("ignore-eos",), "ignore_eos", bool, "Do not stop where the model would."),
)


def find_option(name: str) -> SamplingOption | None:
    """The parameter called `name` (dashes or underscores, leading dashes allowed), or None."""
    plain = name.lstrip("-").replace("_", "-").lower()
    for option in (N_PREDICT, *SAMPLING_OPTIONS):
        if plain in option.names or (option.short and plain == option.short.lstrip("-")):
            return option
    return None


def default_of(option: SamplingOption) -> Value:
    """The value without any setting."""
    if option is N_PREDICT:
        return -1
    value: Value = getattr(SamplingConfig(), option.field)
    return value
