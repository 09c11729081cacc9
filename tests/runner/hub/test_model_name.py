"""What a person writes is read as the model that is meant."""

import pytest

from runner.errors import HubError
from runner.hub.model_name import ModelName, looks_like_name, parse, with_flags


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("user/repo", ModelName("user/repo")),
        ("user/repo:Q4_K_M", ModelName("user/repo", "Q4_K_M")),
        ("user/repo:UD-Q4_K_XL", ModelName("user/repo", "UD-Q4_K_XL")),
        ("Bloke/Mix-8x7B-v0.1-GGUF:q5_0", ModelName("Bloke/Mix-8x7B-v0.1-GGUF", "q5_0")),
        ("hf.co/user/repo:Q8_0", ModelName("user/repo", "Q8_0")),
        ("huggingface.co/user/repo", ModelName("user/repo")),
        ("https://huggingface.co/user/repo", ModelName("user/repo")),
        ("https://huggingface.co/user/repo/", ModelName("user/repo")),
        ("hf://user/repo", ModelName("user/repo")),
        ("hf://models/user/repo", ModelName("user/repo")),
        ("hf://user/repo@v2:Q8_0", ModelName("user/repo", "Q8_0", revision="v2")),
        ("user/repo@dev", ModelName("user/repo", revision="dev")),
        ("hf://user/repo/a/b.gguf", ModelName("user/repo", file="a/b.gguf")),
        (
            "https://huggingface.co/user/repo/blob/main/x.gguf?download=true",
            ModelName("user/repo", file="x.gguf"),
        ),
        (
            "https://huggingface.co/user/repo/resolve/v2/a/x.gguf",
            ModelName("user/repo", file="a/x.gguf", revision="v2"),
        ),
        ("https://huggingface.co/user/repo/tree/main", ModelName("user/repo")),
    ],
)  # fmt: skip
def test_all_ways_to_write_a_name(text: str, name: ModelName) -> None:
    assert looks_like_name(text)
    assert parse(text) == name
    assert parse(str(name)) == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "x.gguf",
        "a/b/c",
        "./a/b",
        "../a",
        "/a/b",
        "~/a",
        "a/b.gguf",
        "a/b c",
        "x:y",
        "a//b",
    ],
)
def test_what_is_a_path_is_no_name(text: str) -> None:
    assert not looks_like_name(text)


@pytest.mark.parametrize(
    "text",
    ["hf.co/x", "user/..", "../repo", "us--er/repo", "user/repo.git", "-user/repo",
     "user/" + "r" * 96, "user/repo:", "user/repo:Q4 K", "hf://user/repo@", "user/répo",
     "user/repo:../x", "https://example.com/user/repo", "user/repo/file.gguf"],
)  # fmt: skip
def test_an_impossible_name_is_told_what_one_looks_like(text: str) -> None:
    with pytest.raises(HubError, match="expected user/repo or user/repo:QUANT"):
        parse(text)


@pytest.mark.parametrize(
    "name",
    [
        ModelName("user/repo", file="mit leer zeichen-Q8_0.gguf"),
        ModelName("user/repo", file="a/b: c?d%20e@f\u00a0g.gguf"),
        ModelName("user/repo", file="größe/模型-Q8_0.gguf", revision="v 2?"),
        ModelName("user/repo", file="blob/main/x.gguf"),
        ModelName("user/repo", revision="refs/pr/1"),
        ModelName("user/repo", "Q8_0", revision="feature/a:b@c%2F"),
    ],
)
def test_every_name_is_read_as_it_is_written(name: ModelName) -> None:
    assert looks_like_name(str(name))
    assert parse(str(name)) == name


def test_a_browsers_address_has_percents() -> None:
    text = "https://huggingface.co/user/repo/blob/refs%2Fpr%2F1/a%20b.gguf"
    assert parse(text) == ModelName("user/repo", file="a b.gguf", revision="refs/pr/1")


def test_flags_add_to_a_name_and_may_not_contradict_it() -> None:
    name = ModelName("user/repo")
    assert with_flags(name, "x.gguf", "v2") == ModelName("user/repo", file="x.gguf", revision="v2")
    assert with_flags(name, None, None) == name
    with pytest.raises(HubError, match="two models"):
        with_flags(ModelName("user/repo", "Q8_0"), "x.gguf", None)
    with pytest.raises(HubError, match="contradicts"):
        with_flags(ModelName("user/repo", revision="v1"), None, "v2")
