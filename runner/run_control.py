"""What the owner changes in a run while it goes on: who stands in, how much, pauses.

Knows what was asked for; the engine is told what holds. Driven by the engine's thread.
"""

from runner.config import BUDDY_AUTO, BUDDY_OFF
from runner.engine import Engine
from runner.errors import OptionError
from runner.frames import RunSettings
from runner.protocol import ChangeFields

_NO_MISSES = "every expert is in memory: none has to be stood in for"


class RunControl:
    """The settings of one loaded model. A run that is exact keeps the policy that it would have."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        now, config = engine.buddies, engine.config
        would_be = config.buddy if config.buddy != BUDDY_OFF else BUDDY_AUTO
        self._settings = RunSettings(
            is_exact=not now.name,
            buddy=now.name or (would_be if engine.can_miss else ""),
            buddy_budget=now.budget or config.buddy_budget or 0.0,
            is_paused=False,
        )

    @property
    def settings(self) -> RunSettings:
        """What holds now; from any thread."""
        return self._settings

    def change(self, wanted: ChangeFields) -> RunSettings:
        """Change what is not None; returns what holds then. All of it or, when it raises, nothing.

        Raises OptionError for values that cannot be, ProfileError for a policy whose profile
        cannot be used.
        """
        is_paused = self._settings.is_paused if wanted.is_paused is None else wanted.is_paused
        is_exact, buddy, budget = self._settings.is_exact, self._settings.buddy, self._budget()
        if (wanted.is_exact, wanted.buddy, wanted.buddy_budget) != (None, None, None):
            if not self._engine.can_miss:
                raise OptionError(_NO_MISSES)
            is_exact = is_exact if wanted.is_exact is None else wanted.is_exact
            buddy = buddy if wanted.buddy is None else _checked_policy(wanted.buddy)
            budget = budget if wanted.buddy_budget is None else _checked_budget(wanted.buddy_budget)
            buddy, budget = self._use(is_exact, buddy, budget)
        self._settings = RunSettings(is_exact, buddy, budget or 0.0, is_paused)
        return self._settings

    def _budget(self) -> float | None:
        return self._settings.buddy_budget or None

    def _use(self, is_exact: bool, buddy: str, budget: float | None) -> tuple[str, float]:
        """Let the engine use a policy, or none; returns the policy's name and budget."""
        chosen = self._engine.choose_standins(buddy, budget)
        if is_exact:
            self._engine.use_standins(self._engine.choose_standins(BUDDY_OFF, None))
        else:
            self._engine.use_standins(chosen)
        return chosen.name, chosen.budget


def _checked_policy(buddy: str) -> str:
    if buddy == BUDDY_OFF:
        raise OptionError("the policy off is what exact does")
    return buddy


def _checked_budget(budget: float) -> float:
    if not 0.0 < budget <= 1.0:
        raise OptionError(f"a budget of {budget:g}: expected a share above 0, at most 1")
    return budget
