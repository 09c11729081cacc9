"""The messages between the terminal's process and the worker. Documented here and nowhere else.

Each message is one JSON object (UTF-8) sent with `Connection.send_bytes`; nothing is pickled.
Requests carry an `id`; every reply to a request carries the same `id`.

Requests, client to worker

    load      {model: path, engine: {EngineConfig fields}, chat_template: text | null}
    generate  {request: {GenerateRequest fields}}
    bench     {tests: [{n_prompt, n_gen}], repetitions, text: text}
    perplexity {PerplexityFields fields}       needs no loaded model, and leaves none
    profile   {ProfileFields fields}           the same
    frontier  {FrontierFields fields}          the same
    doctor    {DoctorFields fields}            the same
    stats     {}
    frame     {}
    change    {ChangeFields fields}
    cancel    {target: id}                     ends a running job; no reply
    shutdown  {}                               no reply; the worker exits with status 0

Replies, worker to client

    progress         {stage: text, done: int, total: int}        while loading, any number of times
    loaded           {info: {ModelInfo fields}}                  ends load
    prompt_progress  {done: int, total: int, n_cached: int}      tokens, after every prompt batch
    text             {text: text, n_tokens: int}                 a piece of the answer
    done             {result: {GenerateResult fields}}           ends generate
    bench_result     {BenchSample fields}                        after every test
    bench_done       {}                                          ends bench
    run_progress     {RunProgress fields}              during a run of perplexity or frontier
    window_done      {number: int, divergence: {Divergence fields}}   of the second run's windows
    perplexity_done  {evaluation: {Evaluation fields}}           ends perplexity
    profile_done     {result: {ProfileResult fields}}            ends profile
    frontier_base    {FrontierBase fields}                       after the exact run of frontier
    frontier_point   {FrontierPoint fields}                      after every other run
    frontier_done    {}                                          ends frontier
    doctor_done      {report: {DoctorReport fields}}             ends doctor
    stats            {snapshot: {StatsSnapshot fields}}          ends stats
    frame            {frame: {Frame fields}}, without the model  ends frame
    changed          {settings: {RunSettings fields}}            ends change, from the next token on
    error            {kind: class name in runner.errors, message: text}   ends any request

A load while a model is loaded replaces it. `stats`, `frame`, `change` and `cancel` are answered
while a generate runs; a second job meanwhile is refused with an error. A message that cannot be
read gets an error with the id null. A worker whose client is gone exits.

Before all this the worker writes one line to its stdout, {address, authkey (hex)}: where it listens
and the key without which `multiprocessing.connection` refuses a caller.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from runner.config import EngineConfig, GenerateRequest
from runner.device_memory import DeviceMemory
from runner.errors import OptionError
from runner.message_values import fields_of
from runner.quality.evaluation import RunProgress, WindowDone
from runner.quality.frontier import FrontierBase, FrontierPoint, FrontierSetting

Message = dict[str, Any]

MAX_MESSAGE_BYTES = 64 << 20
EVENT_TYPES: Mapping[type, str] = {  # what jobs that judge runs tell meanwhile
    RunProgress: "run_progress",
    WindowDone: "window_done",
    FrontierBase: "frontier_base",
    FrontierPoint: "frontier_point",
}


@dataclass(frozen=True)
class ModelInfo:
    """What the client may show about a loaded model."""

    path: str
    name: str
    description: str  # "llama 8 x 29M Q8_0" like llama.cpp's model description
    architecture: str
    file_type: str  # "Q8_0", "Q4_K - Medium"
    n_params: int
    size_bytes: int
    n_layer: int
    n_expert: int
    n_expert_used: int
    n_ctx: int
    n_ctx_train: int
    n_threads: int
    n_batch: int
    cache_type_k: str
    cache_type_v: str
    chat_template: str  # the template's source text
    device: str
    load_s: float
    ggml_version: str
    moe_cache_bytes: int = 0  # memory of all expert slots; 0 = experts stay in the mapped file
    moe_cache_slots: tuple[int, ...] = ()  # per layer
    moe_cache_policy: str = ""
    buddy: str = ""  # the policy that lets others stand in for missing experts; "" = none
    buddy_budget: float = 0.0  # the most of the router's weight that they may carry
    buddy_profile: str = ""  # the file that the policy was made with
    backend: str = "CPU"  # ggml's: "CPU", "CUDA", "Vulkan", "Metal"
    device_memory: DeviceMemory | None = None  # of a GPU
    warnings: tuple[str, ...] = ()  # what nobody should overlook, each one sentence
    notes: tuple[str, ...] = ()  # things the user should know, each one sentence


@dataclass(frozen=True)
class GenerateResult:
    """How one answer ended and what it cost."""

    stop_reason: str  # "eos", "length", "cancelled", "context"
    n_prompt: int  # tokens of the prompt, cached ones included
    n_cached: int  # of these, taken from the KV cache
    n_generated: int
    prompt_s: float
    generation_s: float
    n_past: int  # tokens in the context after the answer
    n_ctx: int
    seed: int
    n_hit: int = 0  # (token, expert) pairs behind the prompt, as `runner.stats` tells them apart
    n_loaded: int = 0
    n_on_host: int = 0
    n_substituted: int = 0
    n_dropped: int = 0
    has_cache: bool = False  # without an expert cache every pair is a hit
    has_buddies: bool = False  # others may have stood in for missing experts
    repeated_4grams: float = 0.0  # share, of the last tokens: see `StatsSnapshot`
    n_verified: int = 0  # tokens that were computed a second time, exactly
    verified_kl: float = 0.0  # mean of these, nats
    verified_agreement: float = 0.0  # share of these where both find the same token most likely


@dataclass(frozen=True)
class PromptProgress:
    """How far the prompt is, in tokens; `n_cached` of them were in the KV cache already."""

    done: int
    total: int
    n_cached: int


@dataclass(frozen=True)
class TextPiece:
    """The next piece of the answer; `n_tokens` made so far."""

    text: str
    n_tokens: int


@dataclass(frozen=True)
class BenchTest:
    """One speed test: a prompt of `n_prompt` tokens, then `n_gen` tokens one by one."""

    n_prompt: int
    n_gen: int


@dataclass(frozen=True)
class BenchSample:
    """The times of one test, one per repetition, and what the experts took in all of these."""

    n_prompt: int
    n_gen: int
    samples_ns: tuple[int, ...]
    n_hit: int = 0  # (token, expert) pairs, as the next four
    n_loaded: int = 0
    n_on_host: int = 0
    n_substituted: int = 0
    n_dropped: int = 0
    load_bytes: int = 0  # of experts, read from the file

    @property
    def n_pairs(self) -> int:
        return self.n_hit + self.n_loaded + self.n_on_host + self.n_substituted + self.n_dropped


@dataclass(frozen=True)
class NamedText:
    """A text and what to call it."""

    name: str
    text: str


@dataclass(frozen=True)
class PerplexityFields:
    """The body of a perplexity message: what is judged, and on which texts."""

    model: str
    texts: tuple[NamedText, ...]
    engine: EngineConfig = field(default_factory=EngineConfig)  # n_ctx is that of a window
    max_windows: int = 0  # of each text; 0 = all
    max_tokens: int = 0  # of each text, from its start; 0 = all


@dataclass(frozen=True)
class FrontierFields:
    """The body of a frontier message: the settings that are compared, and on which texts."""

    model: str
    texts: tuple[NamedText, ...]
    points: tuple[FrontierSetting, ...]
    engine: EngineConfig = field(default_factory=EngineConfig)  # n_ctx is that of a window
    max_tokens: int = 0  # of each text, from its start; 0 = all


@dataclass(frozen=True)
class ProfileFields:
    """The body of a profile message: the model, the texts to run, the file to write."""

    model: str
    texts: tuple[str, ...]
    output: str
    engine: EngineConfig = field(default_factory=EngineConfig)
    n_tokens: int = 2048  # of the texts together


@dataclass(frozen=True)
class ProfileResult:
    """What a profile says in short, and what it took."""

    output: str
    n_bytes: int  # of the file
    n_tokens: int  # that were run
    n_compared: int  # of these, tokens that every expert was computed on
    n_layer: int
    n_expert: int
    device: str  # that compared the experts
    n_kept: int  # contexts and layers that an interrupted run had left
    trace_s: float
    compare_s: float
    estimate_s: float
    best_errors: tuple[float, ...]  # per layer: mean error of an expert's best buddy, 0 to 1
    notes: tuple[str, ...] = ()  # things the user should know, each one sentence


@dataclass(frozen=True)
class DoctorFields:
    """The body of a doctor message."""

    measure: bool = True  # how fast the devices' memory is


@dataclass(frozen=True)
class ChangeFields:
    """The body of a change message; None leaves a setting as it is. See `frames.RunSettings`."""

    is_exact: bool | None = None
    buddy: str | None = None
    buddy_budget: float | None = None
    is_paused: bool | None = None


@dataclass(frozen=True)
class LoadFields:
    """The body of a load message; `chat_template` is template text that replaces the model's."""

    model: str
    engine: EngineConfig = field(default_factory=EngineConfig)
    chat_template: str | None = None


@dataclass(frozen=True)
class GenerateFields:
    """The body of a generate message."""

    request: GenerateRequest


@dataclass(frozen=True)
class BenchFields:
    """The body of a bench message."""

    tests: tuple[BenchTest, ...]
    repetitions: int
    text: str


def encode(message: Message) -> bytes:
    """The bytes of one message. Raises OptionError when it is larger than a worker accepts."""
    data = json.dumps(message, default=fields_of).encode()
    if len(data) > MAX_MESSAGE_BYTES:
        mib = len(data) >> 20
        limit = MAX_MESSAGE_BYTES >> 20
        raise OptionError(f"the text is too long to send: {mib} MiB; at most {limit} MiB")
    return data


def send(connection: Connection, message: Message) -> None:
    """Send one message. Raises OSError when the other side is gone."""
    connection.send_bytes(encode(message))


def receive(connection: Connection) -> Message:
    """Wait for one message. Raises EOFError or OSError when the other side is gone, ValueError
    for bytes that are no message; the next one can still be received."""
    data = connection.recv_bytes(MAX_MESSAGE_BYTES)
    try:
        message = json.loads(data)
    except RecursionError as error:
        raise ValueError("not a message: nested too deeply") from error
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise ValueError(f"not a message: {data[:80]!r}")
    return message
