"""Turns a conversation into a prompt with a model's chat template. Knows no vocabulary, no engine.

A template is Jinja source from the model or the user, run in llama-cpp-python's sandbox, or the
name of one of llama.cpp's built-in templates. Its output may begin with the BOS token's text;
`Tokenizer.tokenize(prompt, add_special=True, parse_special=True)` still makes one BOS of it.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NoReturn

import jinja2

from runner.errors import TemplateError
from runner.time_limit import TimeLimitError, time_limit
from runner.tokenizer import apply_builtin_template, builtin_template_names

Message = Mapping[str, str]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MERGED_SYSTEM_NOTE = (
    "The model's chat template takes no system message; it was put before the first user message."
)

_LIMIT_S = 2.0
_MAX_SOURCE_CHARACTERS = 1 << 20
_MAX_PROMPT_CHARACTERS = 16 << 20

# A template is a program, and compiling it folds constants: both may fail in any of these ways.
_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TimeLimitError,
    TypeError,
    ValueError,
    jinja2.TemplateError,
)


class ChatTemplate:
    """One template, ready to render conversations."""

    def __init__(self, source: str | None, bos_token: str, eos_token: str) -> None:
        """`source`: Jinja text, a built-in template's name, or None or "" for ChatML.

        Raises TemplateError for an unknown name, and when Jinja cannot read it or takes over 2 s.
        """
        self.source = source or CHATML
        self._bos_token = bos_token
        self._is_builtin = self.source in builtin_template_names()
        self._formatter = None if self._is_builtin else self._compile(eos_token)

    @cached_property
    def merges_system(self) -> bool:
        """Whether the template leaves out or refuses system messages; see `MERGED_SYSTEM_NOTE`.

        Raises TemplateError when the template fails in another way.
        """
        probe = "5e1fc0de"
        question = {"role": "user", "content": "a"}
        try:
            return probe not in self._apply([{"role": "system", "content": probe}, question], True)
        except TemplateError as error:
            if not _is_refusal(error):
                raise
            return True

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt for `messages`, each with "role" and "content".

        Where the template takes no system role, a leading system message is put before the first
        user message. Raises TemplateError: the template failed, refused the conversation, took
        over 2 s or wrote over 16 MiB.
        """
        has_system = bool(messages) and messages[0]["role"] == "system"
        if has_system and self.merges_system:
            messages = _with_merged_system(messages)
        return self._apply(messages, add_generation_prompt)

    def _compile(self, eos_token: str) -> Any:
        if len(self.source) > _MAX_SOURCE_CHARACTERS:
            raise TemplateError(
                f"The chat template has {len(self.source)} characters;"
                f" at most {_MAX_SOURCE_CHARACTERS} are read."
            )
        if "{" not in self.source:
            raise TemplateError(
                f"The chat template {self.source[:40]!r} is neither Jinja text, which has braces,"
                f" nor one of llama.cpp's names: {', '.join(builtin_template_names())}."
            )
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        try:
            with time_limit(_LIMIT_S):
                return Jinja2ChatFormatter(self.source, eos_token, self._bos_token)
        except _FAULTS as error:
            _refuse(error, "cannot be read")

    def _apply(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        if self._formatter is None:
            prompt: object = apply_builtin_template(self.source, messages, add_generation_prompt)
        else:
            prompt = self._render_jinja(messages, add_generation_prompt)
        if not isinstance(prompt, str):
            raise TemplateError(f"The chat template made a {type(prompt).__name__}, not text.")
        if len(prompt) > _MAX_PROMPT_CHARACTERS:
            raise TemplateError(
                f"The chat template made {len(prompt)} characters;"
                f" at most {_MAX_PROMPT_CHARACTERS} are taken."
            )
        return prompt

    def _render_jinja(self, messages: Sequence[Message], add_generation_prompt: bool) -> object:
        assert self._formatter is not None
        self._formatter.add_generation_prompt = add_generation_prompt
        try:
            with time_limit(_LIMIT_S):
                return self._formatter(messages=[dict(message) for message in messages]).prompt
        except _FAULTS as error:
            _refuse(error, "failed")


def _refuse(error: BaseException, what: str) -> NoReturn:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, TimeLimitError):
        message = f"The chat template took over {_LIMIT_S:g} s and was stopped."
    elif isinstance(error, jinja2.TemplateSyntaxError):
        message = f"The chat template is not valid Jinja, line {error.lineno}: {reason}."
    elif isinstance(error, jinja2.exceptions.SecurityError):
        message = f"The chat template did something that is not allowed: {reason}."
    elif isinstance(error, jinja2.UndefinedError):
        message = f"The chat template uses something that does not exist: {reason}."
    elif isinstance(error, RecursionError):
        message = "The chat template is nested too deeply."
    elif isinstance(error, MemoryError):
        message = "The chat template needs more memory than there is."
    elif type(error) is ValueError and what == "failed":  # the template's raise_exception()
        message = f"The chat template refused the conversation: {reason}."
    else:
        message = f"The chat template {what}: {type(error).__name__}: {reason}."
    message = message.rstrip(".") + "."
    raise TemplateError(f"{message} Another can be chosen with --chat-template.") from error


def _is_refusal(error: TemplateError) -> bool:
    return type(error.__cause__) is ValueError


def _with_merged_system(messages: Sequence[Message]) -> list[Message]:
    system, *rest = messages
    for place, message in enumerate(rest):
        if message["role"] == "user":
            content = f"{system['content']}\n\n{message['content']}".lstrip("\n")
            return [*rest[:place], {**message, "content": content}, *rest[place + 1 :]]
    return [{"role": "user", "content": system["content"]}, *rest]
