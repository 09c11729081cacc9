"""The chat loop with a scripted client: what is printed, kept and sent."""

import io
import signal
from dataclasses import replace

import pytest

from runner.chat import HOW_TO_LEAVE
from runner.config import SamplingConfig
from runner.errors import (
    BackendError,
    CancelledError,
    ContextFullError,
    GGUFError,
    OutOfMemoryError,
    TemplateError,
    WorkerDiedError,
)
from runner.protocol import PromptProgress
from runner.terminal.chat_view import ChatView
from runner.terminal.conversation import ChatSettings
from runner.terminal.interrupts import SecondInterrupt
from runner.terminal.one_shot import remarks
from tests.runner.chat_fakes import INFO, ScriptedChat, press_ctrl_c, result


def test_an_answer_streams_and_ends_with_speeds_and_context_use() -> None:
    chat = ScriptedChat(["hi"], [["Hel", "lo."]])
    assert chat.run() == "Hello.\n[ Prompt: 41.2 t/s | Generation: 9.8 t/s | ctx 1.2k/8k ]\n"
    assert chat.contents == ["hi", "Hello."]


def test_the_last_line_says_how_the_experts_were_served() -> None:
    served = replace(result(), has_cache=True, n_hit=874, n_loaded=105, n_on_host=21)
    chat = ScriptedChat(["hi"], [["ok", served]])
    shares = "hit 87.4 % | load 10.5 % | host 2.1 %"
    last = f"[ Prompt: 41.2 t/s | Generation: 9.8 t/s | {shares} | ctx 1.2k/8k ]"
    assert chat.run() == f"ok\n{last}\n"


@pytest.mark.parametrize(
    ("counts", "expected"),
    [((8, 0, 0, 0, 0), "hit 100.0 %"),
     ((0, 3, 0, 0, 1), "hit 0.0 % | load 75.0 % | dropped 25.0 %"),
     ((1, 0, 0, 2, 0), "hit 33.3 % | buddy 66.7 %"),
     ((7, 1, 0, 2, 0), "hit 70.0 % | buddy 20.0 % | load 10.0 %"),
     ((0, 0, 0, 0, 0), "hit -")],
)  # fmt: skip
def test_classes_without_a_pair_are_left_out_but_for_hits(
    counts: tuple[int, int, int, int, int], expected: str
) -> None:
    names = ("n_hit", "n_loaded", "n_on_host", "n_substituted", "n_dropped")
    served = replace(result(), has_cache=True, **dict(zip(names, counts, strict=True)))
    assert f" t/s | {expected} | ctx " in ScriptedChat(["hi"], [["ok", served]]).run()


@pytest.mark.parametrize(
    ("kl", "text"), [(0.0041, "0.004"), (0.0, "0.000"), (1e-5, "< 0.001"), (0.0005, "0.001")]
)
def test_the_last_line_says_how_far_verified_tokens_were_off(kl: float, text: str) -> None:
    served = replace(result(), has_cache=True, n_hit=874, n_substituted=21, n_loaded=105)
    served = replace(served, n_verified=3, verified_kl=kl, verified_agreement=1.0)
    shares = "hit 87.4 % | buddy 2.1 % | load 10.5 %"
    printed = ScriptedChat(["hi"], [["ok", served]]).run()
    assert f" t/s | {shares} | verified KL {text} | ctx 1.2k/8k ]" in printed


@pytest.mark.parametrize(
    ("share", "n_generated", "has_buddies", "is_said"),
    [(0.51, 128, True, True), (0.5, 128, True, False), (0.9, 127, True, False),
     (0.9, 500, False, False)],
)  # fmt: skip
def test_a_long_answer_of_stand_ins_that_repeats_itself_is_remarked_on(
    share: float, n_generated: int, has_buddies: bool, is_said: bool
) -> None:
    repeating = replace(
        result(), repeated_4grams=share, n_generated=n_generated, has_buddies=has_buddies
    )
    remark = "The answer repeats itself; --exact shows whether the stand-ins are the reason.\n"
    printed = ScriptedChat(["hi"], [["ok", repeating]]).run()
    assert printed.endswith(remark) if is_said else remark not in printed
    err = io.StringIO()
    remarks(repeating, INFO, 0.0, err, verbose=False)
    expected = "buddyrun: the answer repeats itself; --exact shows whether the stand-ins are the"
    assert err.getvalue() == (f"{expected} reason\n" if is_said else "")


@pytest.mark.parametrize(
    ("n_substituted", "n_dropped", "said"),
    [(0, 0, ""), (3, 1, "buddyrun: 40.0 % of the experts were stood in for; --exact lets nobody")],
)
def test_stand_ins_are_told_in_a_script_too(n_substituted: int, n_dropped: int, said: str) -> None:
    answer = replace(
        result(), n_hit=3, n_loaded=2, n_on_host=1, n_substituted=n_substituted,
        n_dropped=n_dropped,
    )  # fmt: skip
    err = io.StringIO()
    remarks(answer, INFO, 0.0, err, verbose=False)
    assert err.getvalue() == (f"{said} stand in\n" if said else "")


def test_without_a_cache_the_last_line_has_no_hits() -> None:
    served = replace(result(), n_hit=8)
    assert "hit" not in ScriptedChat(["?"], [["ok", served]]).run()


def test_every_turn_sends_the_whole_conversation_and_the_settings() -> None:
    settings = ChatSettings(SamplingConfig(seed=3), n_predict=9, system_prompt="Be brief.")
    chat = ScriptedChat(["one", "two"], [["1"], ["2"]], settings=settings)
    chat.run()
    last = chat.client.requests[-1]
    assert [(m["role"], m["content"]) for m in last.messages] == [
        ("system", "Be brief."), ("user", "one"), ("assistant", "1"), ("user", "two"),
    ]  # fmt: skip
    assert (last.n_predict, last.sampling.seed, last.prompt) == (9, 3, None)


def test_ctrl_c_stops_the_answer_and_keeps_the_partial_text() -> None:
    chat = ScriptedChat(["hi"], [["par", press_ctrl_c, "never printed"]])
    printed = chat.run()
    assert chat.contents == ["hi", "par"]
    assert "par\n" in printed and "never" not in printed
    assert "| stopped ]" in printed


def test_ctrl_c_while_the_prompt_is_read_takes_the_message_back() -> None:
    chat = ScriptedChat(["hi", "/regen"], [[PromptProgress(1, 9, 0), press_ctrl_c], ["yes"]])
    printed = chat.run()
    assert "Stopped before the first word" in printed
    assert chat.contents == ["hi", "yes"]
    assert chat.client.requests[0].messages == chat.client.requests[1].messages


def test_a_second_ctrl_c_in_the_same_answer_leaves_at_once() -> None:
    def press_twice() -> None:
        press_ctrl_c()
        press_ctrl_c()

    chat = ScriptedChat(["hi"], [["par", press_twice]])
    with pytest.raises(SecondInterrupt):
        chat.run()
    assert chat.out.getvalue().endswith("par\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_at_an_empty_prompt_says_how_to_leave() -> None:
    chat = ScriptedChat([KeyboardInterrupt(), "hi"], [["yes"]])
    assert chat.run().startswith(HOW_TO_LEAVE + "\nyes\n")


@pytest.mark.parametrize("line", ["/bye", "/exit", "/quit", " /bye "])
def test_bye_leaves(line: str) -> None:
    chat = ScriptedChat([line, "never sent"])
    chat.run()
    assert chat.client.requests == []


@pytest.mark.parametrize("line", ["", "   ", "\n"])
def test_an_empty_line_sends_nothing(line: str) -> None:
    chat = ScriptedChat([line])
    assert chat.run() == ""
    assert chat.client.requests == []


@pytest.mark.parametrize("line", ["/nothing", "/usr/bin/ls", "/ hi", "/Set temp 1", "/set\x1b[2J"])
def test_an_unknown_command_is_refused_and_never_sent(line: str) -> None:
    chat = ScriptedChat([line])
    printed = chat.run()
    assert "There is no command" in printed and "\x1b" not in printed
    assert chat.client.requests == []


def test_two_slashes_send_a_message_that_begins_with_one() -> None:
    chat = ScriptedChat(["//etc is what?"], [["a folder"]])
    chat.run()
    assert chat.contents[0] == "/etc is what?"


def test_quoted_lines_are_sent_without_the_quotes() -> None:
    chat = ScriptedChat(['"""\nline 1\n  line 2\n"""'], [["ok"]])
    chat.run()
    assert chat.contents[0] == "line 1\n  line 2"


def test_escape_sequences_of_a_model_are_shown_not_obeyed() -> None:
    chat = ScriptedChat(["hi"], [["\x1b", "[2Jx\u202e", "y\r"]])
    assert chat.run().startswith("␛[2Jx<U+202E>y␍\n")
    assert chat.contents[1] == "\x1b[2Jx\u202ey\r"


def test_off_a_terminal_the_answer_is_written_as_the_model_made_it() -> None:
    chat = ScriptedChat(["hi"], [["a\x1b[1m\u202e"]], is_terminal=False)
    assert chat.run() == "a\x1b[1m\u202e\n"


def test_an_undecodable_byte_in_a_message_is_replaced() -> None:
    chat = ScriptedChat(["a\udcffb"], [["ok"]])
    chat.run()
    assert chat.contents[0] == "a\ufffdb"


def test_thinking_is_dimmed_also_when_its_tags_are_split() -> None:
    pieces = ["<th", "ink>\nhm", "m</thi", "nk>\n\nYes", "."]
    chat = ScriptedChat(["hi"], [pieces], has_color=True)
    assert chat.run().startswith("\x1b[2mhmm\x1b[0m\n\nYes.\n\x1b[2m[ Prompt")
    assert chat.contents[1] == "".join(pieces)


def test_hidden_thinking_is_not_printed_but_kept() -> None:
    settings = ChatSettings(show_thinking=False)
    chat = ScriptedChat(["hi"], [["<think>hm</think>\n\nYes."]], settings=settings)
    assert chat.run().startswith("Yes.\n")
    assert "hm" in chat.contents[1]


def test_thinking_is_not_sent_back_to_the_model() -> None:
    chat = ScriptedChat(["one", "two"], [["<think>hm</think>\n\nYes."], ["2"]])
    chat.run()
    assert chat.client.requests[1].messages[1]["content"] == "Yes."


def test_colour_is_reset_when_an_answer_stops_while_thinking() -> None:
    chat = ScriptedChat(["hi"], [["<think>hm", press_ctrl_c]], has_color=True)
    assert chat.run().startswith("\x1b[2mhm\x1b[0m\n")


def test_a_full_context_takes_the_message_back_and_says_what_to_do() -> None:
    full = ContextFullError("9000 tokens > ctx 8192")
    chat = ScriptedChat(["one", "long", "short"], [["1"], [full], ["2"]])
    printed = chat.run()
    assert "9000 tokens > ctx 8192" in printed
    for remedy in ("was taken back", "/clear", "-c N", "--context-shift"):
        assert printed.count(remedy) == 1
    assert chat.contents == ["one", "1", "short", "2"]


def test_an_answer_cut_by_the_context_is_kept_and_explained() -> None:
    chat = ScriptedChat(["hi"], [["cut", result("context", 8192)]])
    assert "The answer was cut: the context is full (8192 of 8192 tokens)" in chat.run()
    assert chat.contents == ["hi", "cut"]


@pytest.mark.parametrize(("n_past", "is_warned"), [(6553, False), (6554, True)])
def test_from_80_percent_of_the_context_on_there_is_a_warning(n_past: int, is_warned: bool) -> None:
    chat = ScriptedChat(["hi"], [["ok", result(n_past=n_past)]])
    assert ("of the context is used" in chat.run()) == is_warned


def test_a_dead_worker_is_explained_and_restarted_with_the_conversation_kept() -> None:
    died = WorkerDiedError("The engine was killed \x1b[2J(SIGKILL).")
    chat = ScriptedChat(["one", "two", "/regen"], [["1"], [died], ["2"]])
    printed = chat.run()
    assert "The engine was killed ␛[2J(SIGKILL)." in printed
    assert "Restarted; your conversation is kept" in printed
    assert chat.client.n_restarts == 1
    assert chat.contents == ["one", "1", "two", "2"]


@pytest.mark.parametrize("kind", [BackendError, OutOfMemoryError])
def test_after_a_device_failed_the_engine_is_started_again(kind: type[BackendError]) -> None:
    failed = kind("the device did not do what it was asked to (ggml: failed)")
    chat = ScriptedChat(["one", "two", "/regen"], [["1"], [failed], ["2"]])
    printed = chat.run()
    assert "the device did not do what it was asked to" in printed
    assert "Restarted; your conversation is kept" in printed
    assert chat.client.n_restarts == 1
    assert chat.contents == ["one", "1", "two", "2"]


def test_verbose_adds_what_a_dead_worker_wrote() -> None:
    died = [WorkerDiedError("dead")]
    assert "last words" not in ScriptedChat(["one"], [died]).run()
    assert "last words" in ScriptedChat(["one"], [died], settings=ChatSettings(verbose=True)).run()


def test_the_text_before_a_death_is_kept() -> None:
    chat = ScriptedChat(["hi"], [["par", WorkerDiedError("dead")]])
    chat.run()
    assert chat.contents == ["hi", "par"]


def test_when_a_restart_fails_the_chat_lives_and_tries_again_at_the_next_message() -> None:
    cut = GGUFError("the file was cut")
    chat = ScriptedChat(
        ["one", "two", "three"], [[WorkerDiedError("dead")], ["3"]], restarts=[cut, cut]
    )
    printed = chat.run()
    assert printed.count("the file was cut") == 2
    assert "The answered messages are kept: /save FILE writes them" in printed
    assert chat.client.n_restarts == 3
    assert chat.contents == ["three", "3"]


def test_ctrl_c_during_a_restart_stops_it_without_an_end_of_the_chat() -> None:
    chat = ScriptedChat(["one", "two"], [[WorkerDiedError("dead")], ["2"]], [CancelledError()])
    assert "Stopped." in chat.run()
    assert chat.contents == ["two", "2"]


def test_a_failing_template_keeps_the_chat_going() -> None:
    chat = ScriptedChat(["one", "two"], [[TemplateError("roles must alternate")], ["2"]])
    assert "roles must alternate" in chat.run()
    assert chat.contents == ["two", "2"]


def test_a_first_message_is_answered_before_anything_is_read() -> None:
    chat = ScriptedChat(["second"], [["1"], ["2"]])
    chat.run("first")
    assert chat.contents == ["first", "1", "second", "2"]


def test_a_single_turn_leaves_after_one_answer() -> None:
    chat = ScriptedChat(["one", "two"], [["1"]])
    chat.run(is_single_turn=True)
    assert chat.contents == ["one", "1"]


def test_verbose_prints_the_eight_labels() -> None:
    chat = ScriptedChat(["hi"], [["ok"]], settings=ChatSettings(verbose=True))
    printed = chat.run()
    labels = (
        "total duration:", "load duration:", "prompt eval count:", "prompt eval duration:",
        "prompt eval rate:", "eval count:", "eval duration:", "eval rate:",
    )  # fmt: skip
    positions = [printed.find("\n" + label) for label in labels]
    assert -1 not in positions and positions == sorted(positions)
    assert "prompt eval count:    412 token(s)" in printed


def test_verbose_says_how_the_experts_were_served() -> None:
    served = replace(result(), has_cache=True, n_hit=3, n_on_host=1)
    verbose = ChatSettings(verbose=True)
    printed = ScriptedChat(["hi"], [["ok", served]], settings=verbose).run()
    assert "\nexperts:              hit 75.0 %, host 25.0 %\n" in printed
    assert "experts:" not in ScriptedChat(["hi"], [["ok"]], settings=verbose).run()


def test_verbose_says_what_was_verified() -> None:
    found = replace(result(), n_verified=8, verified_kl=0.0123, verified_agreement=0.875)
    verbose = ChatSettings(verbose=True)
    printed = ScriptedChat(["hi"], [["ok", found]], settings=verbose).run()
    expected = "8 token(s), mean KL 0.012, same likeliest token 87.5 %"
    assert f"\nverified:             {expected}\n" in printed
    assert "verified:" not in ScriptedChat(["hi"], [["ok"]], settings=verbose).run()


def test_speeds_of_nothing_are_dashes() -> None:
    nothing = replace(result(), n_prompt=100, n_generated=0, prompt_s=0.0, generation_s=0.0)
    chat = ScriptedChat(["hi"], [["x", nothing]])
    assert "[ Prompt: - t/s | Generation: - t/s | ctx" in chat.run()


def test_the_banner_shows_a_models_name_safely_and_its_notes() -> None:
    out = io.StringIO()
    ChatView(out, io.StringIO(), is_terminal=True, has_color=False).banner("1.2.3", INFO)
    printed = out.getvalue()
    assert "buddyrun 1.2.3" in printed
    assert "Fake ␛[31m8x1B: llama, 32 layers x 8 experts (top 2), Q8_0, 8.50 GB" in printed
    assert "The context is capped." in printed
