"""What `buddyrun doctor` prints, as text of 80 columns. Asks nobody and prints nothing itself."""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from quant.ggml_library import SUPPORTED_LLAMA_CPP_PYTHON
from runner.byte_sizes import bytes_text
from runner.doctor_report import Bandwidth, DeviceReport, DoctorReport
from runner.gpu_advice import GpuFinding, Install

_COLUMNS = 79
_INDENT = "    "
_WORD = re.compile(r"""(?:[^\s"']|"[^"]*"|'[^']*')+""")  # of a shell command
_NAME_COLUMNS = 18
_KINDS = {
    "cpu": "the CPU",
    "gpu": "GPU with its own memory",
    "igpu": "GPU in the host's memory",
    "accel": "accelerator of the CPU",
}
_SOFTWARE = ("llvmpipe", "lavapipe", "swiftshader")  # Vulkan devices that are the CPU


@dataclass(frozen=True)
class Diagnosis:
    """Everything that the command has to tell."""

    report: DoctorReport
    gpus: tuple[GpuFinding, ...]
    install: Install | None  # None = nothing lacks
    notes: tuple[str, ...]  # what went wrong meanwhile, in sentences
    llama_cpp_lib_path: str  # the variable of this name; "" = not set


def format_diagnosis(diagnosis: Diagnosis) -> str:
    """The sections, without a final line end; names of devices come from their drivers."""
    report = diagnosis.report
    sections = [_section("Libraries", _library_rows(diagnosis))]
    if report.problem:
        sections.append(_loud("GGML CANNOT BE LOADED", [report.problem]))
    sections += [_device(device, report.auto_device) for device in report.devices]
    if report.devices:
        sections.append(_section("The host's memory", _bandwidth_rows("reading", report.host_read)))
    sections.append(_gpus(diagnosis))
    if diagnosis.install is not None:
        sections.append(_install(diagnosis.install, diagnosis.llama_cpp_lib_path))
    if diagnosis.notes:
        sections.append(_loud("NOTES", diagnosis.notes))
    return "\n\n".join(sections)


def _library_rows(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    report = diagnosis.report
    folder = report.library_folder or "none: llama-cpp-python is not installed"
    is_override = report.library_folder and diagnosis.llama_cpp_lib_path
    rows = [("folder", folder + (" (LLAMA_CPP_LIB_PATH)" if is_override else ""))]
    if report.problem:
        return rows
    idle = _without_device(report)
    rows = [("ggml", report.ggml_version), *rows, ("backends", ", ".join(report.backends))]
    return [*rows, ("without a device", ", ".join(idle))] if idle else rows


def _without_device(report: DoctorReport) -> list[str]:
    """Libraries of backends that show no device; ggml names two of them otherwise than files."""
    shown = {{"ROCm": "hip", "MTL": "metal"}.get(name, name.lower()) for name in report.backends}
    return [name for name in report.libraries if name.partition("-")[0] not in shown]


def _device(device: DeviceReport, auto: str) -> str:
    title = f"--device {device.name}"
    if device.kind not in ("cpu", "gpu", "igpu"):
        title = f"{device.name} (no choice for --device)"
    elif device.name == auto:
        title += " (what --device auto takes)"
    return _section(title, _device_rows(device))


def _device_rows(device: DeviceReport) -> list[tuple[str, str]]:
    what = _KINDS.get(device.kind, device.kind)
    if device.kind != "cpu":
        what += f", through {device.backend}"
    if device.description.lower().startswith(_SOFTWARE):
        what = f"no real GPU but the CPU, through {device.backend}"
    free = "unknown" if device.free_bytes is None else bytes_text(device.free_bytes)
    return [
        ("name", device.description),
        ("kind", what),
        ("memory", f"{free} free of {bytes_text(device.total_bytes)}"),
        *_bandwidth_rows("from the host", device.from_host),
        *_bandwidth_rows("in its memory", device.own_memory),
    ]


def _bandwidth_rows(name: str, bandwidth: Bandwidth) -> list[tuple[str, str]]:
    if bandwidth.gb_per_s is None:
        return [(name, bandwidth.how)]
    return [(name, f"{_three_digits(bandwidth.gb_per_s)} GB/s: {bandwidth.how}")]


def _three_digits(value: float) -> str:
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}"


def _gpus(diagnosis: Diagnosis) -> str:
    if not diagnosis.gpus:
        none = _filled("The system tells of no GPU of NVIDIA, AMD, Intel or Apple.")
        return f"  GPUs\n{none}"
    used = [gpu for gpu in diagnosis.gpus if gpu.devices]
    lines = [_filled(f"{gpu.name}: --device {' or '.join(gpu.devices)}") for gpu in used]
    blocks = ["\n".join(["  GPUs that can be used", *lines])] if used else []
    problems = [
        f"{gpu.name} ({gpu.found_in}). {gpu.problem}" for gpu in diagnosis.gpus if not gpu.devices
    ]
    if problems:
        n = len(problems)
        blocks.append(_loud(f"{n} GPU{'S' * (n > 1)} CANNOT BE USED", problems))
    return "\n\n".join(blocks)


def _install(install: Install, override: str) -> str:
    """What to type, ready to be copied."""
    version = f"llama-cpp-python {SUPPORTED_LLAMA_CPP_PYTHON}"
    with_what = f" with {' and '.join(install.backends)}" if install.backends else ""
    lines = [f"  To install {version}{with_what}"]
    if override:
        lines += [
            _filled(
                f"LLAMA_CPP_LIB_PATH is set: whatever is installed, the libraries in {override} "
                "are taken. Unset it first."
            )
        ]
    lines.append(_filled(f"Building it takes some minutes, {install.needs}:"))
    lines.append(f"\n{_command(install.command)}")
    if install.wheel_command:
        text = f"Or take a built wheel, if this version has one ({install.wheel_note}):"
        lines += ["", _filled(text), f"\n{_command(install.wheel_command)}"]
    return "\n".join(lines)


def _command(command: str) -> str:
    """A command on lines that a shell joins; one for PowerShell stays on its line."""
    if command.startswith(("$", "&")):
        return _INDENT + command
    lines, words = [""], _WORD.findall(command)
    for word in words:
        if len(lines[-1]) + len(word) > _COLUMNS - len(_INDENT) - 4:
            lines.append("")
        lines[-1] += word + " "
    return " \\\n".join(_INDENT + "  " * (i > 0) + line.strip() for i, line in enumerate(lines))


def _section(title: str, rows: list[tuple[str, str]]) -> str:
    return "\n".join([f"  {title}", *(_row(name, value) for name, value in rows)])


def _row(name: str, value: str) -> str:
    start = f"{_INDENT}{name:<{_NAME_COLUMNS}}"
    return _wrapped(value, start, " " * len(start))


def _loud(title: str, texts: Sequence[str]) -> str:
    return "\n".join([f"  !!! {title}", *map(_filled, texts)])


def _filled(text: str) -> str:
    return _wrapped(text, _INDENT, _INDENT)


def _wrapped(text: str, first: str, others: str) -> str:
    """Paths and flags stay in one piece, so that they can be copied."""
    return textwrap.fill(
        text,
        _COLUMNS,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )
