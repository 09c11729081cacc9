"""LocalHub: a real HTTP server on loopback that answers as the Hugging Face hub does, or badly.

Two servers: the hub itself at 127.0.0.1, and the "CDN" that it sends large files from at
localhost, which is another host for every client; it answers at 127.0.0.2 and so on, too. Knows
nothing of buddyrun.
"""

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
_CHUNK = 1 << 14
_CUTS = ("short", "less", "reset", "stall")  # faults that end a body early


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer. `where`: "cdn", "head" (of a file), "api" or "hub"."""

    kind: str
    where: str = "cdn"
    status: int = 0
    at: int = 0  # byte of the body, counted from its first
    headers: tuple[tuple[str, str], ...] = ()
    location: str = ""


@dataclass(frozen=True)
class Request:
    """A request as a server saw it."""

    server: str  # "hub", "cdn"
    method: str
    path: str
    range: str | None
    token: str | None
    host: str = ""  # that the client asked, without the port


class Blob:
    """A file's bytes and what they are called by."""

    def __init__(self, data: bytes) -> None:
        self.data, self.n_bytes = data, len(data)
        self.sha256 = hashlib.sha256(data).hexdigest()
        head = b"blob %d\0" % len(data)
        self.git = hashlib.sha1(head + data, usedforsecurity=False).hexdigest()


@dataclass
class Repo:
    """A repository: names and bytes. Files ending in .gguf are large (LFS), others are git's."""

    files: dict[str, Blob]
    commit: str = COMMIT
    needs_token: str = ""  # "" = public
    is_gated: bool = False
    has_lfs: bool = True  # False: .gguf files are git's own, too
    branches: dict[str, str] = field(default_factory=dict)  # further names -> commit


class LocalHub:
    """The two servers and what they are told to do."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: deque[Fault] = deque()  # each is used once
        self.always: list[Fault] = []
        self.requests: list[Request] = []
        self.bytes_per_s = 0.0  # of the CDN; 0 = as fast as it goes
        self.stall_s = 2.5  # how long a fault "stall" is silent
        self.n_sent = 0  # bytes of files that went out
        self._lock = threading.Lock()
        self._hub = _Server(("127.0.0.1", 0), _HubHandler, self)
        self._cdn = _Server(("0.0.0.0", 0), _CdnHandler, self)
        self.endpoint = f"http://127.0.0.1:{self._hub.server_port}"
        self.cdn = f"http://localhost:{self._cdn.server_port}"
        for server in (self._hub, self._cdn):
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def add(self, name: str, files: dict[str, bytes | Path], **settings: Any) -> Repo:
        """A repository with these files."""
        blobs = {
            path: Blob(data.read_bytes() if isinstance(data, Path) else data)
            for path, data in files.items()
        }
        self.repos[name] = Repo(blobs, **settings)
        return self.repos[name]

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """What a client is started with; its cache is below `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "*",
            **more,
        }

    def take_fault(self, *places: str) -> Fault | None:
        """The next fault for one of the places."""
        with self._lock:
            for fault in list(self.faults):
                if fault.where in places:
                    self.faults.remove(fault)
                    return fault
        return next((fault for fault in self.always if fault.where in places), None)

    def note(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def count(self, n_bytes: int) -> None:
        with self._lock:
            self.n_sent += n_bytes

    def n_arrived(self) -> int:
        """Bytes of files that clients have read; the others are in the system's queues."""
        while True:
            n_sent = self.n_sent
            n_queued = _queued_bytes(self._cdn.server_port)
            if n_sent == self.n_sent:
                return n_sent - n_queued

    def to(self, server: str, method: str = "GET") -> list[Request]:
        """The requests that one server got."""
        return [r for r in self.requests if (r.server, r.method) == (server, method)]

    def close(self) -> None:
        for server in (self._hub, self._cdn):
            server.shutdown()
            server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], handler: Any, hub: LocalHub) -> None:
        self.hub = hub
        super().__init__(address, handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    name = ""

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""

    @property
    def hub(self) -> LocalHub:
        return self.server.hub

    def do_GET(self) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        wanted = self.headers.get("Range")
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        self.hub.note(Request(self.name, self.command, self.path, wanted, token, host))
        with suppress(BrokenPipeError, ConnectionResetError):
            self.answer(token)

    do_HEAD = do_GET

    def answer(self, token: str | None) -> None:
        raise NotImplementedError

    def fail(self, fault: Fault) -> bool:
        """Answer badly as a whole; False when the fault is in the body."""
        if fault.kind == "status":
            body = b'{"error": "as the test wants it"}'
            self.send(fault.status, body, dict(fault.headers), "application/json")
        elif fault.kind == "hang up":
            self.hang_up()
        elif fault.kind == "redirect":
            self.send(302, b"", {"Location": fault.location})
        elif fault.kind == "nonsense":
            self.send(200, b"<html>welcome to the hotel's network</html>", {}, "text/html")
        else:
            return False
        return True

    def send(
        self, status: int, body: bytes, headers: dict[str, str], kind: str = "text/plain"
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body))}.items():
            if name not in headers:
                self.send_header(name, value)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str = "") -> None:
        body = json.dumps({"error": message or code}).encode()
        headers = {"X-Error-Code": code, "X-Error-Message": message or code}
        self.send(status, body, headers, "application/json")

    def hang_up(self, is_abrupt: bool = True) -> None:
        """End the connection; abruptly = what is on its way is lost too."""
        if is_abrupt:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.rfile.close()
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_WR)
        self.close_connection = True


class _HubHandler(_Handler):
    name = "hub"

    def answer(self, token: str | None) -> None:
        path = unquote(urlsplit(self.path).path)
        is_api = path.startswith("/api/")
        fault = self.hub.take_fault("api" if is_api else "head", "hub")
        if fault is not None and self.fail(fault):
            return
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|refs))?(?:/(.+))?", path)
        if is_api and found:
            repo = self.repo(found[1], token)
            if repo is not None:
                self.api(found[1], repo, found[2] or "revision", found[3] or "main", fault)
            return
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repo = self.repo(found[1], token) if found else None
        if repo is not None and found:
            self.resolve(found[1], repo, found[2], found[3], fault)
        elif not found:
            self.refuse(404, "NotFound")

    def repo(self, name: str, token: str | None) -> Repo | None:
        """The repository, or None when a refusal was sent."""
        repo = self.hub.repos.get(name)
        if repo is None:
            self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif repo.needs_token and token != repo.needs_token:
            if repo.is_gated:
                text = f"Access to model {name} is restricted."
                self.refuse(403 if token else 401, "GatedRepo", text)
            else:
                self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
            return None
        return repo

    def api(self, name: str, repo: Repo, what: str, revision: str, fault: Fault | None) -> None:
        commit = self.commit(repo, revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        names = {"main": repo.commit, **repo.branches}
        if what == "refs":
            found: Any = {
                "branches": [{"name": n, "ref": n, "targetCommit": c} for n, c in names.items()]
            }
        elif what == "tree":
            found = [self.entry(repo, path, blob) for path, blob in repo.files.items()]
        else:
            more: dict[str, Any] = {}
            has_blobs = "blobs" in parse_qs(urlsplit(self.path).query)
            siblings = [
                self.sibling(repo, path, blob) if has_blobs else {"rfilename": path}
                for path, blob in repo.files.items()
            ]
            if fault is not None and fault.kind == "bad date":
                more = {"lastModified": "yesterday"}
            found = {**more, "id": name, "modelId": name, "sha": commit, "siblings": siblings,
                     "gated": "manual" if repo.is_gated else False, "tags": []}  # fmt: skip
        self.send(200, json.dumps(found).encode(), {}, "application/json")

    def entry(self, repo: Repo, path: str, blob: Blob) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "oid": blob.git, "size": blob.n_bytes}
        entry["path"] = path
        if repo.has_lfs and path.endswith(".gguf"):
            entry["lfs"] = {"oid": blob.sha256, "size": blob.n_bytes, "pointerSize": 134}
        return entry

    def sibling(self, repo: Repo, path: str, blob: Blob) -> dict[str, Any]:
        entry: dict[str, Any] = {"rfilename": path, "size": blob.n_bytes, "blobId": blob.git}
        if repo.has_lfs and path.endswith(".gguf"):
            entry["lfs"] = {"sha256": blob.sha256, "size": blob.n_bytes, "pointerSize": 134}
        return entry

    def commit(self, repo: Repo, revision: str) -> str | None:
        if revision in ("main", repo.commit):
            return repo.commit
        return revision if revision in repo.branches.values() else repo.branches.get(revision)

    def resolve(self, name: str, repo: Repo, revision: str, path: str, fault: Fault | None) -> None:
        commit = self.commit(repo, revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        blob = repo.files.get(path)
        if blob is None:
            return self.refuse(404, "EntryNotFound")
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not (repo.has_lfs and path.endswith(".gguf")):
            return self.send(200, blob.data, {**headers, "ETag": f'"{blob.git}"'})
        etag, size = blob.sha256, blob.n_bytes
        if fault is not None and fault.kind == "etag":
            etag = etag[::-1]
        if fault is not None and fault.kind == "size":
            size += 1
        where = fault.location if fault is not None and fault.kind == "elsewhere" else self.hub.cdn
        location = f"{where}/{quote(name)}/{blob.sha256}?signature=secret-of-the-cdn"
        headers |= {"X-Linked-Size": str(size), "X-Linked-ETag": f'"{etag}"', "Location": location}
        return self.send(302, b"", headers)


class _CdnHandler(_Handler):
    name = "cdn"

    def answer(self, token: str | None) -> None:
        fault = self.hub.take_fault("cdn") or Fault("")
        if self.fail(fault):
            return
        data = self.data()
        if data is None:
            return self.refuse(404, "NotFound")
        first, last = self.wanted(len(data))
        if first >= len(data):
            return self.send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        has_range = self.headers.get("Range") is not None and fault.kind != "no range"
        if not has_range:
            first, last = 0, len(data) - 1
        body = memoryview(data)[first : last + 1]
        if fault.kind == "flip":
            body = _flipped(body, fault.at)
        n_sent = fault.at % len(body) if fault.kind in _CUTS else len(body)
        self.send_response(206 if has_range else 200)
        if has_range:
            shift = 1 if fault.kind == "other range" else 0
            total = "*" if fault.kind == "no total" else len(data)
            self.send_header("Content-Range", f"bytes {first + shift}-{last}/{total}")
        self.send_header("ETag", '"of-the-cdn"')
        self.send_header("Content-Length", str(n_sent if fault.kind == "less" else len(body)))
        self.end_headers()
        self.send_parts(body[:n_sent])
        if fault.kind == "stall":
            time.sleep(self.hub.stall_s)
        if fault.kind in ("short", "reset", "stall"):
            self.hang_up(is_abrupt=fault.kind == "reset")
        return None

    def send_parts(self, body: memoryview) -> None:
        for at in range(0, len(body), _CHUNK):
            part = body[at : at + _CHUNK]
            if self.hub.bytes_per_s:
                time.sleep(len(part) / self.hub.bytes_per_s)
            self.hub.count(len(part))
            self.wfile.write(part)

    def data(self) -> bytes | None:
        wanted = urlsplit(self.path).path.rpartition("/")[2]
        for repo in self.hub.repos.values():
            for path, blob in repo.files.items():
                if path.endswith(".gguf") and blob.sha256 == wanted:
                    return blob.data
        return None

    def wanted(self, n_bytes: int) -> tuple[int, int]:
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if found is None:
            return 0, n_bytes - 1
        last = int(found[2]) if found[2] else n_bytes - 1
        return int(found[1]), min(last, n_bytes - 1)


def _queued_bytes(port: int) -> int:
    """What is under way from a port on loopback: sent and not received, or received and not read.

    At least: bytes that were received and not yet acknowledged are in both queues. From
    /proc/net/tcp, whose columns are addresses as HEX:PORT, a state, and tx_queue:rx_queue.
    """
    n_leaving = n_unread = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, _, queues, *_ = line.split()
        tx, rx = (int(queue, 16) for queue in queues.split(":"))
        if int(local.rpartition(":")[2], 16) == port and int(remote.rpartition(":")[2], 16):
            n_leaving += tx
        if int(remote.rpartition(":")[2], 16) == port:
            n_unread += rx
    return max(n_leaving, n_unread)


def _flipped(body: memoryview, at: int) -> memoryview:
    """The same with another bit somewhere."""
    at %= len(body)
    return memoryview(bytes(body[:at]) + bytes([body[at] ^ 1]) + bytes(body[at + 1 :]))
