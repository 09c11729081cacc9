"""`bench --frontier`: measures through the client, prints rows as they come, keeps the files.

Both files are rewritten whole after every run, so that an interrupted frontier leaves what is
known.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runner.config import BUDDY_OFF, BUDDY_POLICIES, EngineConfig
from runner.errors import InternalError, OptionError, WorkerDiedError
from runner.protocol import FrontierFields, NamedText
from runner.quality.evaluation import RunProgress
from runner.quality.frontier import (
    FORMAT,
    FrontierBase,
    FrontierPoint,
    FrontierSetting,
    frontier_json,
    rows_of,
    settings_of,
)
from runner.quality.frontier_svg import frontier_svg
from runner.quality.frontier_table import footer_lines, header_lines, row_line
from runner.terminal import cli_options as options
from runner.terminal.bench_text import cpu_name
from runner.terminal.cli_options import Params
from runner.terminal.model_path import find_model
from runner.terminal.perplexity_command import warn
from runner.terminal.profile_command import duration_text
from runner.terminal.status_line import StatusLine
from runner.terminal.terminal_text import visible

_HEAD_BYTES = 400  # of a file, where a frontier says that it is one
_NOT_COMMON = (  # settings of the engine that a run has of its own, or that are told elsewhere
    "buddy", "buddy_budget", "buddy_min_rank", "buddy_profile", "buddy_seed", "counts_weight",
    "moe_cache_profile", "verify_every",
)  # fmt: skip


def measure_frontier(model: str, params: Params, texts: Sequence[NamedText]) -> None:
    """Print and write what every policy and budget brings and costs. Raises BuddyrunError."""
    path = find_model(model, [])
    files = FrontierFiles(params["frontier_out"])
    config = replace(
        options.engine_config(params), buddy=BUDDY_OFF, buddy_budget=None, verify_every=0
    )
    policies = chosen_policies(params["policies"], config, path)
    wanted = FrontierFields(
        model=str(path),
        texts=tuple(texts),
        points=tuple(
            settings_of(policies, params["budgets"], config.buddy_min_rank, params["seeds"])
        ),
        engine=config,
        max_tokens=params["max_tokens"],
    )
    _measure(wanted, FrontierRecord(wanted, files), params["verbose"])


def chosen_policies(
    named: Sequence[str] | None, config: EngineConfig, model: Path
) -> Sequence[str]:
    """The policies by name, or all that can run; those that cannot are told on stderr."""
    from runner.standins.choose_policy import profile_path
    from runner.standins.make_policy import NEEDS_PROFILE

    if named is not None:
        return named
    if profile_path(config, model) is not None:
        return BUDDY_POLICIES
    print(
        f"note: without a profile of the model {', '.join(NEEDS_PROFILE)} cannot run: `buddyrun"
        " profile MODEL` makes one",
        file=sys.stderr,
    )
    return [policy for policy in BUDDY_POLICIES if policy not in NEEDS_PROFILE]


class FrontierFiles:
    """The two files of a frontier."""

    def __init__(self, stem: str) -> None:
        """Raises OptionError for a folder that is not there and for files that are not ours."""
        plain = Path(stem.removesuffix(".json").removesuffix(".svg"))
        if plain.name in ("", ".."):
            raise OptionError(f"--frontier-out {stem!r:.200}: a name is needed, like frontier")
        if not plain.parent.is_dir():
            raise OptionError(f"--frontier-out: there is no folder {plain.parent}")
        self.json, self.svg = (plain.with_name(plain.name + end) for end in (".json", ".svg"))
        for path in (self.json, self.svg):
            if os.path.lexists(path) and not _is_frontier(path):
                raise OptionError(
                    f"{path} is there and is no former frontier, so it stays as it is: choose"
                    " another name with --frontier-out"
                )

    def write(self, figures: dict[str, Any], picture: str) -> None:
        """Replace both. Raises OptionError."""
        _write(self.json, json.dumps(figures, indent=1, allow_nan=False) + "\n")
        _write(self.svg, picture)


class FrontierRecord:
    """What is known of a frontier so far: prints each row when it is complete, keeps the files."""

    def __init__(self, wanted: FrontierFields, files: FrontierFiles) -> None:
        self._settings = wanted.points
        self._files = files
        self._about = _about(wanted)
        self._base: FrontierBase | None = None
        self._points: list[FrontierPoint] = []
        self._n_printed = 0  # rows

    def begin(self, base: FrontierBase) -> None:
        """The exact run is over."""
        self._base = base
        self._write()
        _print(header_lines(base))

    def add(self, point: FrontierPoint) -> None:
        """The next run is over."""
        self._points.append(point)
        self._write()
        self._print_rows(is_over=len(self._points) == len(self._settings))

    def end(self) -> None:
        """Print what is left to say; also when not all is known."""
        if self._base is None:
            return
        self._print_rows(is_over=True)
        _print(["", *footer_lines(self._base, rows_of(self._points))])
        n_done, n_wanted = len(self._points), len(self._settings)
        if n_done < n_wanted:
            print(f"{n_done} of {n_wanted} runs were done", file=sys.stderr)
        print(visible(f"{self._files.json} and {self._files.svg} written"), file=sys.stderr)

    def _print_rows(self, is_over: bool) -> None:
        """The complete ones: of the last one more seeds may come."""
        rows = rows_of(self._points)
        if rows and not is_over:
            last, following = rows[-1].setting, self._settings[len(self._points)]
            if replace(last, seed=0) == replace(following, seed=0):
                rows.pop()
        _print([row_line(row) for row in rows[self._n_printed :]])
        self._n_printed = len(rows)

    def _write(self) -> None:
        assert self._base is not None
        figures = frontier_json(self._base, self._points, self._about)
        self._files.write(figures, frontier_svg(self._points, self._base))


class FrontierProgress:
    """The line on stderr: which run, how far, the time left."""

    def __init__(self, settings: Sequence[FrontierSetting], status: StatusLine) -> None:
        self._labels = ["exact", *(setting.label for setting in settings)]
        self._status = status
        self._n_runs_done = 0
        self._started_s = time.monotonic()

    def show(self, progress: RunProgress) -> None:
        """Take news of the run that goes on."""
        warn(progress, self._status)
        done = self._n_runs_done * progress.n_total + progress.n_done
        total = len(self._labels) * progress.n_total
        left_s = (time.monotonic() - self._started_s) / done * (total - done)
        label = self._labels[min(self._n_runs_done, len(self._labels) - 1)]
        self._status.show(
            f"run {self._n_runs_done + 1} of {len(self._labels)} ({label}): {progress.n_done} of"
            f" {progress.n_total} tokens, {duration_text(left_s)} left"
        )

    def end_run(self) -> None:
        """The run is over."""
        self._n_runs_done += 1
        self._status.clear()


def _measure(wanted: FrontierFields, record: FrontierRecord, is_verbose: bool) -> None:
    from runner.engine_client import Client

    status = StatusLine(sys.stderr)
    with Client.start() as client:
        try:
            events = client.frontier(wanted, status.show_progress)
            _take(events, record, FrontierProgress(wanted.points, status))
        except (InternalError, WorkerDiedError):
            if is_verbose:
                print(visible(client.log), file=sys.stderr)
            raise
        finally:
            status.clear()
            record.end()


def _take(
    events: Iterable[RunProgress | FrontierBase | FrontierPoint],
    record: FrontierRecord,
    progress: FrontierProgress,
) -> None:
    for event in events:
        if isinstance(event, RunProgress):
            progress.show(event)
            continue
        progress.end_run()
        if isinstance(event, FrontierBase):
            record.begin(event)
        else:
            record.add(event)


def _about(wanted: FrontierFields) -> dict[str, Any]:
    """What all runs have in common, for the file; of other files only names and hashes."""
    from runner.standins.choose_policy import profile_path
    from runner.version import version

    engine = {
        name: value for name, value in asdict(wanted.engine).items() if name not in _NOT_COMMON
    }
    profile = profile_path(wanted.engine, wanted.model)
    texts = [
        {"name": text.name, "sha256": hashlib.sha256(text.text.encode()).hexdigest()}
        for text in wanted.texts
    ]
    return {
        "buddyrun_version": version(),
        "cpu_info": cpu_name(),
        "test_time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "texts": texts,
        "max_tokens": wanted.max_tokens,
        "buddy_profile": profile and {"name": profile.name, "sha256": _sha256(profile)},
        "engine": engine,
    }


def _sha256(path: Path) -> str | None:
    """None when it cannot be read: the worker will say so."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _print(lines: Sequence[str]) -> None:
    for line in lines:
        print(line, flush=True)


def _is_frontier(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return FORMAT.encode() in file.read(_HEAD_BYTES)
    except OSError:
        return False


def _write(path: Path, text: str) -> None:
    """Replace a file, whole or not at all."""
    target = Path(os.path.realpath(path))
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, target)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise OptionError(f"cannot write {path}: {error.strerror}") from error
