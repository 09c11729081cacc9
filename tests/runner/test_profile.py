"""Profiles of small random models against numpy, and interrupted ones; the demo model's is slow."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from quant.gguf_file import GGUFFile
from runner.buddies import BuddyTable
from runner.config import EngineConfig
from runner.engine import Engine
from runner.engine_client import Client
from runner.errors import CancelledError, OptionError, ProfileError, WorkerDiedError
from runner.model_hash import model_hash
from runner.profile import MAX_SAMPLED, make_profile
from runner.profiling.calibration import Calibration, calibrate
from runner.profiling.workspace import folder_for
from runner.protocol import ProfileFields, ProfileResult
from runner.tokenizer import Tokenizer
from tests import numpy_oracle
from tests.paths import DEMO, HELD_OUT, ROOT
from tests.random_model import RandomModel, write_big_mixtral, write_random_model

TEXT = (HELD_OUT / "story.txt").read_text()[:4000]
ONE_THREAD = EngineConfig(n_threads=1)
SMALL = RandomModel(n_embd=64, n_ff=96, n_layer=3, n_expert=5, type=T.Q8_0)

Emit = Callable[[str, int, int], None]


@pytest.fixture(scope="module", autouse=True)
def short_estimates():  # type: ignore[no-untyped-def]
    """Policies are compared on few tokens, which takes longest: no test here is about that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runner.profiling.estimates.N_TOKENS", 16)
        yield


def silent(stage: str, done: int, total: int) -> None:
    pass


def wanted(model: Path, output: Path, n_tokens: int = 300) -> ProfileFields:
    return ProfileFields(str(model), (TEXT,), str(output), ONE_THREAD, n_tokens)


def make(model: Path, output: Path, n_tokens: int = 300, emit: Emit = silent) -> ProfileResult:
    return make_profile(wanted(model, output, n_tokens), emit, lambda: False)


def load(model: Path, output: Path) -> BuddyTable:
    with GGUFFile.open(model) as file:
        found = model_hash(file)
        n_layer = int(file.metadata["llama.block_count"])  # type: ignore[call-overload]
        n_expert = int(file.metadata["llama.expert_count"])  # type: ignore[call-overload]
    return BuddyTable.load(output, found, n_layer, n_expert)


def calibration_of(model: Path, n_tokens: int = 300) -> Calibration:
    with Tokenizer(model) as tokenizer:
        tokens = tokenizer.tokenize(TEXT, add_special=False, parse_special=True)
        bos = tokenizer.bos if tokenizer.add_bos else None
    return calibrate([tokens], bos, n_tokens, MAX_SAMPLED)


# against numpy


def experts_of(path: Path, m: RandomModel) -> list[list[list[np.ndarray]]]:
    """[layer][expert]: gate, up and down as the gguf package reads and converts them."""
    shards = (
        sorted(path.parent.glob(f"{path.name.split('-0')[0]}*")) if m.tensors_per_shard else [path]
    )
    tensors = {t.name: t for shard in shards for t in gguf.GGUFReader(shard).tensors}

    def matrix(layer: int, name: str, expert: int) -> np.ndarray:
        tensor = tensors.get(f"blk.{layer}.ffn_{name}.{expert}.weight")
        if tensor is not None:
            return gguf.quants.dequantize(tensor.data, tensor.tensor_type)  # type: ignore[no-any-return]
        tensor = tensors[f"blk.{layer}.ffn_{name}_exps.weight"]
        return gguf.quants.dequantize(tensor.data[expert], tensor.tensor_type)  # type: ignore[no-any-return]

    return [
        [[matrix(layer, name, e) for name in ("gate", "up", "down")] for e in range(m.n_expert)]
        for layer in range(m.n_layer)
    ]


def swiglu(parts: list[np.ndarray], x: np.ndarray) -> np.ndarray:
    gate, up, down = (part.astype(np.float64) for part in parts)
    hidden = x @ gate.T
    result: np.ndarray = (hidden / (1 + np.exp(-hidden)) * (x @ up.T)) @ down.T
    return result


def expected_table(
    m: RandomModel,
    traces: list[tuple[np.ndarray, np.ndarray]],
    experts: list[list[list[np.ndarray]]],
) -> tuple[np.ndarray, ...]:
    """uses, coactivation, scale and error by plain loops; traces [layer]: expert_ids, ffn_input."""
    uses = np.zeros((m.n_layer, m.n_expert), int)
    pairs, scale, error = (np.zeros((m.n_layer, m.n_expert, m.n_expert)) for _ in range(3))
    for layer, (ids, x) in enumerate(traces):
        for row in ids:
            for i in row:
                uses[layer, i] += 1
                for j in row:
                    pairs[layer, i, j] += i != j
        for e in range(m.n_expert):
            mine = x[[e in row for row in ids]]
            f_e = swiglu(experts[layer][e], mine)
            for b in range(m.n_expert):
                f_b = swiglu(experts[layer][b], mine)
                scale[layer, e, b] = (f_e * f_b).sum() / (f_b * f_b).sum()
                left = f_e - scale[layer, e, b] * f_b
                error[layer, e, b] = (left * left).sum() / (f_e * f_e).sum()
    return uses, pairs, scale, error


def traced(model: Path, m: RandomModel) -> list[tuple[np.ndarray, np.ndarray]]:
    parts: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(m.n_layer)]
    engine = Engine(model, replace(ONE_THREAD, n_ctx=256, n_batch=256))
    for context in calibration_of(model).contexts:
        engine.reset()
        engine.trace(
            context, lambda layer, t: parts[layer].append((t.expert_ids[1:], t.ffn_input[1:]))
        )
    engine.close()
    return [tuple(map(np.concatenate, zip(*layer, strict=True))) for layer in parts]  # type: ignore[misc]


MODELS = {
    "q8_0": SMALL,
    "f16, three of seven": replace(SMALL, n_expert=7, n_expert_used=3, type=T.F16),
    "one of three": replace(SMALL, n_expert=3, n_expert_used=1, type=T.F32),
    "q5_1 in the old layout": replace(SMALL, n_expert=4, type=T.Q5_1, old_layout=True),
    "bf16 in parts": replace(SMALL, type=T.BF16, tensors_per_shard=9),
}


@pytest.mark.parametrize("name", MODELS)
def test_scale_error_and_counts_are_those_of_plain_loops(name: str, tmp_path: Path) -> None:
    m = MODELS[name]
    model = write_random_model(tmp_path / "model.gguf", m)
    result = make(model, tmp_path / "out.npz")
    table = load(model, tmp_path / "out.npz")
    uses, pairs, scale, error = expected_table(m, traced(model, m), experts_of(model, m))
    assert np.array_equal(table.uses, uses) and np.array_equal(table.coactivation, pairs)
    assert np.allclose(table.scale, scale, atol=3e-3)
    assert np.allclose(table.error, error, atol=3e-3)  # inputs are kept in float16
    assert table.uses.sum() == 300 * m.n_expert_used * m.n_layer and table.n_tokens == 300
    best = [np.sort(layer, axis=1)[:, 1].mean() for layer in error]
    assert np.allclose(result.best_errors, best, atol=3e-3)
    assert not folder_for(tmp_path / "out.npz").exists()


def test_the_whole_profile_is_that_of_a_forward_pass_in_numpy(tmp_path: Path) -> None:
    m = replace(SMALL, type=T.F32, n_layer=2)
    model = write_random_model(tmp_path / "model.gguf", m)
    make(model, tmp_path / "out.npz", 160)
    table = load(model, tmp_path / "out.npz")
    w = {t.name: np.array(t.data) for t in gguf.GGUFReader(model).tensors}
    traces: list[list[list[np.ndarray]]] = [[[], []] for _ in range(m.n_layer)]
    for context in calibration_of(model, 160).contexts:
        x = w["token_embd.weight"][list(context)]
        for layer in range(m.n_layer):
            p = f"blk.{layer}."
            normed = numpy_oracle._norm(x, w[p + "attn_norm.weight"])
            x = x + numpy_oracle._attention(w, p, m, normed, 0)
            ffn_input = numpy_oracle._norm(x, w[p + "ffn_norm.weight"])
            ids = np.argsort(-(ffn_input @ w[p + "ffn_gate_inp.weight"].T), axis=1)
            traces[layer][0].append(ids[1:, : m.n_expert_used])
            traces[layer][1].append(ffn_input[1:])
            x = x + numpy_oracle._experts(w, p, m, ffn_input)
    joined = [(np.concatenate(ids), np.concatenate(inputs)) for ids, inputs in traces]
    uses, _, scale, error = expected_table(m, joined, experts_of(model, m))
    assert np.abs(table.uses - uses).max() <= 2  # a router's near ties may fall otherwise
    assert np.allclose(table.scale, scale, atol=0.03)
    assert np.allclose(table.error, error, atol=0.03)


def test_experts_with_a_common_ancestor_leave_what_plain_loops_find(tmp_path: Path) -> None:
    m = replace(SMALL, type=T.F32)
    model = write_random_model(tmp_path / "model.gguf", m)
    with GGUFFile.open(model) as file:
        merged = [tensor for name, tensor in file.tensors.items() if "_exps" in name]
    whole = np.memmap(model, mode="r+")
    for tensor in merged:
        experts = whole[tensor.offset : tensor.offset + tensor.n_bytes].view(np.float32)
        rows = experts.reshape(m.n_expert, -1)
        rows[:] = 0.9 * rows[0] + np.linspace(0.1, 0.6, m.n_expert)[:, None] * rows
    whole.flush()
    make(model, tmp_path / "out.npz")
    table = load(model, tmp_path / "out.npz")
    _, _, scale, error = expected_table(m, traced(model, m), experts_of(model, m))
    assert error.max() > 0.5 and np.sort(error, axis=2)[:, :, 1].min() < 0.2
    assert np.allclose(table.scale, scale, atol=2e-3)
    assert np.allclose(table.error, error, atol=2e-3)


def test_experts_that_are_copies_replace_each_other_perfectly(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model.gguf", replace(SMALL, type=T.F32, n_layer=1))
    with GGUFFile.open(model) as file:
        parts = [file.tensors[f"blk.0.ffn_{name}_exps.weight"] for name in ("gate", "up", "down")]
    data = bytearray(model.read_bytes())
    for part in parts:
        n_bytes = part.n_bytes // SMALL.n_expert
        first = slice(part.offset, part.offset + n_bytes)
        data[part.offset + 3 * n_bytes : part.offset + 4 * n_bytes] = data[first]
    model.write_bytes(data)
    make(model, tmp_path / "out.npz")
    table = load(model, tmp_path / "out.npz")
    assert table.error[0, 0, 3] < 1e-5 and table.error[0, 3, 0] < 1e-5
    assert np.isclose(table.scale[0, 0, 3], 1.0, atol=1e-4)
    assert table.ranked(0)[0, 0] == 3 and table.ranked(0)[3, 0] == 0


# interrupted and continued


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_random_model(tmp_path / "model.gguf", SMALL)


@pytest.fixture(scope="module")
def whole(short_estimates: None, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The profile of `model` as it is without any interruption."""
    model = write_random_model(tmp_path_factory.mktemp("whole") / "model.gguf", SMALL)
    make(model, model.with_name("whole.npz"))
    return model.with_name("whole.npz").read_bytes()


@pytest.mark.parametrize(
    ("stage", "n_news", "n_kept"),
    [("running the text", 1, 0), ("running the text", 4, 1), ("comparing", 1, 2),
     ("comparing", 9, 3), ("comparing", 17, 4)],
)  # fmt: skip
def test_a_cancelled_profile_goes_on_where_it_was(
    model: Path, whole: bytes, stage: str, n_news: int, n_kept: int
) -> None:
    output = model.with_name("out.npz")
    news: list[str] = []

    def emit(text: str, done: int, total: int) -> None:
        news.append(text)
        assert 0 <= done <= total

    def is_reached() -> bool:
        return sum(text.startswith(stage) for text in news) >= n_news

    with pytest.raises(CancelledError):
        make_profile(wanted(model, output), emit, is_reached)
    assert folder_for(output).is_dir() and not output.exists()
    result = make(model, output)
    assert output.read_bytes() == whole and not folder_for(output).exists()
    assert result.n_kept == n_kept and (result.trace_s == 0.0) == (n_kept >= 2)


@pytest.mark.slow
def test_a_worker_that_is_killed_in_the_middle_is_continued(model: Path) -> None:
    output, whole = model.with_name("out.npz"), model.with_name("whole.npz")
    with Client.start() as client:
        client.profile(wanted(model, whole))

        def kill(stage: str, done: int, total: int) -> None:
            if stage.startswith("comparing experts, layer 2"):
                os.kill(client.pid, signal.SIGKILL)

        with pytest.raises(WorkerDiedError):
            client.profile(wanted(model, output), kill)
    kept = sorted(path.name for path in folder_for(output).iterdir())
    assert kept[:3] == ["context-0000", "context-0001", "gram-0000.npy"] and not output.exists()
    stages: list[str] = []
    with Client.start() as client:
        result = client.profile(wanted(model, output), lambda *news: stages.append(news[0]))
    assert result.n_kept >= 3 and "running the text" not in stages
    assert output.read_bytes() == whole.read_bytes()


def test_cancel_ends_a_profile_and_the_worker_takes_the_next_job(model: Path) -> None:
    output = model.with_name("out.npz")
    with Client.start() as client:

        def cancel(stage: str, done: int, total: int) -> None:
            if stage.startswith("comparing"):
                client.cancel()

        with pytest.raises(CancelledError):
            client.profile(wanted(model, output, 64), cancel)
        assert folder_for(output).is_dir()
        result = client.profile(wanted(model, output, 64))
        assert Path(result.output) == output and result.n_bytes == output.stat().st_size


def test_another_text_or_another_model_begins_anew(model: Path, whole: bytes) -> None:
    output = model.with_name("out.npz")
    n_news = iter(range(9))
    with pytest.raises(CancelledError):
        make_profile(wanted(model, output, 200), silent, lambda: next(n_news, None) is None)
    assert make(model, output).n_kept == 0
    assert output.read_bytes() == whole


# what cannot be done


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model.gguf", replace(SMALL, n_expert=0))
    with pytest.raises(ProfileError, match="no experts: there is nothing that could stand in"):
        make(model, tmp_path / "out.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_file_that_is_no_profile_is_not_overwritten(model: Path) -> None:
    before = model.read_bytes()
    with pytest.raises(ProfileError, match=r"model\.gguf exists and is no profile; .*-o FILE"):
        make(model, model)
    assert model.read_bytes() == before


def test_an_older_profile_is_replaced(model: Path, whole: bytes) -> None:
    output = model.with_name("out.npz")
    output.write_bytes(whole)
    make(model, output, 200)
    assert output.read_bytes() != whole
    make(model, output)
    assert output.read_bytes() == whole


def test_missing_torch_is_told_with_the_remedy(model: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.delitem(sys.modules, "runner.profiling.expert_outputs", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ProfileError, match=r"PyTorch, .*uv tool install '.\[profile\]'"):
        make(model, model.with_name("out.npz"))
    assert [path.name for path in model.parent.iterdir()] == ["model.gguf"]


def test_too_little_memory_is_told_before_anything_is_compared(model: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("runner.profile.available_memory_bytes", lambda: 1000)
    with pytest.raises(ProfileError, match=r"comparing the experts takes 0\.0 GB of memory"):
        make(model, model.with_name("out.npz"))


def test_a_text_of_a_few_words_is_refused(model: Path) -> None:
    few = replace(wanted(model, model.with_name("out.npz")), texts=("w1 w2",))
    with pytest.raises(OptionError, match=r"the text has \d+ tokens"):
        make_profile(few, silent, lambda: False)


def test_weights_that_are_no_numbers_are_told(model: Path) -> None:
    with GGUFFile.open(model) as file:
        down = file.tensors["blk.2.ffn_down_exps.weight"]
    with model.open("r+b") as file:
        file.seek(down.offset)
        file.write(np.float16(np.nan).tobytes())  # the scale of the first block
    with pytest.raises(
        ProfileError, match=r"out\.npz was not written: .* the model's weights must"
    ):
        make(model, model.with_name("out.npz"))


# large ones


_PEAK = """
import sys
from pathlib import Path
import numpy as np
from quant.gguf_file import GGUFFile
from runner.checks.read_model import read_model
from runner.profiling.expert_outputs import ExpertOutputs

def peak_bytes():
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024

n = int(sys.argv[2])
silent = lambda done: None, lambda: False
with GGUFFile.open(sys.argv[1]) as file:
    model = read_model(file)
    x = np.random.default_rng(0).standard_normal((n, model.n_embd), np.float32)
    ExpertOutputs(file, model, 1).gram(0, x[:16], *silent)  # the libraries are loaded
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    ExpertOutputs(file, model, 1).gram(0, x, *silent)
    print(peak_bytes() - before, ExpertOutputs.needed_bytes(model, n))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_matrix_at_a_time_is_there_in_float32(tmp_path: Path) -> None:
    m = {"n_embd": 1024, "n_ff": 3584, "n_layer": 1, "n_vocab": 512}
    model = write_big_mixtral(tmp_path / "model.gguf", **m)
    # What is freed goes back to the system at once, so that the peak is what was in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(model), "256"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    peak, needed = map(int, done.stdout.split())
    matrix = 4 * 1024 * 3584
    assert needed < 4 * matrix, "one expert alone has three, all have 24"
    assert matrix < peak < needed + (4 << 20)


def test_mixtral_is_compared_in_less_than_one_gigabyte(demo_path: Path) -> None:
    from runner.checks.read_model import read_model
    from runner.profiling.expert_outputs import ExpertOutputs

    with GGUFFile.open(demo_path) as file:
        demo = read_model(file)
    mixtral = replace(demo, n_layer=32, n_embd=4096, n_ff_exp=14336, n_expert=8, n_expert_used=2)
    assert ExpertOutputs.needed_bytes(mixtral, MAX_SAMPLED) < 800e6


@pytest.mark.slow
def test_the_command_profiles_the_demo_model_within_a_minute(tmp_path: Path) -> None:
    output = tmp_path / "demo.npz"
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "runner", "profile", str(DEMO), "-o", str(output)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert time.monotonic() - started < 60
    table = load(DEMO, output)
    assert table.n_tokens == 2048 and table.uses.sum() == 2048 * 2 * 8
    assert 0.2 < np.sort(table.error, axis=2)[:, :, 1].mean() < 0.7
    assert "8 layers of 8 experts" in done.stdout and "unexplained" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(tmp_path: Path) -> None:
    output = tmp_path / "demo.npz"
    command = [sys.executable, "-m", "runner", "profile", str(DEMO), "-o", str(output)]
    command += ["--tokens", "512"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(folder_for(output).glob("gram-*.npy")) and time.monotonic() < deadline:
        os.sched_yield()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (
        err
        == f"buddyrun: what is finished is kept in {folder_for(output)}; the same command goes on\n"
    )
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Parts of it were there from an interrupted run." in done.stdout
    assert load(DEMO, output).n_tokens == 512
