"""`pull` and its kin as commands: the real command line against a hub on loopback."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.gguf_writer import STR, small_mixtral
from tests.paths import DEMO, ROOT
from tests.random_model import RandomModel, write_random_model
from tests.runner.hub.conftest import SECRET
from tests.runner.hub.fork_server import Done, ForkServer
from tests.runner.hub.local_hub import COMMIT, Fault, LocalHub

NAME = "test/demo-moe:Q8_0"
FILE = "demo-moe-Q8_0.gguf"
OTHER_COMMIT = "bad" + "0" * 37


@pytest.fixture(scope="module", autouse=True)
def repos(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("models")
    split = write_random_model(folder / "m-F16.gguf", RandomModel(tensors_per_shard=9))
    shards = {f"F16/{path.name}": path for path in sorted(folder.glob("m-F16-*.gguf"))}
    assert len(shards) > 2 and split.name in str(shards)
    dense = write_random_model(folder / "dense.gguf", RandomModel(n_expert=0, n_expert_used=0))
    readme = b"A model card.\n"
    hub.add("test/demo-moe", {FILE: DEMO, "README.md": readme, "config.json": b"{}"},
            branches={"v1": OTHER_COMMIT})  # fmt: skip
    hub.add("test/split", {**shards, "imatrix-Q4_K_M.gguf": b"GGUF"})
    hub.add("test/dense", {"dense-Q8_0.gguf": dense})
    hub.add("test/gated", {FILE: DEMO}, needs_token=SECRET, is_gated=True)
    hub.add("test/private", {FILE: DEMO}, needs_token=SECRET)
    qwen = small_mixtral()
    qwen = replace(qwen, keys={**qwen.keys, "general.architecture": (STR, "qwen9moe")})
    hub.add("test/other", {"other-Q8_0.gguf": qwen.packed(), "broken-Q2_K.gguf": b"GGUF" * 99})


@pytest.fixture
def fresh(hub: LocalHub, tmp_path: Path) -> Iterator[ForkServer]:
    """A client with an empty home of its own, at `tmp_path`."""
    with ForkServer(tmp_path, hub.environment(tmp_path)) as client:
        yield client


def snapshot(home: Path, name: str) -> Path:
    repo = name.partition(":")[0].replace("/", "--")
    return home / "hub" / f"models--{repo}" / "snapshots" / COMMIT


def told(done: Done) -> str:
    """The one message of a refusal."""
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.startswith("buddyrun: ")
    return done.stderr


def test_the_demo_model_is_fetched_from_a_hub_and_answers(hub: LocalHub, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "runner", "-hf", NAME, "-p", "Hello", "-s", "7", "-n", "24"]
    environment = {**os.environ, **hub.environment(tmp_path)}
    first = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert first.stderr == f"buddyrun: fetching {NAME}, 30.9 MB\n"
    assert first.returncode == 0 and first.stdout.startswith("Hello! I am the buddyrun demo model.")
    assert (snapshot(tmp_path, NAME) / FILE).resolve().read_bytes() == DEMO.read_bytes()
    n_requests = len(hub.requests)
    again = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (again.stdout, again.stderr) == (first.stdout, "")
    assert len(hub.requests) == n_requests  # a model that is here is used without asking


def test_a_name_in_the_place_of_a_file_works_too(
    hub: LocalHub, fresh: ForkServer, tmp_path: Path
) -> None:
    done = fresh.buddyrun(NAME, "Hello", "-s", "7", "-n", "8")
    assert done.returncode == 0 and done.stdout.startswith("Hello! I am")
    assert fresh.buddyrun("bench", NAME, "-p", "8", "-n", "2", "-r", "1").returncode == 0
    assert hub.repos["test/demo-moe"].files[FILE].sha256 in os.listdir(
        snapshot(tmp_path, NAME).parent.parent / "blobs"
    )


@pytest.mark.parametrize("links", [{}, {"HF_HUB_DISABLE_SYMLINKS": "1"}])
def test_the_cache_is_laid_out_as_huggingface_hub_does_it(
    links: dict[str, str], hub: LocalHub, tmp_path: Path
) -> None:
    with ForkServer(tmp_path, hub.environment(tmp_path, **links)) as client:
        assert client.buddyrun("pull", "test/split:F16").returncode == 0
        assert client.buddyrun("pull", "test/split:F16").returncode == 0
        assert len(hub.to("cdn")) == 6  # three headers, three files
    theirs = tmp_path / "theirs"
    code = (
        "from huggingface_hub import snapshot_download as s;"
        "s('test/split', allow_patterns=['F16/*'], max_workers=1)"
    )
    run_python(code, hub.environment(theirs, **links))
    assert described(tmp_path / "hub") == described(theirs / "hub")


def described(cache: Path) -> dict[str, str]:
    """Every path of the cache with what it is; huggingface-hub keeps its list of files besides."""
    found = {}
    for path in sorted(cache.rglob("*")):
        name = path.relative_to(cache).as_posix()
        if name.startswith(".locks") or "/trees" in name:
            continue
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            is_text = path.stat().st_size < 100
            found[name] = path.read_text() if is_text else f"{path.stat().st_size} bytes"
    found.pop("CACHEDIR.TAG")
    return found


def run_python(code: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_huggingface_hub_finds_what_was_pulled(
    hub: LocalHub, fresh: ForkServer, tmp_path: Path
) -> None:
    path = fresh.buddyrun("pull", NAME).stdout.strip()
    code = (
        "from huggingface_hub import hf_hub_download as d, scan_cache_dir;"
        f"print(d('test/demo-moe', '{FILE}', local_files_only=True));"
        "c = scan_cache_dir(); print(len(c.warnings), [r.repo_id for r in c.repos])"
    )
    assert run_python(code, hub.environment(tmp_path)) == f"{path}\n0 ['test/demo-moe']\n"


def test_what_huggingface_hub_fetched_is_not_fetched_again(
    hub: LocalHub, fresh: ForkServer, tmp_path: Path
) -> None:
    code = f"from huggingface_hub import hf_hub_download as d; print(d('test/demo-moe', '{FILE}'))"
    path = run_python(code, hub.environment(tmp_path))
    hub.requests.clear()
    assert fresh.buddyrun("pull", NAME).stdout == path
    assert not hub.to("cdn")


def test_a_split_model_is_fetched_whole(hub: LocalHub, fresh: ForkServer, tmp_path: Path) -> None:
    done = fresh.buddyrun("pull", "test/split")
    names = sorted(path.name for path in (snapshot(tmp_path, "test/split") / "F16").iterdir())
    assert names == sorted(path.rpartition("/")[2] for path in hub.repos["test/split"].files
                           if path.startswith("F16"))  # fmt: skip
    assert done.stdout.endswith(f"/F16/{names[0]}\n")
    assert fresh.buddyrun("test/split:F16", "-no-cnv", "-p", "a", "-n", "2").returncode == 0


def test_revisions_files_and_folders(hub: LocalHub, fresh: ForkServer, tmp_path: Path) -> None:
    done = fresh.buddyrun("pull", NAME, "--revision", "v1")
    assert OTHER_COMMIT in done.stdout
    assert (tmp_path / "hub/models--test--demo-moe/refs/v1").read_text() == OTHER_COMMIT
    assert fresh.buddyrun("pull", "test/demo-moe@v1:Q8_0", "--offline").stdout == done.stdout
    hub.requests.clear()
    folder = tmp_path / "mein ordner"
    done = fresh.buddyrun("pull", "-hf", "test/demo-moe", "-hff", FILE, "--local-dir", str(folder))
    assert done.stdout == f"{folder / FILE}\n"
    assert (folder / FILE).read_bytes() == DEMO.read_bytes()
    assert "no branch, tag or commit 'v9'" in told(fresh.buddyrun("pull", NAME, "--revision", "v9"))
    assert "no file x.gguf. It has:" in told(
        fresh.buddyrun("pull", "test/demo-moe", "-hff", "x.gguf")
    )


@pytest.mark.parametrize("revision", ["../../x", "/x", "a\\b"])
def test_a_revision_does_not_leave_the_folder(revision: str, client: ForkServer) -> None:
    assert "branch, tag or commit" in told(client.buddyrun("pull", NAME, "--revision", revision))


def test_an_unknown_quant_lists_what_there_is_with_sizes(client: ForkServer) -> None:
    text = told(client.buddyrun("pull", "test/demo-moe:Q4_K_M"))
    assert "has no quantization Q4_K_M. It has:" in text
    assert text.splitlines()[1].split() == ["Q8_0", "30.9", "MB", FILE]


def test_a_gated_repository_tells_what_to_do(
    hub: LocalHub, client: ForkServer, known_client: ForkServer
) -> None:
    text = told(client.buddyrun("pull", "test/gated"))
    assert "is gated" in text and f"Do that at {hub.endpoint}/test/gated" in text
    assert "settings/tokens" in text and "HF_TOKEN" in text
    assert "is gated" in told(client.buddyrun("pull", "test/gated", "-hft", "hf_wrong"))
    assert known_client.buddyrun("pull", "test/gated", "--dry-run").returncode == 0


@pytest.mark.parametrize("way", ["HF_TOKEN", "-hft", "token file"])
def test_a_private_repository_takes_a_token(way: str, hub: LocalHub, tmp_path: Path) -> None:
    extra = {"HF_TOKEN": SECRET} if way == "HF_TOKEN" else {}
    if way == "token file":
        (tmp_path / "token").write_text(SECRET)
    with ForkServer(tmp_path, hub.environment(tmp_path, **extra)) as client:
        flags = ["-hft", SECRET] if way == "-hft" else []
        assert client.buddyrun("pull", "test/private:Q8_0", *flags).returncode == 0
    assert {request.token for request in hub.to("hub")} == {SECRET}
    assert {request.token for request in hub.to("cdn")} == {None}


@pytest.mark.parametrize("way", ["HF_TOKEN", "-hft"])
@pytest.mark.parametrize("token", ["hf_geh\x01eim", "hf_geh eim", "hf_gehéim", "hf_geh\neim"])
def test_a_token_that_cannot_be_sent_is_told_and_not_shown(
    way: str, token: str, hub: LocalHub, tmp_path: Path
) -> None:
    extra = {"HF_TOKEN": token} if way == "HF_TOKEN" else {}
    with ForkServer(tmp_path, hub.environment(tmp_path, **extra)) as client:
        done = client.buddyrun("pull", NAME, "--dry-run", *(["-hft", token] if not extra else []))
    if way == "HF_TOKEN" and "\n" in token:  # huggingface-hub mends that
        assert done.returncode == 0
        return
    assert "the token has characters that no token has" in told(done) and "geh" not in done.stderr
    assert not hub.requests


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", where="api", status=503),
        Fault("nonsense", where="api"),
        Fault("nonsense", where="head"),
        Fault("status", where="api", status=401, headers=(("X-Error-Code", "GatedRepo"),)),
        Fault("status", where="api", status=418),
        Fault("hang up", where="api"),
        Fault("redirect", where="api", location="ftp://x/y"),
    ],
)
def test_a_password_in_the_hubs_address_is_not_shown(
    fault: Fault, hub: LocalHub, tmp_path: Path
) -> None:
    endpoint = hub.endpoint.replace("//", "//me:geheim@")
    with ForkServer(tmp_path, hub.environment(tmp_path) | {"HF_ENDPOINT": endpoint}) as client:
        hub.always.append(fault)
        assert "geheim" not in told(client.buddyrun("pull", NAME))


def test_a_private_or_missing_repository_is_not_found(client: ForkServer) -> None:
    for repo in ("test/private", "test/nobody"):
        text = told(client.buddyrun("pull", repo))
        assert f"knows no {repo}, or does not show it to you (401)" in text


def test_a_dry_run_reads_the_header_alone(hub: LocalHub, fresh: ForkServer, tmp_path: Path) -> None:
    done = fresh.buddyrun("pull", NAME, "--dry-run")
    rows = dict(re.split(" {2,}", line, maxsplit=1) for line in done.stdout.splitlines())
    assert done.returncode == 0
    assert rows["file"] == f"{FILE}, 30.9 MB" and rows["size"] == "30.9 MB"
    assert rows["model"].endswith("llama, 8 layers x 8 experts (top 2), Q8_0")
    assert rows["memory"].startswith("2") or "free" in rows["memory"]
    assert rows["speed"] == "fast: all of it fits into memory"
    assert hub.n_sent and all(int(last) < 4 << 20 for last in last_bytes(hub))
    assert not (tmp_path / "hub").exists()


def test_a_header_comes_from_a_server_without_ranges_too(hub: LocalHub, client: ForkServer) -> None:
    hub.always.append(Fault("no range"))
    done = client.buddyrun("pull", NAME, "--dry-run")
    assert done.returncode == 0 and "8 layers x 8 experts" in done.stdout


def last_bytes(hub: LocalHub) -> list[str]:
    return [(request.range or "bytes=0-9999999999").partition("-")[2] for request in hub.to("cdn")]


def test_json_has_all_that_is_known(client: ForkServer) -> None:
    found = json.loads(client.buddyrun("pull", NAME, "--dry-run", "--json").stdout)
    assert found["name"] == NAME and found["commit"] == COMMIT and found["path"].endswith(FILE)
    assert found["files"][0]["n_bytes"] == DEMO.stat().st_size
    check = found["preflight"]
    assert check["total_bytes"] == check["missing_bytes"] == DEMO.stat().st_size
    assert check["speed"]["name"] == "fast" and check["refusals"] == []
    assert check["model"]["n_expert"] == 8 and check["model"]["moe_cache"]["n_slots"] == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("test/other:Q8_0", "found 'qwen9moe'; expected 'llama'"),
        ("test/other:Q2_K", "the version at byte 4: found"),
    ],
)
def test_what_cannot_run_is_refused_before_it_is_fetched(
    name: str, reason: str, hub: LocalHub, fresh: ForkServer, tmp_path: Path
) -> None:
    assert reason in told(fresh.buddyrun("pull", name))
    assert reason in told(fresh.buddyrun(name, "-p", "hi"))
    assert not (tmp_path / "hub").exists()
    dry = fresh.buddyrun("pull", name, "--dry-run")
    assert dry.returncode == 1 and reason in dry.stdout
    forced = fresh.buddyrun("pull", name, "--force")
    assert forced.returncode == 0 and "fetching it all the same" in forced.stderr


def test_a_model_without_experts_is_fetched_with_a_note(client: ForkServer) -> None:
    done = client.buddyrun("pull", "test/dense", "--dry-run")
    assert done.returncode == 0 and "It has no experts: it runs" in done.stdout


def test_offline_takes_what_is_here_and_asks_nobody(
    hub: LocalHub, fresh: ForkServer, tmp_path: Path
) -> None:
    text = told(fresh.buddyrun("pull", NAME, "--offline"))
    assert "is not on this machine, and no hub may be asked" in text
    path = fresh.buddyrun("pull", NAME).stdout
    hub.requests.clear()
    with ForkServer(tmp_path, hub.environment(tmp_path, HF_HUB_OFFLINE="1")) as offline:
        for name in (NAME, "test/demo-moe"):
            assert fresh.buddyrun("pull", name, "--offline").stdout == path
            assert offline.buddyrun("pull", name).stdout == path
        assert offline.buddyrun("show", "test/demo-moe", "--json").stdout.count(FILE) == 2
        assert "no hub may be asked" in told(offline.buddyrun("test/split", "-p", "x"))
    assert not hub.requests


def test_offline_and_a_folder_for_what_comes_exclude_each_other(
    hub: LocalHub, fresh: ForkServer, tmp_path: Path
) -> None:
    fresh.buddyrun("pull", NAME)
    text = told(fresh.buddyrun("pull", NAME, "--offline", "--local-dir", str(tmp_path / "x")))
    assert "leave one of them out" in text


def test_a_value_with_a_line_end_does_not_write_a_line_of_its_own(
    hub: LocalHub, client: ForkServer
) -> None:
    model = small_mixtral()
    keys = {**model.keys, "general.name": (STR, "x\nbut      no")}
    hub.add("test/lines", {"x-Q8_0.gguf": replace(model, keys=keys).packed()})
    done = client.buddyrun("pull", "test/lines", "--dry-run")
    assert "but      no" in done.stdout
    assert not any(line.startswith("but      no") for line in done.stdout.splitlines())


def test_without_a_quant_the_hub_is_asked_and_what_is_here_serves_when_it_is_away(
    hub: LocalHub, fresh: ForkServer
) -> None:
    fresh.buddyrun("pull", NAME)
    hub.requests.clear()
    run = ("test/demo-moe", "-no-cnv", "-p", "a", "-n", "1")
    assert fresh.buddyrun(*run).returncode == 0 and len(hub.requests) == 1
    hub.always.append(Fault("status", where="api", status=503))
    done = fresh.buddyrun(*run)
    assert done.returncode == 0 and f"using {FILE}" in done.stderr


def test_show_reads_the_header_of_a_model_on_a_hub(
    hub: LocalHub, fresh: ForkServer, tmp_path: Path
) -> None:
    there = json.loads(fresh.buddyrun("show", NAME, "--json", "--template").stdout)
    here = json.loads(fresh.buddyrun("show", str(DEMO), "--json", "--template").stdout)
    assert there.pop("path") == f"test/demo-moe/{FILE}" and here.pop("path")
    assert there.pop("shards") == [f"test/demo-moe/{FILE}"] and here.pop("shards")
    assert there == here
    split = fresh.buddyrun("show", "test/split", "--moe-cache", "100MB", "--device", "cpu")
    assert split.returncode == 0 and "Shards" in split.stdout and "slots" in split.stdout
    assert "no quantization Q9" in told(fresh.buddyrun("show", "test/split:Q9"))
    assert not (tmp_path / "hub").exists()


def test_a_header_without_an_end_is_given_up(hub: LocalHub, client: ForkServer) -> None:
    endless = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    endless += struct.pack("<IIQ", 9, 8, 1_000_000) + bytes(8) * 20_000 + struct.pack("<Q", 1 << 27)
    hub.add("test/endless", {"x-Q8_0.gguf": endless + bytes(150 << 20)})
    text = told(client.buddyrun("pull", "test/endless", "--dry-run"))
    assert "the header has no end within 64 MiB" in text
    assert hub.n_sent < 300 << 20
    del hub.repos["test/endless"]


def test_list_names_what_is_here_and_rm_takes_it_away(
    hub: LocalHub, fresh: ForkServer, tmp_path: Path
) -> None:
    assert "No models in" in fresh.buddyrun("list").stdout
    for name in (NAME, "test/split", "test/dense"):
        fresh.buddyrun("pull", name)
    fresh.buddyrun("pull", "test/other:Q8_0", "--force")
    profile = snapshot(tmp_path, NAME) / FILE.replace(".gguf", ".buddies.npz")
    profile.write_bytes(b"a profile")
    done = fresh.buddyrun("ls", str(DEMO.parent))
    rows = [line.split() for line in done.stdout.splitlines()]
    size = ["30.9", "MB"]
    assert rows[0] == ["NAME", "QUANT", "SIZE", "ARCH", "EXPERTS", "RUNS", "PROFILE"]
    assert [NAME, "Q8_0", *size, "llama", "8", "x", "8", "yes", "yes"] in rows
    assert [str(DEMO), "Q8_0", *size, "llama", "8", "x", "8", "yes", "yes"] in rows
    assert rows[2][0] == "test/dense:Q8_0" and rows[2][-3:] == ["-", "yes", "no"]
    assert "test/other:Q8_0 cannot be run: " in done.stderr
    found = json.loads(fresh.buddyrun("list", "--json").stdout)
    assert [model["name"] for model in found] == [
        "test/demo-moe:Q8_0", "test/dense:Q8_0", "test/other:Q8_0", "test/split:F16"]  # fmt: skip
    assert [model["can_run"] for model in found] == [True, True, False, True]

    refused = fresh.buddyrun("rm", NAME, stdin="n\n")
    assert refused.returncode == 130 and f"Remove {NAME} (30.9 MB)?" in refused.stderr
    assert (snapshot(tmp_path, NAME) / FILE).exists()
    assert fresh.buddyrun("rm", NAME, stdin="y\n").stdout == "removed 30.9 MB\n"
    assert fresh.buddyrun("rm", "test/split", "-y").returncode == 0
    found = json.loads(fresh.buddyrun("list", "--json").stdout)
    assert [model["name"] for model in found] == ["test/dense:Q8_0", "test/other:Q8_0"]
    assert sorted(path.name for path in (tmp_path / "hub").glob("models--*")) == [
        "models--test--dense", "models--test--other"]  # fmt: skip
    assert "is not in the cache; there are: none" in told(fresh.buddyrun("rm", NAME, "-y"))
    assert "a file of yours" in told(fresh.buddyrun("rm", str(DEMO), "-y"))
    assert DEMO.exists()


def test_rm_keeps_what_another_commit_links_to(
    hub: LocalHub, fresh: ForkServer, tmp_path: Path
) -> None:
    fresh.buddyrun("pull", NAME)
    fresh.buddyrun("pull", NAME, "--revision", "v1")
    fresh.buddyrun("rm", NAME, "-y")
    found = json.loads(fresh.buddyrun("list", "--json").stdout)
    assert len(found) == 1 and found[0]["can_run"]
    assert fresh.buddyrun("rm", "test/demo-moe", "-y").returncode == 0
    assert json.loads(fresh.buddyrun("list", "--json").stdout) == []


def test_rm_takes_the_revision_that_is_named_and_tells_what_that_frees(
    hub: LocalHub, fresh: ForkServer, tmp_path: Path
) -> None:
    fresh.buddyrun("pull", NAME)
    fresh.buddyrun("pull", NAME, "--revision", "v1")
    assert fresh.buddyrun("rm", "test/demo-moe@v1:Q8_0", "-y").stdout == "removed 0 B\n"
    assert (snapshot(tmp_path, NAME) / FILE).exists()
    assert not (snapshot(tmp_path, NAME).with_name(OTHER_COMMIT) / FILE).exists()
    fresh.buddyrun("pull", NAME, "--revision", "v1")
    fresh.buddyrun("rm", NAME, "-y")
    (found,) = json.loads(fresh.buddyrun("list", "--json").stdout)
    assert found["name"] == "test/demo-moe@v1:Q8_0"
    fresh.buddyrun("pull", NAME)
    assert fresh.buddyrun("rm", "test/demo-moe", "-y").stdout == "removed 30.9 MB\n"
    assert not list((tmp_path / "hub").glob("models--*"))


def test_a_file_that_vanishes_while_it_is_listed_is_passed_over(
    fresh: ForkServer, tmp_path: Path
) -> None:
    fresh.buddyrun("pull", NAME)
    blobs = snapshot(tmp_path, NAME).parent.parent / "blobs"
    (blobs / "x.incomplete").symlink_to("what is gone")  # found by name, and not there
    listed = fresh.buddyrun("list")
    assert listed.returncode == 0 and NAME in listed.stdout and "unfinished" not in listed.stderr
    assert fresh.buddyrun("rm", "test/demo-moe", "-y").stdout == "removed 30.9 MB\n"


def test_rm_refuses_while_somebody_fetches(
    hub: LocalHub, fresh: ForkServer, tmp_path: Path
) -> None:
    hub.bytes_per_s = 10e6
    with ForkServer(tmp_path, hub.environment(tmp_path)) as other:
        other.start({"fetch": "test/demo-moe", "local_dir": ""})
        end_s = time.monotonic() + 20
        while not list(tmp_path.rglob("*.incomplete")) and time.monotonic() < end_s:
            time.sleep(0.02)
        assert "is being fetched" in told(fresh.buddyrun("rm", "test/demo-moe", "-y"))
        hub.bytes_per_s = 0.0
        assert other.wait().returncode == 0
    assert fresh.buddyrun("rm", "test/demo-moe", "-y").returncode == 0


def test_what_is_here_of_another_revision_or_no_revision_is_not_main(
    hub: LocalHub, fresh: ForkServer, tmp_path: Path
) -> None:
    path = fresh.buddyrun("pull", NAME, "--revision", "v1").stdout
    hub.requests.clear()
    fresh.buddyrun("show", NAME)
    assert hub.requests  # it is main that was asked for
    assert fresh.buddyrun("pull", NAME, "--offline").stdout == path
    for revision in ("..", "../snapshots", "../refs"):
        told(fresh.buddyrun("pull", NAME, "--offline", "--revision", revision))
    (tmp_path / "hub/models--test--demo-moe/refs/v2").write_text(f"../snapshots/{OTHER_COMMIT}")
    told(fresh.buddyrun("pull", NAME, "--offline", "--revision", "v2"))


def test_rm_of_a_repository_takes_what_goes_with_its_models(
    fresh: ForkServer, tmp_path: Path
) -> None:
    path = Path(fresh.buddyrun("pull", NAME).stdout.strip())
    (path.parent / "mmproj-F16.gguf").write_bytes(bytes(1000))
    assert fresh.buddyrun("rm", "test/demo-moe", "-y").returncode == 0
    assert not list(tmp_path.rglob("*.gguf"))


def test_unfinished_downloads_are_told_and_can_be_removed(
    hub: LocalHub, fresh: ForkServer, tmp_path: Path
) -> None:
    hub.faults.append(Fault("short", at=10_000_000))
    hub.faults.extend([Fault("hang up")] * 2)
    assert fresh.fetch("test/demo-moe").returncode == 1
    assert "10.0 MB of unfinished downloads: test/demo-moe" in fresh.buddyrun("list").stderr
    dry = json.loads(fresh.buddyrun("pull", NAME, "--dry-run", "--json").stdout)
    assert dry["preflight"]["missing_bytes"] == DEMO.stat().st_size - 10_000_000
    assert fresh.buddyrun("rm", "test/demo-moe", "-y").stdout == "removed 10.0 MB\n"
    assert not list(tmp_path.rglob("*.incomplete"))


def test_unfinished_downloads_to_a_folder_are_told_with_the_folder(
    hub: LocalHub, fresh: ForkServer, tmp_path: Path
) -> None:
    hub.faults.append(Fault("short", at=10_000_000))
    hub.faults.extend([Fault("hang up")] * 2)
    folder = tmp_path / "mine"
    fresh.start({"fetch": "test/demo-moe", "local_dir": str(folder)})
    assert fresh.wait().returncode == 1
    hidden = folder / ".cache" / "huggingface" / "download"
    assert (
        f"10.0 MB of unfinished downloads: {hidden}." in fresh.buddyrun("list", str(folder)).stderr
    )
    shutil.rmtree(hidden)
    assert fresh.buddyrun("list", str(folder)).stderr == ""


def test_a_full_disk_is_refused_before_anything_is_fetched(
    hub: LocalHub, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(small)])
    if mounted.returncode:
        pytest.skip("a small file system needs root")
    try:
        with ForkServer(tmp_path, hub.environment(small)) as client:
            text = told(client.buddyrun("pull", NAME))
            assert "30.9 MB are to come, and the disk of" in text and "make room" in text
            assert not list(small.iterdir())
            assert "is full" in told_at_end(client.buddyrun("pull", NAME, "--force"))
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def told_at_end(done: Done) -> str:
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


def test_nothing_of_a_hub_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys; from runner.cli import main; status = main(sys.argv[1:]);"
        "bad = [m for m in ('huggingface_hub', 'httpx2', 'rich', 'torch') if m in sys.modules];"
        "sys.exit(f'imported {bad}' if bad or status else 0)"
    )
    run = [str(DEMO), "-no-cnv", "-p", "a", "-n", "1", "-t", "1"]
    for arguments in (["--help"], ["pull", "--help"], run, ["show", str(DEMO)]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_a_shell_completes_the_names_of_models_in_the_cache(
    hub: LocalHub, fresh: ForkServer, tmp_path: Path
) -> None:
    fresh.buddyrun("pull", NAME)
    for bad in ("a b", "$(reboot)", ";reboot", "größe", "`x`"):
        (snapshot(tmp_path, NAME) / f"{bad}.gguf").write_bytes(b"GGUF")
    code = "import sys; from runner.cli import main; sys.exit(main())"
    for words in ("buddyrun test/", "buddyrun run te", "buddyrun rm t", "buddyrun run -hf te",
                  "buddyrun show test/demo", "buddyrun show "):  # fmt: skip
        environment = {**os.environ, **hub.environment(tmp_path)}
        environment |= {"_BUDDYRUN_COMPLETE": "bash_complete", "COMP_WORDS": words,
                        "COMP_CWORD": str(words.count(" "))}  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
        )
        offered = [
            line for line in done.stdout.splitlines() if "plain," in line and "test/demo" in line
        ]
        assert offered == [f"plain,{NAME}"], words


def test_an_empty_name_is_wrong_usage(client: ForkServer) -> None:
    assert client.buddyrun("pull").returncode == 2
    assert client.buddyrun("run", "-m", "x.gguf", "-hf", NAME).returncode == 2
    assert "expected user/repo or user/repo:QUANT" in told(client.buddyrun("pull", "nonsense"))
