"""The slash commands and their completion."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runner import protocol
from runner.errors import ContextFullError, TemplateError, WorkerDiedError
from runner.miss_policy import RoutingPlan, ServedWeight
from runner.protocol import ModelInfo
from runner.standins.budget import WINDOW
from runner.stats_recorder import StatsRecorder
from runner.terminal.chat_commands import COMMANDS, complete
from runner.terminal.conversation import ChatSettings
from runner.terminal.history import LineHistory
from tests.runner.chat_fakes import INFO, ScriptedChat, Step, press_ctrl_c


def run(*lines: str) -> tuple[ScriptedChat, str]:
    """A chat of commands alone, and what it prints."""
    chat = ScriptedChat(lines)
    printed = chat.run()
    assert chat.client.requests == []
    return chat, printed


def test_help_lists_every_command() -> None:
    for line in ("/?", "/help"):
        printed = run(line)[1]
        assert all(command.usage in printed for command in COMMANDS)
        assert '"""' in printed and "//text" in printed


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("/set temp 0.5", "temperature", 0.5),
        ("/set temperature 0", "temperature", 0.0),
        ("/set parameter top_k 7", "top_k", 7),
        ("/set --top-p 0.3", "top_p", 0.3),
        ("/set min-p 0.1", "min_p", 0.1),
        ("/set seed 42", "seed", 42),
        ("/set s 42", "seed", 42),
        ("/set mirostat 2", "mirostat", 2),
        ("/set ignore-eos on", "ignore_eos", True),
        ('/set grammar root ::= "a b"', "grammar", 'root ::= "a b"'),
    ],
)
def test_set_changes_a_sampling_parameter(line: str, field: str, value: object) -> None:
    chat, _ = run(line)
    assert getattr(chat.conversation.settings.sampling, field) == value


@pytest.mark.parametrize(
    "line",
    ["/set temp x", "/set temp -1", "/set temp nan", "/set temp inf", "/set top-p 1.5",
     "/set top-k 1.5", "/set top-k 99999999999", "/set seed -2", "/set mirostat 3",
     "/set ignore-eos perhaps", "/set verbose maybe", "/set nonsense 1", "/set n-predict -2"],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_and_changes_nothing(line: str) -> None:
    chat, printed = run(line)
    assert chat.conversation.settings == ChatSettings()
    assert "must be" in printed or "There is no setting" in printed


def test_set_reaches_the_next_request() -> None:
    chat = ScriptedChat(["/set temp 0.5", "/set n-predict 3", "/set system Rhyme.", "hi"], [["ok"]])
    chat.run()
    request = chat.client.requests[0]
    assert (request.sampling.temperature, request.n_predict) == (0.5, 3)
    assert request.messages[0] == {"role": "system", "content": "Rhyme."}


def test_set_alone_lists_every_setting_with_its_value() -> None:
    _, printed = run("/set temp 0.25", "/set")
    assert "0.25" in printed
    for name in ("n-predict", "top-k", "dry-multiplier", "verbose", "history", "system"):
        assert name in printed


def test_a_grammar_and_a_schema_replace_each_other() -> None:
    chat, _ = run("/set grammar x", "/set json-schema {}")
    assert chat.conversation.settings.sampling.grammar == ""


def test_switches() -> None:
    chat, _ = run("/set verbose on", "/set nothink")
    assert chat.conversation.settings.verbose
    assert not chat.conversation.settings.show_thinking
    assert not run("/set verbose on", "/set verbose off")[0].conversation.settings.verbose


@pytest.mark.parametrize(
    ("line", "is_shown"),
    [("/set think", True), ("/set think on", True), ("/set think off", False),
     ("/set nothink on", False), ("/set nothink off", True)],
)  # fmt: skip
def test_thinking_is_shown_or_hidden_as_the_value_says(line: str, is_shown: bool) -> None:
    chat, printed = run("/set nothink" if is_shown else "/set think", line)
    assert chat.conversation.settings.show_thinking == is_shown
    assert printed.endswith(f"Thinking sections are {'shown' if is_shown else 'hidden'}.\n")


@pytest.mark.parametrize(
    ("line", "is_kept"),
    [("/set history", True), ("/set history off", False), ("/set nohistory", False),
     ("/set nohistory off", True)],
)  # fmt: skip
def test_lines_are_kept_or_not_as_the_value_says(line: str, is_kept: bool, tmp_path: Path) -> None:
    history = LineHistory(tmp_path / "history")
    history.keep(not is_kept)
    chat = ScriptedChat([line])
    chat.chat._state.history = history
    assert ("not kept in the history" in chat.run()) != is_kept
    assert history.is_kept == is_kept


@pytest.mark.parametrize("line", ["/set history", "/set history off", "/set nohistory"])
def test_without_a_history_file_the_switch_says_so(line: str) -> None:
    chat, printed = run(line, "/set")
    assert printed.startswith("No history file is in use.\n")
    assert not chat.chat._reader.history.is_kept


@pytest.mark.parametrize("name", ["verbose", "think", "nothink", "history", "nohistory"])
def test_a_switch_takes_no_other_value_than_on_and_off(name: str) -> None:
    chat, printed = run(f"/set {name} maybe")
    assert f"{name} must be on or off, not 'maybe'" in printed
    assert chat.conversation.settings == ChatSettings()


def test_system_shows_changes_and_removes_the_system_prompt() -> None:
    chat, printed = run("/system", "/system Be brief.", "/system", '/system ""', "/show system")
    assert printed.count("No system prompt is set.") == 2
    assert "Be brief.\n" in printed
    assert chat.conversation.settings.system_prompt == ""


def test_set_system_without_a_value_shows_the_system_prompt() -> None:
    chat, printed = run("/set system Be brief.", "/set system")
    assert printed.endswith("\nBe brief.\n")
    assert chat.conversation.settings.system_prompt == "Be brief."
    assert run("/set system Be brief.", '/set system ""')[0].conversation.settings == ChatSettings()


def test_a_system_prompt_of_several_lines() -> None:
    chat, _ = run('/system """one\ntwo"""')
    assert chat.conversation.settings.system_prompt == "one\ntwo"


@pytest.mark.parametrize(
    ("topic", "expected"),
    [("", "8.0 B"), ("info", "llama 8x1B"), ("parameters", "top-k"), ("system", "No system"),
     ("template", "{{ template }}"), ("context", "0 of 8192 tokens"), ("stats", '"n_past": 7'),
     ("nonsense", "/show knows info, parameters, system, template, context, stats, cache;")],
)  # fmt: skip
def test_show(topic: str, expected: str) -> None:
    printed = run(f"/show {topic}")[1]
    assert expected in printed
    assert "\x1b" not in printed


def show_cache(recorder: StatsRecorder, *state: Any, info: ModelInfo = INFO) -> str:
    chat = ScriptedChat(["/show cache"])
    message = protocol.encode({"type": "stats", "snapshot": recorder.snapshot(7, 64, *state)})
    chat.client.snapshot = json.loads(message)["snapshot"]
    chat.chat._state.info = info
    return chat.run()


def test_show_cache_says_how_the_cache_did_and_where_it_helped_least() -> None:
    recorder = StatsRecorder(7, (4, 4, 4, 4, 4, 4, 5))
    experts = np.zeros((50, 2), np.int32)
    hits = (60, 95, 50, 94, 93, 100, 92)
    plans = [RoutingPlan(experts, (), (), n, 100 - n, 0) for n in hits[:6]]
    plans.append(RoutingPlan(experts, (), (), hits[6], 2, 3, 2, 1))
    recorder.record_batch(50, plans, 10**9, 600 * 10**6, 350 * 10**6, False)
    for layer in range(5):
        recorder.record_read(layer, 600 * 10**6, 400 * 10**6)
    recorder.record_prefetch(30, 10)
    info = replace(
        INFO, moe_cache_bytes=1_190_000_000, moe_cache_slots=(4,) * 6 + (5,), moe_cache_policy="lru"
    )
    printed = show_cache(recorder, (), (10, 0, 3, 0, 0, 0, 2), info=info)
    expected = """\
slots       4 to 5 of 8 experts per layer (1.19 GB), lru
pairs       700: hit 83.4 %, load 15.7 %, host 0.4 %, substituted 0.3 %, dropped 0.1 %
read        3.00 GB, 1.50 GB/s
read ahead  40 experts, 75.0 % of them used
time        compute 60.0 %, waiting for reads 35.0 %, Python 5.0 %
evictions   15
lowest hit  layer 2     50.0 %    4 slots
            layer 0     60.0 %    4 slots
            layer 6     92.0 %    5 slots
            layer 4     93.0 %    4 slots
            layer 3     94.0 %    4 slots
"""
    assert printed == expected


def test_show_cache_before_the_first_answer_has_no_shares() -> None:
    info = replace(
        INFO, moe_cache_bytes=40_000_000, moe_cache_slots=(4, 4), moe_cache_policy="static"
    )
    assert show_cache(StatsRecorder(2, (4, 4)), info=info) == (
        "slots       4 of 8 experts per layer (40.0 MB), static\n"
        "pairs       nothing was computed yet\n"
    )


def test_show_cache_says_what_is_known_of_the_answers_quality() -> None:
    info = replace(INFO, moe_cache_bytes=40_000_000, moe_cache_slots=(4, 4), moe_cache_policy="lfu")
    recorder = StatsRecorder(2, (4, 4), buddy_budget=0.05)
    weight = ServedWeight(hit=0.9, loaded=0.06, on_host=0.0, substituted=0.03, dropped=0.01)
    plans = [RoutingPlan(np.zeros((1, 2), np.int32), (), (), 2, 0, 0, weight=weight)] * 2
    recorder.record_batch(1, plans, 10**9, 10**9, 0, False)
    recorder.record_standins(0.021)
    recorder.record_output(2.345, 0.0123)
    for kl, is_same_top in ((0.004, True), (0.0164, False), (0.0, True), (0.0, True)):
        recorder.record_verified(kl, is_same_top, 10**8)
    printed = show_cache(recorder, info=info)
    assert printed.splitlines()[-3:] == [
        f"stand-ins   2.1 % of the router's weight in the last {WINDOW} tokens (budget 5.0 %),"
        " 4.0 % since the model was loaded",
        "output      entropy 2.35 nats, repeated 4-grams 1.2 %",
        "verified    4 tokens: mean KL 0.0051 nats, largest 0.0164, same likeliest token 75.0 %",
    ]


def test_show_cache_says_when_there_is_no_budget() -> None:
    info = replace(INFO, moe_cache_bytes=40_000_000, moe_cache_slots=(4, 4), moe_cache_policy="lfu")
    printed = show_cache(StatsRecorder(2, (4, 4), buddy_budget=1.0), info=info)
    assert "in the last 256 tokens (no budget), 0.0 % since" in printed
    assert "output" not in printed and "verified" not in printed


def test_show_cache_without_a_cache_is_one_sentence() -> None:
    assert show_cache(StatsRecorder(2)) == (
        "There is no expert cache: every expert is used in place, where the file is mapped.\n"
    )


def test_regen_answers_the_last_message_again() -> None:
    chat = ScriptedChat(["hi", "/regen"], [["first"], ["second"]])
    chat.run()
    assert chat.contents == ["hi", "second"]
    assert chat.client.requests[0].messages == chat.client.requests[1].messages


@pytest.mark.parametrize(
    ("turn", "expected"),
    [([press_ctrl_c], "The earlier answer is kept. /regen tries again."),
     ([TemplateError("no such role")], "/regen tries your last message again."),
     ([ContextFullError("9 > 8")], "The earlier answer is kept. Shorten"),
     ([WorkerDiedError("dead")], "Restarted; your conversation is kept.")],
)  # fmt: skip
def test_a_regen_without_a_first_word_keeps_the_earlier_answer(
    turn: list[Step], expected: str
) -> None:
    chat = ScriptedChat(["hi", "/regen"], [["first"], turn])
    printed = chat.run()
    assert expected in printed and "taken back" not in printed
    assert chat.contents == ["hi", "first"]


def test_a_kept_answer_can_be_regenerated_and_the_chat_goes_on() -> None:
    chat = ScriptedChat(
        ["hi", "/regen", "/regen", "more", "/regen"],
        [["first"], [press_ctrl_c], ["second"], [press_ctrl_c], ["third"]],
    )
    chat.run()
    assert chat.contents == ["hi", "second", "more", "third"]


def test_regen_without_a_message_sends_nothing() -> None:
    assert "no message to answer" in run("/regen")[1]


def test_clear_forgets_messages_and_files_but_not_settings(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("file text")
    lines = ["hi", "/set temp 0.1", f"/read {tmp_path / 'a.txt'}", "/clear", "again"]
    chat = ScriptedChat(lines, [["1"], ["2"]])
    chat.run()
    assert chat.contents == ["again", "2"]
    assert chat.conversation.settings.sampling.temperature == 0.1


def test_read_adds_files_to_the_next_message_only(tmp_path: Path) -> None:
    (tmp_path / "a b.txt").write_text("alpha\n")
    (tmp_path / "c.txt").write_text("gamma")
    lines = [f'/read "{tmp_path / "a b.txt"}"', f"/read {tmp_path / 'c.txt'}", "sum up", "go on"]
    chat = ScriptedChat(lines, [["1"], ["2"]])
    assert "6 characters of a b.txt go with the next message" in chat.run()
    assert chat.contents[0] == "File a b.txt:\nalpha\n\nFile c.txt:\ngamma\n\nsum up"
    assert chat.contents[2] == "go on"


@pytest.mark.parametrize(
    ("data", "expected"), [(b"a\0b", "binary"), (b"\xff\xfe", "not UTF-8"), (None, "cannot read")]
)
def test_read_refuses_what_is_no_text(data: bytes | None, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if data is not None:
        path.write_bytes(data)
    assert expected in run(f"/read {path}")[1]


def test_an_empty_message_leaves_files_for_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("alpha")
    chat = ScriptedChat([f"/read {tmp_path / 'a.txt'}", "", '""""""', "sum up"], [["1"]])
    chat.run()
    assert chat.contents == ["File a.txt:\nalpha\n\nsum up", "1"]


@pytest.mark.parametrize("command", ["/read", "/save", "/load"])
@pytest.mark.parametrize(
    ("name", "expected"), [("a\0b", "cannot hold a NUL"), ("~nouser/x", "no such home directory")]
)
def test_a_file_name_that_cannot_be_is_refused(command: str, name: str, expected: str) -> None:
    assert expected in run(f"{command} {name}")[1]


@pytest.mark.parametrize("command", ["/read", "/save", "/load"])
def test_a_file_command_without_a_file_says_so(command: str) -> None:
    assert f"Give a file name: {command} FILE" in run(command)[1]


def test_commands_are_completed() -> None:
    assert complete("/re") == (3, ["/read", "/regen"])
    assert "/set" in complete("/")[1]
    assert complete("/show st") == (2, ["stats"])
    assert complete("/show c") == (1, ["cache", "context"])
    assert "top-k" in complete("/set t")[1]
    assert complete("hello /re") == (0, [])
    assert complete("/set temp 1") == (0, [])


def test_file_names_are_completed_after_file_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes one.txt").touch()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "deep.txt").touch()
    (tmp_path / ".hidden").touch()
    assert complete("/read no") == (2, ["notes/", "notes one.txt"])
    assert complete("/load notes/") == (6, ["notes/deep.txt"])
    assert complete("/save ") == (0, ["notes/", "notes one.txt"])
    assert complete(f"/read {tmp_path}/notes/d")[1] == [f"{tmp_path}/notes/deep.txt"]
    assert complete("/read nowhere/x") == (7 + 2, [])


@pytest.mark.parametrize("name", ["~nouser/", "~nouser/x", "a\0b/"])
def test_a_folder_that_cannot_be_has_no_completions(name: str) -> None:
    assert complete(f"/read {name}") == (len(name), [])


def test_a_link_to_itself_is_completed_as_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    assert complete("/read l") == (1, ["loop"])
