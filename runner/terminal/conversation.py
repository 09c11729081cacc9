"""The messages of one chat and its settings. Knows neither the terminal nor the engine."""

from dataclasses import dataclass, field, replace

from runner.config import GenerateRequest, SamplingConfig
from runner.terminal.sampling_options import N_PREDICT, SamplingOption, Value
from runner.terminal.thinking import without_thinking

Message = dict[str, str]


@dataclass(frozen=True)
class ChatSettings:
    """What `/set` can change."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    n_predict: int = -1
    system_prompt: str = ""
    show_thinking: bool = True
    verbose: bool = False

    def value_of(self, option: SamplingOption) -> Value:
        """The current value of a sampling parameter."""
        owner = self if option is N_PREDICT else self.sampling
        value: Value = getattr(owner, option.field)
        return value

    def with_value(self, option: SamplingOption, value: Value) -> "ChatSettings":
        """These settings with one sampling parameter changed."""
        if option is N_PREDICT:
            return replace(self, n_predict=int(value))
        changed: dict[str, Value] = {option.field: value}
        # A grammar and a schema exclude each other; the one set last wins.
        if value and option.field in {"grammar", "json_schema"}:
            changed["json_schema" if option.field == "grammar" else "grammar"] = ""
        return replace(self, sampling=replace(self.sampling, **changed))  # type: ignore[arg-type]


class Conversation:
    """User and assistant messages in turn, always ending with an answer between two turns.

    A question that got no answer (it did not fit, was stopped or the engine died) is taken back
    out, so that templates which demand strict turns keep working, and `retry` brings it back.
    A question that had an answer before the retry gets that answer again.
    """

    def __init__(self, settings: ChatSettings) -> None:
        self.settings = settings
        self.messages: list[Message] = []
        self.attached: list[str] = []  # texts of files for the next message
        self._unanswered: str | None = None
        self._replaced: Message | None = None  # the answer that a retry is to replace

    @property
    def has_unanswered(self) -> bool:
        """Whether the last question was taken back."""
        return self._unanswered is not None

    def attach(self, name: str, text: str) -> None:
        """Keep a file's text for the next message."""
        self.attached.append(f"File {name}:\n{text.rstrip()}\n")

    def ask(self, text: str) -> None:
        """Add the user's message, with the attached files before it."""
        content = "\n".join([*self.attached, text])
        self.attached.clear()
        self._unanswered = self._replaced = None
        self.messages.append({"role": "user", "content": content})

    def answer(self, text: str) -> None:
        """Add the assistant's answer; without any text `take_back`."""
        if text:
            self.messages.append({"role": "assistant", "content": text})
            self._replaced = None
        else:
            self.take_back()

    def take_back(self) -> None:
        """Remove the open question, or give it the answer back that it had before a retry."""
        if self._replaced is None:
            self._unanswered = self.messages.pop()["content"]
        else:
            self.messages.append(self._replaced)
            self._replaced = None

    def retry(self) -> bool:
        """Make the last question the open one again; False when there is none."""
        if self._unanswered is not None:
            self.messages.append({"role": "user", "content": self._unanswered})
            self._unanswered = None
            return True
        if not self.messages:
            return False
        if self.messages[-1]["role"] == "assistant":
            self._replaced = self.messages.pop()
        return True

    def clear(self) -> None:
        """Forget all messages; the settings stay."""
        self.messages.clear()
        self.attached.clear()
        self._unanswered = self._replaced = None

    def restore(self, messages: list[Message], settings: ChatSettings) -> None:
        """Replace everything by a saved chat."""
        self.clear()
        self.messages.extend(messages)
        self.settings = settings

    def request(self) -> GenerateRequest:
        """What to send to the engine: earlier answers go without their thinking sections."""
        sent = [
            {**message, "content": without_thinking(message["content"])}
            if message["role"] == "assistant"
            else message
            for message in self.messages
        ]
        if self.settings.system_prompt:
            sent.insert(0, {"role": "system", "content": self.settings.system_prompt})
        return GenerateRequest(
            messages=tuple(sent),
            n_predict=self.settings.n_predict,
            sampling=self.settings.sampling,
        )
