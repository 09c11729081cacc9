"""The line about experts in memory at the beginning of a chat."""

import io
from dataclasses import replace

from runner.protocol import ModelInfo
from runner.terminal.chat_view import ChatView
from tests.runner.chat_fakes import INFO


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
