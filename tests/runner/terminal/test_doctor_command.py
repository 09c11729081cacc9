"""The command `doctor`: what a person reads, the JSON, exit codes, and an engine that dies."""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from quant.ggml_library import SUPPORTED_LLAMA_CPP_PYTHON
from runner.doctor_report import Bandwidth, DeviceReport, DoctorReport
from runner.engine_client import Client
from runner.gpu_advice import Installer, judge, lacking_install
from runner.gpu_hardware import Gpu
from runner.process import worker_process
from runner.protocol import DoctorFields
from runner.terminal import doctor_command
from runner.terminal.doctor_text import Diagnosis, format_diagnosis
from tests.paths import ROOT
from tests.runner import command_line
from tests.runner.command_line import BUDDYRUN, Done, buddyrun, buddyrun_process

FAKE = (
    f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests' / 'runner')!r}];"
    " from fake_session import FakeSession; from runner.worker import main; main(FakeSession)"
)
NOTHING = "nothing is copied: it computes in the host's memory"
CPU = DeviceReport(
    "cpu", "AMD Ryzen 7 5700G", "CPU", "cpu", 24_600_000_000, 32_000_000_000,
    Bandwidth(None, NOTHING), Bandwidth(31.44, "copies of 256 MiB"),
)  # fmt: skip
CUDA = DeviceReport(
    "cuda0", "NVIDIA GeForce RTX 3060", "CUDA", "gpu", 11_900_000_000, 12_600_000_000,
    Bandwidth(25.06, "copies of 64 MiB"), Bandwidth(331.4, "copies of 256 MiB"),
)  # fmt: skip
REPORT = DoctorReport(
    "", "/lib", ("cpu", "cuda"), "0.25.3", ("CUDA", "CPU"), (CUDA, CPU), "cuda0",
    Bandwidth(9.5, "a matrix times a vector"),
)  # fmt: skip
ON_CPU = replace(REPORT, libraries=("cpu",), backends=("CPU",), devices=(CPU,), auto_device="cpu")
NVIDIA = Gpu("NVIDIA", "NVIDIA GeForce RTX 3060", "/proc/driver/nvidia/gpus/0000:01:00.0")
RADEON = Gpu("AMD", "AMD GPU 0x744c", "/sys/devices/0000:03:00.0", "No driver is loaded for it.")
PIP = Installer("/env/bin/python", has_pip=True, is_windows=False)


def diagnosis(report: DoctorReport, *gpus: Gpu, by: Installer = PIP, path: str = "") -> Diagnosis:
    findings = judge(gpus, report)
    return Diagnosis(report, findings, lacking_install(findings, report, by), (), path)


def text_of(report: DoctorReport, *gpus: Gpu, by: Installer = PIP, path: str = "") -> str:
    return format_diagnosis(diagnosis(report, *gpus, by=by, path=path))


def test_devices_are_told_with_the_name_for_the_flag_and_their_figures() -> None:
    assert (
        text_of(REPORT, NVIDIA)
        == """\
  Libraries
    ggml              0.25.3
    folder            /lib
    backends          CUDA, CPU

  --device cuda0 (what --device auto takes)
    name              NVIDIA GeForce RTX 3060
    kind              GPU with its own memory, through CUDA
    memory            11.9 GB free of 12.6 GB
    from the host     25.1 GB/s: copies of 64 MiB
    in its memory     331 GB/s: copies of 256 MiB

  --device cpu
    name              AMD Ryzen 7 5700G
    kind              the CPU
    memory            24.6 GB free of 32.0 GB
    from the host     nothing is copied: it computes in the host's memory
    in its memory     31.4 GB/s: copies of 256 MiB

  The host's memory
    reading           9.50 GB/s: a matrix times a vector

  GPUs that can be used
    NVIDIA GeForce RTX 3060: --device cuda0"""
    )


def test_a_gpu_that_cannot_be_used_is_told_loudly_with_the_command_that_mends_it() -> None:
    text = text_of(ON_CPU, NVIDIA)
    assert (
        text.split("  !!! ")[1]
        == f"""\
1 GPU CANNOT BE USED
    NVIDIA GeForce RTX 3060 (/proc/driver/nvidia/gpus/0000:01:00.0). The
    installed llama-cpp-python is built without CUDA.

  To install llama-cpp-python {SUPPORTED_LLAMA_CPP_PYTHON} with CUDA
    Building it takes some minutes, the CUDA toolkit (nvcc), CMake and a C++
    compiler:

    CMAKE_ARGS="-DGGML_CUDA=on" /env/bin/python -m pip install \\
      llama-cpp-python=={SUPPORTED_LLAMA_CPP_PYTHON} --force-reinstall --no-cache-dir

    Or take a built wheel, if this version has one (cu124 is for CUDA 12.4;
    there are others from cu118 to cu132):

    /env/bin/python -m pip install llama-cpp-python=={SUPPORTED_LLAMA_CPP_PYTHON} \\
      --force-reinstall --no-cache-dir --only-binary llama-cpp-python \\
      --extra-index-url https://abetlen.github.io/llama-cpp-python/whl/cu124"""
    )


def test_a_command_on_several_lines_is_the_same_to_a_shell() -> None:
    by = replace(PIP, python="/o'brien/my env/bin/python")
    found = diagnosis(ON_CPU, NVIDIA, RADEON, by=by)
    assert found.install is not None
    text = format_diagnosis(found)
    start = text.index("CMAKE_ARGS")
    printed = text[start : text.index("\n\n", start)] if "\n\n" in text[start:] else text[start:]
    assert "\\\n" in printed
    joined = printed.replace("\\\n", " ")
    assert shlex.split(joined) == shlex.split(found.install.command)
    assert "CMAKE_ARGS=-DGGML_CUDA=on -DGGML_VULKAN=on" in shlex.split(joined)
    windows = text_of(ON_CPU, NVIDIA, by=Installer("C:\\py.exe", True, True))
    assert '    $env:CMAKE_ARGS = "-DGGML_CUDA=on"; & "C:\\py.exe" -m pip install' in windows


@pytest.mark.parametrize("report", [REPORT, ON_CPU, replace(ON_CPU, problem="no ggml " * 30)])
def test_all_lines_fit_80_columns(report: DoctorReport) -> None:
    long = replace(CPU, own_memory=Bandwidth(None, "why it could not be measured " * 9))
    text = text_of(replace(report, devices=(*report.devices, long)), NVIDIA, RADEON, path="/my/lib")
    assert max(map(len, text.splitlines())) < 80


def test_a_library_without_a_device_and_a_hidden_figure_are_told() -> None:
    text = text_of(replace(ON_CPU, libraries=("cpu-haswell", "hip", "vulkan")))
    assert "    without a device  hip, vulkan\n" in text
    assert "  GPUs\n    The system tells of no GPU of NVIDIA, AMD, Intel or Apple." in text
    rocm = replace(CUDA, name="rocm0", backend="ROCm")
    report = replace(REPORT, libraries=("cpu", "hip"), backends=("ROCm", "CPU"), devices=(rocm,))
    assert "without a device" not in text_of(report)


def test_what_is_no_real_gpu_is_called_so() -> None:
    llvmpipe = replace(CUDA, name="vulkan0", description="llvmpipe (LLVM 15)", backend="Vulkan")
    blas = replace(CPU, name="blas", backend="BLAS", kind="accel", free_bytes=None)
    text = text_of(replace(REPORT, devices=(llvmpipe, blas, CPU), auto_device="cpu"))
    assert "    kind              no real GPU but the CPU, through Vulkan\n" in text
    assert "  blas (no choice for --device)\n" in text
    assert "    memory            unknown free of 32.0 GB\n" in text


def test_escape_sequences_of_a_driver_do_not_reach_the_terminal() -> None:
    evil = replace(ON_CPU, devices=(replace(CPU, description="\x1b[2Jevil\x07"),))
    assert "\x1b" not in doctor(lambda wanted: evil).stdout.decode()


def doctor(answer: Any, *arguments: str, **environment: str) -> Done:
    """The command with an engine that answers so."""

    class Examining(command_line.ScriptedClient):
        def doctor(self, wanted: DoctorFields, on_progress: Any) -> DoctorReport:
            report: DoctorReport = answer(wanted)
            return report

    with mock.patch.object(command_line, "ScriptedClient", Examining):
        return buddyrun("doctor", *arguments, **environment)


def test_the_engine_is_asked_to_measure_unless_told_otherwise() -> None:
    asked: list[bool] = []

    def answer(wanted: DoctorFields) -> DoctorReport:
        asked.append(wanted.measure)
        return ON_CPU

    assert doctor(answer).returncode == doctor(answer, "--no-measure").returncode == 0
    assert asked == [True, False]


def test_json_has_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_command, "find_gpus", lambda places: (NVIDIA,))
    done = doctor(lambda wanted: ON_CPU, "--json")
    values = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, b"")
    assert values["supported_llama_cpp_python"] == SUPPORTED_LLAMA_CPP_PYTHON
    assert (values["problem"], values["backends"], values["auto_device"]) == ("", ["CPU"], "cpu")
    assert values["devices"][0]["own_memory"]["gb_per_s"] == 31.44
    assert values["devices"][0]["from_host"] == {"gb_per_s": None, "how": NOTHING}
    assert values["gpus"][0]["name"] == NVIDIA.name and values["gpus"][0]["devices"] == []
    assert values["install"]["command"].startswith('CMAKE_ARGS="-DGGML_CUDA=on" ')
    assert shlex.quote(sys.executable) in values["install"]["command"]


def test_nvidia_smi_is_looked_for_on_the_path(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA GeForce RTX 3060 (UUID: GPU-1)'\n")
    program.chmod(0o755)
    done = doctor(lambda wanted: ON_CPU, PATH=str(tmp_path))
    assert done.returncode == 0 and b"CANNOT BE USED" in done.stdout
    assert b'CMAKE_ARGS="-DGGML_CUDA=on' in done.stdout


@pytest.fixture
def dying_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of this process abort when they are to measure; the rest is scripted."""
    monkeypatch.setattr(worker_process, "PROGRAM", FAKE)
    monkeypatch.setattr(command_line, "ScriptedClient", Client)


@pytest.mark.usefixtures("dying_worker")
def test_an_engine_that_dies_while_it_measures_still_lists_what_there_is() -> None:
    done = buddyrun("doctor")
    text = " ".join(done.stdout.decode().split())
    assert done.returncode == 0 and b"GGML_ASSERT" not in done.stderr
    assert "backends CPU" in text
    assert (
        "!!! NOTES Nothing could be measured: measuring vulkan0 failed. The engine stopped itself "
        "because a check in native code failed: ggml-vulkan.cpp:1: GGML_ASSERT(device) failed"
    ) in text
    assert b"GGML_ASSERT(device) failed" in buddyrun("doctor", "--verbose").stderr
    assert "Nothing could be" in json.loads(buddyrun("doctor", "--json").stdout)["notes"][0]


def test_an_engine_that_cannot_start_is_a_problem_with_a_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_process, "PROGRAM", "import llama_cpp_missing")
    monkeypatch.setattr(command_line, "ScriptedClient", Client)
    done = buddyrun("doctor")
    text = " ".join(done.stdout.decode().split())
    assert done.returncode == 1
    assert "!!! GGML CANNOT BE LOADED The engine could not start: the Python package" in text
    assert f"pip install llama-cpp-python=={SUPPORTED_LLAMA_CPP_PYTHON}" in text.replace("\\ ", "")


# the real command


@pytest.mark.slow
def test_the_real_command_tells_of_this_machine() -> None:
    done = buddyrun_process("doctor", command=BUDDYRUN)
    text = done.stdout.decode()
    assert (done.returncode, done.stderr) == (0, b"")
    assert "\n  --device cpu" in text and " GB/s: " in text
    assert max(len(line) for line in text.splitlines() if "/" not in line) < 80


def test_the_real_command_as_json_without_figures() -> None:
    done = buddyrun_process("doctor", "--json", "--no-measure", command=BUDDYRUN)
    values = json.loads(done.stdout)
    assert done.returncode == 0 and "cpu" in [device["name"] for device in values["devices"]]
    assert {device["own_memory"]["gb_per_s"] for device in values["devices"]} == {None}


@pytest.mark.parametrize(
    "flags",
    [[], *(pytest.param([flag], marks=pytest.mark.slow) for flag in ("--json", "--no-measure"))],
)
def test_without_libraries_it_says_so_and_what_to_do(flags: list[str], tmp_path: Path) -> None:
    environment = {"LLAMA_CPP_LIB_PATH": str(tmp_path)}
    done = buddyrun_process("doctor", *flags, command=BUDDYRUN, **environment)
    text = " ".join(done.stdout.decode().split()).replace("\\ ", "")
    assert (done.returncode, done.stderr) == (1, b"")
    assert f"no ggml-base library in {tmp_path}" in text
    assert f"pip install llama-cpp-python=={SUPPORTED_LLAMA_CPP_PYTHON} --force-reinstall" in text
    assert str(tmp_path) in text
    if "--json" not in flags:
        assert f"LLAMA_CPP_LIB_PATH is set: whatever is installed, the libraries in {tmp_path}" in (
            text
        )


def test_the_command_keeps_native_code_out_of_this_process() -> None:
    script = (
        "import sys; from runner.cli import main; main(sys.argv[1:]);"
        "sys.exit(any(name in sys.modules for name in ('llama_cpp', 'quant.ggml', 'torch')))"
    )
    done = buddyrun_process("doctor", "--no-measure", command=[sys.executable, "-c", script])
    assert done.returncode == 0 and b"Libraries" in done.stdout


def test_help_lists_the_command_and_its_flags() -> None:
    assert b"doctor      Tell what this machine can compute on" in buddyrun("--help").stdout
    text = buddyrun("doctor", "--help").stdout.decode()
    assert text.startswith("Usage: buddyrun doctor") and "--no-measure" in text
