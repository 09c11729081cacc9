"""Words that bash broke at colons are put together again."""

import pytest

from runner.terminal.bash_completion import glue


@pytest.mark.parametrize(
    ("words", "glued"),
    [
        (["run", "u/r"], ["run", "u/r"]),
        (["run", "u/r", ":"], ["run", "u/r:"]),
        (["run", "u/r", ":", "Q8"], ["run", "u/r:Q8"]),
        (["hf", ":", "//u/r", ":", "Q8", "-p", ""], ["hf://u/r:Q8", "-p", ""]),
        ([":"], [":"]),
        ([""], [""]),
    ],
)
def test_words_are_glued_at_their_colons(words: list[str], glued: list[str]) -> None:
    assert glue(words) == glued
