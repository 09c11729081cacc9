"""Settings are checked before a model takes memory, wherever they come from."""

from typing import Any

import pytest

from quant.gguf_file import GGUFFile
from runner.checks.read_model import read_model
from runner.config import EngineConfig
from runner.engine_limits import choose_limits
from runner.errors import OptionError
from runner.message_values import parse
from tests.paths import DEMO


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"moe_cache_policy": "foo"}, "--moe-cache-policy foo: expected one of lru, lfu, static"),
        ({"moe_miss": "drop"}, "--moe-miss drop: expected one of auto, load, host"),
        ({"moe_cache_bytes": -2}, "--moe-cache -2: expected 0 to"),
        ({"moe_cache_bytes": 1 << 60}, "--moe-cache 1152921504606846976: expected 0 to"),
        ({"fit_margin_bytes": -1}, "--fit-margin -1: expected 0 to"),
        ({"fit_margin_bytes": 1 << 60}, "--fit-margin 1152921504606846976: expected 0 to"),
        ({"moe_cache_slots": -1}, "--moe-cache-slots -1: expected 0 to"),
        ({"verify_every": -1}, "--verify-every -1: expected 0 to"),
    ],
)
def test_a_message_with_a_wrong_expert_setting_is_refused_by_its_flag(
    setting: dict[str, Any], words: str
) -> None:
    config = parse(EngineConfig, setting)
    with GGUFFile.open(DEMO) as file, pytest.raises(OptionError, match=words):
        choose_limits(config, read_model(file))
