"""Speed and memory beside llama.cpp at a real size; `tests.compare_speed` has the figures.

The limits here leave room for a busy machine: they catch what is broken, not what is a little slow.
"""

from pathlib import Path

import numpy as np
import pytest

from tests import compare_speed
from tests.random_model import write_big_mixtral

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def big_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("big") / "mixtral.gguf"
    yield write_big_mixtral(path, n_layer=4)
    path.unlink()


def test_decoding_and_prompts_keep_up_with_llama_cpp(big_path: Path) -> None:
    decode, prompt = compare_speed.compare(
        big_path, n_threads=2, n_rounds=3, repack=False, n_prompt=192
    )
    assert np.max(decode.ratios) > 0.85, str(decode)
    assert np.max(prompt.ratios) > 0.8, str(prompt)


def test_the_weights_are_file_pages_and_not_anonymous_memory(big_path: Path) -> None:
    used = compare_speed.anonymous_megabytes(big_path)
    assert sum(used.values()) < 400, used
    assert used["the terminal's process"] < 80, used


def test_python_takes_little_of_a_layers_time(demo_path: Path) -> None:
    spent = min(compare_speed.python_us_per_layer(demo_path, n_threads=1) for _ in range(3))
    assert spent <= 60
