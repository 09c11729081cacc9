"""A frontier as a Markdown table, line by line as its rows come. Knows no model."""

from collections.abc import Sequence

from runner.byte_sizes import bytes_text
from runner.quality.frontier import FrontierBase, FrontierRow
from runner.terminal.terminal_text import visible_line

_COLUMNS = (
    ("policy", 12),
    ("budget", 8),
    ("substituted weight", 18),
    ("substituted pairs", 17),
    ("read/token (x exact)", 20),
    ("t/s (x exact)", 16),
    ("mean KL", 19),
    ("99 % KL", 8),
    ("PPL ratio", 17),
    ("same top", 8),
)
_LEFT = ("policy",)
_NOTHING = "-"


def header_lines(base: FrontierBase) -> list[str]:
    """The head of the table and the exact run's row."""
    cost = base.cost
    exact = (
        "exact", _NOTHING, _NOTHING, _NOTHING,
        f"{bytes_text(round(cost.bytes_read / base.n_tokens))} (1.00)",
        f"{cost.tokens_per_s:.1f} (1.00)", "0", "0", "1", "100 %",
    )  # fmt: skip
    rules = ("-" * width if name in _LEFT else "-" * (width - 1) + ":" for name, width in _COLUMNS)
    return [_line([name for name, _ in _COLUMNS]), f"| {' | '.join(rules)} |", _line(exact)]


def row_line(row: FrontierRow) -> str:
    """One row."""
    setting = row.setting
    seeds = f" ({row.n_seeds}x)" if row.n_seeds > 1 else ""
    star = " *" if row.stayed_below else ""
    return _line(
        (
            "exact again" if row.is_exact else setting.policy + seeds,
            _NOTHING if row.is_exact else setting.budget_label + star,
            _NOTHING if row.is_exact else f"{100 * row.substituted_weight:.2f} %",
            _NOTHING if row.is_exact else f"{100 * row.substituted_pairs:.2f} %",
            f"{bytes_text(round(row.bytes_per_token))} ({row.bytes_ratio:.2f})",
            f"{row.tokens_per_s:.1f} ({row.speed_ratio:.2f})",
            f"{row.kl:.5f} ± {row.kl_error:.5f}",
            f"{row.kl_p99:.4f}",
            f"{row.ppl_ratio:.4f} ± {row.ppl_ratio_error:.4f}",
            f"{100 * row.same_top:.1f} %",
        )
    )


def footer_lines(base: FrontierBase, rows: Sequence[FrontierRow]) -> list[str]:
    """What was measured, and how the columns are meant."""
    slots = {p.evaluation.moe_cache_slots for row in rows for p in row.points}
    held = f", {min(slots)} slots a layer" if slots else ""
    names = ", ".join(map(visible_line, base.texts))
    n_windows = f"{base.n_windows} window{'s' * (base.n_windows > 1)}"
    lines = [
        f"{visible_line(base.model)}{held}; {base.n_tokens} tokens of {names} in {n_windows} of up"
        f" to {base.n_ctx} tokens, every token decoded alone.",
        "KL and PPL against the exact run of the same file; ± is the standard error of the mean.",
        "Speeds are those of one run each, one after another in one process: what else the machine"
        " did is in them, and `exact again` shows how much. Read: experts, from the file.",
    ]
    if any(row.n_seeds > 1 for row in rows):
        lines.insert(2, "(Nx): the mean of N seeds, ± the standard deviation among them.")
    if any(row.stayed_below for row in rows):
        lines.insert(2, "*: stayed below nine tenths of its budget: beside it is what it reached.")
    return lines


def _line(cells: Sequence[str]) -> str:
    padded = (
        cell.ljust(width) if name in _LEFT else cell.rjust(width)
        for cell, (name, width) in zip(cells, _COLUMNS, strict=True)
    )
    return f"| {' | '.join(padded)} |"
