"""From two runs' logits to figures: log-softmax, KL divergence, perplexity. Pure numpy, float64.

Formulas are those of llama.cpp's tools/perplexity, with the whole distribution in place of its
16-bit log-probabilities cut off at -16.
"""

import math

import numpy as np

from runner.errors import ModelError
from runner.quality.evaluation import Divergence

_MAX_EXPONENT = 709.0  # of exp in float64


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """ln of the probabilities, (n_vocab,) float64, of logits (n_vocab,)."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    shifted -= math.log(np.exp(shifted).sum())
    return shifted


class Scores:
    """What each scored token got, in order; rows are filled one after the other."""

    def __init__(self, n_tokens: int) -> None:
        self.n_scored = 0
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
        base, run = log_softmax(base_logits), log_softmax(logits)
        kl = float(np.exp(base) @ (base - run))
        if not math.isfinite(kl):
            raise ModelError(
                f"the model's answer in front of token {self.n_scored} has values that are no"
                " numbers: the file may be damaged"
            )
        row = self.n_scored
        self._nll_base[row], self._nll[row] = -base[token], -run[token]
        self._kl[row] = max(0.0, kl)  # below 0 by rounding only
        self._delta_p[row] = math.exp(run[token]) - math.exp(base[token])
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
