"""Which device a run computes on, by the name that the user gave. Loads no model."""

from collections.abc import Sequence

from quant.devices import Device, cpu_device, devices
from runner.errors import OptionError

AUTO = "auto"  # the first GPU that ggml can use, else the CPU


def choose_device(name: str, found: Sequence[Device] | None = None) -> Device:
    """The device of this name: "auto", "cpu" or ggml's own in any case, as "cuda0".

    Raises OptionError that lists what there is; BackendError without ggml.
    """
    found = devices() if found is None else found
    gpus = [device for device in found if device.is_gpu]
    if name == AUTO:
        own = [device for device in gpus if device.kind == "gpu"]
        return (own or gpus or [cpu_device()])[0]
    usable = [*gpus, *(device for device in found if device.kind == "cpu")]
    for device in usable:
        if device.name.lower() == name.lower():
            return device
    names = ", ".join(device.name.lower() for device in usable)
    raise OptionError(
        f"--device {name}: the installed llama-cpp-python can use {names}; "
        "buddyrun doctor says what is missing"
    )
