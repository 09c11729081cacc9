"""Makes the profile of a model: runs a text, compares the experts, writes the table of buddies.

The steps of `buddyrun profile` in the engine's process; whatever is finished is kept, so that an
interrupted run goes on where it was. Knows no terminal.
"""

import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quant.gguf_file import GGUFFile
from runner.buddies import BuddyTable, PolicyEstimate
from runner.checks.file_check import check_unchanged
from runner.checks.read_model import read_model
from runner.config import BUDDY_OFF, EngineConfig
from runner.engine import Engine
from runner.errors import CancelledError, ProfileError
from runner.hardware import available_memory_bytes, n_cores
from runner.layer_trace import LayerTrace
from runner.model_config import ModelConfig
from runner.model_hash import model_hash
from runner.profiling import statistics
from runner.profiling.calibration import CONTEXT_TOKENS, Calibration, calibrate
from runner.profiling.estimates import LayerRouting, estimate
from runner.profiling.statistics import LayerRecord
from runner.profiling.workspace import ContextTrace, Shape, Workspace, folder_for
from runner.protocol import ProfileFields, ProfileResult
from runner.standins import buddymoe
from runner.tokenizer import Tokenizer

if TYPE_CHECKING:
    from runner.profiling.expert_outputs import ExpertOutputs

MAX_SAMPLED = 1024  # tokens that experts are compared on
_MAX_OUTPUTS = 1 << 28  # numbers that a layer's experts may put out for them: 1 GiB
_TRACING = "running the text"
_COMPARING = "comparing experts"
_ESTIMATING = "comparing policies"

Emit = Callable[[str, int, int], None]
Cancelled = Callable[[], bool]


def make_profile(wanted: ProfileFields, emit: Emit, cancelled: Cancelled) -> ProfileResult:
    """Make and write a profile; emit(stage, done, total) tells how far it is.

    Raises ProfileError, OptionError, the errors of loading a model, and CancelledError; then what
    is finished stays in the working folder, and the same job continues there.
    """
    output = Path(wanted.output)
    emit("loading PyTorch", 0, 1)
    experts_of = _experts_of()
    with GGUFFile.open(wanted.model) as file:
        model = read_model(file)
        _check(model, output)
        calibration = _calibration(wanted, file, model)
        shape = Shape(model.n_layer, model.n_expert, model.n_expert_used, model.n_embd)
        name = model_hash(file)
        with Workspace(folder_for(output), name, shape, calibration) as work:
            run = _Run(wanted, file, model, calibration, work, emit, cancelled)
            try:
                work.check_room()
                run.trace()
                run.compare(experts_of)
            except OSError as error:
                raise work.problem(error) from error
            records = [work.record_of(layer) for layer in range(model.n_layer)]
            table = _table(work, records, name, calibration)
            table = replace(table, estimates=run.estimate(table, records))
            check_unchanged(file)
            table.save(output)
            work.remove()
    return _result(run, table, records, output)


class _Run:
    """One run over the contexts and the layers that are not finished yet."""

    def __init__(
        self, wanted: ProfileFields, file: GGUFFile, model: ModelConfig,
        calibration: Calibration, work: Workspace, emit: Emit, cancelled: Cancelled,
    ) -> None:  # fmt: skip
        self._wanted = wanted
        self._file = file
        self._model = model
        self._calibration = calibration
        self._work = work
        self._emit = emit
        self._cancelled = cancelled
        self.notes: tuple[str, ...] = ()  # what the user should know, each one sentence
        self.n_kept = 0  # contexts and layers that an earlier run finished
        self.trace_s = self.compare_s = self.estimate_s = 0.0
        self.device = ""

    def trace(self) -> None:
        """Run the contexts and keep what the routers did; the engine is closed after it."""
        n_contexts = len(self._calibration.contexts)
        missing = [number for number in range(n_contexts) if not self._work.has_context(number)]
        self.n_kept += n_contexts - len(missing)
        if not missing:
            return
        started = time.perf_counter()
        config = _tracing(self._wanted.engine)
        engine = Engine(self._wanted.model, config, self._emit, self._cancelled)
        try:
            self.notes += engine.notes
            for number in missing:
                self._work.save_context(number, self._trace_of(engine, number))
        finally:
            engine.close()
        self.trace_s = time.perf_counter() - started

    def _trace_of(self, engine: Engine, number: int) -> ContextTrace:
        n_layer = self._model.n_layer
        total = len(self._calibration.contexts) * n_layer
        traces: list[list[LayerTrace]] = [[] for _ in range(n_layer)]

        def on_layer(layer: int, trace: LayerTrace) -> None:
            traces[layer].append(trace)
            self._emit(_TRACING, number * n_layer + layer, total)

        def joined(name: str) -> np.ndarray:
            layers = [np.concatenate([getattr(t, name) for t in layer]) for layer in traces]
            return np.stack(layers)[:, 1:]  # the first token does not count

        engine.reset()
        engine.trace(self._calibration.contexts[number], on_layer, self._cancelled)
        ffn_input = joined("ffn_input")[:, self._calibration.sampled_in(number)]
        return ContextTrace(
            joined("expert_ids"),
            joined("weights"),
            joined("scores"),
            joined("residual_power"),
            ffn_input.astype(np.float16),
        )

    def compare(self, experts_of: "type[ExpertOutputs]") -> None:
        """Compute every expert on the sampled tokens, layer by layer, and keep the products."""
        started = time.perf_counter()
        n_layer, n_expert = self._model.n_layer, self._model.n_expert
        n_bytes = experts_of.needed_bytes(self._model, len(self._calibration.sampled))
        available = available_memory_bytes()
        if available is not None and n_bytes > available:
            raise ProfileError(
                f"comparing the experts takes {n_bytes / 1e9:.1f} GB of memory, and "
                f"{available / 1e9:.1f} GB are free; the same command goes on when there is more"
            )
        experts = experts_of(self._file, self._model, self._wanted.engine.n_threads or n_cores())
        self.device = experts.device_name
        for layer in range(n_layer):
            if self._work.has_gram(layer):
                self.n_kept += 1
                continue
            stage = f"{_COMPARING}, layer {layer + 1} of {n_layer}"

            def on_expert(n_done: int, layer: int = layer, stage: str = stage) -> None:
                self._emit(stage, layer * n_expert + n_done, n_layer * n_expert)

            on_expert(0)
            ffn_input = self._work.ffn_input(layer)
            self._work.save_gram(layer, experts.gram(layer, ffn_input, on_expert, self._cancelled))
        self.compare_s = time.perf_counter() - started

    def estimate(
        self, table: BuddyTable, records: Sequence[LayerRecord]
    ) -> tuple[PolicyEstimate, ...]:
        """What each policy would cost."""
        started = time.perf_counter()
        sampled = self._calibration.sampled
        layers = [
            LayerRouting(*self._work.routing(layer), sampled, record.gram)
            for layer, record in enumerate(records)
        ]

        def on_done(done: int, total: int) -> None:
            if self._cancelled():
                raise CancelledError
            self._emit(_ESTIMATING, done, total)

        found = estimate(layers, table, on_done)
        self.estimate_s = time.perf_counter() - started
        return found


def _tracing(engine: EngineConfig) -> EngineConfig:
    """The user's settings, for a context at a time and with every token's own experts."""
    return replace(engine, n_ctx=CONTEXT_TOKENS, n_batch=CONTEXT_TOKENS, buddy=BUDDY_OFF)


def _experts_of() -> "type[ExpertOutputs]":
    """The class that computes experts. Raises ProfileError when torch is not there."""
    try:
        from runner.profiling.expert_outputs import ExpertOutputs
    except (ImportError, OSError) as error:
        found = "is not installed" if isinstance(error, ModuleNotFoundError) else "does not load"
        raise ProfileError(
            f"a profile is made with PyTorch, which {found} ({error}): "
            "uv tool install '.[profile]' in a checkout"
        ) from error
    return ExpertOutputs


def is_table_file(path: Path) -> bool:
    """Whether a profile, of whatever model and version, lies there."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "tae_percentiles.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def _check(model: ModelConfig, output: Path) -> None:
    """Raise ProfileError for what cannot be profiled or must not be overwritten."""
    if model.n_expert < 2:
        what = "one expert" if model.is_moe else "no experts"
        raise ProfileError(
            f"this model has {what}: there is nothing that could stand in for anything; a profile "
            "is for a Mixture-of-Experts model"
        )
    if output.exists() and not is_table_file(output):
        raise ProfileError(
            f"{output} exists and is no profile; name another file with -o FILE, or remove it"
        )


def _calibration(wanted: ProfileFields, file: GGUFFile, model: ModelConfig) -> Calibration:
    with Tokenizer(file.paths[0]) as tokenizer:
        texts = [
            tokenizer.tokenize(text, add_special=False, parse_special=True) for text in wanted.texts
        ]
        bos = tokenizer.bos if tokenizer.add_bos else None
    n_sampled = min(MAX_SAMPLED, _MAX_OUTPUTS // (model.n_expert * model.n_embd))
    return calibrate(texts, bos, wanted.n_tokens, n_sampled)


def _table(
    work: Workspace, records: list[LayerRecord], name: str, calibration: Calibration
) -> BuddyTable:
    """The table of what the finished layers recorded."""
    routings = [work.routing(layer) for layer in range(len(records))]
    stood_in = [statistics.standing_in(record) for record in records]
    n = records[0].scores.shape[1]
    return BuddyTable(
        model_hash=name,
        n_tokens=calibration.n_tokens,
        uses=np.stack([statistics.uses(ids, n) for ids, _, _ in routings]),
        coactivation=np.stack([buddymoe.coactivation(ids, n) for ids, _, _ in routings]),
        scale=np.stack([scale for scale, _ in stood_in]),
        error=np.stack([error for _, error in stood_in]),
        tae_percentiles=np.stack([statistics.tae_percentiles(z, ids) for ids, _, z in routings]),
        gram=np.stack([statistics.mean_gram(record) for record in records]),
        power=statistics.power_behind(records, list(map(work.residual_power, range(len(records))))),
    )


def _result(
    run: _Run, table: BuddyTable, records: list[LayerRecord], output: Path
) -> ProfileResult:
    used = [statistics.uses(record.expert_ids, table.n_expert) for record in records]
    n_unused = sum(int((n == 0).sum()) for n in used)
    notes = run.notes
    if n_unused:
        notes += (
            f"{n_unused} of {table.uses.size} experts were chosen by none of the compared tokens, "
            "so nothing is known of who could stand in for them: a larger --tokens helps.",
        )
    return ProfileResult(
        output=str(output),
        n_bytes=output.stat().st_size,
        n_tokens=table.n_tokens,
        n_compared=len(records[0].expert_ids),
        n_layer=table.n_layer,
        n_expert=table.n_expert,
        device=run.device,
        n_kept=run.n_kept,
        trace_s=run.trace_s,
        compare_s=run.compare_s,
        estimate_s=run.estimate_s,
        best_errors=tuple(map(statistics.best_error, table.error, used)),
        notes=notes,
    )
