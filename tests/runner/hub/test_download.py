"""Files come whole and right, or nothing of them can be seen; what came is kept."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.runner.hub.conftest import SECRET
from tests.runner.hub.fork_server import Done, ForkServer
from tests.runner.hub.local_hub import COMMIT, Fault, LocalHub

SIZE = 3_000_000
DATA = random.Random(7).randbytes(SIZE)
_numbers = itertools.count()


def new_repo(hub: LocalHub, data: bytes = DATA, name: str = "m-Q8_0.gguf") -> str:
    """A repository that nobody has fetched from yet."""
    repo = f"test/r{next(_numbers)}"
    hub.add(repo, {name: data})
    return repo


def folder_of(home: Path, repo: str) -> Path:
    return home / "hub" / f"models--{repo.replace('/', '--')}"


def visible_files(home: Path, repo: str) -> list[Path]:
    """What other programs would take for whole files."""
    folder = folder_of(home, repo)
    found = [*folder.glob("snapshots/*/**/*"), *folder.glob("blobs/*")]
    return [p for p in found if not p.is_dir() and not p.name.endswith(".incomplete")]


def partial_bytes(home: Path, repo: str) -> int:
    found = list(folder_of(home, repo).glob("blobs/*.incomplete"))
    assert len(found) <= 1
    return found[0].stat().st_size if found else 0


def check_visible(home: Path, repo: str, data: bytes = DATA) -> bool:
    """Whether the file can be seen; if so it is right."""
    files = visible_files(home, repo)
    assert all(path.read_bytes() == data for path in files)
    return any("snapshots" in path.parts for path in files)


def test_a_file_comes_and_a_second_run_fetches_nothing(
    hub: LocalHub, home: Path, client: ForkServer
) -> None:
    repo = new_repo(hub)
    done = client.fetch(repo)
    path = folder_of(home, repo) / "snapshots" / COMMIT / "m-Q8_0.gguf"
    assert done == Done(0, f"{path}\n", "")
    assert check_visible(home, repo) and not partial_bytes(home, repo)
    hub.requests.clear()
    assert client.fetch(repo) == done
    assert not hub.to("cdn")


def test_a_broken_connection_is_taken_up_where_it_broke(
    hub: LocalHub, home: Path, client: ForkServer
) -> None:
    repo = new_repo(hub)
    hub.faults.extend([Fault("short", at=1_000_000), Fault("short", at=1_500_000)])
    done = client.fetch(repo)
    assert done.returncode == 0 and check_visible(home, repo)
    assert [request.range for request in hub.to("cdn")] == [
        f"bytes={first}-{SIZE - 1}" for first in (0, 1_000_000, 2_500_000)
    ]
    assert "trying again in 0 s" in done.stderr


def test_what_one_run_fetched_the_next_goes_on_with(
    hub: LocalHub, home: Path, client: ForkServer
) -> None:
    repo = new_repo(hub)
    hub.faults.append(Fault("short", at=2_000_000))
    hub.faults.extend([Fault("hang up")] * 2)
    done = client.fetch(repo)
    assert done.returncode == 1 and not visible_files(home, repo)
    assert "What came is kept: the same command goes on with it" in done.stderr
    assert partial_bytes(home, repo) == 2_000_000
    hub.requests.clear()
    assert client.fetch(repo).returncode == 0 and check_visible(home, repo)
    assert [request.range for request in hub.to("cdn")] == [f"bytes=2000000-{SIZE - 1}"]


def test_a_server_that_ignores_ranges_does_no_harm(
    hub: LocalHub, home: Path, client: ForkServer
) -> None:
    repo = new_repo(hub)
    hub.faults.extend([Fault("short", at=1_234_567), Fault("no range")])
    assert client.fetch(repo).returncode == 0 and check_visible(home, repo)
    assert hub.n_sent >= SIZE + 1_234_567


@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_large_file_is_asked_for_in_segments(
    is_ignored: bool, hub: LocalHub, home: Path, client: ForkServer
) -> None:
    repo = new_repo(hub)
    if is_ignored:
        hub.always.append(Fault("no range"))
    client.start({"fetch": repo, "local_dir": "", "segment_bytes": 1_250_000})
    assert client.wait().returncode == 0 and check_visible(home, repo)
    firsts = [request.range for request in hub.to("cdn")]
    ends = ["0-1249999", "1250000-2499999", "2500000-2999999"]
    assert firsts == [f"bytes={part}" for part in (ends[:1] if is_ignored else ends)]


def test_a_server_that_sends_less_than_was_asked_for_is_asked_again_at_once(
    hub: LocalHub, home: Path, client: ForkServer
) -> None:
    repo = new_repo(hub)
    hub.faults.extend([Fault("less", at=700_000)] * 3)
    done = client.fetch(repo)
    assert done.returncode == 0 and done.stderr == "" and check_visible(home, repo)
    assert len(hub.to("cdn")) == 4


def test_a_server_that_trickles_is_waited_for_and_given_up(
    hub: LocalHub, home: Path, client: ForkServer
) -> None:
    repo = new_repo(hub)
    hub.always.append(Fault("less", at=1))
    done = client.fetch(repo)
    assert done.returncode == 1 and not visible_files(home, repo)
    assert done.stderr.count("the server sent only 1 B of m-Q8_0.gguf") == 3
    assert partial_bytes(home, repo) == 3
    assert len(hub.to("cdn")) == 3


def test_an_old_part_that_is_damaged_is_found_out_and_fetched_again(
    hub: LocalHub, home: Path, client: ForkServer
) -> None:
    repo = new_repo(hub)
    blobs = folder_of(home, repo) / "blobs"
    blobs.mkdir(parents=True)
    partial = blobs / f"{hub.repos[repo].files['m-Q8_0.gguf'].sha256}.incomplete"
    partial.write_bytes(bytes(1_000_000))  # as after a power cut
    done = client.fetch(repo)
    assert done.returncode == 0 and check_visible(home, repo)
    assert "what an earlier run left was damaged; fetching it again" in done.stderr


@pytest.mark.parametrize("n_extra", [0, 1, 5_000_000])
def test_an_old_part_that_is_whole_or_too_long_is_checked(
    n_extra: int, hub: LocalHub, home: Path, client: ForkServer
) -> None:
    repo = new_repo(hub)
    blobs = folder_of(home, repo) / "blobs"
    blobs.mkdir(parents=True)
    partial = blobs / f"{hub.repos[repo].files['m-Q8_0.gguf'].sha256}.incomplete"
    partial.write_bytes(DATA + bytes(n_extra))
    assert client.fetch(repo).returncode == 0 and check_visible(home, repo)
    assert not hub.to("cdn")


def test_a_file_in_git_itself_is_checked_by_its_git_hash(
    hub: LocalHub, home: Path, client: ForkServer
) -> None:
    repo = new_repo(hub, DATA[:5000])
    hub.repos[repo].has_lfs = False
    assert client.fetch(repo).returncode == 0 and check_visible(home, repo, DATA[:5000])
    blob = hub.repos[repo].files["m-Q8_0.gguf"].git
    assert (folder_of(home, repo) / "blobs" / blob).exists() and not hub.to("cdn")


def test_a_blob_of_a_wrong_size_is_replaced(hub: LocalHub, home: Path, client: ForkServer) -> None:
    repo = new_repo(hub)
    blobs = folder_of(home, repo) / "blobs"
    blobs.mkdir(parents=True)
    (blobs / hub.repos[repo].files["m-Q8_0.gguf"].sha256).write_bytes(b"short")
    assert client.fetch(repo).returncode == 0 and check_visible(home, repo)


def test_a_file_that_changes_on_the_way_is_thrown_away(
    hub: LocalHub, home: Path, client: ForkServer
) -> None:
    repo = new_repo(hub)
    hub.faults.append(Fault("flip", at=2_999_999))
    done = client.fetch(repo)
    assert done.returncode == 1
    assert "has not the hash that the hub lists" in done.stderr and "thrown away" in done.stderr
    assert not visible_files(home, repo) and not partial_bytes(home, repo)


@pytest.mark.parametrize("kind", ["etag", "size"])
def test_another_file_than_was_listed_is_not_fetched(
    kind: str, hub: LocalHub, home: Path, client: ForkServer
) -> None:
    repo = new_repo(hub)
    hub.always.append(Fault(kind, where="head"))
    done = client.fetch(repo)
    assert done.returncode == 1 and "not fetched" in done.stderr
    assert not hub.to("cdn") and not visible_files(home, repo)


def test_an_answer_with_another_range_is_refused(
    hub: LocalHub, home: Path, client: ForkServer
) -> None:
    repo = new_repo(hub)
    hub.faults.append(Fault("other range"))
    done = client.fetch(repo)
    assert done.returncode == 1 and "asked for the bytes from 0 on, got status 206" in done.stderr
    assert not visible_files(home, repo)


def test_an_answer_with_a_range_of_an_unknown_total_is_taken(
    hub: LocalHub, home: Path, client: ForkServer
) -> None:
    repo = new_repo(hub)
    hub.faults.append(Fault("no total"))
    assert client.fetch(repo).returncode == 0 and check_visible(home, repo)
    assert len(hub.to("cdn")) == 1


BAD_LOCATIONS = ("http://127.0.0.1:99999/x", "http://[bad/x")


@pytest.mark.parametrize(
    "fault",
    [
        Fault("bad date", where="api"),
        *[Fault("elsewhere", where="head", location=bad) for bad in BAD_LOCATIONS],
        *[
            Fault("redirect", where=w, location=bad)
            for w in ("api", "cdn")
            for bad in BAD_LOCATIONS
        ],
        Fault("status", status=503, headers=(("Retry-After", "\u00b2"),)),
    ],
)
def test_what_a_server_cannot_have_meant_is_one_sentence(
    fault: Fault, hub: LocalHub, client: ForkServer
) -> None:
    repo = new_repo(hub)
    hub.always.append(fault)
    done = client.fetch(repo)
    assert done.returncode == 1 and "Error: " not in done.stderr, done.stderr


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_passing_problem_is_waited_for(
    status: int, hub: LocalHub, home: Path, client: ForkServer
) -> None:
    repo = new_repo(hub)
    hub.faults.append(Fault("status", status=status))
    assert client.fetch(repo).returncode == 0 and check_visible(home, repo)


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (401, "check the name; if it is private, make a token at"),
        (403, "refuses test/r"),
        (404, "check the name"),
        (410, "answers 410 for test/r"),
        (429, "allows no more requests for now (429)"),
        (503, "has a problem of its own (503)"),
    ],
)
@pytest.mark.parametrize("where", ["api", "head", "cdn"])
def test_a_refusal_is_one_clear_message(
    where: str, status: int, text: str, hub: LocalHub, home: Path, client: ForkServer
) -> None:
    repo = new_repo(hub)
    hub.always.append(Fault("status", where=where, status=status))
    done = client.fetch(repo)
    assert done.returncode == 1 and text in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr and not visible_files(home, repo)


def test_a_server_that_asks_for_too_long_a_wait_is_not_waited_for(
    hub: LocalHub, client: ForkServer
) -> None:
    repo = new_repo(hub)
    wait = (("Retry-After", "3600"),)
    hub.always.append(Fault("status", status=429, headers=wait))
    began_s = time.monotonic()
    done = client.fetch(repo)
    assert done.returncode == 1 and "try again in 3600 s" in done.stderr
    assert time.monotonic() - began_s < 10


@pytest.mark.parametrize("where", ["api", "head"])
def test_something_that_is_no_hub_is_told(where: str, hub: LocalHub, client: ForkServer) -> None:
    repo = new_repo(hub)
    hub.always.append(Fault("nonsense", where=where))
    done = client.fetch(repo)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    expected = {"api": "answers, but not as a hub does", "head": "so it is no hub: not fetched"}
    assert expected[where] in done.stderr


def test_a_server_that_falls_silent_is_asked_again(hub: LocalHub, tmp_path: Path) -> None:
    repo = new_repo(hub)
    hub.faults.append(Fault("stall", at=1_000_000))
    environment = hub.environment(tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="1")
    with ForkServer(tmp_path, environment) as client:
        done = client.fetch(repo)
    assert done.returncode == 0 and check_visible(tmp_path, repo)
    assert "no answer for 1 s" in done.stderr
    assert hub.to("cdn")[1].range == f"bytes=1000000-{SIZE - 1}"


def test_a_hub_that_cannot_be_reached_is_told(hub: LocalHub, tmp_path: Path) -> None:
    nowhere = hub.environment(tmp_path) | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    with ForkServer(tmp_path, nowhere) as client:
        done = client.buddyrun("pull", "test/any")
    assert done.returncode == 1
    assert "127.0.0.1:9 cannot be reached" in done.stderr and "--offline" in done.stderr


def test_two_runs_at_once_fetch_a_file_once(hub: LocalHub, home: Path, client: ForkServer) -> None:
    repo = new_repo(hub)
    hub.bytes_per_s = 3e6
    with ForkServer(home, hub.environment(home)) as other:
        other.start({"fetch": repo, "local_dir": ""})
        second = client.fetch(repo)
        first = other.wait()
    assert first.returncode == second.returncode == 0 and first.stdout == second.stdout
    assert check_visible(home, repo)
    assert len(hub.to("cdn")) == 1
    assert "another program fetches m-Q8_0.gguf; waiting" in first.stderr + second.stderr


def test_when_the_first_of_two_runs_is_killed_the_second_goes_on(
    hub: LocalHub, home: Path, client: ForkServer
) -> None:
    repo = new_repo(hub)
    hub.bytes_per_s = 3e6
    with ForkServer(home, hub.environment(home)) as other:
        pid = other.start({"fetch": repo, "local_dir": ""})
        wait_for(lambda: partial_bytes(home, repo) > 500_000)
        client.start({"fetch": repo, "local_dir": ""})
        time.sleep(0.2)
        os.kill(pid, signal.SIGKILL)
        assert other.wait().returncode == -signal.SIGKILL
        assert client.wait().returncode == 0
    assert check_visible(home, repo)
    assert len(hub.to("cdn")) == 2 and hub.to("cdn")[1].range != hub.to("cdn")[0].range


def wait_for(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.002)


LEAVING = (
    "../../evil.gguf", "/tmp/evil.gguf", "a\\..\\evil.gguf", "a/../../../evil.gguf", "evil\0.gguf",
    "evil\x1b[2J.gguf", "C:\\evil.gguf", "~/evil.gguf",
)  # fmt: skip


@pytest.mark.parametrize("name", LEAVING, ids=map(str, range(len(LEAVING))))
@pytest.mark.parametrize("is_local", [False, True])
def test_a_file_name_from_the_server_does_not_leave_the_folder(
    name: str, is_local: bool, hub: LocalHub, home: Path, client: ForkServer, tmp_path: Path
) -> None:
    repo = new_repo(hub, name=name)
    folder = tmp_path / "deep" / "er"
    before = set(home.rglob("*evil*"))
    done = client.fetch(repo, str(folder) if is_local else "")
    inside = folder if is_local else folder_of(home, repo)
    found = {*home.rglob("*evil*"), *tmp_path.rglob("*evil*")} - before
    assert all(path.is_relative_to(inside) for path in found)
    assert not Path("/tmp/evil.gguf").exists()
    assert done.returncode == (0 if name.startswith("~") else 1)
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize(
    "name", ["mit leer zeichen-Q8_0.gguf", "größe/模型 Q8_0.gguf", "-Q8_0.gguf"]
)
def test_names_with_spaces_and_other_letters_are_kept(
    name: str, hub: LocalHub, home: Path, client: ForkServer, tmp_path: Path
) -> None:
    repo = new_repo(hub, name=name)
    done = client.fetch(repo)
    assert done.stdout == f"{folder_of(home, repo) / 'snapshots' / COMMIT / name}\n"
    assert check_visible(home, repo)
    assert client.fetch(repo, str(tmp_path / "ein ordner")).returncode == 0
    assert (tmp_path / "ein ordner" / name).read_bytes() == DATA


def test_a_folder_gets_the_file_itself_and_is_taken_up_too(
    hub: LocalHub, client: ForkServer, tmp_path: Path
) -> None:
    repo = new_repo(hub)
    hub.faults.append(Fault("short", at=1_000_000))
    hub.faults.extend([Fault("hang up")] * 2)
    assert client.fetch(repo, str(tmp_path)).returncode == 1
    assert [path.name for path in tmp_path.iterdir()] == [".cache"]
    hub.requests.clear()
    assert client.fetch(repo, str(tmp_path)).stdout == f"{tmp_path / 'm-Q8_0.gguf'}\n"
    assert (tmp_path / "m-Q8_0.gguf").read_bytes() == DATA
    assert not (tmp_path / "m-Q8_0.gguf").is_symlink()
    assert [request.range for request in hub.to("cdn")] == [f"bytes=1000000-{SIZE - 1}"]


def test_a_file_of_the_users_is_not_overwritten(
    hub: LocalHub, client: ForkServer, tmp_path: Path
) -> None:
    (tmp_path / "m-Q8_0.gguf").write_text("mine")
    done = client.fetch(new_repo(hub), str(tmp_path))
    assert done.returncode == 1 and "move it away" in done.stderr
    assert (tmp_path / "m-Q8_0.gguf").read_text() == "mine"


def test_another_file_of_the_same_size_is_not_taken_for_the_hubs(
    hub: LocalHub, client: ForkServer, tmp_path: Path
) -> None:
    other = bytes(SIZE)
    (tmp_path / "m-Q8_0.gguf").write_bytes(other)
    repo = new_repo(hub)
    done = client.fetch(repo, str(tmp_path))
    assert done.returncode == 1 and "other bytes" in done.stderr and "move it away" in done.stderr
    assert (tmp_path / "m-Q8_0.gguf").read_bytes() == other
    (tmp_path / "m-Q8_0.gguf").write_bytes(DATA)
    assert client.fetch(repo, str(tmp_path)).returncode == 0 and not hub.to("cdn")


def test_what_a_killed_run_left_in_the_middle_of_showing_does_no_harm(
    hub: LocalHub, home: Path, client: ForkServer
) -> None:
    repo = new_repo(hub)
    folder = folder_of(home, repo)
    code = (
        "import os; from unittest.mock import patch;"
        "from runner.hub.repository import Hub; from runner.hub.model_name import parse;"
        "from runner.hub.pull import plan_pull; from runner.hub.download import Download;"
        "from runner.terminal.download_progress import QuietWatcher; import sys;"
        f"hub = Hub(); plan = plan_pull(hub, parse('{repo}'));"
        "real = os.replace;"
        "die = lambda a, b: os._exit(9) if 'snapshots' in str(b) else real(a, b);"
        "d = Download(hub, plan.contents, plan.place, QuietWatcher(sys.stderr));"
        "patch('os.replace', die).start(); d.fetch(plan.variant.files)"
    )
    environment = {**os.environ, **hub.environment(home)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT).returncode == 9
    assert not list(folder.glob("snapshots/*/*"))  # huggingface-hub would take it for a file
    assert client.fetch(repo).returncode == 0 and check_visible(home, repo)
    assert not list(folder.glob("**/*.draft"))


def test_without_links_a_blob_that_others_link_to_stays(
    hub: LocalHub, home: Path, client: ForkServer
) -> None:
    repo = new_repo(hub)
    hub.repos[repo].branches["v1"] = "bad" + "0" * 37
    assert client.fetch(repo).returncode == 0
    with ForkServer(home, hub.environment(home, HF_HUB_DISABLE_SYMLINKS="1")) as other:
        assert other.fetch(f"{repo}@v1").returncode == 0
    assert check_visible(home, repo) and len(hub.to("cdn")) == 1
    paths = [path for path in visible_files(home, repo) if "snapshots" in path.parts]
    assert sorted(path.is_symlink() for path in paths) == [False, True]


KINDS = ("flip", "short", "reset", "less", "no range", "etag", "size", "other range")


@pytest.mark.slow
def test_of_200_bad_transfers_none_is_accepted(
    hub: LocalHub, home: Path, client: ForkServer
) -> None:
    chance = random.Random(11)
    n_right = 0
    for i in range(200):
        repo = new_repo(hub)
        kind = KINDS[i % len(KINDS)]
        where = "head" if kind in ("etag", "size") else "cdn"
        if chance.random() < 0.5:  # into a file that was begun before
            hub.faults.append(Fault("short", at=chance.randrange(1, SIZE)))
            hub.faults.extend([Fault("hang up")] * 2)
            assert client.fetch(repo).returncode == 1
            hub.faults.clear()
        fault = Fault(kind, where=where, at=chance.randrange(1, SIZE))
        if chance.random() < 0.5:
            hub.faults.append(fault)
        else:
            hub.always.append(fault)
        done = client.fetch(repo)
        assert check_visible(home, repo) == (done.returncode == 0), (kind, done)
        assert "Traceback" not in done.stderr
        n_right += done.returncode == 0
        hub.faults.clear()
        hub.always.clear()
    assert 40 < n_right < 160  # those that were bad once only were mended


@pytest.mark.slow
def test_after_200_kills_at_random_moments_no_bad_file_is_seen_and_what_came_is_kept(
    hub: LocalHub, home: Path, client: ForkServer
) -> None:
    chance = random.Random(13)
    data = chance.randbytes(16_000_000)
    hub.bytes_per_s = 30e6
    n_kills = n_finished = n_came = n_kept = 0
    repo = new_repo(hub, data)
    while n_kills < 200:
        n_sent, n_arrived = hub.n_sent, hub.n_arrived()
        n_before = partial_bytes(home, repo)
        hub.requests.clear()
        pid = client.start({"fetch": repo, "local_dir": ""})
        if chance.random() < 0.8:  # else in the time before anything comes
            wait_for(lambda n=n_sent, r=repo: hub.n_sent > n or is_visible(home, r))
        time.sleep(chance.uniform(0.0, 0.6))
        os.kill(pid, signal.SIGSTOP)  # nobody has waited for it, so it has its id still
        n_came += hub.n_arrived() - n_arrived  # while it cannot read on
        os.kill(pid, signal.SIGKILL)
        done = client.wait()
        n_kills += done.returncode == -signal.SIGKILL
        ranges = [request.range or "" for request in hub.to("cdn")]
        assert all(wanted.startswith(f"bytes={n_before}-") for wanted in ranges)
        if check_visible(home, repo, data):
            n_finished += 1
            n_kept += len(data) - n_before
            subprocess.run(["rm", "-r", str(folder_of(home, repo))], check=True)
            repo = new_repo(hub, data)
        else:
            n_kept += partial_bytes(home, repo) - n_before
    print(f"{n_kills} kills, {n_finished} files finished, kept {n_kept / n_came:.2%} of {n_came}")
    assert n_finished > 50
    assert n_kept >= 0.95 * n_came


def is_visible(home: Path, repo: str) -> bool:
    return any("snapshots" in path.parts for path in visible_files(home, repo))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, which `resize` makes larger."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small file system needs root: " + mounted.stderr.decode())
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def resize(disk: Path, n_bytes: int) -> None:
    options = f"remount,size={n_bytes}"
    subprocess.run(["mount", "-o", options, str(disk)], check=True)


@pytest.mark.slow
def test_on_50_full_disks_nothing_partial_is_seen_and_room_is_all_it_takes(
    hub: LocalHub, small_disk: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    chance = random.Random(17)
    logs = tmp_path_factory.mktemp("logs")
    with ForkServer(logs, hub.environment(small_disk)) as client:
        for _ in range(50):
            repo = new_repo(hub)
            resize(small_disk, chance.randrange(20_000, SIZE))
            done = client.fetch(repo)
            assert done.returncode == 1 and not visible_files(small_disk, repo)
            assert "is full" in done.stderr and "what came is kept" in done.stderr, done.stderr
            n_kept = partial_bytes(small_disk, repo)
            resize(small_disk, 2 * SIZE)
            hub.requests.clear()
            assert client.fetch(repo).returncode == 0 and check_visible(small_disk, repo)
            assert all((r.range or "").startswith(f"bytes={n_kept}-") for r in hub.to("cdn"))
            for path in small_disk.iterdir():
                subprocess.run(["rm", "-r", str(path)], check=True)


FOREIGN = ["localhost", "LOCALHOST", "127.0.0.1", "127.0.0.2", "127.0.0.5"]


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize("where", ["file", "file twice", "api", "head"])
def test_a_redirect_to_another_host_gets_no_token(
    where: str, host: str, hub: LocalHub, home: Path, known_client: ForkServer
) -> None:
    repo = new_repo(hub)
    port = hub.cdn.rpartition(":")[2]  # another port on the same host is another server, too
    foreign = f"http://{host}:{port}"
    if where == "api":
        hub.faults.append(Fault("redirect", where="api", location=f"{foreign}/api/models/{repo}"))
    elif where == "head":
        hub.faults.append(Fault("redirect", where="head", location=f"{foreign}/x"))
    else:
        hub.faults.append(Fault("elsewhere", where="head", location=foreign))
    if where == "file twice":
        blob = hub.repos[repo].files["m-Q8_0.gguf"]
        hub.faults.append(Fault("redirect", location=f"http://localhost:{port}/{blob.sha256}"))
    done = known_client.fetch(repo)
    assert hub.to("hub") and all(request.token == SECRET for request in hub.to("hub"))
    elsewhere = [*hub.to("cdn"), *hub.to("cdn", "HEAD")]
    is_asked = host.lower() in [request.host for request in elsewhere]
    assert is_asked == (where != "head")  # what answers so names no hash: it is not followed
    assert not any(request.token for request in elsewhere)
    if where.startswith("file"):
        assert done.returncode == 0 and elsewhere and check_visible(home, repo)
    assert SECRET not in done.stderr + done.stdout
