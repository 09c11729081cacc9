"""What the engine's process tells of a GPU that a plan is for: native code stays in that one."""

from typing import TYPE_CHECKING

from runner.config import DEVICE_AUTO, DEVICE_CPU, DEVICE_GPU
from runner.errors import BackendError, OptionError

if TYPE_CHECKING:
    from runner.show import ReportedDevice


def reported_device(name: str) -> "ReportedDevice | None":
    """The GPU of this name, as the engine's process finds it; None for the CPU.

    Raises OptionError, and BackendError where ggml cannot be used.
    """
    if name == DEVICE_CPU:
        return None
    from runner.engine_client import Client
    from runner.protocol import DoctorFields
    from runner.show import ReportedDevice

    with Client.start() as client:
        report = client.doctor(DoctorFields(measure=False))
    if report.problem:
        raise BackendError(report.problem)
    wanted = report.auto_device if name in (DEVICE_AUTO, DEVICE_GPU) else name
    for device in report.devices:
        if device.name == wanted:
            if not device.is_gpu:
                return None
            free_bytes, is_shared = device.free_bytes or 0, device.shares_host_memory
            return ReportedDevice(device.name, free_bytes, device.total_bytes, is_shared)
    names = ", ".join(device.name for device in report.devices)
    raise OptionError(f"--device {name}: the installed llama-cpp-python can use {names}")
