"""A MODEL that is no file gets the remedy that fits."""

from pathlib import Path

import pytest

from runner.errors import ModelError
from runner.terminal.model_path import demo_model, find_file, find_model


def message(text: str) -> str:
    with pytest.raises(ModelError) as caught:
        find_model(text, ["bench", "demo", "run", "show"])
    return str(caught.value)


def test_a_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "any name").touch()
    assert find_model(str(tmp_path / "any name"), []) == tmp_path / "any name"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("Q4_K_M", "name of a quantization"),
        ("mixtral:q4_0", "name of a quantization"),
        ("IQ4_XS", "name of a quantization"),
        ("shwo", "the command 'show'"),
        ("models/x.gguf", "MODEL is the path of a .gguf file, or user/repo:QUANT"),
        ("serve", "has no server"),
        ("", "MODEL is the path"),
    ],
)
def test_what_is_no_file_gets_a_hint(
    text: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if text == "":
        assert "is a directory" in message(text)  # the empty path is the current folder
    else:
        assert hint in message(text)
    assert "pull" not in message(text)


@pytest.mark.parametrize("text", ["mistralai/Mixtral-8x7B", "user/repo:Q4_K_M", "hf.co/user/repo"])
def test_the_name_of_a_model_on_a_hub_is_told_how_to_get_it(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = text.removeprefix("hf.co/")
    assert message(text) == f"{name} is not on this machine: `buddyrun pull {name}` gets it."
    assert find_file(text, []) is None
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "repo.gguf").touch()
    assert "Did you mean user/repo.gguf?" in message("user/repo")


def test_demo_is_the_demo_model_unless_there_is_such_a_file_or_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_model("demo", []) == demo_model()
    assert "The command comes first: buddyrun demo" in message("demo")
    (tmp_path / "demo").touch()
    assert find_model("demo", []) == Path("demo")


def test_a_name_as_ollama_has_them_is_told_how_models_are_called_here() -> None:
    assert "buddyrun pull user/repo:Q4_K_M" in message("mixtral:8x7b")


def test_a_mistyped_name_gets_the_right_one(tmp_path: Path) -> None:
    (tmp_path / "mixtral-q4_k_m.gguf").touch()
    assert f"Did you mean {tmp_path}/mixtral-q4_k_m.gguf?" in message(
        f"{tmp_path}/mixtral-q4km.gguf"
    )


def test_a_folder_names_the_models_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    assert f"In it: {tmp_path}/a.gguf" in message(str(tmp_path))


@pytest.mark.parametrize("text", ["a\0b", "x" * 5000])
def test_an_impossible_name_is_one_message(text: str) -> None:
    assert message(text)
