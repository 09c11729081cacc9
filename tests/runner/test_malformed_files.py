"""Every malformed file ends in one clear error, quickly and in little memory."""

import os
import stat
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quant.errors import BuddyrunError, GGUFError
from quant.gguf_file import GGUFFile
from runner.checks.read_model import read_model
from runner.model_config import ModelConfig
from runner.show import describe, format_text
from tests.gguf_writer import small_mixtral, write_small_mixtral
from tests.malformed_files import BUILDERS

LIMIT_S = 1.0  # of processor time, so that a busy machine fails no test
HEAVY = ("sparse", "many", "sixteen", "thirty")  # measured together in one process of their own
LIMIT_BYTES = 64 << 20
CHECKOUT = Path(__file__).parents[2]


def open_model(path: Path) -> ModelConfig:
    with GGUFFile.open(path) as file:
        config = read_model(file)
        format_text(describe(file, config, template=True))
        return config


@pytest.mark.parametrize("name", BUILDERS)
def test_a_malformed_file_is_refused_at_once_with_one_line(name: str, tmp_path: Path) -> None:
    path = BUILDERS[name](tmp_path / "model.gguf")
    start = time.process_time()
    with pytest.raises(BuddyrunError) as caught:
        open_model(path)
    took_s = time.process_time() - start
    message = str(caught.value)
    assert took_s < LIMIT_S
    assert message.startswith(str(tmp_path)), "the message names the file"
    assert message.isprintable(), "nothing from the file reaches the terminal raw"
    assert len(message) < len(str(tmp_path)) * 2 + 500


@pytest.mark.parametrize("name", [name for name in BUILDERS if not name.startswith(HEAVY)])
def test_refusing_a_malformed_file_takes_little_memory(name: str, tmp_path: Path) -> None:
    path = BUILDERS[name](tmp_path / "model.gguf")
    tracemalloc.start()
    try:
        with pytest.raises(BuddyrunError):
            open_model(path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < LIMIT_BYTES


def test_the_sparse_and_the_crowded_files_stay_within_the_process_limit(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    assert resource is not None
    names = [name for name in BUILDERS if name.startswith(HEAVY)]
    paths = [str(BUILDERS[name](tmp_path / f"{name}.gguf")) for name in names]
    code = (
        "import resource, sys\n"
        "from quant.errors import BuddyrunError\n"
        "from quant.gguf_file import GGUFFile\n"
        "from runner.checks.read_model import read_model\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = used()\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        read_model(GGUFFile.open(path))\n"
        "        sys.exit('accepted ' + path)\n"
        "    except BuddyrunError:\n"
        "        pass\n"
        "print(used() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < LIMIT_BYTES


def test_every_truncation_of_a_good_file_is_refused(tmp_path: Path) -> None:
    good = small_mixtral()
    whole, n_header = good.packed(), len(good.header())
    path = tmp_path / "cut.gguf"
    lengths = [*range(0, 400), *range(400, n_header, 37), *range(n_header, len(whole), 1009)]
    for n in [*lengths, len(whole) - 1]:
        path.write_bytes(whole[:n])
        with pytest.raises(GGUFError):
            open_model(path)


FUZZ = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
GOOD = small_mixtral().packed()
N_HEADER = len(small_mixtral().header())
PLACES = st.integers(0, N_HEADER + 64) | st.integers(0, 64) | st.integers(N_HEADER - 1500, N_HEADER)


@FUZZ
@given(st.lists(st.tuples(PLACES, st.integers(0, 255)), min_size=1, max_size=8))
def test_flipped_bytes_end_in_a_model_or_in_one_clear_error(
    tmp_path: Path, flips: list[tuple[int, int]]
) -> None:
    data = bytearray(GOOD)
    for at, value in flips:
        data[at] = value
    refuse_or_accept(tmp_path / "flipped.gguf", bytes(data))


@FUZZ
@given(PLACES, st.binary(max_size=24), st.integers(0, 24))
def test_inserted_and_removed_bytes_end_in_a_model_or_in_one_clear_error(
    tmp_path: Path, at: int, inserted: bytes, n_removed: int
) -> None:
    refuse_or_accept(tmp_path / "cut.gguf", GOOD[:at] + inserted + GOOD[at + n_removed :])


@FUZZ
@given(st.binary(max_size=400))
def test_random_bytes_after_the_magic_are_refused(tmp_path: Path, noise: bytes) -> None:
    path = tmp_path / "noise.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + noise)
    with pytest.raises(BuddyrunError):
        open_model(path)


def refuse_or_accept(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    start = time.process_time()
    try:
        open_model(path)
    except BuddyrunError as error:
        assert str(path) in str(error)
    assert time.process_time() - start < LIMIT_S


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="cannot be opened: no such file"):
        open_model(tmp_path / "nothing.gguf")


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="found a directory; expected a GGUF file"):
        open_model(tmp_path)


def test_a_path_with_a_nul_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="cannot be opened"):
        open_model(tmp_path / "a\0b")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(GGUFError, match="found a pipe; expected a GGUF file"):
        open_model(tmp_path / "pipe.gguf")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_a_device_is_refused() -> None:
    assert stat.S_ISCHR(os.stat("/dev/zero").st_mode)
    with pytest.raises(GGUFError, match="found a device or socket"):
        open_model(Path("/dev/zero"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    path = write_small_mixtral(tmp_path / "secret.gguf")
    path.chmod(0)
    with pytest.raises(GGUFError, match="permission denied"):
        open_model(path)


def test_the_table_has_the_files_it_should() -> None:
    assert len(BUILDERS) >= 75
