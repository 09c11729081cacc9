"""Answers one prompt and ends: for scripts and pipes. Knows no conversation and no command line."""

import time
from typing import TYPE_CHECKING, TextIO

from runner.config import GenerateRequest
from runner.protocol import GenerateResult, ModelInfo, PromptProgress, TextPiece
from runner.terminal.chat_view import REPEATS, ChatView, eight_labels, repeats_itself, summary
from runner.terminal.terminal_text import visible

if TYPE_CHECKING:
    from runner.engine_client import Client


def answer_once(
    client: "Client", request: GenerateRequest, view: ChatView, show_thinking: bool
) -> GenerateResult:
    """Print the answer to stdout as it is made. Raises what the client raises."""
    printer = view.answer(show_thinking)
    result: GenerateResult | None = None
    try:
        for item in client.generate(request):
            match item:
                case TextPiece():
                    printer.push(item.text)
                case PromptProgress():
                    printer.prompt_progress(item)
                case GenerateResult():
                    result = item
    finally:
        printer.close()
    assert result is not None, "an answer ends with its result"
    return result


def remarks(
    result: GenerateResult, info: ModelInfo, began_s: float, err: TextIO, verbose: bool
) -> None:
    """Timings and how the answer ended, on stderr: always when asked for, else for a person. That
    somebody stood in is told always."""
    if verbose:
        lines = list(eight_labels(result, time.monotonic() - began_s, info.load_s))
        lines += [f"note: {note}" for note in info.notes]
    else:
        lines = [summary(result)] if err.isatty() else _standins(result)
    lines += [f"buddyrun: {warning}" for warning in info.warnings]
    if result.stop_reason == "context":
        lines.append(
            f"buddyrun: the answer was cut: the context is full ({result.n_past} of"
            f" {result.n_ctx} tokens); use a larger -c or --context-shift"
        )
    if repeats_itself(result):
        lines.append(f"buddyrun: {REPEATS[0].lower()}{REPEATS[1:-1]}")
    for line in lines:
        print(visible(line), file=err)


def _standins(result: GenerateResult) -> list[str]:
    n_replaced = result.n_substituted + result.n_dropped
    if not n_replaced:
        return []
    n_pairs = n_replaced + result.n_hit + result.n_loaded + result.n_on_host
    return [
        f"buddyrun: {100 * n_replaced / n_pairs:.1f} % of the experts were stood in for;"
        " --exact lets nobody stand in"
    ]
