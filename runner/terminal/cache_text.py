"""What `/show cache` prints of a snapshot. Knows neither the view nor where snapshots come from."""

from runner.byte_sizes import bytes_text, range_text
from runner.protocol import ModelInfo
from runner.stats import StatsSnapshot, share
from runner.terminal.chat_view import nats, percent

_N_LOWEST = 5  # layers shown, those where the cache helps least
_WINDOW = 256  # tokens of a budget: `runner.standins.budget.WINDOW`, which would bring numpy along


def cache_text(info: ModelInfo, snapshot: StatsSnapshot) -> str:
    """How the expert cache did since the model was loaded; one sentence without a cache."""
    if not snapshot.n_slots:
        return "There is no expert cache: every expert is used in place, where the file is mapped."
    rows = [("slots", _slots(info, snapshot.n_slots))]
    if snapshot.n_pairs:
        rows += [
            ("pairs", _pairs(snapshot)),
            ("read", f"{bytes_text(sum(snapshot.bytes_read))}, {snapshot.read_gb_per_s:.2f} GB/s"),
            ("read ahead", _read_ahead(snapshot)),
            ("time", _time(snapshot)),
            ("evictions", str(sum(snapshot.n_evicted))),
            ("lowest hit", "\n            ".join(_lowest_layers(snapshot))),
        ]
    else:
        rows.append(("pairs", "nothing was computed yet"))
    rows += _quality_rows(snapshot)
    return "\n".join(f"{label:<12}{value}" for label, value in rows)


def _slots(info: ModelInfo, n_slots: tuple[int, ...]) -> str:
    return (
        f"{range_text(n_slots)} of {info.n_expert} experts per layer"
        f" ({bytes_text(info.moe_cache_bytes)}),"
        f" {info.moe_cache_policy}"
    )


def _pairs(snapshot: StatsSnapshot) -> str:
    return (
        f"{snapshot.n_pairs}: hit {percent(snapshot.hit_share, 1)},"
        f" load {percent(snapshot.loaded_share, 1)},"
        f" host {percent(snapshot.on_host_share, 1)},"
        f" substituted {percent(snapshot.substituted_share, 1)},"
        f" dropped {percent(snapshot.dropped_share, 1)}"
    )


def _read_ahead(snapshot: StatsSnapshot) -> str:
    n_used, n_wasted = snapshot.prefetch_used, snapshot.prefetch_wasted
    return f"{n_used + n_wasted} experts, {percent(n_used, n_used + n_wasted)} of them used"


def _time(snapshot: StatsSnapshot) -> str:
    total_s = snapshot.prompt_s + snapshot.generation_s
    return (
        f"compute {percent(snapshot.compute_s, total_s)},"
        f" waiting for reads {percent(snapshot.wait_s, total_s)},"
        f" Python {percent(snapshot.python_s, total_s)}"
    )


def _quality_rows(snapshot: StatsSnapshot) -> list[tuple[str, str]]:
    """What is known of the answers' quality, where something is."""
    rows = []
    if snapshot.buddy_budget:
        rows.append(("stand-ins", _standins(snapshot)))
    if snapshot.output_entropy:
        entropy, repeated = snapshot.output_entropy, percent(snapshot.repeated_4grams, 1)
        rows.append(("output", f"entropy {entropy:.2f} nats, repeated 4-grams {repeated}"))
    if snapshot.n_verified:
        rows.append(("verified", _verified(snapshot)))
    return rows


def _standins(snapshot: StatsSnapshot) -> str:
    is_bounded = snapshot.buddy_budget < 1.0
    budget = f"budget {percent(snapshot.buddy_budget, 1)}" if is_bounded else "no budget"
    return (
        f"{percent(snapshot.standin_share, 1)} of the router's weight in the last {_WINDOW} tokens"
        f" ({budget}), {percent(snapshot.substituted_weight_share, 1)} since the model was loaded"
    )


def _verified(snapshot: StatsSnapshot) -> str:
    return (
        f"{snapshot.n_verified} tokens: mean KL {nats(snapshot.verified_kl, 4)} nats,"
        f" largest {nats(snapshot.verified_kl_max, 4)},"
        f" same likeliest token {percent(snapshot.verified_agreement, 1)}"
    )


def _lowest_layers(snapshot: StatsSnapshot) -> list[str]:
    """The layers with the lowest share of hits, lowest first."""
    hit, n_pairs = snapshot.hit, snapshot.pairs_per_layer
    layers = sorted(range(len(hit)), key=lambda layer: share(hit[layer], n_pairs[layer]))
    return [
        f"layer {layer:<4}{percent(hit[layer], n_pairs[layer]):>8}"
        f"{snapshot.n_slots[layer]:>5} slots"
        for layer in layers[:_N_LOWEST]
    ]
