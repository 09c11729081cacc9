"""Everything that a chat prints. Knows neither commands nor where answers come from.

On a terminal the text of a model is made visible first (`terminal_text`), and help, timings and
thinking are dimmed. Elsewhere stdout receives the answer's text exactly as the model made it, and
nothing else: it is data for the next program; remarks go to stderr.
"""

import os
from collections.abc import Iterator, Sequence
from typing import TextIO

from runner.byte_sizes import bytes_text, range_text
from runner.device_memory import DeviceMemory
from runner.protocol import GenerateResult, ModelInfo, PromptProgress
from runner.terminal.status_line import StatusLine
from runner.terminal.terminal_text import visible, visible_line
from runner.terminal.thinking import Part, ThinkingSplitter

REPEATS = "The answer repeats itself; --exact shows whether the stand-ins are the reason."
CONTEXT_WARNING = 0.8  # share of the context from which on every answer ends with a warning
_REPEATS, _N_REPEATS = 0.5, 128  # share of repeated 4-grams, and tokens, that are remarked on
_DIM, _BOLD, _YELLOW, _RESET = "\x1b[2m", "\x1b[1m", "\x1b[33m", "\x1b[0m"


class ChatView:
    """Prints a chat to `out`, and what is not part of it to `err`."""

    def __init__(self, out: TextIO, err: TextIO, is_terminal: bool, has_color: bool) -> None:
        self.is_terminal = is_terminal
        self._out = out
        self._err = err
        self._has_color = has_color and is_terminal
        self.status = StatusLine(err)

    def banner(self, version: str, info: ModelInfo) -> None:
        """What is running and how to get help; where that is no terminal only the warnings."""
        if not self.is_terminal:
            for warning in info.warnings:
                self.warn(warning)
            return
        self._print(f"{self._styled('buddyrun', _BOLD)} {version}")
        for line in info_lines(info):
            self._print(line)
        for note in (*info.warnings, *info.notes):
            self._print(self._styled(f"note     {visible_line(note)}", _YELLOW))
        self._print(self._styled("/? for help, Ctrl-C stops an answer, /bye leaves", _DIM))

    def say(self, text: str) -> None:
        """A remark of ours: it may quote names and values from outside."""
        stream = self._out if self.is_terminal else self._err
        self._print(visible(text), stream)

    def warn(self, text: str) -> None:
        """A remark that should not be overlooked."""
        stream = self._out if self.is_terminal else self._err
        self._print(self._styled(visible(text), _YELLOW), stream)

    def answer(self, show_thinking: bool) -> "AnswerPrinter":
        """A printer for one answer."""
        return AnswerPrinter(
            self._out, self.status, self.is_terminal, self._has_color, show_thinking
        )

    def last_line(
        self, result: GenerateResult, verbose: bool, total_s: float, load_s: float
    ) -> None:
        """Speeds and context use after an answer, and why it ended if not by itself."""
        if self.is_terminal:
            lines = eight_labels(result, total_s, load_s) if verbose else [summary(result)]
            for line in lines:
                self._print(self._styled(line, _DIM))
        for remark in remarks_on_end(result, self.is_terminal):
            self.warn(remark)

    def _print(self, line: str, stream: TextIO | None = None) -> None:
        self.status.clear()
        stream = stream or self._out
        stream.write(line + "\n")
        stream.flush()

    def _styled(self, text: str, style: str) -> str:
        return f"{style}{text}{_RESET}" if self._has_color else text


class AnswerPrinter:
    """Prints one answer as it streams in."""

    def __init__(
        self,
        out: TextIO,
        status: StatusLine,
        is_terminal: bool,
        has_color: bool,
        show_thinking: bool,
    ) -> None:
        self._out = out
        self._status = status
        self._is_terminal = is_terminal
        self._has_color = has_color
        self._show_thinking = show_thinking
        self._splitter = ThinkingSplitter()
        self._is_dim = False
        self._last = ""  # the last character printed
        self._has_answer = False

    def prompt_progress(self, progress: PromptProgress) -> None:
        """Show how far the prompt is while there is nothing to read yet."""
        done, total = progress.done - progress.n_cached, progress.total - progress.n_cached
        if not self._last and done < total:
            self._status.show_progress("reading the prompt", done, total)

    def push(self, text: str) -> None:
        """Print the next piece."""
        self._status.clear()
        if not self._is_terminal and self._show_thinking:
            self._write(text)
        else:
            for part in self._splitter.push(text):
                self._print_part(part)
        self._out.flush()

    def close(self) -> None:
        """Print what was held back and end the line; also after an interrupted answer."""
        self._status.clear()
        for part in self._splitter.flush():
            self._print_part(part)
        self._set_dim(False)
        if self._last not in ("", "\n"):
            self._out.write("\n")
        self._out.flush()

    def _print_part(self, part: Part) -> None:
        if part.is_thinking and not self._show_thinking:
            self._status.show("thinking ...")
            return
        text = part.text
        if not part.is_thinking and not self._has_answer:
            text = self._begin_answer(text)
        if not text:
            return
        self._set_dim(part.is_thinking)
        self._write(visible(text, self._last) if self._is_terminal else text)

    def _begin_answer(self, text: str) -> str:
        """Leave one empty line after a thinking section and none before an answer."""
        text = text.lstrip("\n") if self._last or not self._show_thinking else text
        if not text:
            return ""
        self._has_answer = True
        return ("\n" if self._last == "\n" else "\n\n") + text if self._last else text

    def _set_dim(self, is_dim: bool) -> None:
        if self._has_color and is_dim != self._is_dim:
            self._out.write(_DIM if is_dim else _RESET)
        self._is_dim = is_dim

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._last = text[-1:] or self._last


def info_lines(info: ModelInfo) -> list[str]:
    """What is running, a line for each thing."""
    threads = "1 thread" if info.n_threads == 1 else f"{info.n_threads} threads"
    lines = [
        f"model    {visible_line(info.name or info.path)}: {model_line(info)}",
        f"context  {info.n_ctx} tokens (trained on {info.n_ctx_train})"
        f"   cache {info.cache_type_k}/{info.cache_type_v}",
        f"device   {visible_line(info.device)}, {threads}",
    ]
    if info.device_memory is not None:
        lines.append(f"memory   {device_memory_line(info.device_memory)}")
    if info.moe_cache_slots:
        lines.append(f"experts  {experts_line(info)}")
    if info.buddy:
        lines.append(f"buddies  {buddies_line(info)}")
    return lines


def remarks_on_end(result: GenerateResult, has_reader: bool) -> Iterator[str]:
    """What should not be overlooked after an answer; a warning ahead only for a person."""
    if result.stop_reason == "context":
        yield (
            f"The answer was cut: the context is full ({result.n_past} of {result.n_ctx}"
            " tokens). /clear starts anew; -c N at the start makes more room; with"
            " --context-shift the oldest part is forgotten instead."
        )
    elif has_reader and result.n_past >= CONTEXT_WARNING * result.n_ctx:
        yield (
            f"{result.n_past / result.n_ctx:.0%} of the context is used"
            f" ({result.n_past} of {result.n_ctx} tokens); /clear starts anew."
        )
    if repeats_itself(result):
        yield REPEATS


def model_line(info: ModelInfo) -> str:
    """Architecture, layers, experts, type and size on one line."""
    experts = f" x {info.n_expert} experts (top {info.n_expert_used})" if info.n_expert else ""
    return (
        f"{visible_line(info.architecture)}, {info.n_layer} layers{experts},"
        f" {visible_line(info.file_type)}, {bytes_text(info.size_bytes)}"
    )


def experts_line(info: ModelInfo) -> str:
    """How many experts are in memory, and which leaves when another is needed."""
    n_slots, memory = info.moe_cache_slots, info.device_memory
    where = "in memory" if memory is None else f"on {visible_line(memory.name)}"
    text = f"{range_text(n_slots)} of {info.n_expert} per layer {where}"
    text += f" ({bytes_text(info.moe_cache_bytes)})"
    if min(n_slots) < info.n_expert:
        text += f", {info.moe_cache_policy}, the rest from the file"
    return text


def device_memory_line(memory: DeviceMemory) -> str:
    """What the model took of a GPU's memory."""
    return (
        f"{visible_line(memory.name)}: weights {bytes_text(memory.weights_bytes)},"
        f" context {bytes_text(memory.kv_bytes)}, compute {bytes_text(memory.compute_bytes)},"
        f" experts {bytes_text(memory.slots_bytes)};"
        f" {bytes_text(memory.free_before_bytes)} were free"
    )


def buddies_line(info: ModelInfo) -> str:
    """Who stands in for missing experts, and how much of an answer that may touch."""
    by = f" by {visible_line(os.path.basename(info.buddy_profile))}" if info.buddy_profile else ""
    if info.buddy_budget >= 1.0:
        return f"{info.buddy}{by}, without a limit; --exact lets nobody stand in"
    most = percent(info.buddy_budget, 1)
    return f"{info.buddy}{by}, at most {most} of the router's weight; --exact lets nobody stand in"


def summary(result: GenerateResult) -> str:
    """The one line after an answer."""
    # A prompt that was stopped half-way has no speed: how much of it was read is not known.
    is_read = result.n_generated > 0 or result.stop_reason != "cancelled"
    prompt = _rate(result.n_prompt - result.n_cached if is_read else 0, result.prompt_s)
    generation = _rate(result.n_generated, result.generation_s)
    parts = [
        f"Prompt: {prompt} t/s",
        f"Generation: {generation} t/s",
        *_pair_shares(result),
        *([f"verified KL {nats(result.verified_kl)}"] if result.n_verified else []),
        f"ctx {tokens(result.n_past)}/{tokens(result.n_ctx)}",
    ]
    ends = {"length": "stopped at -n", "cancelled": "stopped"}
    if result.stop_reason in ends:
        parts.append(ends[result.stop_reason])
    return f"[ {' | '.join(parts)} ]"


def eight_labels(result: GenerateResult, total_s: float, load_s: float) -> Sequence[str]:
    """The timings of an answer under the labels that Ollama prints."""
    n_computed = result.n_prompt - result.n_cached
    rows = [
        ("total duration", _duration(total_s)),
        ("load duration", _duration(load_s)),
        ("prompt eval count", f"{n_computed} token(s)"),
        ("prompt eval duration", _duration(result.prompt_s)),
        ("prompt eval rate", f"{_rate(n_computed, result.prompt_s)} tokens/s"),
        ("eval count", f"{result.n_generated} token(s)"),
        ("eval duration", _duration(result.generation_s)),
        ("eval rate", f"{_rate(result.n_generated, result.generation_s)} tokens/s"),
        ("prompt cached", f"{result.n_cached} token(s)"),
        ("context", f"{result.n_past} of {result.n_ctx} tokens"),
        ("seed", str(result.seed)),
        ("stopped by", result.stop_reason),
    ]
    if result.has_cache:
        rows.append(("experts", ", ".join(_pair_shares(result))))
    if result.n_verified:
        same = percent(result.verified_agreement, 1)
        kl = f"mean KL {nats(result.verified_kl)}, same likeliest token {same}"
        rows.append(("verified", f"{result.n_verified} token(s), {kl}"))
    return [f"{label + ':':<22}{value}" for label, value in rows]


def tokens(n: int) -> str:
    """A token count in a few characters: 812, 1.2k, 8k; contexts are counted in 1024s."""
    if n < 1000:
        return str(n)
    return f"{n / 1024:.1f}k".replace(".0k", "k")


def percent(part: float, whole: float) -> str:
    """A share with one decimal, 87.4 %; of nothing a dash."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def nats(kl: float, n_digits: int = 3) -> str:
    """A divergence: 0.004; one that is too small for these digits is not shown as none."""
    smallest = 10.0**-n_digits
    is_shown = kl == 0.0 or kl >= smallest / 2
    return f"{kl:.{n_digits}f}" if is_shown else f"< {smallest:.{n_digits}f}"


def repeats_itself(result: GenerateResult) -> bool:
    """Whether much of a long answer was said twice while stand-ins may be the reason."""
    is_long = result.n_generated >= _N_REPEATS
    return result.has_buddies and is_long and result.repeated_4grams > _REPEATS


def _pair_shares(result: GenerateResult) -> list[str]:
    """How the experts were served, "hit 87.4 %" first; nothing without a cache."""
    if not result.has_cache:
        return []
    counts = {
        "hit": result.n_hit,
        "buddy": result.n_substituted,
        "load": result.n_loaded,
        "host": result.n_on_host,
        "dropped": result.n_dropped,
    }
    n_pairs = sum(counts.values())
    return [f"{name} {percent(n, n_pairs)}" for name, n in counts.items() if n or name == "hit"]


def _rate(n: int, seconds: float) -> str:
    return f"{n / seconds:.1f}" if n > 0 and seconds > 0 else "-"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.3f}ms"
    return f"{seconds:.3f}s"
