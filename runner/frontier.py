"""Runs one model exactly once and then with every policy and budget. Knows no terminal.

The runs follow one another in this process, so that their speeds can be compared.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from quant.gguf_file import GGUFFile
from runner.config import EngineConfig
from runner.errors import OptionError
from runner.evaluate import Listeners, compare, prepare, record_base
from runner.model_hash import model_hash
from runner.protocol import FrontierFields, PerplexityFields
from runner.quality.base_run import BaseRun
from runner.quality.evaluation import RunProgress, WindowDone
from runner.quality.frontier import FrontierBase, FrontierPoint, FrontierSetting

FrontierEvent = RunProgress | FrontierBase | FrontierPoint


def measure_frontier(
    wanted: FrontierFields,
    on_progress: Callable[[str, int, int], None],
    emit: Callable[[FrontierEvent], None],
    cancelled: Callable[[], bool],
) -> None:
    """Emit the exact run's cost and then every point, each as soon as it is known.

    Raises BuddyrunError, first for what is known without loading; CancelledError.
    """

    def pass_on(event: RunProgress | WindowDone) -> None:
        if isinstance(event, RunProgress):
            emit(event)

    listeners = Listeners(on_progress, pass_on, cancelled)
    texts = PerplexityFields(wanted.model, wanted.texts, wanted.engine, 0, wanted.max_tokens)
    runs = [(setting, _config(wanted.engine, setting)) for setting in wanted.points]
    windows = prepare(texts, [config for _, config in runs])
    with record_base(wanted.model, wanted.engine, windows, listeners) as base:
        emit(_described(base, wanted))
        for setting, config in runs:
            evaluation = compare(base, config, listeners)
            names = tuple(text.name for text in wanted.texts)
            emit(FrontierPoint(setting, replace(evaluation, texts=names)))


def _config(engine: EngineConfig, setting: FrontierSetting) -> EngineConfig:
    return replace(
        engine,
        buddy=setting.policy,
        buddy_budget=setting.budget,
        buddy_min_rank=setting.min_rank,
        buddy_seed=setting.seed,
    )


def _described(base: BaseRun, wanted: FrontierFields) -> FrontierBase:
    """Raises OptionError when nothing was missing, because all points would be the same."""
    assert base.cost is not None
    if not base.cost.loaded_share and not base.cost.on_host_share:
        raise OptionError(
            "no expert was ever missing in the exact run, so no policy would change anything: hold"
            " fewer of them, with --moe-cache-slots N or --moe-cache SIZE"
        )
    with GGUFFile.open(wanted.model) as file:
        content = model_hash(file)
    return FrontierBase(
        model=Path(wanted.model).name,
        model_hash=content,
        cost=base.cost,
        n_tokens=base.n_tokens,
        n_ctx=base.n_ctx,
        n_windows=len(base.windows),
        texts=tuple(text.name for text in wanted.texts),
    )
