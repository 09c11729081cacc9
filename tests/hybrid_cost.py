"""What the host spends per layer and token beside a device, besides kernels.

    LLAMA_CPP_LIB_PATH=FOLDER python -m tests.hybrid_cost [--miss ACTION] [MODEL]
    python -m tests.hybrid_cost --cpu [--miss ACTION] [MODEL]

Decodes with half of the experts on the first GPU device; the host computes every missing one, or
with `--miss auto` what it finds cheaper. What counts is the processor time of its thread, since a
device in software takes the same cores. Time in ggml is told apart: graphs on the host, submitting
to the device, waiting, and copies, which are its driver's. With `--cpu` the CPU is told as a device
with memory of its own: no driver, no kernels beside Python, so that our own part is seen alone.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from quant.devices import Device, cpu_device, devices
from quant.ggml import Backend
from quant.graph import HostPort
from runner import placement
from runner.config import EngineConfig
from runner.devices import DeviceChoice
from runner.engine import Engine
from tests.paths import DEMO

_N_TOKENS = 60
_SPENT: Counter[str] = Counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=DEMO)
    parser.add_argument("--cpu", action="store_true", help="the CPU in the place of a device")
    parser.add_argument("--miss", default="host", help="what --moe-miss takes")
    wanted = parser.parse_args()
    device = _cpu_as_a_device() if wanted.cpu else _first_gpu()
    Backend.compute_later = _timed(Backend.compute_later, "submitted to")  # type: ignore[method-assign]
    Backend.synchronize = _timed(Backend.synchronize, "waited for")  # type: ignore[method-assign]
    Backend.compute = _compute  # type: ignore[method-assign]
    for name in ("upload", "upload_part", "download", "download_later"):
        setattr(HostPort, name, _timed_copy(getattr(HostPort, name)))
    config = EngineConfig(
        n_ctx=512, device=device.name, moe_cache_slots=4, moe_miss=wanted.miss, n_threads=2
    )
    engine = Engine(wanted.model, config)
    engine.prefill(list(range(100, 120)))
    for token in range(200, 220):  # kernels are compiled, graphs are built
        engine.decode(token)
    _SPENT.clear()
    before, started = engine.snapshot(), time.thread_time()
    for token in range(300, 300 + _N_TOKENS):
        engine.decode(token)
    total_s = time.thread_time() - started
    counted = engine.snapshot().counted_since(before)
    n_layers = _N_TOKENS * engine.model_config.n_layer
    print(f"{device.name} ({device.description}), {_N_TOKENS} tokens, {n_layers} layers")
    print(
        f"pairs: {sum(counted.hit)} hits on the device, {sum(counted.on_host)} on the host, "
        f"{sum(counted.loaded)} loaded"
    )
    for name, spent_s in sorted(_SPENT.items()):
        print(f"{name:<24}{spent_s / n_layers * 1e6:8.1f} us per layer and token")
    rest_s = total_s - sum(_SPENT.values())
    print(f"{'everything else':<24}{rest_s / n_layers * 1e6:8.1f} us per layer and token")
    engine.close()


def _first_gpu() -> Device:
    device = next((device for device in devices() if device.is_gpu), None)
    if device is None:
        sys.exit("no GPU device: set LLAMA_CPP_LIB_PATH, or take --cpu")
    return device


def _cpu_as_a_device() -> Device:
    device = replace(cpu_device(), name="GPU0", kind="gpu")
    placement.choose_device = lambda name: DeviceChoice(device)  # type: ignore[assignment]
    return device


def _timed(call: Callable[..., None], what: str) -> Callable[..., None]:
    def timed(backend: Backend, *arguments: Any) -> None:
        started = time.thread_time()
        call(backend, *arguments)
        where = "graphs on the host" if backend.is_host else f"{what} the device"
        _SPENT[where] += time.thread_time() - started

    return timed


def _timed_copy(copy: Callable[..., Any]) -> Callable[..., Any]:
    def timed(port: HostPort, *arguments: int) -> Any:
        started = time.thread_time()
        try:
            return copy(port, *arguments)
        finally:
            _SPENT["copies"] += time.thread_time() - started

    return timed


def _compute(backend: Backend, graph: int) -> None:
    backend.compute_later(graph)
    backend.synchronize()


if __name__ == "__main__":
    main()
