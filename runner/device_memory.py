"""Where the memory of a GPU went: plain values, for whoever shows them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceMemory:
    """One model's memory on one device, as allocated at load."""

    name: str  # ggml's, as "CUDA0"
    weights_bytes: int  # all but the experts and the token embedding
    kv_bytes: int  # keys and values of the whole context
    compute_bytes: int  # what passes within and between graphs
    slots_bytes: int  # for experts
    free_before_bytes: int  # by what the driver said; in shared memory, what the host has
    free_bytes: int  # likewise, after loading
