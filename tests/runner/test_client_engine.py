"""Client and worker together with the real engine and the demo model."""

import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import psutil
import pytest

from runner.config import EngineConfig, GenerateRequest, SamplingConfig
from runner.engine_client import Client
from runner.errors import ContextFullError, GGUFError, OptionError, WorkerDiedError
from runner.protocol import BenchTest, GenerateResult, TextPiece
from tests.paths import DEMO

ROOT = Path(__file__).resolve().parents[2]
CONFIG = EngineConfig(n_ctx=512, n_batch=16, n_threads=1)
GREEDY = SamplingConfig(temperature=0)
ENDLESS = SamplingConfig(temperature=0, ignore_eos=True)
HI = GenerateRequest(messages=({"role": "user", "content": "hi"},), sampling=GREEDY)
LONG = GenerateRequest(prompt="Once upon a time", sampling=ENDLESS)
POSIX_ONLY = pytest.mark.skipif(sys.platform == "win32", reason="signals")


@pytest.fixture
def client():
    with Client.start() as client:
        yield client


@pytest.fixture
def loaded(client):
    client.load(DEMO, CONFIG)
    return client


def text_of(items):
    return "".join(item.text for item in items if isinstance(item, TextPiece))


def test_the_demo_model_answers(client):
    stages = []
    info = client.load(DEMO, CONFIG, on_progress=lambda *stage: stages.append(stage))
    assert info.n_ctx == 512
    assert stages
    *items, result = client.generate(HI)
    assert text_of(items).startswith("Hello!")
    assert isinstance(result, GenerateResult)
    assert result.stop_reason == "eos"
    assert client.stats()["n_past"] == result.n_past
    assert client.log == ""


def test_bench_measures_the_demo_model(loaded):
    (sample,) = loaded.bench([BenchTest(16, 4)], 3, "Some real text to read.")
    assert len(sample.samples_ns) == 3
    assert min(sample.samples_ns) > 0


def test_cancel_ends_a_long_answer_and_a_long_prompt(loaded):
    answer = loaded.generate(LONG)
    list(islice(answer, 8))
    loaded.cancel()
    *_, result = answer
    assert result.stop_reason == "cancelled"
    answer = loaded.generate(GenerateRequest(prompt="word " * 250, sampling=GREEDY))
    next(answer)
    loaded.cancel()
    *items, result = answer
    assert (text_of(items), result.stop_reason) == ("", "cancelled")


def test_errors_of_the_engine_arrive_with_class_and_text(loaded, tmp_path):
    with pytest.raises(ContextFullError, match="512"):
        list(loaded.generate(GenerateRequest(prompt="word " * 600)))
    with pytest.raises(OptionError, match="empty"):
        list(loaded.generate(GenerateRequest(prompt="")))
    with pytest.raises(OptionError, match="temp"):
        sampling = SamplingConfig(temperature=float("nan"))
        list(loaded.generate(GenerateRequest(prompt="a", sampling=sampling)))
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(DEMO.read_bytes()[:100_000])
    for path in (truncated, tmp_path / "none.gguf", tmp_path):
        with pytest.raises(GGUFError, match=path.name):
            loaded.load(path, CONFIG)
    assert loaded.load(DEMO, CONFIG).n_layer == 8
    assert loaded.log == ""


@POSIX_ONLY
def test_after_kill_9_in_an_answer_a_restart_gives_the_same_answer(loaded):
    whole = text_of(loaded.generate(HI))
    answer = loaded.generate(LONG)
    list(islice(answer, 4))
    os.kill(loaded.pid, signal.SIGKILL)
    with pytest.raises(WorkerDiedError, match="killed"):
        list(answer)
    loaded.restart()
    assert text_of(loaded.generate(HI)) == whole


@pytest.mark.slow
@POSIX_ONLY
def test_a_model_truncated_while_chatting_is_explained_and_restart_refuses_it(client, tmp_path):
    model = tmp_path / "model.gguf"
    shutil.copy(DEMO, model)
    client.load(model, CONFIG)
    answer = client.generate(LONG)
    list(islice(answer, 4))
    os.truncate(model, 50_000)
    with pytest.raises(WorkerDiedError, match=r"model\.gguf \(SIGBUS\): it has 50000 bytes"):
        list(answer)
    with pytest.raises(GGUFError, match=r"model\.gguf"):
        client.restart()
    shutil.copy(DEMO, model)
    assert client.restart().n_layer == 8


@pytest.mark.slow
@POSIX_ONLY
def test_a_model_deleted_while_chatting_stays_usable_until_a_restart(client, tmp_path):
    model = tmp_path / "model.gguf"
    shutil.copy(DEMO, model)
    client.load(model, CONFIG)
    model.unlink()
    assert text_of(client.generate(HI)).startswith("Hello!")
    with pytest.raises(GGUFError, match=r"model\.gguf"):
        client.restart()


def test_the_parent_never_loads_native_code_nor_maps_the_model():
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from runner.engine_client import Client
from runner.config import EngineConfig, GenerateRequest
with Client.start() as client:
    client.load({str(DEMO)!r}, EngineConfig(n_threads=1))
    *_, result = client.generate(GenerateRequest(prompt="a", n_predict=2))
print(sorted({{"llama_cpp", "numpy", "torch", "quant.ggml", "gguf"}} & set(sys.modules)))
print(".gguf" in open("/proc/self/maps").read() if sys.platform == "linux" else False)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["[]", "False"]


def test_the_first_token_comes_within_3_seconds_of_the_start():
    start = time.monotonic()
    with Client.start() as client:
        client.load(DEMO, EngineConfig(n_threads=1))
        for item in client.generate(HI):
            if isinstance(item, TextPiece):
                break
        assert time.monotonic() - start < 3


@POSIX_ONLY
def test_a_parent_killed_in_the_middle_of_an_answer_leaves_no_worker():
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from runner.engine_client import Client
from runner.config import EngineConfig, GenerateRequest, SamplingConfig
client = Client.start()
client.load({str(DEMO)!r}, EngineConfig(n_threads=1))
print(client.pid, flush=True)
for _ in client.generate(GenerateRequest(prompt="a", sampling=SamplingConfig(ignore_eos=True))):
    pass
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    deadline = time.monotonic() + 2
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
