"""A session without a model, to test the process boundary: the prompt says what to do."""

import hashlib
import mmap
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path

from runner.device_memory import DeviceMemory
from runner.doctor_report import Bandwidth, DoctorReport
from runner.errors import CancelledError, ContextFullError, ModelError, OptionError
from runner.frames import RunSettings
from runner.protocol import BenchSample, GenerateResult, ModelInfo, PromptProgress, TextPiece
from runner.stats_recorder import StatsRecorder

OUT_OF_DEVICE_MEMORY = "ggml-cuda.cu:98: CUDA error: out of memory"


class FakeSession:
    """Does what `runner.session.Session` does, by script."""

    def __init__(self):
        self.n_generated = 0
        self.path = ""
        self.settings = RunSettings(False, "router", 0.05, False)

    def load(self, path, config, chat_template, on_progress, cancelled):
        on_progress("weights", 1, 2)
        if "hang" in Path(path).name:
            wait_for(cancelled)
            raise CancelledError
        if "abort" in Path(path).name:
            die("ggml.c:7: GGML_ASSERT(n_loaded == 1) failed")
        if not Path(path).exists():
            raise ModelError(f"{path}: no such file")
        is_crowded = "crowded" in Path(path).name
        if is_crowded:
            self.find_room(config)
        self.path = path
        on_progress("weights", 2, 2)
        text = chat_template or "built in"
        info = ModelInfo(
            path=path, name="Fake", description="fake", architecture="llama", file_type="F16",
            n_params=1, size_bytes=2, n_layer=3, n_expert=4, n_expert_used=2, n_ctx=config.n_ctx,
            n_ctx_train=5, n_threads=1, n_batch=config.n_batch, cache_type_k="f16",
            cache_type_v="f16", chat_template=text, device="CPU", load_s=0.5, ggml_version="0",
            notes=("a note",),
        )  # fmt: skip
        if not is_crowded:
            return info
        memory = DeviceMemory("CUDA0", *(1 << 20,) * 6)
        n_slots = (config.moe_cache_slots or 8,) * 3
        return replace(info, device_memory=memory, moe_cache_slots=n_slots)

    def find_room(self, config):
        """On a GPU with room for 6 slots a layer, and for as many as go if 2 GiB stay free."""
        if config.fit_margin_bytes > 3 << 30:
            raise OptionError("one expert of each layer takes 1 GB: use a smaller --fit-margin")
        if config.moe_cache_slots > 6 or not (
            config.moe_cache_slots or config.fit_margin_bytes >= 2 << 30
        ):
            die(OUT_OF_DEVICE_MEMORY)

    def generate(self, request, emit, cancelled, between):
        action, _, argument = (request.prompt or "").partition(" ")
        if action == "count":
            return self.count(int(argument), emit, cancelled, between)
        if action == "forever":
            return self.count(10**9, emit, cancelled, between)
        if action == "read":
            return self.read_prompt(emit, cancelled)
        if action == "messages":
            emit(TextPiece(request.messages[-1]["content"], 1))
            return result("eos", 1)
        return misbehave(action, self.path)

    def count(self, n, emit, cancelled, between):
        for number in range(n):
            if cancelled():
                return result("cancelled", number)
            self.n_generated = number + 1
            emit(TextPiece(f"{number} ", number + 1))
            between()
        return result("length", n)

    def read_prompt(self, emit, cancelled):
        emit(PromptProgress(512, 4096, 0))
        wait_for(cancelled)
        return result("cancelled", 0)

    def bench(self, tests, repetitions, text, emit, cancelled):
        for test in tests:
            samples = tuple(len(text) + number for number in range(repetitions))
            emit(BenchSample(test.n_prompt, test.n_gen, samples, n_loaded=3, load_bytes=9))

    def doctor(self, wanted, on_progress, cancelled):
        on_progress("measuring vulkan0", 0, 1)
        if wanted.measure:
            die("ggml-vulkan.cpp:1: GGML_ASSERT(device) failed")
        return DoctorReport("", "/l", ("cpu",), "0", ("CPU",), (), "cpu", Bandwidth(None, "no"))

    def snapshot(self, with_experts=False):
        if not self.path:
            raise OptionError("no model is loaded")
        recorder = StatsRecorder(3, (2, 2, 2), n_expert=4)
        snapshot = recorder.snapshot(self.n_generated, 64, ((0, 1),) * 3, (), with_experts)
        return replace(snapshot, n_tokens_generated=self.n_generated)

    def change(self, wanted):
        if wanted.buddy == "nobody":
            raise OptionError("nobody is no policy")
        given = {name: value for name, value in vars(wanted).items() if value is not None}
        self.settings = replace(self.settings, **given)
        return self.settings


def result(reason, n):
    return GenerateResult(reason, 3, 1, n, 0.25, 0.5, 3 + n, 64, 7)


def wait_for(cancelled):
    pause = threading.Event()
    while not cancelled():
        pause.wait(0.005)


def die(line):
    print(line, file=sys.stderr, flush=True)
    os.abort()


def misbehave(action, path):
    match action:
        case "gpu-full":
            die(OUT_OF_DEVICE_MEMORY)
        case "full":
            raise ContextFullError("9000 tokens do not fit 8192")
        case "bug":
            raise KeyError("blk.0")
        case "memory":
            raise MemoryError
        case "print":
            os.write(1, b"native code prints to stdout\n" * 10_000)
            return result("eos", 0)
        case "abort":
            die("ggml.c:42: GGML_ASSERT(ne0 == 64) failed")
        case "bad_alloc":
            print(
                "terminate called after throwing an instance of 'std::bad_alloc'", file=sys.stderr
            )
            die("  what():  std::bad_alloc")
        case "native":  # computes for minutes in native code and never asks whether it is cancelled
            hashlib.pbkdf2_hmac("sha256", b"a", b"b", 10**9)
        case "truncate":
            with open(path, "r+b") as file:
                view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                file.truncate(0)
            view[8192]
        case "exit":
            print("the last line on stderr", file=sys.stderr, flush=True)
            os._exit(3)
        case _:
            raise AssertionError(f"no such action: {action}")
