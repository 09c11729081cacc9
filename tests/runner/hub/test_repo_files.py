"""The choice among a repository's files is llama.cpp's, and no name leaves its folder."""

import pytest

from quant.gguf_file import MAX_SHARDS
from runner.errors import HubError
from runner.hub.model_name import ModelName
from runner.hub.repo_files import RepoFile, choose, is_safe_path, variants


def listing(*paths: str) -> list[RepoFile]:
    return [RepoFile(path, 1000 + i, f"{i:064x}") for i, path in enumerate(paths)]


def chosen(quant: str, *paths: str, file: str = "") -> list[str]:
    variant = choose(ModelName("u/r", quant, file), listing(*paths))
    return [file.path for file in variant.files]


def test_without_a_quant_it_is_q4_k_m_then_q8_0_then_the_first() -> None:
    assert chosen("", "m-Q2_K.gguf", "m-Q8_0.gguf", "m-q4_k_m.gguf") == ["m-q4_k_m.gguf"]
    assert chosen("", "m-Q2_K.gguf", "m.Q8_0.gguf") == ["m.Q8_0.gguf"]
    assert chosen("", "README.md", "m-Q2_K.gguf", "m-Q3_K_S.gguf") == ["m-Q2_K.gguf"]


@pytest.mark.parametrize(
    ("quant", "path"),
    [
        ("q8_0", "M-Q8_0.gguf"),
        ("Q4_K", "m-Q4_K.gguf"),
        ("F16", "m.f16.gguf"),
        ("UD-Q4_K_XL", "m-UD-Q4_K_XL.gguf"),
        ("BF16", "BF16/m-BF16-00001-of-00002.gguf"),
    ],
)
def test_a_quant_is_found_in_the_path_whatever_its_case(quant: str, path: str) -> None:
    others = ("m-Q4_K_M.gguf", "m-Q8_0_X.gguf", "BF16/m-BF16-00002-of-00002.gguf")
    assert chosen(quant, *others, path)[0] == path


def test_a_dot_in_a_quant_is_no_wildcard() -> None:
    with pytest.raises(HubError, match="no quantization Q.K"):
        chosen("Q.K", "m-Q4K.gguf", "m-Q_K.gguf")


def test_files_that_are_no_language_model_are_passed_over() -> None:
    others = [
        f"{part}m-Q4_K_M.gguf" for part in ("mmproj-", "x-imatrix-", "mtp-", "eagle3-", "dspark-")
    ]
    assert chosen("", *others, "a/m-Q2_K.gguf") == ["a/m-Q2_K.gguf"]
    with pytest.raises(HubError, match="no .gguf file is in it"):
        chosen("", *others)


def test_a_split_model_is_fetched_whole_and_in_order() -> None:
    paths = [f"d/m-Q4_K_M-0000{i}-of-00003.gguf" for i in (2, 3, 1)]
    whole = [f"d/m-Q4_K_M-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    others = ["d/m-Q4_K_M-00001-of-00002.gguf", "m-Q4_K_M-00002-of-00003.gguf"]
    assert chosen("Q4_K_M", *paths, *others) == whole
    assert chosen("", *others, *paths, file=whole[1]) == whole
    with pytest.raises(HubError, match="is one of 3 files, and the repository lacks"):
        chosen("Q4_K_M", *paths[1:])


def test_a_set_of_more_files_than_can_be_opened_is_refused() -> None:
    def whole(n_files: int) -> list[str]:
        return [f"m-{i + 1:05d}-of-{n_files:05d}.gguf" for i in range(n_files)]

    assert chosen("", *whole(MAX_SHARDS)) == whole(MAX_SHARDS)
    with pytest.raises(HubError, match=f"is one of {MAX_SHARDS + 1} files"):
        chosen("", *whole(MAX_SHARDS + 1))
    with pytest.raises(HubError, match="is one of 99999 files"):
        chosen("", "m-00001-of-99999.gguf")


def test_an_unknown_quant_is_answered_with_what_there_is_and_its_size() -> None:
    paths = ("m-Q2_K.gguf", "m-F16-00001-of-00002.gguf", "m-F16-00002-of-00002.gguf", "mmproj.gguf")
    with pytest.raises(HubError) as caught:
        chosen("Q9_K", *paths)
    rows = str(caught.value).splitlines()
    assert rows[0] == "u/r has no quantization Q9_K. It has:"
    assert [row.split() for row in rows[1:]] == [
        ["Q2_K", "1.00", "kB", "m-Q2_K.gguf"],
        ["F16", "2.00", "kB", "m-F16-00001-of-00002.gguf", "and", "1", "more"],
    ]


def test_a_file_by_name_may_be_any_gguf_file_that_is_there() -> None:
    assert chosen("", "m-Q4_K_M.gguf", "Q2/X.gguf", file="q2/x.gguf") == ["Q2/X.gguf"]
    with pytest.raises(HubError, match="no file y.gguf. It has:"):
        chosen("", "m-Q4_K_M.gguf", file="y.gguf")
    with pytest.raises(HubError, match="is no .gguf file"):
        chosen("", "README.md", file="README.md")


def test_variants_are_the_models_whose_files_are_all_there() -> None:
    found = variants(listing("a-Q8_0.gguf", "b-00001-of-00002.gguf", "b-00002-of-00002.gguf",
                             "c-00001-of-00002.gguf", "mmproj-Q8_0.gguf", "README.md"))  # fmt: skip
    assert [(variant.quant, len(variant.files)) for variant in found] == [("Q8_0", 1), ("", 2)]


@pytest.mark.parametrize(
    "path", ["m.gguf", "a/b c/größe.gguf", "模型-Q8_0.gguf", "a..b/.c.gguf", "-x"]
)
def test_ordinary_names_are_safe(path: str) -> None:
    assert is_safe_path(path)


UNSAFE = (
    "", "/etc/x.gguf", "../x.gguf", "a/../../x.gguf", "a/..", "./x.gguf", "a//x.gguf", "a/",
    "..\\x.gguf", "a\\b.gguf", "C:x.gguf", "C:/x.gguf", "a/D:\\x.gguf", "\\\\host\\x.gguf",
    "a\0.gguf", "a\n.gguf", "a\x1b[2J.gguf", "a\x7f.gguf", "a\x9b.gguf", "a\u2028.gguf",
    "a\ud800.gguf", "x" * 201, "a/" * 600 + "x",
)  # fmt: skip


@pytest.mark.parametrize("path", UNSAFE)
def test_a_name_that_could_leave_its_folder_or_write_on_the_terminal_is_not_safe(path: str) -> None:
    assert not is_safe_path(path)
    with pytest.raises(HubError):
        chosen("", path, file=path)
