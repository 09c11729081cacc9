"""From two runs' logits to figures: log-softmax, KL divergence, perplexity. Pure numpy, float64.

Formulas are those of llama.cpp's tools/perplexity, with the whole distribution in place of its
16-bit log-probabilities cut off at -16.
"""

import math
from typing import Any

import numpy as np

from runner.errors import ModelError
from runner.quality.evaluation import Divergence

_MAX_EXPONENT = 709.0  # of exp in float64


class Softmax:
    """ln of probabilities from logits (n_vocab,) of any float type, without allocating."""

    def __init__(self, n_vocab: int, kind: type[np.floating[Any]] = np.float64) -> None:
        """kind: float32 halves the time and keeps six digits."""
        self.exponentials = np.empty(n_vocab, kind)  # `sum_exp` times the last probabilities
        self.shifted = np.empty(n_vocab, kind)  # the last logits minus their maximum
        self.sum_exp = 1.0

    def take(self, logits: np.ndarray) -> None:
        """Compute the above."""
        np.subtract(logits, logits.max(), out=self.shifted, dtype=self.shifted.dtype)
        np.exp(self.shifted, out=self.exponentials)
        self.sum_exp = float(self.exponentials.sum())

    def ln_p(self, token: int) -> float:
        """ln of the probability of a token."""
        return float(self.shifted[token]) - math.log(self.sum_exp)

    def entropy(self) -> float:
        """-sum p ln p in nats, at least 0; uses `shifted` up."""
        self.shifted *= self.exponentials
        entropy = math.log(self.sum_exp) - float(self.shifted.sum()) / self.sum_exp
        return max(entropy, 0.0)  # below 0 by rounding only


class Scores:
    """What each scored token got, in order; rows are filled one after the other."""

    def __init__(self, n_tokens: int) -> None:
        self.n_scored = 0
        self._softmaxes: tuple[Softmax, Softmax] | None = None
        self._nll_base = np.zeros(n_tokens)
        self._nll = np.zeros(n_tokens)
        self._kl = np.zeros(n_tokens)
        self._delta_p = np.zeros(n_tokens)
        self._is_same_top = np.zeros(n_tokens, bool)

    @property
    def nll_base(self) -> np.ndarray:
        """-ln of the probability that base gave the right token, (n_scored,) float64."""
        return self._nll_base[: self.n_scored]

    @property
    def nll(self) -> np.ndarray:
        """The same of Q."""
        return self._nll[: self.n_scored]

    @property
    def kl(self) -> np.ndarray:
        """KL(base || Q), (n_scored,) float64, at least 0."""
        return self._kl[: self.n_scored]

    @property
    def delta_p(self) -> np.ndarray:
        """Probability of the right token, Q minus base, (n_scored,) float64."""
        return self._delta_p[: self.n_scored]

    @property
    def is_same_top(self) -> np.ndarray:
        """Whether both find the same token most likely, (n_scored,) bool."""
        return self._is_same_top[: self.n_scored]

    def add(self, base_logits: np.ndarray, logits: np.ndarray, token: int) -> None:
        """Score the next token, `token`, by the logits (n_vocab,) in front of it.

        Raises ModelError for logits that are no numbers.
        """
        if self._softmaxes is None:
            self._softmaxes = (Softmax(len(logits)), Softmax(len(logits)))
        base, run = self._softmaxes
        base.take(base_logits)
        run.take(logits)
        ln_base, ln_run = base.ln_p(token), run.ln_p(token)
        row = self.n_scored
        self._kl[row] = kl_divergence(base, run)
        if not math.isfinite(self._kl[row] + ln_base + ln_run):
            raise ModelError(
                f"the model's answer in front of token {row} has values that are no numbers: the"
                " file may be damaged"
            )
        self._nll_base[row], self._nll[row] = -ln_base, -ln_run
        self._delta_p[row] = math.exp(ln_run) - math.exp(ln_base)
        self._is_same_top[row] = base_logits.argmax() == logits.argmax()
        self.n_scored += 1

    def divergence(self) -> Divergence:
        """The figures of the tokens so far; at least one."""
        nll, nll_base, kl, delta_p = self.nll, self.nll_base, self.kl, self.delta_p
        ppl, ppl_base = perplexity(nll), perplexity(nll_base)
        ln_ratio = float((nll - nll_base).mean())
        ln_ratio_error = standard_error(nll - nll_base)
        ratio = perplexity(nll - nll_base)
        same_top = float(self.is_same_top.mean())
        rms = math.sqrt((delta_p**2).mean())
        return Divergence(
            n_tokens=self.n_scored,
            ppl=ppl,
            ppl_error=ppl * standard_error(nll),
            ppl_base=ppl_base,
            ppl_base_error=ppl_base * standard_error(nll_base),
            ppl_correlation=_correlation(nll, nll_base),
            ln_ppl_ratio=ln_ratio,
            ln_ppl_ratio_error=ln_ratio_error,
            ppl_ratio=ratio,
            ppl_ratio_error=ratio * ln_ratio_error,
            ppl_difference=ppl - ppl_base,
            ppl_difference_error=standard_error(ppl * nll - ppl_base * nll_base),
            kl_mean=float(kl.mean()),
            kl_mean_error=standard_error(kl),
            delta_p_mean=float(delta_p.mean()),
            delta_p_mean_error=standard_error(delta_p),
            delta_p_rms=rms,
            delta_p_rms_error=0.5 / rms * standard_error(delta_p**2) if rms else 0.0,
            top1_agreement=same_top,
            top1_agreement_error=math.sqrt(same_top * (1 - same_top) / max(1, self.n_scored - 1)),
            **_quantiles("kl", kl, _KL_QUANTILES),
            **_quantiles("delta_p", delta_p, _DELTA_P_QUANTILES),
        )


def kl_divergence(base: Softmax, run: Softmax) -> float:
    """KL(base || run) = sum p (ln p - ln q) in nats; uses `run.shifted` up.

    The constants of ln p and ln q are taken out of the sum.
    """
    np.subtract(base.shifted, run.shifted, out=run.shifted)
    run.shifted *= base.exponentials
    kl = float(run.shifted.sum()) / base.sum_exp + math.log(run.sum_exp) - math.log(base.sum_exp)
    return max(kl, 0.0)  # below 0 by rounding only


def perplexity(nll: np.ndarray) -> float:
    """exp of the mean of n values of -ln p."""
    mean = float(nll.mean())
    return math.exp(mean) if mean < _MAX_EXPONENT else math.inf


def standard_error(values: np.ndarray) -> float:
    """Of the mean of n values; 0.0 for fewer than 11, as llama.cpp has it."""
    return float(values.std()) / math.sqrt(len(values) - 1) if len(values) > 10 else 0.0


_KL_QUANTILES = {
    "max": 1.0, "p999": 0.999, "p99": 0.99, "p95": 0.95, "p90": 0.9, "median": 0.5, "p10": 0.1,
    "p5": 0.05, "p1": 0.01, "p01": 0.001, "min": 0.0,
}  # fmt: skip
_DELTA_P_QUANTILES = {**_KL_QUANTILES, "p75": 0.75, "p25": 0.25}


def _quantiles(what: str, values: np.ndarray, wanted: dict[str, float]) -> dict[str, float]:
    found = np.quantile(values, list(wanted.values()))
    return {f"{what}_{name}": float(value) for name, value in zip(wanted, found, strict=True)}


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    deviation = float(a.std() * b.std())
    if deviation == 0.0:
        return math.nan
    return float(((a - a.mean()) * (b - b.mean())).mean()) / deviation
