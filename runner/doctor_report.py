"""What `buddyrun doctor` finds in the engine's process, as frozen values. Measures nothing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bandwidth:
    """A measured figure, or none and the reason."""

    gb_per_s: float | None  # 10^9 bytes a second; None = could not be measured
    how: str  # how it was measured, or why it was not


@dataclass(frozen=True)
class DeviceReport:
    """One device that ggml can compute on."""

    name: str  # what --device takes: "cpu", "cuda0", "vulkan0"
    description: str
    backend: str  # ggml's name of what drives it: "CPU", "CUDA", "Vulkan"
    kind: str  # as in `quant.devices.Device`
    free_bytes: int | None  # None where the system does not say
    total_bytes: int
    from_host: Bandwidth  # of copies from host memory to the device
    own_memory: Bandwidth  # of its memory, bytes read and bytes written together
    shares_host_memory: bool = False  # as in `quant.devices.Device`

    @property
    def is_gpu(self) -> bool:
        return self.kind in ("gpu", "igpu")


@dataclass(frozen=True)
class DoctorReport:
    """What the ggml libraries can compute on here."""

    problem: str  # why ggml cannot be used; "" = it can, otherwise the lists below are empty
    library_folder: str  # "" = there is none
    libraries: tuple[str, ...]  # the backends that lie there: "cpu", "cuda", "vulkan"
    ggml_version: str
    backends: tuple[str, ...]  # those that show a device, by ggml's names
    devices: tuple[DeviceReport, ...]  # in ggml's order
    auto_device: str  # the name of the one that --device auto takes
    host_read: Bandwidth  # of the machine's own memory, read by all cores
