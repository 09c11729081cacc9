"""What is said of the speed before a download follows from what fits into memory."""

from pathlib import Path

import pytest

from quant.gguf_file import GGUFFile
from runner.checks.read_model import read_model, read_shape
from runner.config import EngineConfig
from runner.hub.preflight import FAST, MIXED, PAGED, speed_class
from runner.show import ModelDescription, ReportedDevice, describe
from tests.paths import DEMO
from tests.random_model import RandomModel, write_random_model

MB = 1_000_000
EXPERT = 3 * 256 * 512 * 34 // 32  # bytes of a demo expert, Q8_0


def demo_with(
    monkeypatch: pytest.MonkeyPatch, memory_bytes: int, device: ReportedDevice | None = None
) -> ModelDescription:
    monkeypatch.setattr("runner.show.available_memory_bytes", lambda: memory_bytes)
    config = EngineConfig(device="auto" if device else "cpu", fit_margin_bytes=MB)
    with GGUFFile.open(DEMO) as file:
        return describe(file, read_shape(file), run_config=config, device=device)


def test_a_model_that_fits_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    assert speed_class(demo_with(monkeypatch, 1000 * MB)).name == FAST


def test_experts_that_do_not_fit_are_read_and_it_is_said_how_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = demo_with(monkeypatch, 140 * MB)
    assert model.moe_cache is not None
    n_slots = sum(model.moe_cache.n_slots)
    assert 0 < n_slots < 64
    found = speed_class(model)
    assert found.name == PAGED
    # 8 layers use 2 experts each; evenly used, those in slots are hit in their share of cases
    assert found.read_bytes_per_token == int(16 * (1 - n_slots / 64) * EXPERT)
    assert "are read per token" in found.text and "2 GB/s" in found.text


def test_on_a_gpu_the_processor_computes_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    small = ReportedDevice("cuda0", 40 * MB, 40 * MB)
    found = speed_class(demo_with(monkeypatch, 1000 * MB, small))
    assert found.name == MIXED and "cuda0 holds" in found.text
    large = ReportedDevice("cuda0", 900 * MB, 900 * MB)
    assert speed_class(demo_with(monkeypatch, 1000 * MB, large)).name == FAST


def test_a_header_alone_gives_the_same_shape_as_the_file(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "m.gguf", RandomModel(tensors_per_shard=9))
    with GGUFFile.open(path) as file:
        assert read_shape(file) == read_model(file)
