"""The engine where the model does not fit, in a real memory control group (Linux, as root)."""

import json
import sys
from dataclasses import replace
from typing import Any

import pytest

from quant.gguf_file import GGUFFile
from runner.checks.read_model import read_model
from runner.model_sizes import model_sizes
from tests.capped_child import Settings, command, run_endurance
from tests.memory_group import CappedRun, run_capped, why_not
from tests.random_model import write_big_mixtral

pytestmark = pytest.mark.slow

CAP = 300_000_000
MAX_GROWTH_MB = 1.0  # of anonymous memory: what an allocator may keep
N_SETTLED = 50  # tokens after which it must not grow
SETTINGS = Settings("", n_threads=1, n_ctx=256, n_batch=64, n_decode=150, miss="auto")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Of a model with 297 MB of experts."""
    if reason := why_not():
        pytest.skip(reason)
    path = tmp_path_factory.mktemp("capped") / "mixtral.gguf"
    write_big_mixtral(path, n_embd=1024, n_ff=3584, n_layer=6, n_vocab=2000)
    return replace(SETTINGS, model=str(path))


@pytest.fixture(scope="module")
def run(settings: Settings) -> CappedRun:
    return run_capped(command("endurance", settings), CAP)


@pytest.fixture(scope="module")
def answer(run: CappedRun) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run.check().stdout)
    return found


def test_all_experts_at_once_would_be_killed(settings: Settings) -> None:
    with GGUFFile.open(settings.model) as file:
        expert_bytes = model_sizes(file, read_model(file)).all_experts_bytes
    too_much = f"import runner.engine; bytearray({expert_bytes})"
    done = run_capped([sys.executable, "-c", too_much], CAP)
    assert (done.returncode, done.n_oom_kills) == (-9, 1)


def test_the_answer_is_the_same_as_without_a_cap(
    settings: Settings, answer: dict[str, Any]
) -> None:
    assert 2 <= min(answer["n_slots"]) <= max(answer["n_slots"]) < 8
    assert answer["tokens"] == run_endurance(settings)["tokens"]


def test_memory_stays_under_the_cap(run: CappedRun) -> None:
    assert run.returncode == 0
    assert run.n_oom_kills == 0
    assert 0 < run.peak_bytes <= CAP


def test_anonymous_memory_does_not_grow(answer: dict[str, Any]) -> None:
    used_mb = dict(answer["anonymous_mb"])
    assert max(used_mb) == SETTINGS.n_decode
    assert max(used_mb.values()) - used_mb[N_SETTLED] <= MAX_GROWTH_MB, used_mb
