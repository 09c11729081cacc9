"""What this machine can compute on: ggml's libraries, their devices and how fast these are.

The part of `buddyrun doctor` that needs native code; the worker runs it. Knows no terminal.
"""

from collections.abc import Callable
from pathlib import Path

from quant.devices import Device, devices
from quant.errors import BackendError
from quant.ggml import Backend
from quant.ggml_library import library_folder, load_ggml
from runner import bandwidth
from runner.doctor_report import Bandwidth, DeviceReport, DoctorReport
from runner.errors import CancelledError
from runner.hardware import available_memory_bytes, n_cores

_NOT_ASKED = Bandwidth(None, "not measured (--no-measure)")
_SHARE = 4  # a measurement takes at most this part of the free memory
_NAME_START = "ggml-"

Emit = Callable[[str, int, int], None]
Cancelled = Callable[[], bool]


def examine(measure: bool, emit: Emit, cancelled: Cancelled) -> DoctorReport:
    """List what there is and, when asked to, measure it: two to three seconds a device at most.

    Without a usable ggml the report says so in `problem`. Raises CancelledError.
    """
    folder: Path | None = None
    try:
        folder = library_folder()
        ggml, found = load_ggml(), devices()
    except BackendError as error:
        return DoctorReport(
            str(error), str(folder or ""), _libraries(folder), "", (), (), _NOT_ASKED
        )
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
    backends = tuple(dict.fromkeys(device.backend for device in found))
    libraries = _libraries(folder)
    return DoctorReport(
        "", str(folder), libraries, ggml.version_text, backends, tuple(reports), host_read
    )


def _report(device: Device, measure: bool) -> DeviceReport:
    free_bytes, total_bytes = _memory_bytes(device)
    from_host = own_memory = _NOT_ASKED
    if measure:
        limit_bytes = (total_bytes if free_bytes is None else free_bytes) // _SHARE
        from_host, own_memory = _measure(device, limit_bytes)
    return DeviceReport(
        name=device.name.lower(),
        description=device.description,
        backend=device.backend,
        kind=device.kind,
        free_bytes=free_bytes,
        total_bytes=total_bytes,
        from_host=from_host,
        own_memory=own_memory,
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
    available = available_memory_bytes()
    if available is None:
        return Bandwidth(None, "not measured: the system does not say how much memory is free")
    try:
        return bandwidth.host_read(n_cores(), available // _SHARE)
    except BackendError as error:
        return Bandwidth(None, str(error))


def _memory_bytes(device: Device) -> tuple[int | None, int]:
    """(free, total); ggml does not tell what is free of the host's, the system does."""
    free_bytes, total_bytes = device.memory_bytes()
    return (available_memory_bytes() if device.kind == "cpu" else free_bytes), total_bytes


def _libraries(folder: Path | None) -> tuple[str, ...]:
    """The backends whose libraries lie in the folder, with or without a device: "cpu", "cuda"."""
    if folder is None or not folder.is_dir():
        return ()
    names = (path.name.removeprefix("lib").partition(".")[0] for path in folder.iterdir())
    found = {name.removeprefix(_NAME_START) for name in names if name.startswith(_NAME_START)}
    return tuple(sorted(found - {"base"}))
