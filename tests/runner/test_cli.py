"""The command line with a scripted engine: what is sent, what is printed, which exit code."""

import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from runner.config import MOE_CACHE_AUTO, MOE_CACHE_OFF, EngineConfig, GenerateRequest
from runner.protocol import ModelInfo
from runner.terminal.chat_view import ChatView
from tests.paths import DEMO, HELD_OUT
from tests.runner import command_line
from tests.runner.command_line import buddyrun
from tests.runner.scripted_client import ScriptedClient

STORY = HELD_OUT / "story.txt"


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "model.gguf"
    path.touch()
    return str(path)


@pytest.mark.parametrize("command", [[], ["run"], ["demo"], ["show"], ["bench"]])
def test_every_command_has_help(command: list[str]) -> None:
    done = buddyrun(*command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(b"Usage: buddyrun")


def test_help_names_every_flag_of_llama_cpp_and_its_twin() -> None:
    text = buddyrun("run", "--help").stdout.decode()
    for flag in ("-m", "-p", "-n", "-c", "-b", "-t", "-ctk", "-ctv", "-sys", "-st", "-cnv",
                 "-no-cnv", "-dev", "--device", "-ngl", "--gpu-layers", "--temp", "--top-k",
                 "--top-p", "--min-p", "--typical",
                 "--repeat-last-n", "--repeat-penalty", "--presence-penalty",
                 "--frequency-penalty", "--dry-multiplier", "--xtc-probability", "--mirostat",
                 "-s,", "--grammar", "--grammar-file", "-j,", "-jf", "--chat-template",
                 "--chat-template-file", "--ignore-eos", "--context-shift", "--keep", "--verbose",
                 "--no-color", "--simple-io", "-f,", "-tb"):  # fmt: skip
        assert flag in text
    squeezed = "".join(text.split())
    for twin in ("BUDDYRUN_MODEL", "BUDDYRUN_CTX_SIZE", "BUDDYRUN_TEMP", "BUDDYRUN_GRAMMAR_FILE"):
        assert twin in squeezed


def test_help_of_the_prompt_flag_says_that_stdin_is_read_too() -> None:
    text = " ".join(buddyrun("run", "--help").stdout.decode().split())
    assert "Stdin is read too unless it is a terminal; < /dev/null" in text


def test_version() -> None:
    done = buddyrun("--version")
    assert done.returncode == 0 and done.stdout.startswith(b"buddyrun ")


def test_a_prompt_flag_answers_once_with_the_answer_alone_on_stdout(model: str) -> None:
    done = buddyrun(model, "-p", "hi", "-n", "64")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"You said 'hi'\n", b"")


@pytest.mark.parametrize(
    "arguments", [["hi", "there"], ["-p", "hi there"], ["-p", "hi", "there"], ["-st", "hi there"]]
)
def test_words_after_the_model_are_the_prompt(arguments: list[str], model: str) -> None:
    assert buddyrun(model, *arguments).stdout == b"You said 'hi there'\n"
    assert buddyrun("run", "-m", model, *arguments).stdout == b"You said 'hi there'\n"


def test_what_is_piped_joins_the_prompt(model: str) -> None:
    assert buddyrun(model, stdin=b"piped\n").stdout == b"You said 'piped'\n"
    assert (
        buddyrun(model, "sum up", stdin=b"a\r\nb\n").stdout == b"You said 'a\\r\\nb\\n\\nsum up'\n"
    )


def test_a_file_joins_the_prompt(model: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\xef\xbb\xbffrom a file\n")
    assert buddyrun(model, "-f", str(tmp_path / "f")).stdout == b"You said 'from a file'\n"
    missing = buddyrun(model, "-f", str(tmp_path / "no"))
    assert missing.returncode == 1
    assert b"cannot read the prompt" in missing.stderr


@pytest.mark.parametrize("arguments", [[], ["-p", ""], ["-p", " \n "], ["-no-cnv"], [""]])
def test_an_empty_prompt_is_one_message(arguments: list[str], model: str) -> None:
    done = buddyrun(model, *arguments)
    assert (done.returncode, done.stdout) == (1, b"")
    assert (
        done.stderr.startswith(b"buddyrun: the prompt is empty") and done.stderr.count(b"\n") == 1
    )


def test_invalid_utf8_on_a_pipe_is_replaced_and_told(model: str) -> None:
    done = buddyrun(model, stdin=b"a\xffb\xf0\x9f\n")
    assert done.stdout == b"You said 'a\\ufffdb\\ufffd'\n"
    assert b"not UTF-8 (first at byte 1)" in done.stderr and done.returncode == 0


def test_no_cnv_sends_the_prompt_raw(model: str) -> None:
    assert buddyrun(model, "-no-cnv", "-p", "raw").stdout == b"\x1b[1mraw\x1b[0m\n"


def test_off_a_terminal_the_answer_is_data(model: str) -> None:
    assert buddyrun(model, "-p", "evil").stdout.startswith(b"\x1b[2J")


def test_hidden_thinking_is_left_out(model: str) -> None:
    assert buddyrun(model, "-p", "think").stdout == b"<think>\nhmm</think>\n\nYes.\n"
    assert buddyrun(model, "-p", "think", "--hide-thinking").stdout == b"Yes.\n"


def test_verbose_puts_timings_on_stderr(model: str) -> None:
    done = buddyrun(model, "-p", "hi", "--verbose")
    assert b"eval rate:" in done.stderr and b"eval rate" not in done.stdout


def test_a_cut_answer_is_told_on_stderr(model: str) -> None:
    done = buddyrun(model, "-p", "cut")
    assert done.returncode == 0
    assert b"the context is full" in done.stderr


def test_a_chat_over_pipes_takes_one_line_a_turn(model: str) -> None:
    done = buddyrun(model, "-cnv", stdin=b"one\n/nothing\ntwo\\\nlines\n/bye\nnever\n")
    assert done.stdout == b"You said 'one'\nYou said 'two\\nlines'\n"
    assert b"There is no command /nothing" in done.stderr
    assert done.returncode == 0


def test_what_belongs_to_one_command_has_no_twin() -> None:
    perplexity = ["perplexity", str(DEMO), "-f", "/nowhere/text"]
    done = buddyrun(*perplexity, "-c", "1")
    assert done.returncode == 2 and b"2<=x" in done.stderr
    done = buddyrun(*perplexity, BUDDYRUN_CTX_SIZE="1", BUDDYRUN_TOKENS="-1")
    assert done.returncode == 1 and b"/nowhere/text" in done.stderr
    done = buddyrun("show", "demo", BUDDYRUN_JSON="1")
    assert done.returncode == 0 and not done.stdout.startswith(b"{")


def test_every_flag_has_a_twin_and_the_flag_wins(model: str, tmp_path: Path) -> None:
    done = buddyrun(BUDDYRUN_MODEL=model, BUDDYRUN_PROMPT="hi")
    assert done.stdout == b"You said 'hi'\n"
    done = buddyrun(model, "-p", "flag", BUDDYRUN_MODEL="/nowhere", BUDDYRUN_PROMPT="twin")
    assert done.stdout == b"You said 'flag'\n"
    bad = buddyrun(model, "-p", "x", BUDDYRUN_TOP_P="7")
    assert bad.returncode == 2
    assert b"top-p must be a number from 0 to 1, not '7'" in bad.stderr


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("full", b"buddyrun: 9000 tokens > ctx 8192\n"),
     ("die", b"buddyrun: The engine was killed (SIGKILL).\n")],
)  # fmt: skip
def test_an_error_of_the_engine_is_one_message(prompt: str, message: bytes, model: str) -> None:
    done = buddyrun(model, "-p", prompt, SHOW_CLOSE="1")
    assert (done.returncode, done.stderr) == (1, b"closed\n" + message)


def test_a_bug_shows_no_traceback_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "bug"
    path.touch()
    done = buddyrun(str(path), "-p", "x")
    assert done.returncode == 1
    assert done.stderr.startswith(b"buddyrun: internal error: KeyError: 'a bug'")
    assert b"Traceback" in buddyrun(str(path), "-p", "x", "--verbose").stderr


@pytest.mark.parametrize(
    "arguments",
    [["-c", "-1"], ["-c", "x"], ["-b", "0"], ["-t", "-2"], ["-ctk", "f32"], ["--temp", "nan"],
     ["--temp", "-1"], ["--top-p", "1.1"], ["-s", "-2"], ["-n", "-2"], ["--mirostat", "3"],
     ["--repeat-penalty", "0"], ["--nonsense"], ["-c"], ["--keep", "99999999999"],
     ["--moe-cache", "6X"], ["--moe-cache", "-1"], ["--moe-cache", "9999999G"],
     ["--moe-cache-slots", "-1"], ["--moe-cache-policy", "fifo"], ["--moe-miss", "drop"],
     ["--verify-every", "-1"], ["-ngl", "x"], ["-ngl", "1.5"], ["--device"],
     ["--fit-margin", "6X"], ["--fit-margin", "-1"], ["--fit-margin", "auto"],
     ["--fit-margin", "9999999G"]],
)  # fmt: skip
def test_a_wrong_flag_is_a_usage_error(arguments: list[str], model: str) -> None:
    done = buddyrun(model, "-p", "hi", *arguments)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"Error: " in done.stderr


@pytest.mark.parametrize("command", [["run"], ["show"], ["bench"], ["-p", "hi"]])
def test_a_missing_model_is_a_usage_error(command: list[str]) -> None:
    done = buddyrun(*command)
    assert done.returncode == 2 and b"Missing MODEL" in done.stderr


@pytest.mark.parametrize("command", [["run"], ["show"], ["bench"], []])
def test_a_model_that_is_not_there_is_one_message(command: list[str]) -> None:
    done = buddyrun(*command, "no\x1bwhere.gguf")
    assert done.returncode == 1
    assert done.stderr.startswith("buddyrun: There is no file no␛where.gguf.".encode())
    assert done.stderr.count(b"\n") == 1


def test_a_grammar_and_a_schema_together_are_refused(model: str) -> None:
    done = buddyrun(model, "-p", "hi", "--grammar", "x", "-j", "{}")
    assert done.returncode == 2
    assert b"--grammar and --json-schema cannot be used together" in done.stderr


@pytest.mark.parametrize(
    ("flag", "value", "twin"),
    [("--grammar", 'root ::= "a"', "BUDDYRUN_GRAMMAR_FILE"),
     ("-j", "{}", "BUDDYRUN_JSON_SCHEMA_FILE"),
     ("-j", "{}", "BUDDYRUN_GRAMMAR"),
     ("--chat-template", "chatml", "BUDDYRUN_CHAT_TEMPLATE_FILE")],
)  # fmt: skip
def test_a_flag_beats_the_twin_of_its_rival(
    flag: str, value: str, twin: str, model: str, tmp_path: Path
) -> None:
    (tmp_path / "rival").write_text("rival")
    seen: list[object] = []

    class Watched(ScriptedClient):
        def load(self, path: object, config: Any, template: Any, on_progress: Any) -> ModelInfo:
            seen.append(template)
            return super().load(path, config, template, on_progress)

        def generate(self, request: GenerateRequest) -> Any:
            seen.extend((request.sampling.grammar, request.sampling.json_schema))
            return super().generate(request)

    with mock.patch.object(command_line, "ScriptedClient", Watched):
        done = buddyrun(model, "-p", "hi", flag, value, **{twin: str(tmp_path / "rival")})
    assert done.returncode == 0, done.stderr
    assert [text for text in seen if text] == [value]


@pytest.mark.parametrize(
    "arguments",
    [["--grammar", "x", "--grammar-file", "y"], ["-j", "{}", "-jf", "y"],
     ["--chat-template", "chatml", "--chat-template-file", "y"]],
)  # fmt: skip
def test_two_rivals_on_the_command_line_are_refused(arguments: list[str], model: str) -> None:
    done = buddyrun(model, "-p", "hi", *arguments)
    assert done.returncode == 2 and b"cannot be used together" in done.stderr


def test_two_rival_twins_are_refused_by_their_names(model: str) -> None:
    done = buddyrun(model, "-p", "hi", BUDDYRUN_GRAMMAR="x", BUDDYRUN_GRAMMAR_FILE="y")
    assert done.returncode == 2
    assert b"BUDDYRUN_GRAMMAR and BUDDYRUN_GRAMMAR_FILE cannot be used" in done.stderr


def test_a_system_prompt_without_a_chat_is_refused(model: str) -> None:
    done = buddyrun(model, "-p", "hi", "-no-cnv", "-sys", "Be kind.")
    assert done.returncode == 2 and b"-sys needs a chat" in done.stderr
    assert buddyrun(model, "-p", "hi", "-no-cnv", BUDDYRUN_SYSTEM_PROMPT="x").returncode == 0


@pytest.mark.parametrize("command", ["show", "bench"])
def test_a_model_given_twice_is_refused(command: str, model: str) -> None:
    done = buddyrun(command, model, "-m", model)
    assert done.returncode == 2 and b"MODEL or with -m, not both" in done.stderr


def test_show_shows_the_trace_of_a_bug_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("runner.terminal.run_command.show_model", fail)
    done = buddyrun("show", str(DEMO), "--verbose")
    assert (done.returncode, done.stdout) == (1, b"") and b"Traceback" in done.stderr


def test_show_takes_the_word_demo_for_the_demo_model() -> None:
    assert b"one expert" in buddyrun("show", "demo").stdout


def test_a_command_after_its_flags_is_told_to_come_first() -> None:
    done = buddyrun("-t", "1", "demo")
    assert done.returncode == 1
    assert b"The command comes first: buddyrun demo" in done.stderr


@pytest.mark.parametrize("command", [[], ["run"], ["demo"], ["show"], ["bench"]])
@pytest.mark.parametrize(
    "arguments", [["-ot", "exps=CPU"], ["-mg", "0"], ["-mli"], ["-pg", "1,2"], ["-ot=x"]]
)
def test_a_flag_of_llama_cpp_that_is_missing_here_is_named_whole(
    command: list[str], arguments: list[str]
) -> None:
    done = buddyrun(*command, *arguments)
    assert (done.returncode, done.stdout) == (2, b"")
    assert re.search(rf"buddyrun has no flag {arguments[0].partition('=')[0]}[.:]", _told(done))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-fa", "on"], "no flag -fa: attention is always flash attention."),
        (["--flash-attn"], "no flag --flash-attn: attention is always flash attention."),
        (["--n-cpu-moe", "4"], "no flag --n-cpu-moe: --moe-cache says how many experts fit."),
        (["-ncmoe", "4"], "no flag -ncmoe: --moe-cache says how many experts fit."),
        (["-i"], "no flag -i: it chats unless there is a prompt."),
        (["--no-mmap"], "no flag --no-mmap: weights stay in the mapped file"),
        (["--ctx", "5"], "Did you mean '--ctx-size'?"),
        (["--moe-cach", "5"], "--moe-cache"),
    ],
)
def test_a_flag_of_llama_cpp_is_told_what_there_is_instead(
    arguments: list[str], words: str
) -> None:
    done = buddyrun("demo", "-p", "x", *arguments)
    assert done.returncode == 2 and words in _told(done)


def _told(done: Any) -> str:
    """What was said, on one line."""
    return " ".join(done.stderr.decode().split())


def test_a_missing_flag_with_the_letter_of_a_file_flag_reads_no_file(model: str) -> None:
    done = buddyrun(model, "-p", "hi", "-fa", "on")
    assert done.returncode == 2 and b"no flag -fa:" in done.stderr


@pytest.mark.parametrize(
    "arguments", [["-n4"], ["-n-1"], ["-st"], ["-ctk", "q8_0"], ["-s", "1"], ["-v"]]
)
def test_short_flags_still_take_a_number_that_is_glued_on(arguments: list[str], model: str) -> None:
    assert buddyrun(model, "-p", "hi", *arguments).stdout == b"You said 'hi'\n"


def test_invalid_utf8_in_a_chat_over_pipes_is_replaced(model: str) -> None:
    done = buddyrun(model, "-cnv", stdin=b"h\xff\n")
    assert (done.returncode, done.stdout) == (0, b"You said 'h\\ufffd'\n")


def test_a_history_of_an_unknown_user_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "bug").touch()  # to load it would end in a KeyError
    done = buddyrun(str(tmp_path / "bug"), "-cnv", BUDDYRUN_HISTORY="~nobody-has-this-name/x")
    assert done.returncode == 1 and b"there is no such user" in done.stderr


@pytest.mark.parametrize(("flag", "value"), [("--temp", "1e9"), ("--repeat-penalty", "1e7")])
def test_a_flag_has_the_range_that_the_sampler_has(flag: str, value: str, model: str) -> None:
    done = buddyrun(model, "-p", "hi", flag, value)
    assert done.returncode == 2 and b"to 1000000, not" in done.stderr


def test_the_loading_bar_needs_only_stderr_to_be_a_terminal() -> None:
    err = io.StringIO()
    err.isatty = lambda: True  # type: ignore[method-assign]
    view = ChatView(io.StringIO(), err, is_terminal=False, has_color=False)
    view.status.show_progress("reading weights", 1, 2)
    assert "reading weights" in err.getvalue()


def engines_asked_for(arguments: list[str], twins: dict[str, str]) -> list[EngineConfig]:
    """The settings that a command loads its model with."""
    seen: list[EngineConfig] = []

    class Watched(ScriptedClient):
        def load(self, path: object, config: Any, template: Any, on_progress: Any) -> ModelInfo:
            seen.append(config)
            return super().load(path, config, template, on_progress)

    with mock.patch.object(command_line, "ScriptedClient", Watched):
        done = buddyrun(*arguments, BUDDYRUN_THREADS="0", **twins)
    assert done.returncode == 0, done.stderr
    return seen


@pytest.mark.parametrize(
    ("arguments", "twins", "expected"),
    [
        ([], {}, EngineConfig()),
        (["--moe-cache", "auto"], {}, EngineConfig(moe_cache_bytes=MOE_CACHE_AUTO)),
        (["--moe-cache", "OFF"], {}, EngineConfig(moe_cache_bytes=MOE_CACHE_OFF)),
        (["--moe-cache", "1.5GB"], {}, EngineConfig(moe_cache_bytes=1_500_000_000)),
        (["--moe-cache", "6144"], {}, EngineConfig(moe_cache_bytes=6 << 30)),
        (
            ["--moe-cache-slots", "3", "--moe-cache-policy", "lfu", "--moe-miss", "host"],
            {"BUDDYRUN_MOE_CACHE": "6GiB", "BUDDYRUN_MOE_MISS": "load"},
            EngineConfig(
                moe_cache_bytes=6 << 30,
                moe_cache_slots=3,
                moe_cache_policy="lfu",
                moe_miss="host",
            ),
        ),
        (
            ["--buddy-budget", "5%", "--buddy-min-rank", "1", "--verify-every", "64"],
            {"BUDDYRUN_BUDDY_BUDGET": "0.1", "BUDDYRUN_BUDDY_PROFILE": "off"},
            EngineConfig(buddy_budget=0.05, buddy_min_rank=1, verify_every=64, buddy_profile="off"),
        ),
        (
            [],
            {"BUDDYRUN_MOE_CACHE_SLOTS": "2", "BUDDYRUN_MOE_CACHE_POLICY": "static"},
            EngineConfig(moe_cache_slots=2, moe_cache_policy="static"),
        ),
    ],
)
@pytest.mark.parametrize("command", [["run", "-p", "hi"], ["demo", "-p", "hi"], ["bench"]])
def test_flags_about_experts_and_their_twins_reach_the_engine(
    command: list[str], arguments: list[str], twins: dict[str, str], expected: EngineConfig
) -> None:
    model = [] if command[0] == "demo" else ["-m", str(DEMO)]
    seen = engines_asked_for([*command, *model, *arguments], twins)
    assert replace(seen[0], n_ctx=0) == replace(expected, buddy="auto", device="auto")


COMMANDS = [["run", "-p", "hi", "-m", str(DEMO)], ["demo", "-p", "hi"], ["bench", str(DEMO)]]


@pytest.mark.parametrize(
    ("arguments", "twins", "device"),
    [
        ([], {}, "auto"),
        (["-ngl", "0"], {}, "cpu"),
        (["-ngl", "99"], {}, "gpu"),
        (["-ngl=99"], {}, "gpu"),
        (["-ngl", "-1"], {}, "gpu"),
        (["--gpu-layers", "all"], {}, "gpu"),
        (["--device", "CUDA0"], {}, "cuda0"),
        (["-dev", "cpu"], {}, "cpu"),
        (["--device", "gpu"], {}, "gpu"),
        (["--device", "auto", "-ngl", "0"], {}, "cpu"),
        (["--device", "auto", "-ngl", "99"], {}, "gpu"),
        (["--device", "cuda0", "-ngl", "99"], {}, "cuda0"),
        (["--device", "CPU", "-ngl", "0"], {}, "cpu"),
        ([], {"BUDDYRUN_DEVICE": "vulkan1"}, "vulkan1"),
        ([], {"BUDDYRUN_GPU_LAYERS": "0"}, "cpu"),
        (["--device", "cuda0"], {"BUDDYRUN_DEVICE": "cpu"}, "cuda0"),
        (["-ngl", "0"], {"BUDDYRUN_GPU_LAYERS": "99"}, "cpu"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_device_and_layers_say_together_where_the_model_runs(
    command: list[str], arguments: list[str], twins: dict[str, str], device: str
) -> None:
    seen = engines_asked_for([*command, *arguments], twins)
    assert [config.device for config in seen] == [device]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-ngl", "0", "--device", "CUDA0"], "-ngl 0 contradicts --device cuda0"),
        (["--device", "gpu", "-ngl", "0"], "-ngl 0 contradicts --device gpu"),
        (["-ngl", "99", "--device", "cpu"], "-ngl 99 contradicts --device cpu"),
        (["--device", "CPU", "-ngl", "1"], "-ngl 1 contradicts --device cpu"),
        (["--device", "cpu", "--n-gpu-layers", "all"], "-ngl all contradicts --device cpu"),
    ],
)
@pytest.mark.parametrize("command", [*COMMANDS, ["perplexity", str(DEMO), "-f", str(STORY)]])
def test_a_device_and_layers_that_contradict_are_one_message(
    command: list[str], arguments: list[str], words: str
) -> None:
    done = buddyrun(*command, *arguments)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().endswith(f"Error: {words}: leave one out\n")


@pytest.mark.parametrize(
    ("arguments", "twins", "n_bytes"),
    [
        ([], {}, 1 << 30),
        (["--fit-margin", "0"], {}, 0),
        (["--fit-margin", "512"], {}, 512 << 20),
        (["--fit-margin", "1.5GiB"], {}, 3 << 29),
        (["--fit-margin", "2GB"], {}, 2_000_000_000),
        ([], {"BUDDYRUN_FIT_MARGIN": "256M"}, 256 << 20),
        (["--fit-margin", "1G"], {"BUDDYRUN_FIT_MARGIN": "256M"}, 1 << 30),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_memory_that_a_gpu_keeps_for_others_is_a_size(
    command: list[str], arguments: list[str], twins: dict[str, str], n_bytes: int
) -> None:
    seen = engines_asked_for([*command, *arguments], twins)
    assert [config.fit_margin_bytes for config in seen] == [n_bytes]


@pytest.mark.parametrize("command", ["run", "demo", "bench"])
def test_help_has_a_section_on_the_device_that_tells_the_defaults(command: str) -> None:
    text = buddyrun(command, "--help").stdout.decode()
    title = "Device and speed" if command == "bench" else "Device, context and speed"
    section = " ".join(text.split(f"\n{title}:\n")[1].split("\n\n")[0].split())
    for words in ("-dev, --device TEXT", "[env var: BUDDYRUN_DEVICE; default: auto]",
                  "-ngl, --gpu-layers, --n-gpu-layers N", "0 = CPU", "--fit-margin SIZE",
                  "default: 1024MiB"):  # fmt: skip
        assert words in section


WARNINGS = ["No ␛[1mGPU.", "Really."]  # as they are shown


@pytest.fixture
def warned() -> Iterator[None]:
    """The engine has something to say that nobody should overlook."""

    class Warned(ScriptedClient):
        def load(self, *arguments: Any) -> ModelInfo:
            return replace(super().load(*arguments), warnings=("No \x1b[1mGPU.", "Really."))

    with mock.patch.object(command_line, "ScriptedClient", Warned):
        yield


@pytest.mark.usefixtures("warned")
def test_a_warning_is_told_on_stderr_even_when_that_is_no_terminal(model: str) -> None:
    done = buddyrun(model, "-p", "hi")
    assert (done.returncode, done.stdout) == (0, b"You said 'hi'\n")
    assert done.stderr.decode().splitlines() == [f"buddyrun: {text}" for text in WARNINGS]


@pytest.mark.usefixtures("warned")
def test_a_warning_is_told_once_beside_timings_and_notes(model: str) -> None:
    lines = buddyrun(model, "-p", "hi", "--verbose").stderr.decode().splitlines()
    assert lines[0].startswith("total duration:")
    told = [f"buddyrun: {text}" for text in WARNINGS]
    assert lines[-3:] == ["note: The context is capped.", *told]


@pytest.mark.usefixtures("warned")
def test_a_warning_is_told_on_stderr_in_a_chat_over_pipes(model: str) -> None:
    done = buddyrun(model, "-cnv", stdin=b"one\n")
    assert done.stdout == b"You said 'one'\n"
    assert done.stderr.decode().splitlines() == WARNINGS


@pytest.mark.usefixtures("warned")
def test_a_warning_is_told_beside_the_figures_of_a_bench() -> None:
    done = buddyrun("bench", str(DEMO), "-o", "jsonl")
    assert all(json.loads(line) for line in done.stdout.splitlines())
    assert done.stderr.decode().splitlines() == WARNINGS


@pytest.mark.parametrize(
    ("arguments", "twins", "expected"),
    [
        ([], {}, "auto"),
        (["--buddy", "off"], {}, "off"),
        (["--exact"], {}, "off"),
        (["--exact", "--buddy", "router"], {}, "off"),
        (["--buddy", "prior"], {"BUDDYRUN_BUDDY": "router"}, "prior"),
        ([], {"BUDDYRUN_BUDDY": "router"}, "router"),
        ([], {"BUDDYRUN_BUDDY": "router", "BUDDYRUN_EXACT": "1"}, "off"),
    ],
)
def test_exact_beats_every_policy(
    arguments: list[str], twins: dict[str, str], expected: str
) -> None:
    seen = engines_asked_for(["run", "-p", "hi", "-m", str(DEMO), *arguments], twins)
    assert [config.buddy for config in seen] == [expected]


def test_help_has_a_section_on_experts_that_explains_sizes() -> None:
    text = buddyrun("run", "--help").stdout.decode()
    section = " ".join(text.split("\nExperts:\n")[1].split("\n\n")[0].split())
    assert "--moe-cache auto|off|SIZE" in section
    assert "K, M and G are powers of 1024, KB, MB and GB of 1000, a bare number is MiB" in section
    for flag in ("--moe-cache-slots", "--moe-cache-policy [lru|lfu|static]", "--moe-miss"):
        assert flag in section


def test_show_prints_sizes_as_text_and_as_json() -> None:
    text = buddyrun("show", str(DEMO)).stdout.decode()
    assert "one expert" in text and "KV cache" in text
    description = json.loads(buddyrun("show", "-m", str(DEMO), "--json", "--template").stdout)
    assert description["n_expert"] == 8 and description["chat_template"]


def test_show_refuses_what_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"not a model")
    done = buddyrun("show", str(path))
    assert done.returncode == 1
    assert done.stderr.startswith(b"buddyrun: ") and done.stdout == b""


# What a shell asks for: the words typed so far, and which of them to complete.
@pytest.mark.parametrize(
    ("typed", "number", "expected"),
    [
        ("buddyrun de", "1", b"file,de\nplain,demo\n"),
        ("buddyrun run --te", "2", b"plain,--temp\nplain,--temperature\n"),
        ("buddyrun show mod", "2", b"file,mod\n"),
    ],
)
def test_a_shell_can_complete(typed: str, number: str, expected: bytes) -> None:
    done = buddyrun(_BUDDYRUN_COMPLETE="bash_complete", COMP_WORDS=typed, COMP_CWORD=number)
    assert done.stdout == expected


@pytest.mark.parametrize(
    ("arguments", "twins", "device"),
    [
        (["-ngl", "0"], {"BUDDYRUN_DEVICE": "cuda0"}, "cpu"),
        (["-ngl", "99"], {"BUDDYRUN_DEVICE": "cpu"}, "gpu"),
        (["--device", "cpu"], {"BUDDYRUN_GPU_LAYERS": "99"}, "cpu"),
        (["-ngl", "auto"], {}, "auto"),
    ],
)
def test_a_flag_about_the_device_beats_the_twin_of_the_other(
    arguments: list[str], twins: dict[str, str], device: str
) -> None:
    seen = engines_asked_for(["demo", "-p", "hi", *arguments], twins)
    assert seen[0].device == device
