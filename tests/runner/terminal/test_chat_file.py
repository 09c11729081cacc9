"""Saved chats: what is kept, what is refused, and that an old file survives a full disk."""

import json
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from runner.config import SamplingConfig
from runner.terminal.chat_file import FORMAT, ChatFileError, load_chat, save_chat
from runner.terminal.conversation import ChatSettings
from tests.runner.chat_fakes import ScriptedChat

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo\x1b\ud800"}]


def test_a_saved_chat_goes_on_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    first = ScriptedChat(["/set temp 0.5", "/system Rhyme.", "hi", f"/save {path}"], [["yo"]])
    assert "Saved 2 messages" in first.run()
    second = ScriptedChat(["/set nothink", f"/load {path}", "more"], [["ok"]])
    assert "Loaded 2 messages" in second.run()
    assert second.contents == ["hi", "yo", "more", "ok"]
    assert second.conversation.settings.sampling == SamplingConfig(temperature=0.5)
    assert second.conversation.settings.system_prompt == "Rhyme."
    assert not second.conversation.settings.show_thinking
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text())["version"] == 1


def test_any_text_survives_saving(tmp_path: Path) -> None:
    save_chat(tmp_path / "c", MESSAGES, ChatSettings(), "m")
    messages, _, model = load_chat(tmp_path / "c")
    assert messages[1]["content"] == "yo\x1b\ufffd"
    assert model == "m"


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", "3", "\xff", '{"format": "x"}'])
def test_a_file_that_is_no_chat_is_refused_and_nothing_changes(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode("latin-1"))
    chat = ScriptedChat(["hi", f"/load {path}"], [["yo"]])
    assert "is not a saved chat" in chat.run()
    assert chat.contents == ["hi", "yo"]
    assert chat.conversation.settings == ChatSettings()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"version": 2}, "version 2"),
        ({"version": None}, "version None"),
        ({"messages": None}, "'messages' must be a list"),
        ({"messages": [1]}, "message 0"),
        (
            {"messages": [{"role": "system", "content": "x"}]},
            "message 0 must be text of role 'user'",
        ),
        ({"messages": [{"role": "user", "content": 1}]}, "message 0"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no answer"),
        ({"settings": 3}, "'settings'"),
        ({"settings": {"temperature": "hot"}}, "temp must not be 'hot'"),
        ({"settings": {"temperature": True}}, "temp must not be True"),
        ({"settings": {"top_p": 7}}, "top-p must be"),
        ({"settings": {"top_p": float("nan")}}, "top-p must be"),
        ({"settings": {"top_k": 1.5}}, "top-k must be"),
        ({"settings": {"system_prompt": 1}}, "'system_prompt'"),
    ],
    ids=str,
)
def test_a_damaged_chat_is_refused_with_what_is_wrong(
    changes: dict[str, object], expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.json"
    document = {"format": FORMAT, "version": 1, "messages": [], "settings": {}, **changes}
    path.write_text(json.dumps(document))
    with pytest.raises(ChatFileError) as caught:
        load_chat(path)
    assert expected in str(caught.value)


def test_an_unknown_setting_in_a_chat_file_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "c"
    save_chat(path, [], ChatSettings(), "m")
    document = json.loads(path.read_text())
    document["settings"]["of_a_later_version"] = 1
    path.write_text(json.dumps(document))
    assert load_chat(path)[1] == ChatSettings()


def test_save_does_not_replace_a_file_that_is_no_chat(tmp_path: Path) -> None:
    path = tmp_path / "precious.txt"
    path.write_text("precious")
    assert "is not a saved chat" in ScriptedChat([f"/save {path}"]).run()
    assert path.read_text() == "precious"


def test_save_to_a_missing_folder_or_a_folder_is_a_plain_message(tmp_path: Path) -> None:
    assert "No such file or directory" in ScriptedChat([f"/save {tmp_path / 'no' / 'c'}"]).run()
    assert "is not a saved chat" in ScriptedChat([f"/save {tmp_path}"]).run()


def test_a_link_is_saved_through_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_chat(tmp_path / "link", [], ChatSettings(), "m")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").is_file()


def test_a_full_disk_is_told_and_the_old_chat_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c"
    save_chat(path, MESSAGES, ChatSettings(), "old")
    before = path.read_bytes()

    def no_space(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(ChatFileError, match="No space left on device"):
        save_chat(path, [], ChatSettings(), "new")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_the_system_refuses_leaves_the_old_chat(tmp_path: Path) -> None:
    path = tmp_path / "c"
    save_chat(path, MESSAGES, ChatSettings(), "old")
    before = path.read_bytes()
    script = (
        "import sys; from pathlib import Path; from runner.terminal.chat_file import *\n"
        "message = [{'role': 'user', 'content': 'x' * 100_000}]\n"
        "try: save_chat(Path(sys.argv[1]), message, ChatSettings(), 'new')\n"
        "except ChatFileError as error: sys.exit(str(error))\n"
    )

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    run_it = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(
        run_it, capture_output=True, text=True, preexec_fn=limit_file_size, check=False
    )
    assert "cannot save to" in done.stderr and "Traceback" not in done.stderr
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
