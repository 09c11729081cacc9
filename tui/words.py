"""What the monitor says about a moment: sentences and figures. Knows no widget."""

import os
from bisect import bisect_left
from dataclasses import dataclass

from runner.client import Frame, ModelInfo, StatsSnapshot, bytes_text, visible_line

REPEATED_SHARE = 0.5  # of an answer's 4-grams, from which on a person is warned


def percent(share: float, digits: int = 0) -> str:
    """As "57 %", or "0.4 %" with a digit."""
    return f"{share * 100:.{digits}f} %"


def short_percent(share: float) -> str:
    """A digit where it matters: "0.4 %" and "57 %"."""
    return percent(share, 1 if 0 < share < 0.0995 else 0)


def times(n: int) -> str:
    return "once" if n == 1 else f"{n:,} times"


def shown(text: str, is_ascii: bool) -> str:
    """A text from outside that can be drawn: on one line, without what a terminal would obey."""
    text = visible_line(text)
    return text.encode("ascii", "replace").decode() if is_ascii else text


def model_name(info: ModelInfo | None) -> str:
    """A model's name as it came: show it with `shown`."""
    return (info.name or os.path.basename(info.path)) if info is not None else "no model yet"


def model_facts(info: ModelInfo) -> str:
    """A model in one line, without its name."""
    experts = f", {info.n_layer} layers x {info.n_expert} experts" if info.n_expert else ", dense"
    return f"{info.file_type}, {bytes_text(info.size_bytes)}{experts}"


def phase_text(frame: Frame) -> str:
    """What the engine does, in words. A pause holds the next answer too: it is always said."""
    is_paused = frame.settings is not None and frame.settings.is_paused
    if not is_paused:
        return _doing(frame)
    is_held = frame.phase in ("paused", "generating")
    return "paused" if is_held else f"paused; {_doing(frame)}"


def _doing(frame: Frame) -> str:
    match frame.phase:
        case "loading":
            done = f", {percent(frame.done / frame.total)}" if frame.total else ""
            return f"loading {frame.stage}".rstrip() + done
        case "prompt":
            done = f", {frame.done:,} of {frame.total:,} tokens" if frame.total else ""
            return f"reading the prompt{done}"
        case "measuring":
            return f"measuring {frame.stage}".rstrip()
        case "ready":
            return "waits for a message"
        case _:
            return frame.phase


def speed_text(frame: Frame, generation_per_s: float, prompt_per_s: float) -> str:
    """The speed now, "" while nothing is computed."""
    if frame.phase == "prompt" and prompt_per_s:
        return f"{figure(prompt_per_s)} tokens/s"
    return f"{figure(generation_per_s)} tokens/s" if generation_per_s else ""


def figure(value: float) -> str:
    """Three digits: "929", "33.5", "0.84"."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


@dataclass(frozen=True)
class CellWords:
    """What is known of one expert: a title and sentences."""

    title: str
    sentences: tuple[str, ...]


def cell_words(stats: StatsSnapshot, layer: int, expert: int) -> CellWords:
    """The expert in words; the counts are those since the model was loaded."""
    counts = stats.experts
    assert counts is not None
    sentences = [_residency(stats, layer, expert)]
    if counts.used:
        sentences.append(_chosen(counts.used[layer], expert))
    else:
        sentences.append("Choices are not counted in this run.")
    sentences.append(_missed(stats, layer, expert))
    sentences += filter(None, (_replaced_by(stats, layer, expert), _stood_in(stats, layer, expert)))
    return CellWords(f"Layer {layer}, expert {expert}", tuple(sentences))


def _residency(stats: StatsSnapshot, layer: int, expert: int) -> str:
    if not stats.residency:
        return "In memory, as all are: no cache."
    slots = stats.residency[layer]
    if expert in slots:
        return f"In slot {slots.index(expert)} of {len(slots)}."
    return "Not in memory."


def _chosen(used: tuple[int, ...], expert: int) -> str:
    n, n_all = used[expert], sum(used)
    if not n:
        return "Never chosen."
    return f"Chosen {times(n)}, {short_percent(n / n_all)} of the layer."


def _missed(stats: StatsSnapshot, layer: int, expert: int) -> str:
    counts = stats.experts
    assert counts is not None
    n, n_replaced = counts.missed[layer][expert], counts.substituted[layer][expert]
    n_loaded = counts.loaded[layer][expert]
    if not n:
        return f"Never missing, read {times(n_loaded)}." if n_loaded else "Never missing."
    share = ""
    if counts.used and counts.used[layer][expert]:
        share = f" ({short_percent(n / counts.used[layer][expert])})"
    return f"Missing {times(n)}{share}, {n_replaced:,} replaced. Read {times(n_loaded)}."


def _replaced_by(stats: StatsSnapshot, layer: int, expert: int) -> str:
    """Who stood in for it, most often first."""
    mine = [(by, n) for missing, by, n in buddies_of(stats, layer) if missing == expert]
    if not mine:
        return ""
    parts = [f"{'nobody' if by < 0 else by} ({n:,})" for by, n in mine]
    return f"Stand-ins: {', '.join(parts)}."


def _stood_in(stats: StatsSnapshot, layer: int, expert: int) -> str:
    counts = stats.experts
    assert counts is not None
    n = counts.stood_in[layer][expert]
    if not n:
        return ""
    helped = sorted(
        ((n, missing) for missing, by, n in buddies_of(stats, layer) if by == expert), reverse=True
    )
    names = ", ".join(f"{missing} ({n:,})" for n, missing in helped[:3])
    return f"Stood in {times(n)}" + (f": for {names}." if names else ".")


def buddies_of(stats: StatsSnapshot, layer: int) -> list[tuple[int, int, int]]:
    """The layer's (missing expert, its stand-in or -1, pairs)."""
    assert stats.experts is not None
    rows = stats.experts.buddies
    begin, end = bisect_left(rows, (layer,)), bisect_left(rows, (layer + 1,))
    return [row[1:] for row in rows[begin:end]]
