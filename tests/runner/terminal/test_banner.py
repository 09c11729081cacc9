"""The lines about memory and experts at the beginning of a chat, and its warnings."""

import io
from dataclasses import replace

from runner.device_memory import DeviceMemory
from runner.protocol import ModelInfo
from runner.terminal.chat_view import ChatView, device_memory_line
from tests.runner.chat_fakes import INFO

MEMORY = DeviceMemory(
    name="Vulkan0", weights_bytes=1_600_000_000, kv_bytes=1_070_000_000,
    compute_bytes=85_000_000, slots_bytes=8_900_000_000, free_before_bytes=12_700_000_000,
    free_bytes=1_050_000_000,
)  # fmt: skip
ON_DEVICE = replace(
    INFO, device="Vulkan0: some card", device_memory=MEMORY, moe_cache_bytes=8_900_000_000,
    moe_cache_slots=(3,) * 32, moe_cache_policy="lfu",
)  # fmt: skip


def banner(info: ModelInfo) -> list[str]:
    out = io.StringIO()
    ChatView(out, io.StringIO(), is_terminal=True, has_color=False).banner("1.2.3", info)
    return out.getvalue().splitlines()


def test_the_banner_tells_how_many_experts_are_in_memory() -> None:
    info = replace(
        INFO, moe_cache_bytes=1_190_000_000, moe_cache_slots=(4,) * 32, moe_cache_policy="lru"
    )
    assert "experts  4 of 8 per layer in memory (1.19 GB), lru, the rest from the file" in banner(
        info
    )
    uneven = replace(info, moe_cache_slots=(4, 5) * 16)
    assert any(line.startswith("experts  4 to 5 of 8 per layer") for line in banner(uneven))


def test_with_all_experts_in_memory_nothing_comes_from_the_file() -> None:
    info = replace(INFO, moe_cache_bytes=26_000_000_000, moe_cache_slots=(8,) * 32)
    assert "experts  8 of 8 per layer in memory (26.0 GB)" in banner(info)


def test_without_a_cache_the_banner_says_nothing_of_one() -> None:
    assert not any(line.startswith("experts") for line in banner(INFO))


def test_the_banner_of_a_gpu_tells_where_its_memory_went_and_that_the_experts_are_there() -> None:
    lines = banner(ON_DEVICE)
    first = lines.index("device   Vulkan0: some card, 2 threads")
    assert lines[first + 1 : first + 3] == [
        "memory   Vulkan0: weights 1.60 GB, context 1.07 GB, compute 85.0 MB, experts 8.90 GB;"
        " 12.7 GB were free",
        "experts  3 of 8 per layer on Vulkan0 (8.90 GB), lfu, the rest from the file",
    ]
    everything = replace(ON_DEVICE, moe_cache_slots=(8,) * 32)
    assert "experts  8 of 8 per layer on Vulkan0 (8.90 GB)" in banner(everything)


def test_without_a_gpu_the_banner_says_nothing_of_a_device_s_memory() -> None:
    lines = banner(replace(ON_DEVICE, device_memory=None))
    assert not any(line.startswith("memory") for line in lines)
    assert any("3 of 8 per layer in memory" in line for line in lines)


def test_a_name_from_a_driver_cannot_steer_the_terminal() -> None:
    name = "Vul\x1b[2Jkan\n0"
    line = device_memory_line(replace(MEMORY, name=name))
    assert "\x1b" not in line and "\n" not in line
    assert line.startswith("Vul")
    odd = replace(ON_DEVICE, device=name, device_memory=replace(MEMORY, name=name))
    assert not any("\x1b" in line for line in banner(odd))


def test_warnings_stand_before_the_notes() -> None:
    lines = banner(replace(INFO, warnings=("There is no GPU.",), notes=("It is capped.",)))
    first = lines.index("note     There is no GPU.")
    assert lines[first + 1] == "note     It is capped."


def test_where_nobody_sits_only_the_warnings_are_told_on_stderr() -> None:
    out, err = io.StringIO(), io.StringIO()
    info = replace(ON_DEVICE, warnings=("There is no GPU.",))
    ChatView(out, err, is_terminal=False, has_color=True).banner("1.2.3", info)
    assert (out.getvalue(), err.getvalue()) == ("", "There is no GPU.\n")
