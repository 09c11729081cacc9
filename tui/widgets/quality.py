"""What stand-ins give away: their budget, their share, and what verifying found."""

from textual.content import Content

from runner.client import Frame, RunSettings, StatsSnapshot
from tui.drawing import gauge
from tui.widgets.memory import label
from tui.widgets.panel import Panel
from tui.words import REPEATED_SHARE, percent, short_percent

_GAUGE_SHARE = 0.4


class Quality(Panel):
    """Policy, budget, shares, KL, repetition."""

    def text(self, frame: Frame, width: int) -> Content:
        stats = frame.stats
        if stats is None:
            return Content.styled("no model yet", "$text-muted")
        settings = frame.settings or RunSettings(
            not stats.buddy, stats.buddy, stats.buddy_budget, False
        )
        rows = [self._policy(settings), *self._budget(stats, settings, width)]
        rows += self._given(stats)
        rows += self._verified(stats)
        if stats.repeated_4grams >= REPEATED_SHARE:
            repeated = percent(stats.repeated_4grams)
            words = f"! the answer repeats itself: {repeated} of its 4-grams"
            rows.append(Content.styled(words, "bold $text-warning"))
        return Content("\n").join(rows)

    def _policy(self, settings: RunSettings) -> Content:
        if settings.is_exact:
            return label("policy") + Content.styled("exact: nobody stands in", "bold")
        if not settings.buddy:
            return label("policy") + Content("nobody has to stand in")
        return label("policy") + Content.styled(settings.buddy, "bold")

    def _budget(self, stats: StatsSnapshot, settings: RunSettings, width: int) -> list[Content]:
        """What the last 256 tokens spent of what they may."""
        if settings.is_exact or not settings.buddy:
            return []
        spent, budget = stats.standin_share, settings.buddy_budget
        if budget >= 1.0:
            return [label("budget") + Content(f"{short_percent(spent)} spent, no limit")]
        words = f" {percent(spent, 1)} of {percent(budget, 1)}"
        room = min(int(width * _GAUGE_SHARE), width - 9 - len(words))
        filled, rest = gauge(spent / budget if budget else 0.0, max(0, room), self.is_ascii)
        bar = Content.assemble((filled, "$warning"), (rest, "$text-disabled"))
        return [label("budget") + bar + Content(words)]

    def _given(self, stats: StatsSnapshot) -> list[Content]:
        """What stand-ins carried since loading."""
        if not stats.n_pairs or not stats.buddy:
            return []
        pairs = short_percent(stats.substituted_share + stats.dropped_share)
        weight = short_percent(stats.substituted_weight_share)
        return [label("replaced") + Content(f"{pairs} of pairs, {weight} of weight")]

    def _verified(self, stats: StatsSnapshot) -> list[Content]:
        if not stats.n_verified:
            return []
        same = percent(stats.verified_agreement)
        words = f"KL {stats.verified_kl:.4f}, same {same} of {stats.n_verified:,}"
        return [label("verified") + Content(words)]
