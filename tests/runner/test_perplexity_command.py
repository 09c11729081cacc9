"""`buddyrun perplexity` shows llama-perplexity's labels, and works through the worker."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import pytest

from runner.config import EngineConfig
from runner.engine_client import Client
from runner.errors import CancelledError, GGUFError, ModelError, OptionError
from runner.protocol import NamedText, PerplexityFields
from runner.quality.evaluation import Evaluation, RunCost, RunProgress, WindowDone
from runner.quality.report import WINDOWS_HEADER, format_text, window_line
from runner.terminal.perplexity_command import progress_text
from tests.paths import DEMO, HELD_OUT
from tests.runner import command_line
from tests.runner.command_line import BUDDYRUN, ROOT, buddyrun, buddyrun_process
from tests.runner.evaluation_fakes import DIVERGENCE, EVALUATION
from tests.runner.scripted_client import ScriptedClient

STORY = HELD_OUT / "story.txt"
WANTED_KEYS = (
    "ppl_base", "ppl", "ppl_ratio", "kl_mean", "kl_median", "kl_p99", "kl_max", "top1_agreement",
    "hit_share", "substituted_share", "substituted_weight_share", "loaded_share", "bytes_read",
    "n_tokens", "bytes_read_base", "dropped_share", "on_host_share", "hit_weight_share",
    "loaded_weight_share", "tokens_per_s", "tokens_per_s_base", "policy", "buddy_budget",
    "moe_cache_slots", "n_ctx", "texts", "ppl_error", "ppl_base_error", "kl_mean_error",
    "delta_p_mean", "delta_p_rms", "seconds", "seconds_base", "bytes_read_ratio",
)  # fmt: skip
# Every line of llama-perplexity's summary up to its first figure.
LABELS = """\
====== Perplexity statistics ======
Mean PPL(Q)                   :
Mean PPL(base)                :
Cor(ln(PPL(Q)), ln(PPL(base))):
Mean ln(PPL(Q)/PPL(base))     :
Mean PPL(Q)/PPL(base)         :
Mean PPL(Q)-PPL(base)         :
====== KL divergence statistics ======
Mean    KLD:
Maximum KLD:
99.9%   KLD:
99.0%   KLD:
95.0%   KLD:
90.0%   KLD:
Median  KLD:
10.0%   KLD:
 5.0%   KLD:
 1.0%   KLD:
 0.1%   KLD:
Minimum KLD:
====== Token probability statistics ======
Mean    Δp:
Maximum Δp:
99.9%   Δp:
99.0%   Δp:
95.0%   Δp:
90.0%   Δp:
75.0%   Δp:
Median  Δp:
25.0%   Δp:
10.0%   Δp:
 5.0%   Δp:
 1.0%   Δp:
 0.1%   Δp:
Minimum Δp:
RMS Δp    :
Same top p:
"""


# what is printed


def test_the_labels_are_llama_perplexitys() -> None:
    lines = format_text(EVALUATION).splitlines()
    start, end = lines.index("====== Perplexity statistics ======"), lines.index(
        "====== Experts: 4 slots a layer ======"
    )  # fmt: skip
    printed = [line.partition(": ")[0] + ":" * (": " in line) for line in lines[start:end] if line]
    assert printed == LABELS.splitlines()


def test_every_figure_of_the_divergence_is_printed_in_the_order_of_its_fields() -> None:
    text = format_text(EVALUATION)
    lines = text[text.index("Mean PPL(Q)") : text.index("====== Experts")].splitlines()
    printed = [
        float(word.strip("%")) / (100 if "%" in line.partition(": ")[2] else 1)
        for line in lines
        for word in line.partition(": ")[2].split()
        if word not in "±%"
    ]
    figures = [value for name, value in asdict(DIVERGENCE).items() if name != "n_tokens"]
    assert printed == pytest.approx(figures, abs=1e-4)


def test_what_the_runs_took_stands_side_by_side() -> None:
    rows = {
        line[:22].strip(): line[22:].split("  ")
        for line in format_text(EVALUATION).partition("Experts")[2].splitlines()
    }
    cells = {label: [cell.strip() for cell in row if cell.strip()] for label, row in rows.items()}
    assert cells["hit"] == ["60.00 %", "65.00 %"]
    assert cells["substituted"] == ["20.00 %", "0.00 %"]
    assert cells["substituted weight"] == ["15.00 %", "0.00 %"]
    assert cells["dropped"] == ["5.00 %", "0.00 %"]
    assert cells["bytes read"] == ["6.00 GB", "12.0 GB"]
    assert cells["tokens/s"] == ["123.4", "61.7"]
    assert cells["bytes, Q / base"] == ["0.500"]


def test_the_heading_says_what_was_scored_and_what_q_is() -> None:
    first, second = format_text(EVALUATION).splitlines()[:2]
    assert first == "a.txt: 1234 tokens scored in 3 windows of up to 512 tokens"
    assert second.endswith("Q: buddies router, budget 5 %, ranks from 2")
    other = replace(EVALUATION, policy="off", n_windows=1, moe_cache_slots=0)
    text = format_text(replace(other, divergence=replace(DIVERGENCE, n_tokens=99)))
    assert "in 1 window of" in text and "Q: exact too" in text and "no cache" in text
    assert "fewer than 100 tokens" in text
    assert "no budget" in format_text(replace(EVALUATION, buddy_budget=1.0))


def test_a_windows_line_stands_under_llama_perplexitys_header() -> None:
    line = window_line(7, DIVERGENCE)
    assert line.startswith(f"   7    {DIVERGENCE.ppl:9.4f} ± ")
    assert line.count("±") == 5 and line.endswith("%")
    assert WINDOWS_HEADER.split()[:2] == ["chunk", "PPL"]


def test_json_has_one_level_of_names() -> None:
    found = EVALUATION.as_json()
    assert set(WANTED_KEYS) <= set(found)
    assert (found["hit_share"], found["hit_share_base"]) == (0.6, 0.65)
    assert found["bytes_read_ratio"] == 0.5
    assert not any(isinstance(value, dict) for value in found.values())


def test_what_is_no_number_is_null_in_json() -> None:
    nothing = RunCost(*[0] * 13)
    found = replace(
        EVALUATION, base=nothing, divergence=replace(DIVERGENCE, ppl_correlation=math.nan)
    ).as_json()
    assert found["ppl_correlation"] is None and found["bytes_read_ratio"] is None
    json.dumps(found, allow_nan=False)
    assert replace(EVALUATION, base=nothing, run=nothing).bytes_read_ratio == 1.0


def test_progress_says_which_run_it_is() -> None:
    assert progress_text(RunProgress(True, 3, 9, 2.5)) == "exact run: 3 of 9 tokens, PPL 2.5000"
    assert progress_text(RunProgress(False, 3, 9, 2.5, 0.01)) == (
        "run: 3 of 9 tokens, PPL 2.5000, KLD 0.010000"
    )


# the command, with a scripted client


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "some.txt"
    path.write_text("Some text.\n")
    return str(path)


def test_the_command_sends_texts_and_settings(text: str, tmp_path: Path) -> None:
    seen: list[PerplexityFields] = []

    class Watched(ScriptedClient):
        def perplexity(
            self, wanted: PerplexityFields, on_progress: object = None
        ) -> Iterator[RunProgress | WindowDone | Evaluation]:
            seen.append(wanted)
            return super().perplexity(wanted, on_progress)

    other = tmp_path / "other.txt"
    other.write_text("More.")
    with mock.patch.object(command_line, "ScriptedClient", Watched):
        done = buddyrun(
            *("perplexity", "-m", str(DEMO), "-f", text, "-f", str(other), "-c", "64"),
            *("--chunks", "3", "--tokens", "100", "--moe-cache-slots", "4", "-t", "1"),
        )
        assert done.returncode == 0, done.stderr
        buddyrun("perplexity", str(DEMO), "-f", text)
    first, second = seen
    assert first.texts == (NamedText("some.txt", "Some text.\n"), NamedText("other.txt", "More."))
    assert first.engine == EngineConfig(
        n_ctx=64, moe_cache_slots=4, n_threads=1, buddy="auto", device="auto"
    )
    assert (first.max_windows, first.max_tokens, first.model) == (3, 100, str(DEMO))
    assert (second.engine.n_ctx, second.max_windows, second.max_tokens) == (512, 0, 0)
    assert done.stdout.decode().startswith("some.txt, other.txt: 1234 tokens")


def test_json_is_alone_on_stdout(text: str) -> None:
    done = buddyrun("perplexity", str(DEMO), "-f", text, "--json", "-v")
    assert json.loads(done.stdout) == {**EVALUATION.as_json(), "texts": ["some.txt"],
                                       "policy": "auto"}  # fmt: skip


def test_verbose_shows_the_windows_on_stderr(text: str) -> None:
    quiet = buddyrun("perplexity", str(DEMO), "-f", text)
    assert quiet.stderr == b""
    done = buddyrun("perplexity", str(DEMO), "-f", text, "--verbose")
    assert done.stderr.decode().splitlines() == [WINDOWS_HEADER, window_line(1, DIVERGENCE)]


def test_a_warning_of_the_engine_is_told_once_and_at_once(text: str) -> None:
    class Warned(ScriptedClient):
        def perplexity(
            self, wanted: PerplexityFields, on_progress: object = None
        ) -> Iterator[RunProgress | WindowDone | Evaluation]:
            for event in super().perplexity(wanted, on_progress):
                if isinstance(event, RunProgress):
                    event = replace(event, warnings=("No \x1b[1mGPU.",))
                yield event

    with mock.patch.object(command_line, "ScriptedClient", Warned):
        done = buddyrun("perplexity", str(DEMO), "-f", text, "--verbose")
    assert done.stderr.decode().splitlines()[:2] == ["buddyrun: No ␛[1mGPU.", WINDOWS_HEADER]
    assert done.stderr.decode().count("GPU") == 1


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, b"Missing MODEL"),
        ([str(DEMO)], 1, b"there is no text to score: give one with -f FILE"),
        ([str(DEMO), "-f", "/nowhere"], 1, b"cannot read the text from /nowhere"),
        (["/nowhere", "-f", str(STORY)], 1, b"There is no file /nowhere"),
        ([str(DEMO), "-f", str(STORY), "-c", "1"], 2, b"--ctx-size"),
        ([str(DEMO), "-f", str(STORY), "--chunks", "-1"], 2, b"--chunks"),
        ([str(DEMO), "-m", str(DEMO)], 2, b"MODEL or with -m, not both"),
        ([str(DEMO), "-hf", "user/repo"], 2, b"no flag -hf"),
    ],
)
def test_wrong_settings_are_refused(arguments: list[str], status: int, message: bytes) -> None:
    done = buddyrun("perplexity", *arguments)
    assert (done.returncode, done.stdout) == (status, b"") and message in done.stderr


def test_a_worker_that_dies_is_told_and_its_log_when_asked(text: str, tmp_path: Path) -> None:
    model = tmp_path / "die.gguf"
    model.touch()
    quiet = buddyrun("perplexity", str(model), "-f", text)
    assert quiet.returncode == 1 and b"The engine was killed" in quiet.stderr
    assert b"the last words of the engine" not in quiet.stderr
    verbose = buddyrun("perplexity", str(model), "-f", text, "-v")
    assert b"the last words of the engine" in verbose.stderr


def test_ctrl_c_ends_it_with_the_worker_closed(text: str, tmp_path: Path) -> None:
    model = tmp_path / "interrupt.gguf"
    model.touch()
    done = buddyrun_process("perplexity", str(model), "-f", text, SHOW_CLOSE="1")
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"closed\n")


def test_help_says_what_is_scored() -> None:
    help_text = " ".join(buddyrun("perplexity", "--help").stdout.decode().split())
    assert "every token but a window's first is scored" in help_text
    assert "BUDDYRUN_THREADS" in help_text and "BUDDYRUN_CTX_SIZE" not in help_text


# through the worker, with the demo model

WANTED = PerplexityFields(
    str(DEMO),
    (NamedText("story.txt", STORY.read_text()),),
    EngineConfig(n_ctx=64, moe_cache_slots=4, moe_miss="load", n_threads=1),
    max_tokens=80,
)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Client.start() as client:
        yield client


def test_the_worker_judges_without_a_loaded_model_and_leaves_none(client: Client) -> None:
    stages: list[str] = []
    *events, result = client.perplexity(WANTED, lambda stage, done, total: stages.append(stage))
    assert isinstance(result, Evaluation)
    assert (result.divergence.kl_max, result.divergence.ppl_ratio) == (0.0, 1.0)
    assert (result.divergence.n_tokens, result.n_windows) == (80, 2)
    assert result.texts == ("story.txt",) and stages
    windows = [event.number for event in events if isinstance(event, WindowDone)]
    assert windows == [1, 2]
    with pytest.raises(OptionError, match="no model is loaded"):
        client.stats()


def test_a_cancelled_job_ends_at_once_and_the_next_one_works(client: Client) -> None:
    events = client.perplexity(replace(WANTED, max_tokens=0))
    assert isinstance(next(events), RunProgress)
    began = time.monotonic()
    client.cancel()
    with pytest.raises(CancelledError):
        list(events)
    assert time.monotonic() - began < 2
    assert client.load(DEMO, EngineConfig(n_ctx=64, n_threads=1)).n_ctx == 64


def test_problems_of_the_model_arrive_with_their_class(client: Client, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(DEMO.read_bytes()[:5000])
    with pytest.raises((GGUFError, ModelError)):
        list(client.perplexity(replace(WANTED, model=str(bad))))
    with pytest.raises(OptionError, match="short.txt is too short"):
        list(client.perplexity(replace(WANTED, texts=(NamedText("short.txt", ""),))))
    with pytest.raises(OptionError, match="--moe-cache-slots 9"):
        engine = replace(WANTED.engine, moe_cache_slots=9)
        list(client.perplexity(replace(WANTED, engine=engine)))


def test_the_demo_model_is_judged_from_the_command_line(tmp_path: Path) -> None:
    done = buddyrun_process(
        *("perplexity", str(DEMO), "-f", str(STORY), "-c", "64", "--tokens", "100", "--json"),
        *("--moe-cache-slots", "4", "--moe-miss", "load", "--exact"),
        command=BUDDYRUN,
        TMPDIR=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(WANTED_KEYS) <= set(found)
    assert (found["kl_max"], found["ppl_ratio"], found["n_tokens"]) == (0.0, 1.0, 100)
    assert found["ppl"] == found["ppl_base"] > 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_leaves_no_file_of_logits(number: signal.Signals, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = subprocess.Popen(
        [*BUDDYRUN, "perplexity", str(DEMO), "-f", str(STORY), "-c", "64", "--tokens", "500", "-v"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    assert process.stderr.readline()  # the second run has begun: the logits are there
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    left = [path for path in temporary.iterdir() if not path.is_dir()]
    assert left == []
