"""Which of a machine's GPUs the installed libraries can use, and how to install what lacks.

Pure functions of what was found; calls no native code.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from quant.ggml_library import SUPPORTED_LLAMA_CPP_PYTHON
from runner.doctor_report import DeviceReport, DoctorReport
from runner.gpu_hardware import Gpu

_PACKAGE = "llama-cpp-python"
_WHEELS = "https://abetlen.github.io/llama-cpp-python/whl"


@dataclass(frozen=True)
class _Build:
    """A backend that llama-cpp-python can be built with."""

    library: str  # as in `DoctorReport.libraries`
    name: str  # as people say it
    flag: str
    needs: str  # beside CMake and a C++ compiler
    wheels: str  # the index of built wheels that llama-cpp-python's README names
    wheels_note: str  # what these are for
    no_device: str  # what to look at when its library is there and shows no device


_CUDA = _Build(
    "cuda", "CUDA", "GGML_CUDA", "the CUDA toolkit (nvcc)",
    "cu124", "cu124 is for CUDA 12.4; there are others from cu118 to cu132",
    "see whether nvidia-smi lists the GPU, and whether CUDA_VISIBLE_DEVICES hides it",
)  # fmt: skip
_VULKAN = _Build(
    "vulkan", "Vulkan", "GGML_VULKAN",
    "the Vulkan headers and glslc (Debian, Ubuntu: libvulkan-dev glslc spirv-headers)",
    "vulkan", "for Linux and Windows",
    "see whether vulkaninfo --summary lists the GPU, and whether GGML_VK_VISIBLE_DEVICES hides it",
)  # fmt: skip
_HIP = _Build(
    "hip", "HIP", "GGML_HIP", "ROCm", "rocm72", "rocm72 is for ROCm 7.2",
    "see whether rocminfo lists the GPU, and whether HIP_VISIBLE_DEVICES hides it",
)  # fmt: skip
_METAL = _Build(
    "metal", "Metal", "GGML_METAL", "Xcode", "metal", "for macOS 11 or later", "restart it"
)
_BUILDS = (_CUDA, _VULKAN, _HIP, _METAL)

_FITTING = {"NVIDIA": (_CUDA,), "AMD": (_VULKAN, _HIP), "Intel": (_VULKAN,), "Apple": (_METAL,)}
_OWN_BACKENDS = {"NVIDIA": ("CUDA",), "AMD": ("ROCm",), "Intel": ("SYCL",), "Apple": ("MTL",)}
_WORDS = {"NVIDIA": ("nvidia",), "AMD": ("amd", "radeon"), "Intel": ("intel",), "Apple": ("apple",)}


@dataclass(frozen=True)
class GpuFinding:
    """A GPU of the machine and whether the libraries can use it."""

    vendor: str
    name: str
    found_in: str
    devices: tuple[str, ...]  # of this vendor, for --device; empty = it cannot be used
    problem: str  # why it cannot be used, in sentences; "" = it can


@dataclass(frozen=True)
class Install:
    """How to get llama-cpp-python with the backends that lack."""

    backends: tuple[str, ...]  # "CUDA", "Vulkan"; empty = the CPU suffices
    needs: str  # what building takes
    command: str
    wheel_command: str  # takes a built wheel where there is one; "" = not for this choice
    wheel_note: str  # what to know of that


@dataclass(frozen=True)
class Installer:
    """The program that installs packages for the Python that runs buddyrun."""

    python: str
    has_pip: bool  # what uv has installed lacks it
    is_windows: bool

    def building(self, cmake_args: str) -> str:
        """The command that builds the supported llama-cpp-python anew."""
        command = self._command([])
        if not cmake_args:
            return command
        if self.is_windows:
            return f'$env:CMAKE_ARGS = "{cmake_args}"; {command}'
        return f'CMAKE_ARGS="{cmake_args}" {command}'

    def with_wheels(self, index: str) -> str:
        """The command that takes a built wheel or fails: it never builds one for the CPU."""
        return self._command(["--only-binary", _PACKAGE, "--extra-index-url", index])

    def _command(self, more: list[str]) -> str:
        python = f'"{self.python}"' if self.is_windows else shlex.quote(self.python)
        program = f"uv pip install --python {python}"
        if self.has_pip:
            program = f"{'& ' if self.is_windows else ''}{python} -m pip install"
        again = "--force-reinstall --no-cache-dir" if self.has_pip else "--reinstall --no-cache"
        return " ".join([program, f"{_PACKAGE}=={SUPPORTED_LLAMA_CPP_PYTHON}", again, *more])


def judge(gpus: Sequence[Gpu], report: DoctorReport) -> tuple[GpuFinding, ...]:
    """Compare the machine's GPUs with the devices that ggml shows."""
    return tuple(_judge(gpu, report) for gpu in gpus)


def _judge(gpu: Gpu, report: DoctorReport) -> GpuFinding:
    names = tuple(device.name for device in report.devices if _is_of(device, gpu.vendor))
    sentences = [] if names else [gpu.problem, _what_lacks(gpu, report)]
    problem = " ".join(sentence for sentence in sentences if sentence)
    return GpuFinding(gpu.vendor, gpu.name, gpu.found_in, names, problem)


def _is_of(device: DeviceReport, vendor: str) -> bool:
    words = device.description.lower().replace("(", " ").split()
    is_named = any(word.startswith(_WORDS[vendor]) for word in words)
    return device.is_gpu and (device.backend in _OWN_BACKENDS[vendor] or is_named)


def _what_lacks(gpu: Gpu, report: DoctorReport) -> str:
    if report.problem:
        return "ggml cannot be loaded."
    fitting = _FITTING[gpu.vendor]
    there = [build for build in fitting if build.library in report.libraries]
    if there:
        return (
            f"The library for {there[0].name} is there and does not see it: {there[0].no_device}."
        )
    return f"The installed llama-cpp-python is built without {fitting[0].name}."


def lacking_install(
    gpus: Sequence[GpuFinding], report: DoctorReport, installer: Installer
) -> Install | None:
    """The command that mends what can be mended by installing; None when nothing lacks.

    It keeps the backends that are there.
    """
    lacking = [_FITTING[gpu.vendor][0] for gpu in gpus if _lacks_backend(gpu, report)]
    if not lacking and not report.problem:
        return None
    builds = [b for b in _BUILDS if b in lacking or b.library in report.libraries]
    needs = "".join(f"{build.needs}, " for build in builds) + "CMake and a C++ compiler"
    wheels, note = ("cpu", "for the CPU") if not builds else ("", "")
    if len(builds) == 1:  # wheels have one backend beside the CPU
        wheels, note = builds[0].wheels, builds[0].wheels_note
    return Install(
        backends=tuple(build.name for build in builds),
        needs=needs,
        command=installer.building(" ".join(f"-D{build.flag}=on" for build in builds)),
        wheel_command=installer.with_wheels(f"{_WHEELS}/{wheels}") if wheels else "",
        wheel_note=note,
    )


def _lacks_backend(gpu: GpuFinding, report: DoctorReport) -> bool:
    has_any = any(build.library in report.libraries for build in _FITTING[gpu.vendor])
    return not gpu.devices and not has_any
