"""A hub on loopback, and processes that talk to it with a home of their own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runner.hub.fork_server import ForkServer
from tests.runner.hub.local_hub import LocalHub

SECRET = "hf_" + "s" * 37


@pytest.fixture(scope="module")
def hub() -> Iterator[LocalHub]:
    with LocalHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HF_HOME; its name has a space and letters that are not ASCII."""
    return tmp_path_factory.mktemp("größe und 模型")


@pytest.fixture(scope="module")
def client(hub: LocalHub, home: Path) -> Iterator[ForkServer]:
    """Without a token."""
    with ForkServer(home, hub.environment(home)) as client:
        yield client


@pytest.fixture(scope="module")
def known_client(hub: LocalHub, home: Path) -> Iterator[ForkServer]:
    """With SECRET as HF_TOKEN."""
    with ForkServer(home, hub.environment(home, HF_TOKEN=SECRET)) as client:
        yield client


@pytest.fixture(autouse=True)
def hub_is_well(hub: LocalHub) -> None:
    hub.faults.clear()
    hub.always.clear()
    hub.requests.clear()
    hub.bytes_per_s = 0.0
    hub.n_sent = 0
