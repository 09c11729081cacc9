"""The settings of a run as frozen values. Knows neither the command line nor the engine."""

from dataclasses import dataclass, field

MOE_CACHE_AUTO = -1  # what is free, and no cache when the whole model fits
MOE_CACHE_OFF = 0
CACHE_POLICIES = ("lru", "lfu", "static")
MISS_ACTIONS = ("auto", "load", "host")
BUDDY_OFF, BUDDY_AUTO = "off", "auto"
BUDDY_POLICIES = (
    "blend",
    "buddymoe",
    "router",
    "similar",
    "prior",
    "prior-router",
    "resident",
    "drop",
    "random",
)
DEFAULT_BUDDY_BUDGET = 0.08  # share of the router's weight, where a profile says how to spend it
BUDGET_WITHOUT_PROFILE = 0.05  # where stand-ins are chosen by the router's scores
DEVICE_AUTO, DEVICE_GPU, DEVICE_CPU = "auto", "gpu", "cpu"  # see `devices.choose_device`
DEFAULT_FIT_MARGIN_BYTES = 1 << 30  # as llama.cpp's --fit-target


@dataclass(frozen=True)
class EngineConfig:
    """How a model is loaded and run; names and defaults follow llama.cpp's command line."""

    n_ctx: int = 0  # tokens; 0 = the model's own, at most `DEFAULT_MAX_CTX`
    n_batch: int = 512  # most tokens of a prompt computed at once
    n_threads: int = 0  # 0 = one per physical core
    n_threads_batch: int = 0  # 0 = the same as n_threads
    device: str = DEVICE_CPU  # DEVICE_AUTO, DEVICE_GPU, DEVICE_CPU or one of ggml's, as "cuda0"
    fit_margin_bytes: int = DEFAULT_FIT_MARGIN_BYTES  # memory of a GPU that is left free
    warmup: bool = True  # let a GPU compute once at load, before anybody waits for it
    cache_type_k: str = "f16"  # f16 or q8_0
    cache_type_v: str = "f16"
    context_shift: bool = False  # when the context is full drop the oldest half, not an error
    n_keep: int = 0  # tokens behind the first that a context shift keeps as well
    moe_cache_bytes: int = MOE_CACHE_AUTO  # memory for expert slots; MOE_CACHE_AUTO, MOE_CACHE_OFF
    moe_cache_slots: int = 0  # per layer; 0 = as many as the memory buys
    moe_cache_policy: str = "lfu"  # one of CACHE_POLICIES: which expert leaves first
    moe_cache_profile: str = ""  # file with the uses of experts in earlier runs, kept current
    moe_miss: str = "auto"  # one of MISS_ACTIONS: read a missing expert, or compute from the file
    buddy: str = BUDDY_OFF  # who stands in for missing experts: BUDDY_OFF, BUDDY_AUTO, a policy
    buddy_budget: float | None = None  # most router weight given away, 0 to 1; None = the default
    buddy_min_rank: int = 2  # the router's first choices, up to rank 1, are never replaced
    buddy_profile: str = ""  # "" = the one beside the model if any, BUDDY_OFF = none, or a file
    buddy_seed: int = 0  # of the policy "random"
    counts_weight: bool = False  # count router weight also where nothing can stand in
    verify_every: int = 0  # generated tokens between two that are recomputed exactly; 0 = never


DEFAULT_SAMPLERS = (
    "penalties",
    "dry",
    "top_n_sigma",
    "top_k",
    "typ_p",
    "top_p",
    "min_p",
    "xtc",
    "temperature",
)


@dataclass(frozen=True)
class SamplingConfig:
    """llama.cpp's sampler parameters under llama.cpp's names and with its defaults."""

    seed: int = -1  # -1 = a new one each time
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    top_n_sigma: float = -1.0  # 0 or less = off
    repeat_last_n: int = 64  # tokens, -1 = the whole context
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64  # tokens, -1 = the whole context
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    samplers: tuple[str, ...] = DEFAULT_SAMPLERS  # in this order; not used with mirostat
    mirostat: int = 0  # 0 off, 1 or 2 = the version
    mirostat_lr: float = 0.1
    mirostat_ent: float = 5.0
    grammar: str = ""  # GBNF
    json_schema: str = ""  # JSON schema as text; turned into a grammar
    ignore_eos: bool = False


@dataclass(frozen=True)
class GenerateRequest:
    """One answer to make: either chat `messages` (template applied) or a raw `prompt`."""

    messages: tuple[dict[str, str], ...] = ()  # {"role": system|user|assistant, "content": text}
    prompt: str | None = None
    n_predict: int = -1  # tokens; -1 = until the model stops or the context is full
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


DEFAULT_MAX_CTX = 8192  # without -c a model with a longer context gets this one, and it is said

# What a setting may be at most; a flag and the engine refuse the same.
MAX_CTX = 1 << 24  # tokens
MAX_BATCH = 1 << 16
MAX_THREADS = 512
MAX_MOE_CACHE_BYTES = 1 << 50
MAX_MOE_CACHE_SLOTS = 1 << 16  # per layer
MAX_VERIFY_EVERY = 1 << 20  # tokens
