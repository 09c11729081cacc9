"""Hub: what a repository holds and where its files lie, through huggingface-hub. Keeps nothing.

huggingface-hub reads HF_ENDPOINT, HF_HOME, HF_TOKEN and their kin when it is imported.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_token, hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from runner.errors import HubError
from runner.hub.hub_errors import Asked, checked_token, told_of_nonsense, told_plainly
from runner.hub.model_name import ModelName
from runner.hub.repo_files import Contents, RepoFile, is_safe_path
from runner.version import version

if TYPE_CHECKING:
    from huggingface_hub.utils import httpx

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_MAX_FILE_BYTES = 1 << 50


@dataclass(frozen=True)
class Location:
    """Where a file's bytes can be had now, and the headers that may be sent there."""

    url: str
    headers: dict[str, str]


class Hub:
    """The hub that HF_ENDPOINT names, asked with a token or without."""

    def __init__(self, token: str | None = None) -> None:
        """token: None = the one of HF_TOKEN or of `hf auth login`, if any."""
        # Its warnings hold what servers say, and would go to the terminal as they are.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        self._token = token = checked_token(token)
        self._api = HfApi(token=token, library_name="buddyrun", library_version=version())

    def contents(self, name: ModelName) -> Contents:
        """What the repository of `name` holds. Raises HubError."""
        with told_plainly(Asked(name.repo, name.revision)), told_of_nonsense():
            self._check_known_token()
            info = self._api.model_info(
                name.repo,
                revision=name.revision,
                files_metadata=True,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
            )
            listed = [_checked(sibling) for sibling in info.siblings or ()]
        if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
            raise HubError(f"{name.repo}: the hub names no commit, but {info.sha!r:.60}")
        files = tuple(file for file in listed if file is not None)
        return Contents(name.repo, name.revision, info.sha, files)

    def locate(self, contents: Contents, file: RepoFile) -> Location:
        """Ask where the bytes of `file` are. Raises HubError when they are not what was listed."""
        url = hf_hub_url(contents.repo, file.path, revision=contents.commit)
        asked = Asked(contents.repo, contents.revision, file.path)
        with told_plainly(asked), told_of_nonsense():
            found = get_hf_file_metadata(
                url,
                token=self._token,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
                library_name="buddyrun",
                library_version=version(),
            )
            target = urljoin(url, found.location)
            headers = self._headers(url, target)
        if found.etag is None:
            raise HubError(f"{asked}: what answers names no hash, so it is no hub: not fetched")
        if found.etag != file.hash or found.size not in (None, file.n_bytes):
            raise HubError(
                f"{asked}: the hub lists {file.n_bytes} bytes with the hash {file.hash[:12]}, and"
                f" offers {found.size} with {found.etag[:12]!r}: not fetched; try again later"
            )
        return Location(target, headers)

    @contextmanager
    def body(
        self, contents: Contents, file: RepoFile, first: int, last: int
    ) -> Iterator[Iterator[bytes]]:
        """The bytes `first` to `last` of `file`, both included, as they come.

        They may end early, and are not checked. From a server that understands no ranges all
        bytes from `first` on come. Raises HubError, PassingError, also while they are read.
        """
        location = self.locate(contents, file)
        headers = {**location.headers, "Range": f"bytes={first}-{last}"}
        asked = Asked(contents.repo, contents.revision, file.path)
        with (
            told_plainly(asked),
            get_session().stream(
                "GET", location.url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            ) as response,
        ):
            hf_raise_for_status(response)
            n_before = _n_bytes_before(response, asked, file, first)
            end = file.n_bytes if response.status_code == 200 else last + 1
            yield _between(response.iter_raw(), n_before, end - first)

    def _check_known_token(self) -> None:
        """Check the token that huggingface-hub sends by itself."""
        if self._token is None and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
            checked_token(get_token())

    def _headers(self, asked: str, location: str) -> dict[str, str]:
        """What to send to `location`: the token only where it was sent before."""
        token: str | bool | None = self._token if _origin(asked) == _origin(location) else False
        headers: dict[str, str] = build_hf_headers(
            token=token, library_name="buddyrun", library_version=version()
        )
        return {**headers, "Accept-Encoding": "identity"}


def _n_bytes_before(response: "httpx.Response", asked: Asked, file: RepoFile, first: int) -> int:
    """How many bytes come before those that were asked for. Raises HubError."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise HubError(f"{asked}: the server packs the file, so that nothing can be resumed")
    if response.status_code == 200:  # it did not understand the wish and sends all
        return first
    start = re.fullmatch(
        r"bytes (\d{1,18})-\d+/(\d{1,18}|\*)", response.headers.get("Content-Range", "")
    )
    if response.status_code != 206 or not start or int(start[1]) != first:
        raise HubError(
            f"{asked}: asked for the bytes from {first} on, got status {response.status_code} and"
            f" {response.headers.get('Content-Range', 'no range')!r:.60}"
        )
    if start[2] != "*" and int(start[2]) != file.n_bytes:
        raise HubError(f"{asked}: the server has {start[2]} bytes, the hub lists {file.n_bytes}")
    return 0


def _between(chunks: Iterator[bytes], n_before: int, n_wanted: int) -> Iterator[bytes]:
    """`n_wanted` bytes of a stream behind its first `n_before`."""
    for chunk in chunks:
        part = chunk[n_before : n_before + n_wanted]
        n_before = max(0, n_before - len(chunk))
        n_wanted -= len(part)
        if part:
            yield part
        if not n_wanted:
            return


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, parts.hostname, port


def _checked(sibling: Any) -> RepoFile | None:
    """A listed file; None for one whose name is no path or whose size or hash is unknown.

    `-hff` with a name that was left out finds no such file.
    """
    path, n_bytes = sibling.rfilename, sibling.size
    digest = sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id
    if not isinstance(path, str) or not is_safe_path(path):
        return None
    if not isinstance(n_bytes, int) or not 0 < n_bytes <= _MAX_FILE_BYTES:
        return None
    if not isinstance(digest, str) or not _HASH.fullmatch(digest):
        return None
    return RepoFile(path, n_bytes, digest)
