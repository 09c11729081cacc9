"""What this machine can compute on: ggml's libraries, their devices and how fast these are.

The part of `buddyrun doctor` that needs native code; the worker runs it. Knows no terminal.
"""

from collections.abc import Callable
from pathlib import Path

from quant.devices import Device, cpu_device, devices
from quant.errors import BackendError
from quant.ggml import Backend
from quant.ggml_library import library_folder, load_ggml
from runner import bandwidth
from runner.config import DEVICE_AUTO
from runner.devices import choose_device
from runner.doctor_report import Bandwidth, DeviceReport, DoctorReport
from runner.errors import CancelledError
from runner.hardware import available_memory_bytes, n_cores

_NOT_ASKED = Bandwidth(None, "not measured (--no-measure)")
_SHARE = 4  # a measurement takes at most this part of the free memory
_NAME_START = "ggml-"

Emit = Callable[[str, int, int], None]
Cancelled = Callable[[], bool]


def examine(measure: bool, emit: Emit, cancelled: Cancelled) -> DoctorReport:
    """List what there is and, when asked to, measure it: about two seconds a device.

    Without a usable ggml the report says so in `problem`. Raises CancelledError.
    """
    folder: Path | None = None
    try:
        folder = library_folder()
        ggml, found = load_ggml(), devices()
        auto = choose_device(DEVICE_AUTO, found, ()).device
    except BackendError as error:
        return _unusable(str(error), folder)
    reports = []
    host_read = _NOT_ASKED
    for number, device in enumerate(found):
        if measure:
            emit(f"measuring {device.name.lower()}", number, len(found) + 1)
        if cancelled():
            raise CancelledError
        reports.append(_report(device, measure))
    if measure:
        emit("measuring the host's memory", len(found), len(found) + 1)
        host_read = _host_read()
    return DoctorReport(
        problem="",
        library_folder=str(folder),
        libraries=_libraries(folder),
        ggml_version=ggml.version_text,
        backends=tuple(dict.fromkeys(device.backend for device in found)),
        devices=tuple(reports),
        auto_device=auto.name.lower(),
        host_read=host_read,
    )


def _unusable(problem: str, folder: Path | None) -> DoctorReport:
    """The report without a ggml that can be used."""
    not_read = Bandwidth(None, "not measured: ggml cannot be loaded")
    return DoctorReport(problem, str(folder or ""), _libraries(folder), "", (), (), "", not_read)


def _report(device: Device, measure: bool) -> DeviceReport:
    free_bytes, total_bytes = _memory_bytes(device)
    from_host = own_memory = _NOT_ASKED
    if measure:
        from_host, own_memory = _measure(device, _limit_bytes(device))
    return DeviceReport(
        name=device.name.lower(),
        description=device.description,
        backend=device.backend,
        kind=device.kind,
        free_bytes=free_bytes,
        total_bytes=total_bytes,
        from_host=from_host,
        own_memory=own_memory,
        shares_host_memory=device.shares_host_memory,
    )


def _measure(device: Device, limit_bytes: int) -> tuple[Bandwidth, Bandwidth]:
    if device.kind not in ("cpu", "gpu", "igpu"):
        reason = Bandwidth(None, "not measured: it helps the CPU and works in the host's memory")
        return reason, reason
    try:
        with Backend.cpu(n_cores()) if device.kind == "cpu" else Backend.on(device) as backend:
            return (
                bandwidth.from_host(backend, limit_bytes),
                bandwidth.own_memory(backend, limit_bytes),
            )
    except BackendError as error:  # the device is listed but cannot be opened
        reason = Bandwidth(None, str(error))
        return reason, reason


def _host_read() -> Bandwidth:
    try:
        return bandwidth.host_read(n_cores(), _limit_bytes(cpu_device()))
    except BackendError as error:
        return Bandwidth(None, str(error))


def _memory_bytes(device: Device) -> tuple[int | None, int]:
    """(free, total); ggml does not tell what is free of the host's, the system does."""
    free_bytes, total_bytes = device.memory_bytes()
    return (available_memory_bytes() if device.kind == "cpu" else free_bytes), total_bytes


def _limit_bytes(device: Device) -> int:
    """The most that a measurement takes of its memory."""
    free_bytes, total_bytes = _memory_bytes(device)
    return (total_bytes if free_bytes is None else free_bytes) // _SHARE


def _libraries(folder: Path | None) -> tuple[str, ...]:
    """The backends whose libraries lie in the folder, with or without a device: "cpu", "cuda"."""
    if folder is None or not folder.is_dir():
        return ()
    names = (path.name.removeprefix("lib").partition(".")[0] for path in folder.iterdir())
    found = {name.removeprefix(_NAME_START) for name in names if name.startswith(_NAME_START)}
    return tuple(sorted(found - {"base"}))
