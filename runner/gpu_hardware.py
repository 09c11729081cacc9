"""The GPUs in this machine as the system tells of them, whether ggml can use them or not.

Reads small files and runs nvidia-smi where there is nothing to read; calls no native code.
"""

import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
_DISPLAY_CLASS = "0x03"  # of a PCI device: VGA, 3D and other display controllers
_SMI_WAIT_S = 10.0


@dataclass(frozen=True)
class SystemPlaces:
    """Where to look; tests put other places here."""

    proc: Path = Path("/proc")
    sysfs: Path = Path("/sys")
    dev: Path = Path("/dev")
    search_path: str = ""  # of programs, as in PATH
    system: str = sys.platform
    machine: str = platform.machine()


@dataclass(frozen=True)
class Gpu:
    """One GPU that the system knows."""

    vendor: str  # "NVIDIA", "AMD", "Intel", "Apple"
    name: str
    found_in: str  # what told of it
    problem: str = ""  # what keeps every program from it, one sentence; "" = nothing seen


def find_gpus(places: SystemPlaces) -> tuple[Gpu, ...]:
    """All GPUs of the vendors that ggml has backends for."""
    on_bus = _on_bus(places)
    nvidia = (
        _nvidia_of_driver(places)
        or _nvidia_of_smi(places)
        or _nvidia_nodes(places)
        or [gpu for gpu in on_bus if gpu.vendor == "NVIDIA"]
    )
    others = [gpu for gpu in on_bus if gpu.vendor != "NVIDIA"]
    return (*nvidia, *others, *_apple(places))


def _nvidia_of_driver(places: SystemPlaces) -> list[Gpu]:
    """As NVIDIA's driver lists them, by name."""
    problem = "" if _nvidia_nodes(places) else _no_node(places.dev / "nvidia0", "--gpus all")
    gpus = []
    for path in sorted((places.proc / "driver/nvidia/gpus").glob("*/information")):
        name = re.search(r"^Model:\s*(.+?)\s*$", _read(path), re.MULTILINE)
        text = name[1] if name else f"GPU {path.parent.name}"
        gpus.append(Gpu("NVIDIA", _with_vendor("NVIDIA", text), str(path), problem))
    return gpus


def _nvidia_of_smi(places: SystemPlaces) -> list[Gpu]:
    """As nvidia-smi lists them: on Windows and in WSL nothing else tells."""
    program = shutil.which("nvidia-smi", path=places.search_path)
    if program is None:
        return []
    try:
        done = subprocess.run(
            [program, "-L"], capture_output=True, timeout=_SMI_WAIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    names = re.findall(
        r"^GPU \d+: (.+?)(?: \(UUID.*)?$", done.stdout.decode(errors="replace"), re.M
    )
    return [Gpu("NVIDIA", _with_vendor("NVIDIA", name.strip()), f"{program} -L") for name in names]


def _nvidia_nodes(places: SystemPlaces) -> list[Gpu]:
    """As device files: in some containers there is nothing else."""
    nodes = [path for path in places.dev.glob("nvidia*") if path.name[6:].isdigit()]
    return [Gpu("NVIDIA", f"NVIDIA GPU {path.name[6:]}", str(path)) for path in sorted(nodes)]


def _on_bus(places: SystemPlaces) -> list[Gpu]:
    """PCI devices that are graphics cards or that a graphics driver has taken."""
    cards = [
        path / "device"
        for path in (places.sysfs / "class/drm").glob("card*")
        if path.name[4:].isdigit()
    ]
    displays = [
        path
        for path in (places.sysfs / "bus/pci/devices").glob("*")
        if _read(path / "class").startswith(_DISPLAY_CLASS)
    ]
    folders = dict.fromkeys(path.resolve() for path in [*sorted(cards), *sorted(displays)])
    gpus = (_of_pci(folder, places) for folder in folders)
    return [gpu for gpu in gpus if gpu is not None]


def _of_pci(folder: Path, places: SystemPlaces) -> Gpu | None:
    vendor = _VENDORS.get(_read(folder / "vendor"))
    if vendor is None:
        return None
    name = _read(folder / "product_name") or f"GPU {_read(folder / 'device')}"
    driver = folder / "driver"
    driver_name = driver.resolve().name if driver.exists() else ""
    problem = _driver_problem(vendor, driver_name, places.dev)
    return Gpu(vendor, _with_vendor(vendor, name), str(folder), problem)


def _driver_problem(vendor: str, driver: str, dev: Path) -> str:
    if not driver:
        return "No driver is loaded for it."
    if driver.startswith("vfio"):
        return f"It is set aside for a virtual machine (driver {driver})."
    if vendor == "NVIDIA":
        if driver != "nvidia":
            return f"It has the driver {driver}; CUDA needs NVIDIA's own."
        return _no_node(dev / "nvidia0", "--gpus all")
    if any(dev.glob("dri/renderD*")):
        return ""
    return _no_node(dev / "dri/renderD128", "--device /dev/dri")


def _no_node(node: Path, flag: str) -> str:
    return f"There is no {node}; in a container the GPU must be passed in ({flag})."


def _apple(places: SystemPlaces) -> list[Gpu]:
    if places.system == "darwin" and places.machine == "arm64":
        return [Gpu("Apple", "Apple GPU", "macOS on arm64")]
    return []


def _with_vendor(vendor: str, name: str) -> str:
    return name if name.lower().startswith(vendor.lower()) else f"{vendor} {name}"


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
