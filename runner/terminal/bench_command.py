"""The command `bench`: runs the tests through the client and prints them as they end."""

import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from runner.errors import BuddyrunError, OptionError
from runner.protocol import BenchSample, BenchTest, NamedText
from runner.terminal import cli_options as options
from runner.terminal.bench_text import BenchSetting, format_records, label_of_test, records
from runner.terminal.chat_view import ChatView
from runner.terminal.cli_options import Params
from runner.terminal.model_path import find_model
from runner.terminal.run_command import loaded_model

_DEFAULT_TEXT = "bench.txt"


def bench_model(model: str, params: Params) -> None:
    """Print the speed of a model. Raises BuddyrunError."""
    from runner.version import version

    path = find_model(model, [])
    tests = [BenchTest(n, 0) for n in params["prompts"] if n]
    tests += [BenchTest(0, n) for n in params["gens"] if n]
    if not tests:
        raise OptionError("nothing to measure: -p and -n are both 0")
    text, source = bench_text(params["text"])
    view = ChatView(sys.stderr, sys.stderr, sys.stderr.isatty(), has_color=False)
    context = {**params, "n_ctx": max(test.n_prompt + test.n_gen for test in tests) + 1}
    with loaded_model(path, context, None, view) as (client, info):
        for warning in info.warnings:
            view.warn(warning)
        samples = client.bench(tests, params["repetitions"], text)
        setting = BenchSetting(info, source, version(), _now)
        shown = _with_status(samples, tests, view)
        for line in format_records(records(shown, setting), params["form"]):
            print(line, flush=True)


def bench_text(file: str | None) -> tuple[str, str]:
    """The text to measure with and its name. Raises OptionError."""
    if file:
        return options.read_text(file, "the text"), Path(file).name
    path = Path(__file__).parents[1] / "demo" / _DEFAULT_TEXT
    if not path.is_file():
        raise BuddyrunError(f"this installation lacks {path}; give a text with --text FILE")
    return options.read_text(str(path), "the text"), f"buddyrun's {_DEFAULT_TEXT}"


def bench_texts(files: Sequence[str], file: str | None) -> list[NamedText]:
    """The texts to run and their names; without `files` that of `file`. Raises OptionError."""
    if not files:
        text, name = bench_text(file)
        return [NamedText(name, text)]
    return [NamedText(Path(name).name, options.read_text(name, "the text")) for name in files]


def _with_status(
    samples: Iterator[BenchSample], tests: list[BenchTest], view: ChatView
) -> Iterator[BenchSample]:
    """The samples, with a line on stderr that says which test is running."""
    try:
        for number, test in enumerate(tests):
            label = label_of_test(test.n_prompt, test.n_gen)
            view.status.show(f"test {number + 1} of {len(tests)}: {label} ...")
            sample = next(samples, None)
            view.status.clear()
            if sample is None:
                return
            yield sample
        yield from samples
    finally:
        view.status.clear()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
