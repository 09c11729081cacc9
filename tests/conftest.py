"""Models that many tests share; each is made once a session."""

import os
import signal
from pathlib import Path

import pytest

from tests.llama_cpp_oracle import quantize
from tests.paths import DEMO, HELD_OUT

# Threads that wait for each other crawl on a machine that does something else meanwhile.
os.environ["BUDDYRUN_THREADS"] = "1"

# Started in the background or by nohup, the tests and their children would ignore these.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# LLAMA_FTYPE numbers of llama.cpp's quantizer
FILE_TYPES = {
    "F16": 1, "Q8_0": 7, "Q6_K": 18, "Q5_K": 17, "Q4_K": 15, "Q4_0": 2, "Q3_K": 12, "Q2_K": 10,
    "IQ4_XS": 30,
}  # fmt: skip


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
