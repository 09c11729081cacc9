"""Which expert is worth a slot on the device, of those that the host had to compute. Pure.

Uploading is not for the token at hand, for which the host is faster, but for those that follow.
"""

from collections.abc import Sequence

from runner.experts.expert_store import ExpertCosts
from runner.experts.slot_table import EMPTY, SlotTable


def expert_to_upload(
    table: SlotTable, costs: ExpertCosts, layer: int, on_host: Sequence[int]
) -> int | None:
    """The expert of `on_host` whose upload pays, or None.

    It is expected to be used as often in the tokens to come as in those behind, by the aged counts
    of the table. So a slot saves, for each use more than the expert that would leave has, the time
    between computing on the host and on the device; that has to be more than the upload takes.
    """
    if not on_host:
        return None
    best = max(on_host, key=lambda expert: table.recent_uses(layer, expert))
    n_uses = table.recent_uses(layer, best)
    saved_s_per_byte = costs.host_s_per_byte - costs.slot_s_per_byte
    n_most_gained = n_uses - table.least_recent_uses(layer)  # whoever would leave
    if n_most_gained <= 0.0 or n_most_gained * saved_s_per_byte <= costs.read_s_per_byte:
        return None
    victim = table.next_victim(layer)
    if victim is None:
        return None
    n_lost_uses = table.recent_uses(layer, victim) if victim != EMPTY else 0.0
    return best if (n_uses - n_lost_uses) * saved_s_per_byte > costs.read_s_per_byte else None
