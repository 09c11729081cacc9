import tempfile

import pytest

from runner.engine_client import Client
from runner.process import worker_process
from tests.runner.engine_client.fake_worker import CONFIG, PROGRAM


@pytest.fixture
def private_directories(tmp_path_factory, monkeypatch):
    """The folder in which the private directories are made, for looking at what is left."""
    folder = tmp_path_factory.mktemp("d")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def client(monkeypatch, private_directories):
    monkeypatch.setattr(worker_process, "PROGRAM", PROGRAM)
    client = Client.start()
    yield client
    client.close()
    assert list(private_directories.iterdir()) == []


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(64 << 10))
    return path


@pytest.fixture
def loaded(client, model):
    client.load(model, CONFIG)
    return client


@pytest.fixture
def crowded(tmp_path):
    """A model on a GPU that has less memory than it said."""
    path = tmp_path / "crowded.gguf"
    path.write_bytes(bytes(64 << 10))
    return path
