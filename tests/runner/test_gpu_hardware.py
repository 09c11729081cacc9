"""GPUs found in planted trees of /proc, /sys and /dev."""

from pathlib import Path

import pytest

from runner.gpu_hardware import SystemPlaces, find_gpus


@pytest.fixture
def places(tmp_path: Path) -> SystemPlaces:
    for name in ("proc", "sys", "dev", "bin"):
        (tmp_path / name).mkdir()
    return SystemPlaces(
        proc=tmp_path / "proc",
        sysfs=tmp_path / "sys",
        dev=tmp_path / "dev",
        search_path=str(tmp_path / "bin"),
        system="linux",
        machine="x86_64",
    )


def plant(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def plant_pci(
    places: SystemPlaces,
    address: str,
    vendor: str,
    device: str = "0x744c",
    pci_class: str = "0x030000",
    driver: str = "",
    card: int | None = None,
) -> Path:
    """A PCI device as the kernel shows it, with a link to its driver and one from its card."""
    folder = places.sysfs / "devices/pci0000:00" / address
    plant(folder / "vendor", f"{vendor}\n")
    plant(folder / "device", f"{device}\n")
    plant(folder / "class", f"{pci_class}\n")
    bus = places.sysfs / "bus/pci/devices"
    bus.mkdir(parents=True, exist_ok=True)
    (bus / address).symlink_to(folder)
    if driver:
        (places.sysfs / "bus/pci/drivers" / driver).mkdir(parents=True, exist_ok=True)
        (folder / "driver").symlink_to(places.sysfs / "bus/pci/drivers" / driver)
    if card is not None:
        drm = places.sysfs / "class/drm"
        (drm / f"card{card}-HDMI-A-1").mkdir(parents=True)
        (drm / f"card{card}").mkdir()
        (drm / f"card{card}" / "device").symlink_to(folder)
    return folder


def plant_information(places: SystemPlaces, address: str, model: str) -> Path:
    text = f"Model: \t\t {model}\nIRQ:   \t\t 162\nGPU UUID: \t GPU-1\nDevice Minor: \t 0\n"
    return plant(places.proc / "driver/nvidia/gpus" / address / "information", text)


def plant_program(places: SystemPlaces, script: str) -> Path:
    path = plant(Path(places.search_path) / "nvidia-smi", f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_a_machine_without_gpus_has_none(places: SystemPlaces) -> None:
    assert find_gpus(places) == ()
    plant_pci(places, "0000:00:00.0", "0x8086", pci_class="0x060000")  # a bridge
    plant_pci(places, "0000:00:02.0", "0x1a03", card=0)  # the graphics of a server's board
    assert find_gpus(places) == ()


def test_nvidias_driver_tells_the_names_of_all_its_gpus(places: SystemPlaces) -> None:
    plant(places.dev / "nvidia0")
    plant(places.dev / "nvidiactl")
    first = plant_information(places, "0000:01:00.0", "NVIDIA GeForce RTX 3060")
    plant_information(places, "0000:02:00.0", "Tesla P40")
    plant_pci(places, "0000:01:00.0", "0x10de", driver="nvidia", card=0)  # the same card again
    gpus = find_gpus(places)
    assert [gpu.name for gpu in gpus] == ["NVIDIA GeForce RTX 3060", "NVIDIA Tesla P40"]
    assert (gpus[0].vendor, gpus[0].found_in, gpus[0].problem) == ("NVIDIA", str(first), "")


def test_a_driver_without_device_files_is_a_container_without_its_gpu(places: SystemPlaces) -> None:
    plant_information(places, "0000:01:00.0", "NVIDIA GeForce RTX 3060")
    (gpu,) = find_gpus(places)
    assert f"no {places.dev}/nvidia0" in gpu.problem and "--gpus all" in gpu.problem


def test_nvidia_smi_is_asked_where_the_driver_shows_no_files(places: SystemPlaces) -> None:
    program = plant_program(
        places,
        '[ "$*" = -L ] || exit 2\n'
        'echo "GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-77)"\n'
        'echo "GPU 1: Quadro P2000 (UUID: GPU-78)"\n'
        'echo "  MIG 1g.5gb Device 0: (UUID: MIG-1)"',
    )
    gpus = find_gpus(places)
    assert [gpu.name for gpu in gpus] == ["NVIDIA GeForce RTX 4090", "NVIDIA Quadro P2000"]
    assert gpus[0].found_in == f"{program} -L"


def test_an_nvidia_smi_that_fails_is_no_gpu(places: SystemPlaces) -> None:
    plant_program(places, "echo NVIDIA-SMI has failed to talk to the driver; exit 9")
    assert find_gpus(places) == ()
    (Path(places.search_path) / "nvidia-smi").write_bytes(b"\x00 not a program")
    assert find_gpus(places) == ()


def test_a_device_file_alone_is_a_gpu(places: SystemPlaces) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        plant(places.dev / name)
    assert [gpu.name for gpu in find_gpus(places)] == ["NVIDIA GPU 0", "NVIDIA GPU 1"]


@pytest.mark.parametrize(
    ("driver", "problem"),
    [
        ("", "No driver is loaded for it."),
        ("nouveau", "It has the driver nouveau; CUDA needs NVIDIA's own."),
        ("vfio-pci", "It is set aside for a virtual machine (driver vfio-pci)."),
    ],
)
def test_an_nvidia_card_without_nvidias_driver_says_so(
    driver: str, problem: str, places: SystemPlaces
) -> None:
    folder = plant_pci(places, "0000:01:00.0", "0x10de", "0x2504", driver=driver)
    (gpu,) = find_gpus(places)
    assert (gpu.name, gpu.problem) == ("NVIDIA GPU 0x2504", problem)
    assert gpu.found_in == str(folder)


def test_cards_of_amd_and_intel_are_found_once_each(places: SystemPlaces) -> None:
    plant(places.dev / "dri/renderD128")
    folder = plant_pci(places, "0000:03:00.0", "0x1002", driver="amdgpu", card=1)
    plant(folder / "product_name", "AMD Instinct MI100\n")
    plant_pci(places, "0000:00:02.0", "0x8086", "0x9a49", driver="i915", card=0)
    gpus = find_gpus(places)
    assert [(gpu.vendor, gpu.name, gpu.problem) for gpu in gpus] == [
        ("Intel", "Intel GPU 0x9a49", ""),
        ("AMD", "AMD Instinct MI100", ""),
    ]


def test_an_accelerator_that_is_no_display_is_found_by_its_card(places: SystemPlaces) -> None:
    plant(places.dev / "dri/renderD128")
    plant_pci(places, "0000:05:00.0", "0x1002", pci_class="0x120000", driver="amdgpu", card=0)
    plant_pci(places, "0000:06:00.0", "0x8086", pci_class="0x020000", driver="e1000")  # a network
    assert [gpu.name for gpu in find_gpus(places)] == ["AMD GPU 0x744c"]


def test_a_card_without_a_render_node_must_be_passed_into_the_container(
    places: SystemPlaces,
) -> None:
    plant_pci(places, "0000:03:00.0", "0x1002", driver="amdgpu", card=0)
    (gpu,) = find_gpus(places)
    assert "--device /dev/dri" in gpu.problem


def test_apple_silicon_has_its_gpu(places: SystemPlaces) -> None:
    def on(system: str, machine: str) -> SystemPlaces:
        return SystemPlaces(places.proc, places.sysfs, places.dev, "", system, machine)

    assert [gpu.vendor for gpu in find_gpus(on("darwin", "arm64"))] == ["Apple"]
    assert find_gpus(on("darwin", "x86_64")) == find_gpus(on("linux", "arm64")) == ()
