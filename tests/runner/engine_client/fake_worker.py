"""A real worker process with a fake session, and what its tests ask of it."""

import sys
from pathlib import Path

import pytest

from runner.config import EngineConfig, GenerateRequest

PROGRAM = (
    f"sys.path.insert(0, {str(Path(__file__).parents[1])!r}); from fake_session import FakeSession;"
    " from runner.worker import main; main(FakeSession)"
)
CONFIG = EngineConfig(n_ctx=64)
POSIX_ONLY = pytest.mark.skipif(sys.platform == "win32", reason="signals")


def ask(client, prompt):
    return list(client.generate(GenerateRequest(prompt=prompt)))


def answer_stop(client, prompt):
    return ask(client, prompt)[-1].stop_reason
