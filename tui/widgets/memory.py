"""What is filled: the cache's slots, the process's memory, a GPU's."""

from textual.content import Content

from runner.client import Frame, bytes_text
from tui.drawing import gauge
from tui.widgets.panel import Panel

_LABEL_WIDTH = 9
_GAUGE_SHARE = 0.4  # of the width


class Memory(Panel):
    """One gauge each, with its figures in words."""

    def text(self, frame: Frame, width: int) -> Content:
        rows = [self._slots(frame, width), self._process(frame, width), self._device(frame, width)]
        return Content("\n").join(row for row in rows if row is not None)

    def _slots(self, frame: Frame, width: int) -> Content | None:
        stats, info = frame.stats, frame.model
        if stats is None or info is None or not info.n_expert:
            return None
        if not stats.residency:
            return label("slots") + Content("no cache: the file is mapped")
        n_slots = sum(map(len, stats.residency))
        n_filled = sum(expert >= 0 for slots in stats.residency for expert in slots)
        budget = bytes_text(info.moe_cache_bytes)
        words = f"{n_filled:,} of {n_slots:,} ({budget})"
        return self._gauge("slots", n_filled / n_slots if n_slots else 0.0, words, width)

    def _process(self, frame: Frame, width: int) -> Content | None:
        if not frame.memory_bytes:
            return None
        used = bytes_text(frame.memory_bytes)
        if frame.model is None:
            return label("memory") + Content(used)
        whole = frame.model.size_bytes
        words = f"{used}, model {bytes_text(whole)}"
        return self._gauge("memory", frame.memory_bytes / whole if whole else 0.0, words, width)

    def _device(self, frame: Frame, width: int) -> Content | None:
        memory = frame.model.device_memory if frame.model is not None else None
        if memory is None:
            return None
        parts = (memory.weights_bytes, memory.kv_bytes, memory.compute_bytes, memory.slots_bytes)
        used, free = sum(parts), memory.free_bytes
        words = f"{bytes_text(used)}, {bytes_text(free)} free"
        share = used / (used + free) if used + free else 0.0
        return self._gauge("GPU", share, words, width)

    def _gauge(self, name: str, share: float, words: str, width: int) -> Content:
        room = min(int(width * _GAUGE_SHARE), width - _LABEL_WIDTH - len(words) - 1)
        filled, rest = gauge(share, max(0, room), self.is_ascii)
        bar = Content.assemble((filled, "$primary"), (rest, "$text-disabled"))
        return label(name) + bar + Content(f" {words}")


def label(name: str) -> Content:
    """The name of a row, dim."""
    return Content.styled(f"{name:<{_LABEL_WIDTH}}", "$text-muted")
