"""Completion in bash of words with a colon, such as `user/repo:QUANT`. Knows no model.

Bash breaks words at colons, so it asks for the part behind the last one and inserts only that.
"""

from typing import Any

from click.shell_completion import BashComplete, CompletionItem, add_completion_class

_COLON = ":"


class ColonBashComplete(BashComplete):
    """Click's own completion for bash, with words put together again at their colons."""

    _behind = ""  # what bash has of the word already, colon included

    def get_completion_args(self) -> tuple[list[str], str]:
        """The whole words before the one to complete, and that one."""
        args, incomplete = super().get_completion_args()
        glued = glue([*args, incomplete])
        word = glued[-1]
        self._behind = word[: len(word) - len(incomplete)] if incomplete != _COLON else word
        return glued[:-1], word

    def format_completion(self, item: CompletionItem[Any]) -> str:
        """As click does it, without what stands there already."""
        if self._behind and item.type == "plain" and item.value.startswith(self._behind):
            item = CompletionItem(item.value[len(self._behind) :])
        return super().format_completion(item)


def glue(words: list[str]) -> list[str]:
    """Words as they were typed, from words that were broken at colons."""
    glued: list[str] = []
    for word in words:
        if glued and (word == _COLON or glued[-1].endswith(_COLON)):
            glued[-1] += word
        else:
            glued.append(word)
    return glued


def use_for_bash() -> None:
    """Let click take this class for bash."""
    add_completion_class(ColonBashComplete)
