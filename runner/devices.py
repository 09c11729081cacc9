"""Which device a run computes on, by the name that the user gave. Loads no model."""

from collections.abc import Sequence
from dataclasses import dataclass

from quant.devices import Device, devices
from runner.config import DEVICE_AUTO, DEVICE_CPU, DEVICE_GPU
from runner.errors import BackendError, OptionError
from runner.gpu_hardware import Gpu, SystemPlaces, find_gpus


@dataclass(frozen=True)
class DeviceChoice:
    """The device, and what the user should know of it, each one sentence."""

    device: Device
    notes: tuple[str, ...] = ()


def choose_device(
    name: str, found: Sequence[Device] | None = None, gpus: Sequence[Gpu] | None = None
) -> DeviceChoice:
    """The device of this name: "auto" or "gpu" (the first GPU, else the CPU and a note), "cpu", or
    ggml's own name in any case, as "cuda0".

    found: what ggml can use; gpus: what the machine has; both are looked up if not given. "auto"
    notes a GPU that ggml cannot use, "gpu" also that there is none. Raises OptionError that lists
    what there is; BackendError without ggml.
    """
    found = devices() if found is None else found
    if name not in (DEVICE_AUTO, DEVICE_GPU):
        return DeviceChoice(_named(name, found))
    usable = [device for device in found if device.is_gpu]
    if usable:
        own_memory = [device for device in usable if device.kind == "gpu"]
        return DeviceChoice((own_memory or usable)[0])
    gpus = find_gpus(SystemPlaces()) if gpus is None else gpus
    return DeviceChoice(_named(DEVICE_CPU, found), _idle_notes(name, gpus))


def _named(name: str, found: Sequence[Device]) -> Device:
    usable = [device for device in found if device.is_gpu or device.kind == "cpu"]
    for device in usable:
        if device.name.lower() == name.lower():
            return device
    if name == DEVICE_CPU:
        raise BackendError("the ggml libraries have no CPU backend: reinstall llama-cpp-python")
    names = ", ".join(device.name.lower() for device in usable)
    raise OptionError(
        f"--device {name}: the installed llama-cpp-python can use {names}; "
        "buddyrun doctor says what is missing"
    )


def _idle_notes(name: str, gpus: Sequence[Gpu]) -> tuple[str, ...]:
    if gpus:
        names = " and ".join(gpu.name for gpu in gpus)
        what = f"{names} cannot be used by the installed llama-cpp-python"
    elif name == DEVICE_GPU:
        what = "There is no GPU that the installed llama-cpp-python can use"
    else:
        return ()
    return (f"{what}: the CPU computes. buddyrun doctor says what to do.",)
