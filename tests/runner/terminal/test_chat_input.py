"""Multi-line rules and the file of typed lines."""

import io
import json
import os
import stat
import sys
from pathlib import Path

import pytest

from runner.terminal.chat_input import PlainReader, is_open, without_quotes
from runner.terminal.history import MAX_LINES, LineHistory, default_history_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"""', True), ('"""a', True), ('"""a"""', False), ('""""', True), ('""""""', False),
        ('/system """a', True), ('/set system """a\nb"""', False), ('what does """ mean', False),
        ("plain", False), ("", False), ('  """a\n', True),
    ],
)  # fmt: skip
def test_a_message_stays_open_until_its_quotes_are_closed(text: str, expected: bool) -> None:
    assert is_open(text) == expected


def test_quotes_are_taken_off_and_inner_space_is_kept() -> None:
    assert without_quotes('"""\n  a\n\nb\n"""') == "  a\n\nb"
    assert without_quotes('"""one line"""') == "one line"
    assert without_quotes('say """x""" now') == 'say """x""" now'


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("hello\n", "hello"),
        ("one\\\ntwo\\\nthree\n", "one\ntwo\nthree"),
        ('"""a\nb\\\nc"""\n', '"""a\nb\\\nc"""'),
    ],
)
def test_plain_input_joins_continued_lines(
    typed: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    reader = PlainReader(LineHistory(None), shows_prompt=False)
    assert reader.read() == message
    with pytest.raises(EOFError):
        reader.read()


def test_lines_come_back_in_order_from_a_file_of_this_user_only(tmp_path: Path) -> None:
    path = tmp_path / "state" / "history"
    history = LineHistory(path)
    for line in ("one", "two\nlines", "   ", "three \u202e\udcff"):
        history.add(line)
    assert LineHistory(path).load() == ["one", "two\nlines", "three \u202e\udcff"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_nothing_is_written_while_the_history_is_off(tmp_path: Path) -> None:
    history = LineHistory(tmp_path / "h")
    history.keep(False)
    history.add("secret")
    assert not (tmp_path / "h").exists()
    history.keep(True)
    history.add("told")
    assert history.load() == ["told"]


def test_without_a_file_no_line_is_kept() -> None:
    history = LineHistory(None)
    history.add("secret")
    assert not history.is_kept and history.load() == []
    with pytest.raises(AssertionError):
        history.keep(True)


def test_a_long_history_is_cut_to_its_newest_lines(tmp_path: Path) -> None:
    path = tmp_path / "h"
    path.write_text("".join(json.dumps(str(n)) + "\n" for n in range(2 * MAX_LINES + 1)))
    assert LineHistory(path).load()[0] == str(MAX_LINES + 1)
    assert len(path.read_text().splitlines()) == MAX_LINES


def test_damaged_lines_of_a_history_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "h").write_bytes(b'"good"\n{]\n\xff\xfe\n3\n"also')
    assert LineHistory(tmp_path / "h").load() == ["good"]


@pytest.mark.parametrize("path", [Path("/dev/full"), Path("/proc/nothing/here"), Path("/")])
def test_a_history_that_cannot_be_written_is_no_problem(path: Path) -> None:
    if not path.exists() and os.name == "nt":
        pytest.skip("no such devices")
    LineHistory(path).add("line")


@pytest.mark.parametrize(
    ("environment", "is_windows", "expected"),
    [
        ({"XDG_STATE_HOME": "/s", "HOME": "/h"}, False, "/s/buddyrun/history"),
        ({"XDG_STATE_HOME": "relative", "HOME": "/h"}, False, "/h/.local/state/buddyrun/history"),
        ({"HOME": "/h"}, False, "/h/.local/state/buddyrun/history"),
        ({"LOCALAPPDATA": "/l"}, True, "/l/buddyrun/history"),
        ({}, False, None),
    ],
)
def test_the_history_lies_where_the_system_keeps_state(
    environment: dict[str, str], is_windows: bool, expected: str | None
) -> None:
    found = default_history_path(environment, is_windows)
    assert found == (Path(expected) if expected else None)
