"""What the property tests of the expert cache share."""

from collections.abc import Iterator
from contextlib import closing

import pytest

from quant.read_only_file import BLOCK_BYTES
from tests.runner.experts.cache_programs import OpenModels


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenModels]:
    with closing(OpenModels(tmp_path_factory.mktemp("experts"))) as models:
        yield models


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read ahead block by block, so that what is read ahead of a small expert can end anywhere."""
    monkeypatch.setattr("runner.experts.expert_store._PIECE_BYTES", BLOCK_BYTES)
