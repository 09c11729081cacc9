"""Which GPUs can be used and what to install: findings made by hand."""

import shlex
from dataclasses import replace

import pytest

from quant.ggml_library import SUPPORTED_LLAMA_CPP_PYTHON
from runner.doctor_report import Bandwidth, DeviceReport, DoctorReport
from runner.gpu_advice import Install, Installer, judge, lacking_install
from runner.gpu_hardware import Gpu

NONE = Bandwidth(None, "not measured")
CPU = DeviceReport("cpu", "AMD Ryzen 7 5700G", "CPU", "cpu", 1, 1, NONE, NONE)
REPORT = DoctorReport("", "/lib", ("cpu",), "0.25.3", ("CPU",), (CPU,), "cpu", NONE)
BROKEN = DoctorReport("no ggml-base library in /lib", "/lib", (), "", (), (), "", NONE)
GPUS = {
    "NVIDIA": Gpu("NVIDIA", "NVIDIA GeForce RTX 3060", "/proc"),
    "AMD": Gpu("AMD", "AMD GPU 0x744c", "/sys"),
    "Intel": Gpu("Intel", "Intel GPU 0x9a49", "/sys"),
    "Apple": Gpu("Apple", "Apple GPU", "macOS on arm64"),
}
PIP = Installer("/env/bin/python", has_pip=True, is_windows=False)


def gpu_device(name: str, description: str, backend: str, kind: str = "gpu") -> DeviceReport:
    return DeviceReport(name, description, backend, kind, 1, 1, NONE, NONE)


def report_with(library: str, *devices: DeviceReport) -> DoctorReport:
    return replace(REPORT, libraries=("cpu", library), devices=(*devices, CPU))


def install_for(*vendors: str, report: DoctorReport = REPORT, by: Installer = PIP) -> Install:
    found = lacking_install(judge([GPUS[name] for name in vendors], report), report, by)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("vendor", "library", "device"),
    [
        ("NVIDIA", "cuda", gpu_device("cuda0", "NVIDIA GeForce RTX 3060", "CUDA")),
        ("NVIDIA", "vulkan", gpu_device("vulkan0", "NVIDIA GeForce RTX 3060", "Vulkan")),
        ("AMD", "vulkan", gpu_device("vulkan0", "AMD Radeon RX 6800 (RADV NAVI21)", "Vulkan")),
        ("AMD", "hip", gpu_device("rocm0", "Instinct MI100", "ROCm")),
        ("Intel", "vulkan", gpu_device("vulkan0", "Intel(R) Iris(R) Xe", "Vulkan", "igpu")),
        ("Apple", "metal", gpu_device("mtl0", "Apple M2", "MTL")),
    ],
)
def test_a_gpu_with_a_device_can_be_used(vendor: str, library: str, device: DeviceReport) -> None:
    report = report_with(library, device)
    (finding,) = judge([GPUS[vendor]], report)
    assert (finding.devices, finding.problem) == ((device.name,), "")
    assert lacking_install([finding], report, PIP) is None


def test_a_processor_and_a_software_gpu_are_no_gpus_of_a_vendor() -> None:
    report = report_with("vulkan", gpu_device("vulkan0", "llvmpipe (LLVM 15)", "Vulkan"))
    for vendor in ("AMD", "NVIDIA", "Intel"):
        (finding,) = judge([GPUS[vendor]], report)
        assert finding.devices == () and finding.problem


@pytest.mark.parametrize(
    ("vendor", "backend", "flag"),
    [
        ("NVIDIA", "CUDA", "GGML_CUDA"),
        ("AMD", "Vulkan", "GGML_VULKAN"),
        ("Intel", "Vulkan", "GGML_VULKAN"),
        ("Apple", "Metal", "GGML_METAL"),
    ],
)
def test_a_build_without_the_backend_ends_in_the_command_that_builds_it(
    vendor: str, backend: str, flag: str
) -> None:
    (finding,) = judge([GPUS[vendor]], REPORT)
    assert finding.problem == f"The installed llama-cpp-python is built without {backend}."
    found = install_for(vendor)
    assert found.backends == (backend,)
    assert found.command == (
        f'CMAKE_ARGS="-D{flag}=on" /env/bin/python -m pip install '
        f"llama-cpp-python=={SUPPORTED_LLAMA_CPP_PYTHON} --force-reinstall --no-cache-dir"
    )


def test_what_keeps_every_program_from_the_gpu_comes_first() -> None:
    gpu = replace(GPUS["NVIDIA"], problem="No driver is loaded for it.")
    (finding,) = judge([gpu], REPORT)
    assert finding.problem.startswith("No driver is loaded for it. The installed llama-cpp-python")


def test_a_library_that_shows_no_device_needs_no_install() -> None:
    report = report_with("cuda")
    findings = judge([GPUS["NVIDIA"]], report)
    assert "The library for CUDA is there and does not see it" in findings[0].problem
    assert "CUDA_VISIBLE_DEVICES" in findings[0].problem
    assert lacking_install(findings, report, PIP) is None


def test_an_install_keeps_the_backends_that_are_there() -> None:
    report = report_with("cuda", gpu_device("cuda0", "NVIDIA GeForce RTX 3060", "CUDA"))
    found = install_for("NVIDIA", "AMD", report=report)
    assert found.command.startswith('CMAKE_ARGS="-DGGML_CUDA=on -DGGML_VULKAN=on" ')
    assert found.backends == ("CUDA", "Vulkan") and "nvcc" in found.needs
    assert found.wheel_command == ""  # no wheel has both


def test_a_wheel_is_taken_or_nothing_and_never_built_for_the_cpu() -> None:
    found = install_for("NVIDIA")
    words = shlex.split(found.wheel_command)
    assert words[:5] == [
        *("/env/bin/python", "-m", "pip", "install"),
        f"llama-cpp-python=={SUPPORTED_LLAMA_CPP_PYTHON}",
    ]
    assert words[words.index("--only-binary") + 1] == "llama-cpp-python"
    assert words[-1] == "https://abetlen.github.io/llama-cpp-python/whl/cu124"
    assert "cu118 to cu132" in found.wheel_note


def test_without_a_usable_ggml_the_supported_version_is_to_be_installed() -> None:
    found = install_for(report=BROKEN)
    assert found.command.startswith("/env/bin/python -m pip install llama-cpp-python==")
    assert found.backends == () and found.wheel_command.endswith("/whl/cpu")
    assert judge([GPUS["NVIDIA"]], BROKEN)[0].problem == "ggml cannot be loaded."
    assert install_for("NVIDIA", report=BROKEN).backends == ("CUDA",)
    broken_cuda = replace(BROKEN, libraries=("cpu", "cuda"))
    assert install_for(report=broken_cuda).backends == ("CUDA",)


def test_the_command_is_for_the_python_that_runs_and_the_shell_in_use() -> None:
    by = Installer("/my env/python", has_pip=False, is_windows=False)
    words = shlex.split(install_for("NVIDIA", by=by).command)
    assert words[:6] == [
        *("CMAKE_ARGS=-DGGML_CUDA=on", "uv", "pip", "install", "--python", "/my env/python"),
    ]
    assert words[-2:] == ["--reinstall", "--no-cache"]
    by = Installer("C:\\py\\python.exe", has_pip=True, is_windows=True)
    assert install_for("NVIDIA", by=by).command.startswith(
        '$env:CMAKE_ARGS = "-DGGML_CUDA=on"; & "C:\\py\\python.exe" -m pip install '
    )


def test_nothing_lacks_in_a_machine_without_gpus() -> None:
    assert lacking_install(judge([], REPORT), REPORT, PIP) is None
