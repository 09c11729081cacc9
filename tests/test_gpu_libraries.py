"""Libraries of a build for the GPU made loadable, and what the suite does without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quant.ggml_library import library_folder
from tests.conftest import NO_GPU, find_gpu
from tests.gpu_libraries import link_libraries
from tests.paths import ROOT

NAMES = ("ggml-base", "ggml-cpu", "ggml")
BACKEND_TESTS = "tests/quant/test_gpu_backend.py"
LONG = b"\x7fELF" + bytes(1000)


def stored_without_links(folder: Path) -> Path:
    """As a storage without links gives it back: text files in the place of links."""
    folder.mkdir()
    for name in NAMES:
        (folder / f"lib{name}.so.0").write_bytes(LONG + name.encode())
        (folder / f"lib{name}.so").write_text(f"lib{name}.so.0")
    (folder / "readme.txt").write_text("no library")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


WANTED = {
    f"lib{name}.so{version}": LONG + name.encode() for name in NAMES for version in ("", ".0")
}


def test_text_files_in_the_place_of_links_become_links(tmp_path: Path) -> None:
    link_libraries(stored_without_links(tmp_path / "stored"), tmp_path / "deep" / "target")
    assert contents(tmp_path / "deep" / "target") == WANTED


def test_a_folder_with_right_links_is_linked_as_it_is(tmp_path: Path) -> None:
    folder = stored_without_links(tmp_path / "built")
    for name in NAMES:
        (folder / f"lib{name}.so").unlink()
        (folder / f"lib{name}.so").symlink_to(f"lib{name}.so.0")
    link_libraries(folder, tmp_path / "target")
    assert contents(tmp_path / "target") == WANTED


def test_a_relative_folder_is_linked_by_its_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored_without_links(tmp_path / "stored")
    monkeypatch.chdir(tmp_path)
    link_libraries(Path("stored"), Path("target"))
    monkeypatch.chdir(ROOT)
    assert contents(tmp_path / "target") == WANTED


def test_a_second_time_leaves_no_library_of_the_first(tmp_path: Path) -> None:
    first = stored_without_links(tmp_path / "first")
    (first / "libggml-cuda.so").write_bytes(LONG)
    link_libraries(first, tmp_path / "target")
    assert "libggml-cuda.so" in contents(tmp_path / "target")
    (first / "libggml-cuda.so").unlink()
    (tmp_path / "target" / "notes").write_text("no link, so not ours")
    link_libraries(first, tmp_path / "target")
    assert contents(tmp_path / "target") == WANTED | {"notes": b"no link, so not ours"}


def test_the_libraries_of_this_machine_load_from_a_folder_of_links(tmp_path: Path) -> None:
    link_libraries(library_folder(), tmp_path)
    code = "from quant.devices import devices; print([d.kind for d in devices()])"
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True, cwd=ROOT)
    assert "'cpu'" in done.stdout


def test_a_folder_without_libraries_is_refused_in_words(tmp_path: Path) -> None:
    stored = stored_without_links(tmp_path / "stored")
    for folder, said in (
        (tmp_path / "none", "No such file or directory"),
        (tmp_path, f"gpu_libraries: no ggml-base library in {tmp_path}"),
        (stored, "libggml.so is no library and names none"),
    ):
        (stored / "libggml.so").write_text("version https://example.org/large-files")
        arguments = (str(folder), str(tmp_path / "target"))
        command = [sys.executable, "-m", "tests.gpu_libraries", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1
        assert not (tmp_path / "target").exists()


@pytest.mark.slow
@pytest.mark.parametrize("flag", [(), ("--require-gpu",)], ids=["usually", "where required"])
def test_without_a_gpu_its_tests_are_skipped_or_an_error(flag: tuple[str, ...]) -> None:
    if find_gpu():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", BACKEND_TESTS, *flag]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if flag:
        assert done.returncode == pytest.ExitCode.USAGE_ERROR
        assert f"no GPU device with the ggml libraries in {library_folder()}" in done.stderr
    else:
        assert done.returncode == 0 and NO_GPU in done.stdout
        assert "no GPU device: gpu tests are skipped" in done.stdout
        assert "passed" not in done.stdout
