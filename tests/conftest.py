"""Models that many tests share, each made once a session; and the GPU for those that need one."""

import os

# Threads that wait for each other crawl on a machine that does something else meanwhile.
os.environ["BUDDYRUN_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's, which looks when it is imported

import signal
from functools import cache
from pathlib import Path

import pytest

from quant.devices import Device, devices
from quant.errors import BackendError
from quant.ggml_library import library_folder
from tests.llama_cpp_oracle import FILE_TYPES, quantize
from tests.paths import DEMO, HELD_OUT

NO_GPU = "needs a GPU, and ggml finds none (CONTRIBUTING.md: make test-gpu)"

# Started in the background or by nohup, the tests and their children would ignore these.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="no GPU is an error, not a skip")


@pytest.hookimpl(trylast=True)  # when `-m` has chosen: ggml is loaded for tests that will run only
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests or find_gpu():
        return
    if config.getoption("--require-gpu"):
        raise pytest.UsageError(f"no GPU device with the ggml libraries in {library_folder()}")
    for item in gpu_tests:
        item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_report_collectionfinish(items: list[pytest.Item]) -> list[str]:
    if not any(item.get_closest_marker("gpu") for item in items):
        return []
    gpu = find_gpu()
    if gpu is None:
        return ["no GPU device: gpu tests are skipped"]
    return [f"gpu tests run on {gpu.name} ({gpu.description})"]


@cache
def find_gpu() -> Device | None:
    """The first GPU of ggml's devices."""
    try:
        return next((device for device in devices() if device.is_gpu), None)
    except BackendError as error:
        raise pytest.UsageError(str(error)) from error


@pytest.fixture(scope="session")
def gpu_device() -> Device:
    """For tests with the marker `gpu`, which are skipped where there is none."""
    gpu = find_gpu()
    assert gpu is not None, "this test needs the marker `gpu`"
    return gpu


@pytest.fixture(scope="session")
def demo_path() -> Path:
    return DEMO


@pytest.fixture(scope="session")
def demo_in(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """A function: name of a quantization -> path of the demo model in it."""
    folder = tmp_path_factory.mktemp("quantized")

    def make(name: str) -> Path:
        target = folder / f"demo-{name}.gguf"
        return target if target.exists() else quantize(DEMO, target, FILE_TYPES[name])

    return make


@pytest.fixture(scope="session")
def held_out_text() -> str:
    """Real text of all six domains, which the demo model never saw."""
    return "\n".join(path.read_text()[:2000] for path in sorted(HELD_OUT.glob("*.txt")))
