"""An evaluation as text: the labels of llama-perplexity's --kl-divergence, then what it cost.

Knows no model and computes nothing.
"""

from runner.byte_sizes import bytes_text
from runner.quality.evaluation import Divergence, Evaluation, RunCost

_FEW_TOKENS = 100  # below it llama-perplexity prints no statistics

WINDOWS_HEADER = (
    "chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence"
    "              Δp RMS            Same top p"
)


def window_line(number: int, so_far: Divergence) -> str:
    """The line of one window, as llama-perplexity prints it for a chunk; for all up to it."""
    d = so_far
    return (
        f"{number:4d}    {d.ppl:9.4f} ± {d.ppl_error:9.4f}"
        f"    {d.ln_ppl_ratio:10.5f} ± {d.ln_ppl_ratio_error:10.5f}"
        f"    {d.kl_mean:10.5f} ± {d.kl_mean_error:10.5f}"
        f"    {100 * d.delta_p_rms:6.3f} ± {100 * d.delta_p_rms_error:6.3f} %"
        f"    {100 * d.top1_agreement:6.3f} ± {100 * d.top1_agreement_error:6.3f} %"
    )


def format_text(evaluation: Evaluation) -> str:
    """All figures, ready to print."""
    divergence = evaluation.divergence
    sections = [
        _heading(evaluation),
        _perplexity_lines(divergence),
        _kl_lines(divergence),
        _probability_lines(divergence),
        _cost_lines(evaluation),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def _heading(evaluation: Evaluation) -> list[str]:
    e = evaluation
    windows = f"{e.n_windows} window{'s' if e.n_windows > 1 else ''} of up to {e.n_ctx} tokens"
    lines = [
        f"{', '.join(e.texts)}: {e.divergence.n_tokens} tokens scored in {windows}",
        f"base: exact, every token decoded alone; Q: {_settings(e)}",
    ]
    if e.divergence.n_tokens < _FEW_TOKENS:
        lines.append(f"fewer than {_FEW_TOKENS} tokens: these figures say little")
    return lines


def _settings(e: Evaluation) -> str:
    if e.policy == "off":
        return "exact too"
    budget = "no budget" if e.buddy_budget >= 1 else f"budget {100 * e.buddy_budget:g} %"
    return f"buddies {e.policy}, {budget}, ranks from {e.buddy_min_rank}"


def _perplexity_lines(d: Divergence) -> list[str]:
    rows = (
        ("Mean PPL(Q)", d.ppl, d.ppl_error),
        ("Mean PPL(base)", d.ppl_base, d.ppl_base_error),
        ("Mean ln(PPL(Q)/PPL(base))", d.ln_ppl_ratio, d.ln_ppl_ratio_error),
        ("Mean PPL(Q)/PPL(base)", d.ppl_ratio, d.ppl_ratio_error),
        ("Mean PPL(Q)-PPL(base)", d.ppl_difference, d.ppl_difference_error),
    )
    lines = [f"{label:<30}: {value:10.6f} ± {error:10.6f}" for label, value, error in rows]
    lines.insert(2, f"Cor(ln(PPL(Q)), ln(PPL(base))): {100 * d.ppl_correlation:6.2f}%")
    return ["====== Perplexity statistics ======", *lines]


def _kl_lines(d: Divergence) -> list[str]:
    rows = (
        ("Maximum", d.kl_max),
        ("99.9%  ", d.kl_p999),
        ("99.0%  ", d.kl_p99),
        ("95.0%  ", d.kl_p95),
        ("90.0%  ", d.kl_p90),
        ("Median ", d.kl_median),
        ("10.0%  ", d.kl_p10),
        (" 5.0%  ", d.kl_p5),
        (" 1.0%  ", d.kl_p1),
        (" 0.1%  ", d.kl_p01),
        ("Minimum", d.kl_min),
    )
    return [
        "====== KL divergence statistics ======",
        f"Mean    KLD: {d.kl_mean:10.6f} ± {d.kl_mean_error:10.6f}",
        *(f"{label} KLD: {value:10.6f}" for label, value in rows),
    ]


def _probability_lines(d: Divergence) -> list[str]:
    rows = (
        ("Maximum", d.delta_p_max),
        ("99.9%  ", d.delta_p_p999),
        ("99.0%  ", d.delta_p_p99),
        ("95.0%  ", d.delta_p_p95),
        ("90.0%  ", d.delta_p_p90),
        ("75.0%  ", d.delta_p_p75),
        ("Median ", d.delta_p_median),
        ("25.0%  ", d.delta_p_p25),
        ("10.0%  ", d.delta_p_p10),
        (" 5.0%  ", d.delta_p_p5),
        (" 1.0%  ", d.delta_p_p1),
        (" 0.1%  ", d.delta_p_p01),
        ("Minimum", d.delta_p_min),
    )
    return [
        "====== Token probability statistics ======",
        f"Mean    Δp: {100 * d.delta_p_mean:6.3f} ± {100 * d.delta_p_mean_error:5.3f} %",
        *(f"{label} Δp: {100 * value:6.3f}%" for label, value in rows),
        f"RMS Δp    : {100 * d.delta_p_rms:6.3f} ± {100 * d.delta_p_rms_error:5.3f} %",
        f"Same top p: {100 * d.top1_agreement:6.3f} ± {100 * d.top1_agreement_error:5.3f} %",
    ]


def _cost_lines(e: Evaluation) -> list[str]:
    cells = [_costs(cost) for cost in (e.run, e.base)]
    rows = zip(_COST_LABELS, *cells, strict=True)
    slots = f"{e.moe_cache_slots} slots a layer" if e.moe_cache_slots else "no cache"
    return [
        f"====== Experts: {slots} ======",
        f"{'':<22}{'Q':>12}{'base':>12}",
        *(f"{label:<22}{run:>12}{base:>12}" for label, run, base in rows),
        f"{'bytes, Q / base':<22}{e.bytes_read_ratio:>12.3f}",
    ]


_COST_LABELS = (
    "hit",
    "substituted",
    "loaded",
    "on host",
    "dropped",
    "hit weight",
    "substituted weight",
    "loaded weight",
    "on host weight",
    "dropped weight",
    "bytes read",
    "seconds",
    "tokens/s",
)


def _costs(cost: RunCost) -> tuple[str, ...]:
    shares = (
        cost.hit_share,
        cost.substituted_share,
        cost.loaded_share,
        cost.on_host_share,
        cost.dropped_share,
        cost.hit_weight_share,
        cost.substituted_weight_share,
        cost.loaded_weight_share,
        cost.on_host_weight_share,
        cost.dropped_weight_share,
    )
    return (
        *(f"{100 * part:.2f} %" for part in shares),
        bytes_text(cost.bytes_read),
        f"{cost.seconds:.1f}",
        f"{cost.tokens_per_s:.1f}",
    )
