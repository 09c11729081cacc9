"""SlotTable: which expert is in which slot of which layer. Pure bookkeeping: no bytes, no ggml.

A slot is empty, being filled (lent to a read) or resident. It can be taken for another expert
unless it is being filled, in use by the running graph, or pinned. One thread writes; others may
copy `slot_of` and `expert_in`.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from runner.experts import eviction
from runner.experts.eviction import LFU_HALF_LIFE

EMPTY = -1
_MAX_HALF_LIVES = 500  # aged counts are scaled down before floats overflow


class SlotTable:
    """The slots of all layers. `slot` counts within a layer, from 0 to n_slots[layer] - 1."""

    def __init__(self, n_slots: Sequence[int], n_expert: int, policy: str) -> None:
        """n_slots: slots of each layer, 1 to n_expert; policy: see `eviction.worth`."""
        assert all(1 <= n <= n_expert for n in n_slots), n_slots
        self.n_slots = tuple(n_slots)
        self.policy = policy
        shape = (len(n_slots), max(n_slots))
        self.slot_of = np.full((len(n_slots), n_expert), EMPTY, np.int32)  # of residents only
        self.expert_in = np.full(shape, EMPTY, np.int32)  # residents only
        self.last_used = np.full(self.slot_of.shape, -1, np.int64)  # tokens, one clock per layer
        self.frequency = np.zeros(self.slot_of.shape)  # of uses, aged
        self.n_uses = np.zeros(self.slot_of.shape, np.int64)
        self.n_evicted = [0] * len(n_slots)
        self._filling = np.full(shape, EMPTY, np.int32)  # the expert that is being read
        self._in_use = np.zeros(shape, bool)
        self._pinned = np.zeros(shape, bool)
        self._favourites: list[list[int]] | None = None
        self._n_resident = [0] * len(n_slots)
        self._n_tokens = [0] * len(n_slots)
        self._least: list[float | None] = [None] * len(n_slots)  # see `least_recent_uses`

    # what is asked for

    def record_use(self, layer: int, expert_ids: np.ndarray) -> None:
        """Count the experts that a batch asks for, resident or not: (n_tokens, n_expert_used)."""
        n_tokens = len(expert_ids)
        clock = self._n_tokens[layer]
        if clock > _MAX_HALF_LIVES * LFU_HALF_LIFE:
            self.frequency[layer] *= 2.0 ** -(clock / LFU_HALF_LIFE)
            self.last_used[layer] -= clock
            self._n_tokens[layer] = clock = 0
            self._least[layer] = None
        increment = 2.0 ** (clock / LFU_HALF_LIFE)
        self._n_tokens[layer] += n_tokens
        if n_tokens == 1:  # an expert comes at most once in a token
            self._record_use_of_token(layer, expert_ids, clock, increment)
            return
        self.count_uses(layer, expert_ids)
        tokens = np.arange(clock, clock + n_tokens)[:, None]
        np.maximum.at(self.last_used[layer], expert_ids, tokens)
        counts = np.bincount(expert_ids.ravel(), minlength=self.slot_of.shape[1])
        self.frequency[layer] += counts * increment

    def _record_use_of_token(
        self, layer: int, expert_ids: np.ndarray, clock: int, increment: float
    ) -> None:
        n_uses, last_used = self.n_uses[layer], self.last_used[layer]
        frequency = self.frequency[layer]
        for expert in expert_ids[0].tolist():
            n_uses[expert] += 1
            last_used[expert] = clock
            frequency[expert] += increment

    def count_uses(self, layer: int, expert_ids: np.ndarray) -> None:
        """Count the experts that a batch asks for where nobody will ever be evicted."""
        if len(expert_ids) == 1:
            self.n_uses[layer, expert_ids[0]] += 1
        else:
            counts = np.bincount(expert_ids.ravel(), minlength=self.n_uses.shape[1])
            self.n_uses[layer] += counts

    def expect(self, frequency: np.ndarray) -> None:
        """Begin with the aged counts of earlier runs, (n_layer, n_expert).

        The most frequent experts are the favourites: empty slots are for them, and `static` pins
        them.
        """
        self.frequency[:] = frequency
        self._least = [None] * len(self.n_slots)
        ranked = np.argsort(-frequency, axis=1, kind="stable")
        self._favourites = [
            ranked[layer, :n_slots].tolist() for layer, n_slots in enumerate(self.n_slots)
        ]

    def favourites(self, layer: int) -> list[int]:
        """The experts that empty slots are for, the most frequent first; [] if not known."""
        return self._favourites[layer] if self._favourites is not None else []

    def n_empty(self, layer: int) -> int:
        """Slots that nobody has."""
        n_taken = (self.expert_in[layer] != EMPTY) | (self._filling[layer] != EMPTY)
        return self.n_slots[layer] - int(n_taken.sum())

    def has_empty(self, layer: int) -> bool:
        """Whether a slot of the layer holds no expert."""
        return self._n_resident[layer] < self.n_slots[layer]

    def worth(self, layer: int) -> np.ndarray:
        """How much each expert of a layer is worth keeping, (n_expert,)."""
        return eviction.worth(self.policy, self.last_used[layer], self.frequency[layer])

    def recent_uses(self, layer: int, expert: int) -> float:
        """How often an expert was asked for, older tokens counting less: see `LFU_HALF_LIFE`."""
        return float(self.frequency[layer, expert]) * self._age(layer)

    def least_recent_uses(self, layer: int) -> float:
        """No resident has fewer `recent_uses`; 0.0 with an empty slot. Quick, and may be too low:
        what was added since `next_victim` looked is left out."""
        if self.has_empty(layer):
            return 0.0
        least = self._least[layer]
        if least is None:
            least = float(self.frequency[layer, self.residents(layer)].min())
            self._least[layer] = least
        return least * self._age(layer)

    def _age(self, layer: int) -> float:
        """What an aged count is multiplied with to be one of uses."""
        return float(2.0 ** -(self._n_tokens[layer] / LFU_HALF_LIFE))

    # what is where

    def residents(self, layer: int) -> np.ndarray:
        """The experts in this layer's slots, (n,) int32."""
        here = self.expert_in[layer]
        residents: np.ndarray = here[here != EMPTY]
        return residents

    def is_full(self, layer: int) -> bool:
        """Whether every expert of the layer has a slot of its own."""
        return self.n_slots[layer] == self.slot_of.shape[1]

    def has_all(self, layer: int) -> bool:
        """Whether every expert of the layer is resident: in the slot of its number, for good."""
        return self._n_resident[layer] == self.slot_of.shape[1]

    @property
    def has_everything(self) -> bool:
        """Whether every expert of every layer is resident."""
        return min(self._n_resident) == self.slot_of.shape[1]

    def n_unpinned(self, layer: int) -> int:
        """Slots whose expert may change."""
        return self.n_slots[layer] - int(self._pinned[layer].sum())

    def pinned(self, layer: int) -> list[int]:
        """The experts that are never evicted."""
        experts: list[int] = self.expert_in[layer, self._pinned[layer]].tolist()
        return experts

    def is_pinned(self, layer: int, slot: int) -> bool:
        return bool(self._pinned[layer, slot])

    def is_filling(self, layer: int, expert: int) -> bool:
        """Whether the expert is being read into a slot."""
        return bool((self._filling[layer] == expert).any())

    # filling

    def can_take(self, layer: int) -> bool:
        """Whether `take` would find a slot."""
        return bool(self._takeable(layer))

    def next_victim(self, layer: int) -> int | None:
        """Who leaves at the next `take`: a resident, or EMPTY; None where it would find no slot."""
        self._least[layer] = None
        slots = self._takeable(layer)
        if not slots:
            return None
        if self.is_full(layer):
            return EMPTY
        return int(self.expert_in[layer, self._least_worth(layer, slots)])

    def take(self, layer: int, expert: int) -> int:
        """Lend a slot to a read of `expert`, which must have none; evicts the least worth.

        The slot is nobody's until `commit` or `fail`. Ask `can_take` first. In a layer with a slot
        for every expert, each has the slot of its own number.
        """
        assert self.slot_of[layer, expert] == EMPTY, f"expert {expert} is resident already"
        assert not self.is_filling(layer, expert), f"expert {expert} is being read already"
        slots = self._takeable(layer)
        assert slots, "every slot is in use"
        if self.is_full(layer):
            self._filling[layer, expert] = expert
            return expert
        slot = self._least_worth(layer, slots)
        self._evict(layer, slot)
        self._filling[layer, slot] = expert
        return slot

    def commit(self, layer: int, slot: int) -> None:
        """The bytes are there: the expert that the slot was lent for is resident."""
        expert = self._end_filling(layer, slot)
        self.slot_of[layer, expert] = slot
        self.expert_in[layer, slot] = expert
        self._n_resident[layer] += 1
        self._least[layer] = None
        if self._is_worth_a_pin(layer, expert):
            self._pinned[layer, slot] = True

    def fail(self, layer: int, slot: int) -> None:
        """The read did not succeed: the slot is empty."""
        self._end_filling(layer, slot)

    # keeping

    def hold(self, layer: int, slots: np.ndarray) -> None:
        """Mark resident slots that a graph is about to read."""
        self._in_use[layer, slots] = True

    def hold_only(self, layer: int, slots: np.ndarray) -> None:
        """The same, when no graph reads the layer's other slots any more."""
        self._in_use[layer] = False
        self._in_use[layer, slots] = True

    def release(self, layer: int, slots: np.ndarray | None = None) -> None:
        """The graph has read these slots; None = all of the layer."""
        self._in_use[layer, slots if slots is not None else slice(None)] = False

    def pin(self, layer: int, experts: Iterable[int]) -> None:
        """Never evict these residents."""
        for expert in experts:
            slot = self.slot_of[layer, expert]
            assert slot != EMPTY, f"expert {expert} is not resident"
            self._pinned[layer, slot] = True

    def unpin(self, layer: int, experts: Iterable[int]) -> None:
        for expert in experts:
            slot = self.slot_of[layer, expert]
            assert slot != EMPTY, f"expert {expert} is not resident"
            self._pinned[layer, slot] = False

    # Without numpy: asked for per layer and token, and a few plain numbers are faster.

    def _least_worth(self, layer: int, slots: Sequence[int]) -> int:
        """The slot of these that is empty, else the one whose expert is worth least."""
        experts, worth = self.expert_in[layer].tolist(), self.worth(layer).tolist()
        empty = (slot for slot in slots if experts[slot] == EMPTY)
        least = min(slots, key=lambda slot: worth[experts[slot]])
        return next(empty, least)

    def _takeable(self, layer: int) -> list[int]:
        filling, in_use = self._filling[layer].tolist(), self._in_use[layer].tolist()
        pinned = self._pinned[layer].tolist()
        return [
            slot
            for slot in range(self.n_slots[layer])
            if filling[slot] == EMPTY and not in_use[slot] and not pinned[slot]
        ]

    def _evict(self, layer: int, slot: int) -> None:
        expert = self.expert_in[layer, slot]
        if expert != EMPTY:
            self.slot_of[layer, expert] = EMPTY
            self.expert_in[layer, slot] = EMPTY
            self._n_resident[layer] -= 1
            self.n_evicted[layer] += 1

    def _end_filling(self, layer: int, slot: int) -> int:
        expert = int(self._filling[layer, slot])
        assert expert != EMPTY, f"slot {slot} of layer {layer} is not being filled"
        self._filling[layer, slot] = EMPTY
        return expert

    def _is_worth_a_pin(self, layer: int, expert: int) -> bool:
        n_pins = eviction.n_pinned_at_most(self.policy, self.n_slots[layer])
        if n_pins == 0 or int(self._pinned[layer].sum()) >= n_pins:
            return False
        return self._favourites is None or expert in self._favourites[layer][:n_pins]
