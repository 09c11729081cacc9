"""Which device a name means, among devices that this machine does not have."""

from dataclasses import replace

import pytest

from quant.devices import Device
from runner.devices import choose_device
from runner.errors import BackendError, OptionError
from runner.gpu_hardware import Gpu

CPU = Device(1, "CPU", "a processor", "CPU", "cpu", False, False)
BLAS = Device(2, "BLAS", "a library", "BLAS", "accel", False, False)
INSIDE = Device(3, "Vulkan0", "a GPU in the processor", "Vulkan", "igpu", True, True)
CARD = Device(4, "CUDA0", "a card", "CUDA", "gpu", True, True)
OTHER_CARD = replace(CARD, handle=5, name="CUDA1")
IDLE = Gpu("NVIDIA", "RTX 9", "nvidia-smi")


def chosen(name: str, *found: Device, gpus: tuple[Gpu, ...] = ()) -> Device:
    return choose_device(name, found, gpus).device


@pytest.mark.parametrize("name", ["auto", "gpu"])
def test_a_card_comes_before_a_gpu_in_the_processor_and_that_before_the_cpu(name: str) -> None:
    assert chosen(name, INSIDE, CARD, OTHER_CARD, BLAS, CPU) is CARD
    assert chosen(name, INSIDE, BLAS, CPU) is INSIDE
    assert chosen(name, BLAS, CPU) is CPU


@pytest.mark.parametrize("name", ["auto", "gpu"])
def test_a_gpu_that_is_used_needs_no_words(name: str) -> None:
    assert choose_device(name, (CARD, CPU), (IDLE,)).notes == ()


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("cpu", CPU), ("CPU", CPU), ("cuda0", CARD), ("CUDA1", OTHER_CARD), ("Cuda0", CARD),
        ("vulkan0", INSIDE),
    ],
)  # fmt: skip
def test_a_device_has_ggmls_name_in_any_case(name: str, device: Device) -> None:
    choice = choose_device(name, (CARD, OTHER_CARD, INSIDE, BLAS, CPU), (IDLE,))
    assert (choice.device, choice.notes) == (device, ())


@pytest.mark.parametrize("name", ["cuda2", "cuda", "blas", "", "vulkan 0"])
def test_a_name_that_nothing_has_is_refused_with_the_names_there_are(name: str) -> None:
    with pytest.raises(OptionError) as refused:
        chosen(name, CARD, INSIDE, BLAS, CPU)
    text = str(refused.value)
    assert text.startswith(f"--device {name}: ")
    assert "can use cuda0, vulkan0, cpu;" in text and "buddyrun doctor" in text


def test_a_gpu_that_ggml_cannot_use_is_noted_by_its_name() -> None:
    choice = choose_device("auto", (CPU,), (IDLE,))
    assert choice.device is CPU
    assert len(choice.notes) == 1 and choice.notes[0].startswith("RTX 9 cannot be used")
    assert choose_device("cpu", (CPU,), (IDLE,)).notes == (), "the CPU was asked for"


def test_that_there_is_no_gpu_is_noted_only_where_one_was_asked_for() -> None:
    assert choose_device("auto", (CPU,), ()).notes == ()
    notes = choose_device("gpu", (CPU,), ()).notes
    assert len(notes) == 1 and notes[0].startswith("There is no GPU")


def test_libraries_without_a_cpu_backend_are_told_of() -> None:
    for name in ("cpu", "auto"):
        with pytest.raises(BackendError, match="no CPU backend"):
            chosen(name, BLAS)


def test_the_cpu_of_this_machine_is_found() -> None:
    assert choose_device("cpu").device.kind == "cpu"
