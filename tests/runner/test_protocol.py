"""A model's description comes through a message as it was sent, with a GPU or without."""

import json
from dataclasses import asdict, fields, replace
from typing import Any

import pytest

from runner.device_memory import DeviceMemory
from runner.errors import OptionError
from runner.message_values import parse
from runner.protocol import LoadFields, ModelInfo, encode
from tests.runner.chat_fakes import INFO

MEMORY = DeviceMemory("CUDA0", 1, 2, 3, 4, 5, 6)


def sent(info: ModelInfo) -> dict[str, Any]:
    """The object that arrives at the other side."""
    message: dict[str, Any] = json.loads(encode({"type": "loaded", "info": info}))
    found: dict[str, Any] = message["info"]
    return found


@pytest.mark.parametrize(
    "info",
    [
        INFO,
        replace(INFO, device_memory=MEMORY, moe_cache_slots=(3, 4), backend="CUDA"),
        replace(INFO, warnings=("One.", "Two."), notes=()),
        replace(INFO, device_memory=MEMORY, warnings=("There was less memory.",)),
    ],
)
def test_a_description_of_a_model_arrives_as_it_was_sent(info: ModelInfo) -> None:
    assert parse(ModelInfo, sent(info)) == info


def test_a_gpu_s_memory_that_is_left_out_or_null_is_none() -> None:
    values = sent(replace(INFO, device_memory=MEMORY))
    assert parse(ModelInfo, {**values, "device_memory": None}).device_memory is None
    del values["device_memory"]
    assert parse(ModelInfo, values) == INFO


@pytest.mark.parametrize("value", ["CUDA0", 3, True, [], [1, 2], 0.5])
def test_a_gpu_s_memory_that_is_no_object_is_refused_by_its_name(value: object) -> None:
    with pytest.raises(OptionError, match="device_memory must be of type"):
        parse(ModelInfo, {**sent(INFO), "device_memory": value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_bytes": "2"}, "kv_bytes must be of type"),
        ({"kv_bytes": 2.0}, "kv_bytes must be of type"),
        ({"kv_bytes": True}, "kv_bytes must be of type"),
        ({"kv_bytes": None}, "kv_bytes must be of type"),
        ({"name": 7}, "name must be of type"),
        ({"colour": "red"}, "DeviceMemory has no field colour"),
    ],
)
def test_a_wrong_field_of_a_gpu_s_memory_is_refused_by_its_name(
    change: dict[str, Any], words: str
) -> None:
    memory = {**asdict(MEMORY), **change}
    with pytest.raises(OptionError, match=words):
        parse(ModelInfo, {**sent(INFO), "device_memory": memory})


@pytest.mark.parametrize("name", [f.name for f in fields(DeviceMemory)])
def test_a_gpu_s_memory_without_one_of_its_fields_is_refused(name: str) -> None:
    memory = {key: value for key, value in asdict(MEMORY).items() if key != name}
    with pytest.raises(OptionError, match=f"DeviceMemory lacks a field: {name}"):
        parse(ModelInfo, {**sent(INFO), "device_memory": memory})


@pytest.mark.parametrize("value", [[1], {"a": "b"}, 7, None])
def test_warnings_that_are_no_list_of_texts_are_refused(value: object) -> None:
    with pytest.raises(OptionError, match="warnings must be of type"):
        parse(ModelInfo, {**sent(INFO), "warnings": value})


def test_an_object_where_a_text_or_nothing_is_expected_is_refused() -> None:
    with pytest.raises(OptionError, match="chat_template must be of type"):
        parse(LoadFields, {"model": "m", "chat_template": {}})
