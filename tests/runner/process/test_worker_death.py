"""Exit statuses and last lines in plain words."""

import re

import pytest

from runner.process import worker_death
from runner.process.worker_death import Circumstances, explain, lacked_device_memory

NOTHING = Circumstances()
DUMP = """
Fatal Python error: Aborted

Current thread 0x00007f (most recent call first):
  File "runner/engine.py", line 1 in _run
"""


@pytest.mark.parametrize(
    ("status", "log", "words"),
    [
        (
            -6,
            "loading\nggml.c:9: GGML_ASSERT(x) failed" + DUMP,
            r"failed: ggml\.c:9: GGML_ASSERT\(x\)",
        ),
        (-6, "a.cpp:3: fatal error" + DUMP, r"native code failed: a\.cpp:3: fatal error$"),
        (-6, "", "did not say why"),
        (-6, "CUDA error: out of memory\n  in function f\na.cu:1: CUDA error", "ran out of memory"),
        (
            -6,
            "terminate called\n  what():  std::bad_alloc\n",
            r"memory \(what\(\):  std::bad_alloc",
        ),
        (-11, "", "SIGSEGV"),
        (-4, "", "instructions that this processor lacks"),
        (-15, "", "ended from outside"),
        (143, "", "ended from outside"),
        (-64, "", "signal 64|SIGRTMAX"),
        (-7, "", "a file that it reads was cut short"),
        (0, "", "exit status 0 and did not say why"),
        (1, "Traceback\nValueError: no", "exit status 1: ValueError: no"),
        (
            1,
            "ModuleNotFoundError: No module named 'llama_cpp'",
            "llama-cpp-python is not installed",
        ),
        (1, "ModuleNotFoundError: No module named 'numpy.core'", "numpy is not installed"),
        (0xC0000005, "", "SIGSEGV"),
        (0xC0000006, "", "SIGBUS"),
        (None, "", "stopped answering"),
    ],
)
def test_the_cause_is_in_the_message(status, log, words):
    assert re.search(words, explain(status, log, NOTHING))


REFUSED = "alloc_buffer: allocating 900.00 MiB on device 0: cudaMalloc failed: out of memory\n"
FAILED = "ggml_backend_alloc_ctx_tensors: failed to allocate CUDA0 buffer of size 943718400\n"
CUDA = "CUDA error: {}\n  current device: 0, in function f at a.cu:9\na.cu:105: CUDA error" + DUMP


@pytest.mark.parametrize(
    ("status", "log", "is_lacking", "words"),
    [
        (-6, CUDA.format("out of memory"), True, "GPU ran out of memory"),
        (-6, CUDA.format("out of memory").replace("CUDA", "ROCm"), True, "GPU ran out of memory"),
        (-6, CUDA.format("CUBLAS_STATUS_ALLOC_FAILED"), True, "GPU ran out of memory"),
        (-6, "ErrorOutOfDeviceMemory" + DUMP, True, "GPU ran out of memory"),
        (0xC0000409, CUDA.format("out of memory"), True, "GPU ran out of memory"),
        (-6, REFUSED + "ggml.c:9: GGML_ASSERT(x) failed" + DUMP, False, "GGML_ASSERT"),
        (-6, REFUSED + FAILED + "x.cpp:1: fatal error" + DUMP, False, "failed: x.cpp:1: fatal"),
        (-6, REFUSED + "what():  std::bad_alloc\n", False, "engine ran out of memory (what"),
        (-9, REFUSED, False, "killed"),
        (None, REFUSED, False, "stopped answering"),
        (-6, CUDA.format("unspecified launch failure"), False, "GPU was lost"),
        (-6, CUDA.format("no kernel image is available"), False, "not built for this GPU"),
        (-6, CUDA.format("an illegal memory access"), False, "check in native code failed: CUDA"),
    ],
)
def test_a_gpu_s_end_is_told_apart(status, log, is_lacking, words):
    assert lacked_device_memory(status, log) == is_lacking
    assert words in explain(status, log, NOTHING)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (3, 4, "ran out of memory .*killed the engine"),
        (3, 3, "killed from outside"),
        (None, None, "most often because memory ran out"),
    ],
)
def test_a_kill_is_blamed_on_memory_when_the_kernel_counted_one(monkeypatch, before, after, words):
    monkeypatch.setattr(worker_death, "_oom_kills", lambda: after)
    assert re.search(words, explain(-9, "", Circumstances(oom_kills=before)))


def test_sigbus_with_an_unchanged_model_blames_the_disk(tmp_path):
    model = tmp_path / "m.gguf"
    model.write_bytes(b"1234")
    before = Circumstances.now(model)
    assert "disk may have failed" in explain(-7, "", before)
    model.write_bytes(b"12")
    assert "it has 2 bytes now and had 4" in explain(-7, "", before)
    model.unlink()
    assert "no longer there" in explain(-7, "", before)


def test_a_very_long_line_is_cut():
    assert len(explain(1, "x" * 100_000, NOTHING)) < 1000
