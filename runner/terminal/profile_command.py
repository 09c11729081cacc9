"""The command `profile`: gathers the texts, lets the worker make the profile, prints what it says.

An interrupted profile is continued by the same command, and this says so.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from runner.buddies import default_path
from runner.byte_sizes import bytes_text
from runner.errors import BuddyrunError, InternalError, OptionError, WorkerDiedError
from runner.profiling.workspace import folder_for
from runner.protocol import NamedText, ProfileFields, ProfileResult
from runner.terminal import cli_options as options
from runner.terminal.cli_options import Params
from runner.terminal.history import LineHistory, default_history_path
from runner.terminal.model_path import find_model
from runner.terminal.status_line import StatusLine
from runner.terminal.terminal_text import visible

_DEFAULT_TEXT = "calibration.txt"
_N_RANGES = 4  # of layers, that figures are given for


def profile_model(model: str, params: Params, environment: Mapping[str, str]) -> None:
    """Make a model's profile and print what it says. Raises BuddyrunError."""
    path = find_model(model, []).absolute()
    output = Path(params["output"] or default_path(path)).absolute()
    texts = gather_texts(params["texts"], params["with_history"], environment)
    wanted = ProfileFields(
        model=str(path),
        texts=tuple(text.text for text in texts),
        output=str(output),
        engine=options.engine_config(params),
        n_tokens=params["n_tokens"],
    )
    with _hint_at_the_rest(output):
        result = _make(wanted, params["verbose"])
    for note in result.notes:
        print(visible(f"note: {note}"), file=sys.stderr)
    print(visible(format_result(result, [text.name for text in texts])))


def gather_texts(
    files: tuple[str, ...], with_history: bool, environment: Mapping[str, str]
) -> list[NamedText]:
    """The texts, and what to call them. Raises OptionError when one cannot be read."""
    texts = [NamedText(Path(name).name, options.read_text(name, "the text")) for name in files]
    if not files:
        path = Path(__file__).parents[1] / "demo" / _DEFAULT_TEXT
        if not path.is_file():
            raise BuddyrunError(f"this installation lacks {path}; give a text with --text FILE")
        text = options.read_text(str(path), "the text")
        texts.append(NamedText(f"buddyrun's {_DEFAULT_TEXT}", text))
    if with_history:
        lines = LineHistory(_history_path(environment)).load()
        if not lines:
            raise OptionError("--history: no lines of chats are kept; leave it out")
        name = f"{len(lines)} line{'s' * (len(lines) > 1)} of your chats"
        texts.append(NamedText(name, "\n".join(lines)))
    return texts


def format_result(result: ProfileResult, texts: list[str]) -> str:
    """What was written, what it took, and how good the buddies are."""
    kept = " Parts of it were there from an interrupted run." if result.n_kept else ""
    return "\n".join(
        [
            f"{result.output} written ({bytes_text(result.n_bytes)}): {result.n_layer} layers of "
            f"{result.n_expert} experts.",
            f"{result.n_tokens} tokens of {_listed(texts)} were run in "
            f"{duration_text(result.trace_s)}, and all experts compared on {result.n_compared} of "
            f"them in {duration_text(result.compare_s)} ({result.device}).{kept}",
            f"The best buddy leaves {_percent(result.best_errors)} of an expert's output "
            f"unexplained{_by_range(result.best_errors)}.",
        ]
    )


def duration_text(seconds: float) -> str:
    """As "0.4 s", "12 s", "5 min" or "2 h 10 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class ProgressLine:
    """The line on stderr while a profile is made: what is done, how far, the time left."""

    def __init__(self, status: StatusLine) -> None:
        self._status = status
        self._total = 0  # of the stage that is timed
        self._first_done = 0
        self._started_s = 0.0

    def show(self, stage: str, done: int, total: int) -> None:
        """Take news of a stage; one with another total is another one."""
        now_s = time.monotonic()
        if total != self._total or done < self._first_done:
            self._total, self._first_done, self._started_s = total, done, now_s
        left = ""
        if done > self._first_done:
            rate = (now_s - self._started_s) / (done - self._first_done)
            left = f", {duration_text(rate * (total - done))} left"
        self._status.show_progress(stage + left, done, total)


def _make(wanted: ProfileFields, is_verbose: bool) -> ProfileResult:
    from runner.engine_client import Client

    status = StatusLine(sys.stderr)
    with Client.start() as client:
        try:
            return client.profile(wanted, ProgressLine(status).show)
        except (InternalError, WorkerDiedError):
            if is_verbose:
                print(visible(client.log), file=sys.stderr)
            raise
        finally:
            status.clear()


@contextmanager
def _hint_at_the_rest(output: Path) -> Iterator[None]:
    """Say how to go on when the profile is interrupted or its process dies."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, WorkerDiedError):
        folder = folder_for(output)
        if folder.is_dir():
            print(
                visible(
                    f"buddyrun: what is finished is kept in {folder}; the same command goes on"
                ),
                file=sys.stderr,
            )
        raise


def _history_path(environment: Mapping[str, str]) -> Path | None:
    """The file of the lines typed in chats, as a chat chooses it."""
    chosen = environment.get("BUDDYRUN_HISTORY")
    if chosen is None:
        return default_history_path(environment, sys.platform == "win32")
    try:
        return Path(chosen).expanduser() if chosen else None
    except RuntimeError as error:  # ~name of a user that does not exist
        raise OptionError(f"cannot read the history in {chosen}: there is no such user") from error


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _percent(shares: tuple[float, ...]) -> str:
    low, high = round(100 * min(shares)), round(100 * max(shares))
    return f"{low} %" if low == high else f"{low}-{high} %"


def _by_range(errors: tuple[float, ...]) -> str:
    """The mean in some ranges of layers, as " (layers 1-8: 40 %, 9-16: 52 %)"."""
    n, n_ranges = len(errors), min(_N_RANGES, len(errors))
    if n_ranges < 2:
        return ""
    parts = []
    for i in range(n_ranges):
        start, end = i * n // n_ranges, (i + 1) * n // n_ranges
        name = f"{start + 1}" if end - start == 1 else f"{start + 1}-{end}"
        parts.append(f"{name}: {100 * sum(errors[start:end]) / (end - start):.0f} %")
    return f" (layers {', '.join(parts)})"
