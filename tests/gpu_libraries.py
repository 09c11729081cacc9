"""Makes a stored build of ggml and llama.cpp loadable: python -m tests.gpu_libraries FOLDER TARGET

TARGET becomes a folder of links to the libraries in FOLDER. Where FOLDER came through a storage
without links, a small text file stands for each of them: `libggml.so` with the name `libggml.so.0`
in it. Knows nothing of what is in a library.
"""

import sys
from pathlib import Path

_LONGEST_NAME_BYTES = 255


def link_libraries(folder: Path, target: Path) -> None:
    """Fill `target` with a link for every library of `folder`, and with no other.

    Raises FileNotFoundError when `folder` has no libraries or one of them links to nothing.
    """
    libraries = sorted(p for p in folder.resolve().iterdir() if _is_library(p))
    if not any("ggml-base" in path.name for path in libraries):
        raise FileNotFoundError(f"no ggml-base library in {folder}")
    files = [_file_behind(path) for path in libraries]
    target.mkdir(parents=True, exist_ok=True)
    for old in target.iterdir():
        if old.is_symlink():
            old.unlink()
    for path, file in zip(libraries, files, strict=True):
        (target / path.name).symlink_to(file)


def _is_library(path: Path) -> bool:
    return ".so" in path.suffixes or path.suffix == ".dylib"


def _file_behind(path: Path) -> Path:
    """The library itself, or the one beside it that a text file in its place names."""
    if path.stat().st_size > _LONGEST_NAME_BYTES:
        return path
    named = path.parent / path.read_text(errors="replace").strip()
    if not named.is_file():
        raise FileNotFoundError(f"{path} is no library and names none: no file {named}")
    return named


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        link_libraries(Path(sys.argv[1]), Path(sys.argv[2]))
    except OSError as error:
        sys.exit(f"gpu_libraries: {error}")
