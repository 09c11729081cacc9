"""A frame as text that is printed once: what `top --once` and `ps` show. Knows no socket."""

from dataclasses import replace

from runner.byte_sizes import bytes_text
from runner.frames import Frame
from runner.stats import StatsSnapshot, share
from runner.terminal.cache_text import cache_text
from runner.terminal.chat_view import buddies_line, model_line, percent, tokens
from runner.terminal.terminal_text import visible_line

PS_HEADER = ("PID", "MODEL", "SIZE", "DEVICE", "DOING", "CONTEXT", "SLOTS", "HIT", "BUDDY", "T/S")
_RAMP = " .:-=+*#%@"  # none to most


def frame_text(frame: Frame) -> str:
    """All of a frame, in lines of plain characters."""
    rows = [
        ("process", f"{frame.owner_pid} (engine {frame.pid}), buddyrun {frame.version}"),
        ("doing", doing(frame)),
    ]
    if frame.memory_bytes:
        rows.append(("memory", f"{bytes_text(frame.memory_bytes)} in RAM, mapped files included"))
    model, stats = frame.model, frame.stats
    if model is None or stats is None:
        return _lines(rows)
    rows[1:1] = [("model", f"{visible_line(model.name or model.path)}: {model_line(model)}")]
    rows += [
        ("device", visible_line(model.device)),
        ("context", f"{stats.n_past} of {stats.n_ctx} tokens"),
        ("speed", _speed(stats)),
        ("buddies", _buddies(frame)),
    ]
    parts = [_lines(rows), cache_text(model, stats)]
    if stats.experts is not None and stats.n_pairs:
        parts.append(_usage(stats))
    return "\n".join(parts)


def doing(frame: Frame) -> str:
    """The phase in words, with how far it is."""
    if frame.phase in ("loading", "measuring") and frame.stage:
        far = f", {percent(frame.done, frame.total)}" if frame.total else ""
        return f"{frame.phase} ({visible_line(frame.stage)}{far})"
    if frame.phase == "prompt":
        return f"reading the prompt ({frame.done} of {frame.total} tokens)"
    return "no model" if frame.phase == "empty" else frame.phase


def ps_row(frame: Frame) -> tuple[str, ...]:
    """A line of `ps`, by PS_HEADER; figures since the model was loaded."""
    model, stats = frame.model, frame.stats
    if model is None or stats is None:
        return (str(frame.owner_pid), "-", "-", "-", doing(frame), "-", "-", "-", "-", "-")
    n_slots = stats.n_slots
    return (
        str(frame.owner_pid),
        visible_line(model.name or model.path)[:30],
        bytes_text(model.size_bytes),
        visible_line(model.backend),
        doing(frame),
        f"{tokens(stats.n_past)}/{tokens(stats.n_ctx)}",
        f"{sum(n_slots)}/{len(n_slots) * model.n_expert}" if n_slots else "all",
        percent(stats.hit_share, 1) if stats.n_pairs else "-",
        percent(stats.substituted_share, 1) if stats.buddy else "off",
        _rate(stats.n_tokens_generated, stats.generation_s),
    )


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows of equal length, as columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _lines(rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"{label:<12}{value}" for label, value in rows)


def _speed(stats: StatsSnapshot) -> str:
    return (
        f"prompt {_rate(stats.n_tokens_prompt, stats.prompt_s)} t/s,"
        f" generation {_rate(stats.n_tokens_generated, stats.generation_s)} t/s"
        " since the model was loaded"
    )


def _rate(n: int, seconds: float) -> str:
    return f"{n / seconds:.1f}" if n and seconds else "-"


def _buddies(frame: Frame) -> str:
    assert frame.model is not None
    settings = frame.settings
    if settings is None or not settings.buddy:
        return "none: every expert is in memory"
    if settings.is_exact:
        return "none: exact"
    now = replace(frame.model, buddy=settings.buddy, buddy_budget=settings.buddy_budget)
    return buddies_line(now)


def _usage(stats: StatsSnapshot) -> str:
    """How often each expert was chosen: a row per layer; residents are in brackets."""
    assert stats.experts is not None
    lines = ["experts     a row per layer, darker = chosen more often, [resident]"]
    everyone = range(len(stats.experts.used[0]))
    residency = stats.residency or (everyone,) * len(stats.experts.used)
    for layer, (used, residents) in enumerate(zip(stats.experts.used, residency, strict=True)):
        most = max(used, default=0)
        cells = "".join(_cell(share(n, most), expert in residents) for expert, n in enumerate(used))
        lines.append(f"layer {layer:<6}{cells}")
    return "\n".join(lines)


def _cell(level: float, is_resident: bool) -> str:
    mark = _RAMP[round(level * (len(_RAMP) - 1))]
    return f"[{mark}]" if is_resident else f" {mark} "
