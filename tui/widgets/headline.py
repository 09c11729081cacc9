"""The monitor's first lines: which model, on what, what it does now and how fast."""

from textual.content import Content
from textual.reactive import reactive

from runner.client import Frame, StatsRates
from tui.drawing import gauge
from tui.widgets.panel import Panel
from tui.words import model_facts, model_name, phase_text, shown, speed_text

_GAUGE_WIDTH = 20


class Headline(Panel):
    """Two lines."""

    rates: reactive[StatsRates | None] = reactive[StatsRates | None](None, repaint=False)
    ended: reactive[str] = reactive("")  # why no frame follows, in words

    def __init__(self, is_ascii: bool, is_mine: bool, id: str | None = None) -> None:
        super().__init__(is_ascii, id=id)
        self._is_mine = is_mine  # the run can be changed here

    def watch_ended(self) -> None:
        self.redraw()

    def text(self, frame: Frame, width: int) -> Content:
        return Content("\n").join([self._model(frame), self._state(frame)])

    def text_before(self) -> Content:
        return self._end() if self.ended else Content("waits for the engine")

    def _model(self, frame: Frame) -> Content:
        info = frame.model
        name = Content.styled(shown(model_name(info), self.is_ascii), "bold $text-primary")
        if info is None:
            return name
        facts = f"  {model_facts(info)}  {shown(info.device, self.is_ascii)}"
        return name + Content.styled(facts, "$text-muted")

    def _end(self) -> Content:
        return Content.styled(f"ended: {shown(self.ended, self.is_ascii)}", "bold $text-error")

    def _state(self, frame: Frame) -> Content:
        if self.ended:
            return self._end()
        parts = [Content.styled(shown(phase_text(frame), self.is_ascii), "bold")]
        if self._is_mine and frame.settings is not None and frame.settings.is_paused:
            parts.append(Content("p goes on"))
        if frame.total and frame.phase in ("loading", "prompt", "measuring"):
            filled, rest = gauge(frame.done / frame.total, _GAUGE_WIDTH, self.is_ascii)
            parts.append(Content.assemble((filled, "$text-accent"), (rest, "$text-disabled")))
        rates = self.rates
        if rates is not None and frame.phase in ("generating", "prompt", "measuring"):
            speed = speed_text(frame, rates.generation_tokens_per_s, rates.prompt_tokens_per_s)
            parts.append(Content.styled(speed, "bold $text-success"))
        if frame.stats is not None:
            context = f"context {frame.stats.n_past:,} of {frame.stats.n_ctx:,}"
            parts.append(Content.styled(context, "$text-muted"))
        return Content("  ").join(part for part in parts if part.plain)
