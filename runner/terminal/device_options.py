"""The flags about the device that computes. Knows no command, runs nothing."""

from typing import Any

import click

from runner.config import DEFAULT_FIT_MARGIN_BYTES, DEVICE_AUTO
from runner.terminal.cli_options import flag, switch
from runner.terminal.memory_size import MemorySize

_ALL = -1  # layers


class _LayerCount(click.ParamType):  # type: ignore[type-arg]
    """A number of layers as llama.cpp takes it; only whether it is 0 means something here."""

    name = "N"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        """Raises click.BadParameter."""
        if value in ("auto", None):
            return None
        if value == "all":
            return _ALL
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is not a number, auto or all", param, ctx)


_MARGIN_FLAG = flag(
    *("--fit-margin", "fit_margin_bytes"),
    help="Memory of the GPU that is left to others.",
    type=MemorySize(),
    default=f"{DEFAULT_FIT_MARGIN_BYTES >> 20}MiB",
)

_DEVICE_FLAG = flag(
    *("-dev", "--device", "device"),
    help="Where the model runs: auto (a GPU if there is one), cpu, or a device that"
    " buddyrun doctor lists, as cuda0.",
    default=DEVICE_AUTO,
)
_LAYERS_FLAG = flag(
    *("-ngl", "--gpu-layers", "--n-gpu-layers", "n_gpu_layers"),
    help="As in llama.cpp: 0 = CPU. Any other number means a GPU; how much of the experts is"
    " there, --moe-cache says.",
    type=_LayerCount(),
)

DEVICE_FLAGS = (
    _DEVICE_FLAG,
    _LAYERS_FLAG,
    _MARGIN_FLAG,
    switch(
        *("--warmup/--no-warmup", "warmup"),
        help="Let a GPU compute once while the model is loaded: it gets its kernels and memory"
        " ready then, not within the first answer.",
        default=True,
    ),
)

# For a command that only says what would be.
PLAN_DEVICE_FLAGS = (_DEVICE_FLAG, _LAYERS_FLAG, _MARGIN_FLAG)
