"""The command `perplexity`: judges settings through the client and prints the figures."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from runner.errors import InternalError, OptionError, WorkerDiedError
from runner.protocol import NamedText, PerplexityFields
from runner.quality.evaluation import Evaluation, RunProgress, WindowDone
from runner.quality.report import WINDOWS_HEADER, format_text, window_line
from runner.terminal import cli_options as options
from runner.terminal.cli_options import Params
from runner.terminal.model_path import find_model
from runner.terminal.status_line import StatusLine
from runner.terminal.terminal_text import visible


def judge_model(model: str, params: Params) -> None:
    """Print how far settings are from the exact run of the same file. Raises BuddyrunError."""
    path = find_model(model, [])
    if not params["texts"]:
        raise OptionError("there is no text to score: give one with -f FILE")
    texts = [
        NamedText(Path(name).name, options.read_text(name, "the text")) for name in params["texts"]
    ]
    wanted = PerplexityFields(
        model=str(path),
        texts=tuple(texts),
        engine=options.engine_config(params),
        max_windows=params["max_windows"],
        max_tokens=params["max_tokens"],
    )
    evaluation = _evaluate(wanted, params["verbose"])
    if params["as_json"]:
        print(json.dumps(evaluation.as_json(), indent=2))
    else:
        print(visible(format_text(evaluation)))


def _evaluate(wanted: PerplexityFields, is_verbose: bool) -> Evaluation:
    """The worker's figures; meanwhile a line on stderr says how far it is."""
    from runner.engine_client import Client

    status = StatusLine(sys.stderr)
    with Client.start() as client:
        try:
            events = client.perplexity(wanted, status.show_progress)
            return _last(events, status, is_verbose)
        except (InternalError, WorkerDiedError):
            if is_verbose:
                print(visible(client.log), file=sys.stderr)
            raise
        finally:
            status.clear()


def _last(
    events: Iterator[RunProgress | WindowDone | Evaluation], status: StatusLine, is_verbose: bool
) -> Evaluation:
    evaluation: Evaluation | None = None
    for event in events:
        if isinstance(event, Evaluation):
            evaluation = event
        elif isinstance(event, RunProgress):
            warn(event, status)
            status.show(progress_text(event))
        elif is_verbose:
            status.clear()
            if event.number == 1:
                print(WINDOWS_HEADER, file=sys.stderr)
            print(window_line(event.number, event.divergence), file=sys.stderr, flush=True)
    assert evaluation is not None, "the last item of a job is its result"
    return evaluation


def warn(progress: RunProgress, status: StatusLine) -> None:
    """Print the engine's warnings; the exact run's, which comes first, are those of all runs."""
    if progress.is_base and progress.warnings:
        status.clear()
        for warning in progress.warnings:
            print(visible(f"buddyrun: {warning}"), file=sys.stderr)


def progress_text(progress: RunProgress) -> str:
    """What the line on stderr says."""
    name = "exact run" if progress.is_base else "run"
    text = f"{name}: {progress.n_done} of {progress.n_total} tokens, PPL {progress.ppl:.4f}"
    return text if progress.is_base else f"{text}, KLD {progress.kl_mean:.6f}"
