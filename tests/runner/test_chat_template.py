"""Chat templates: what they render, how they fail, and that they cannot run for ever."""

import threading
import time
from collections.abc import Callable

import pytest

from runner.chat_template import CHATML, MERGED_SYSTEM_NOTE, ChatTemplate
from runner.errors import TemplateError
from runner.tokenizer import builtin_template_names

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "Hi!"}
MIXTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)


def template(source: str | None) -> ChatTemplate:
    return ChatTemplate(source, "<s>", "</s>")


def in_another_thread(work: Callable[[], object]) -> BaseException | None:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


@pytest.mark.parametrize("source", [None, "", "chatml", CHATML])
def test_without_a_template_the_conversation_is_chatml(source: str | None) -> None:
    assert template(source).render([SYSTEM, USER]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_generation_prompt_can_be_left_out() -> None:
    for source in (None, "chatml"):
        assert template(source).render([USER], add_generation_prompt=False) == (
            "<|im_start|>user\nHello<|im_end|>\n"
        )


def test_a_mixtral_conversation_has_its_own_form() -> None:
    prompt = template(MIXTRAL).render([USER, ANSWER, USER])
    assert prompt == "<s>[INST] Hello [/INST]Hi!</s>[INST] Hello [/INST]"


def test_a_refused_system_message_goes_before_the_first_user_message() -> None:
    mixtral = template(MIXTRAL)
    assert mixtral.merges_system and "system" in MERGED_SYSTEM_NOTE
    assert mixtral.render([SYSTEM, USER]) == "<s>[INST] Be brief.\n\nHello [/INST]"
    assert mixtral.render([SYSTEM, USER, ANSWER, USER]).startswith("<s>[INST] Be brief.\n\nHello")


def test_a_system_message_that_a_template_leaves_out_is_merged_too() -> None:
    silent = (
        "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }}{% endif %}{% endfor %}"
    )
    assert template(silent).render([SYSTEM, USER]) == "U:Be brief.\n\nHello"


def test_a_system_message_alone_becomes_a_user_message() -> None:
    assert template(MIXTRAL).render([SYSTEM]) == "<s>[INST] Be brief. [/INST]"


def test_a_template_with_a_system_role_merges_nothing() -> None:
    assert not template(None).merges_system
    assert not template("llama3").merges_system


def test_roles_that_do_not_alternate_are_refused_in_the_templates_words() -> None:
    with pytest.raises(TemplateError, match="refused the conversation: Conversation roles must"):
        template(MIXTRAL).render([USER, USER])


def test_the_messages_given_are_not_changed() -> None:
    messages = [dict(SYSTEM), dict(USER)]
    template(MIXTRAL).render(messages)
    assert messages == [SYSTEM, USER]


def test_llama_cpps_built_in_templates_are_known_by_name() -> None:
    assert {"chatml", "llama2", "llama3", "mistral-v1", "gemma"} <= set(builtin_template_names())
    assert template("llama3").render([SYSTEM, USER]) == (
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert template("mistral-v1").render([USER, ANSWER]) == " [INST] Hello [/INST] Hi!</s>"


@pytest.mark.parametrize("name", builtin_template_names())
def test_every_built_in_template_renders_long_and_odd_texts(name: str) -> None:
    odd = {"role": "user", "content": "é\0😀 " + "long " * 5000}
    prompt = template(name).render([odd, ANSWER, USER])
    assert prompt.count("long") == 5000 and "é\ufffd😀" in prompt and "\0" not in prompt


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for x %}", "not valid Jinja, line 1: expected token 'in'"),
        ("\n\n{{ (1 }}", "not valid Jinja, line 3"),
        ("{{ foo() }}", "something that does not exist: 'foo' is undefined"),
        ("{{ messages[0].x.y }}", "does not exist: .* has no attribute 'x'"),
        ("{{ raise_exception('No tools.') }}", "refused the conversation: No tools. Another"),
        ("{{ 1/0 }}", "ZeroDivisionError"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{% include 'secrets' %}", "TemplateNotFound"),
        ("{{ ''.__class__.__mro__ }}", "not allowed: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "not allowed"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
        ("{% for a in x %}" * 40 + "{% endfor %}" * 40, "cannot be read: SyntaxError"),
        ("{{ 'x' * 99999999999999 }}", "memory"),
        ("x" * (2 << 20), "at most 1048576 are read"),
        (
            "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
            "made 99999000 characters; at most",
        ),
    ],
)
def test_a_bad_template_is_refused_in_plain_words(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        template(source).render([USER])


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        pytest.param("{{ 9**(9**9) }}", marks=pytest.mark.slow),
        pytest.param("{% set n = messages|length + 8 %}{{ n**(n**n) }}", marks=pytest.mark.slow),
    ],
)
def test_a_template_that_takes_too_long_is_stopped(source: str) -> None:
    start_s = time.monotonic()
    with pytest.raises(TemplateError, match="over 2 s"):
        template(source).render([SYSTEM, USER])
    assert time.monotonic() - start_s < 6


@pytest.mark.slow
def test_endless_loops_are_stopped_in_other_threads_too() -> None:
    source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    error = in_another_thread(lambda: template(source).render([USER]))
    assert isinstance(error, TemplateError) and "over 2 s" in str(error)


def test_rendering_works_in_other_threads() -> None:
    assert in_another_thread(lambda: template(MIXTRAL).render([SYSTEM, USER])) is None


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(TemplateError, match=r"'lama3' is neither Jinja text.*chatml.*llama3"):
        ChatTemplate("lama3", "", "")
