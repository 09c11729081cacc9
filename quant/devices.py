"""What ggml can compute on: the devices of every backend that the installed libraries bring.

Knows no model and allocates nothing.
"""

from dataclasses import dataclass

from quant.errors import BackendError
from quant.ggml_library import (
    device_memory_bytes,
    device_properties,
    library_folder,
    load_ggml,
)

_OF_APPLE = ("MTL", "Metal")
_KINDS = ("cpu", "gpu", "igpu", "accel", "meta")  # enum ggml_backend_dev_type


@dataclass(frozen=True)
class Device:
    """One device; ggml keeps it for as long as the process lives."""

    handle: int
    name: str  # ggml's: "CPU", "CUDA0", "Vulkan0"
    description: str
    backend: str  # the backend it belongs to: "CPU", "CUDA", "Vulkan", "Metal"
    kind: str  # "cpu", "gpu" (memory of its own), "igpu" (the host's memory), "accel"
    has_events: bool
    has_host_buffer: bool  # pinned host memory, which it copies faster

    @property
    def shares_host_memory(self) -> bool:
        """Whether what it holds is taken from the host: integrated graphics, Apple's chips."""
        return self.kind == "igpu" or self.backend in _OF_APPLE

    @property
    def is_gpu(self) -> bool:
        return self.kind in ("gpu", "igpu")

    def memory_bytes(self) -> tuple[int, int]:
        """Its memory now: (free, total). The CPU tells the machine's total as both."""
        return device_memory_bytes(load_ggml(), self.handle)


def devices() -> tuple[Device, ...]:
    """All devices in ggml's order, the GPUs first. Raises BackendError without ggml."""
    ggml = load_ggml()
    return tuple(_describe(ggml.backend_dev_get(i)) for i in range(ggml.backend_dev_count()))


def cpu_device() -> Device:
    """The CPU. Raises BackendError when the libraries have no CPU backend."""
    for device in devices():
        if device.kind == "cpu":
            return device
    raise BackendError(f"the ggml libraries in {library_folder()} have no CPU backend")


def _describe(handle: int) -> Device:
    ggml = load_ggml()
    properties = device_properties(ggml, handle)
    registry = ggml.backend_dev_backend_reg(handle)
    return Device(
        handle,
        (properties.name or b"?").decode(errors="replace"),
        (properties.description or b"?").decode(errors="replace"),
        (ggml.backend_reg_name(registry) or b"?").decode(errors="replace"),
        _KINDS[properties.type] if 0 <= properties.type < len(_KINDS) else "meta",
        bool(properties.events),
        bool(properties.host_buffer),
    )
