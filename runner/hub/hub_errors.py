"""What went wrong with a hub, as a sentence that says what to do. Sends nothing."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx, parse_ratelimit_headers

from runner.errors import HubError

_PASSWORD = re.compile(r"(?<=//)[^/\s]*@")  # user:password@ of an address
_WORTH_A_RETRY = (408, 425, 429, 500, 502, 503, 504)


class PassingError(HubError):
    """It may be gone in a moment; `wait_s` is what the server asked for, None if nothing."""

    def __init__(self, text: str, wait_s: float | None = None) -> None:
        super().__init__(text)
        self.wait_s = wait_s


@dataclass(frozen=True)
class Asked:
    """What was asked for, as messages name it."""

    repo: str
    revision: str
    file: str = ""

    def __str__(self) -> str:
        return f"{self.repo}/{self.file}" if self.file else self.repo


@contextmanager
def told_plainly(asked: Asked) -> Iterator[None]:
    """Turn what huggingface-hub raises into HubError; PassingError where waiting may help."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise HubError(
            f"{asked} is not on this machine, and HF_HUB_OFFLINE forbids to ask a hub; unset it"
        ) from error
    except HfHubHTTPError as error:
        raise _refusal(asked, error) from error
    except FileMetadataError as error:
        raise HubError(f"{_host()} answers, but not as a hub does: {_one_line(error)}") from error
    except httpx.LocalProtocolError:  # its words are those of the header, which may be the token
        raise HubError(
            f"{asked}: the request has a header with characters that no header has; check HF_TOKEN"
            " and HF_HUB_USER_AGENT_ORIGIN"
        ) from None
    except httpx.TransportError as error:
        raise PassingError(_no_way(asked, error)) from error
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
        raise HubError(f"{asked}: {_one_line(error)}") from error
    except (HFValidationError, LocalTokenNotFoundError) as error:
        raise HubError(_one_line(error)) from error


@contextmanager
def told_of_nonsense() -> Iterator[None]:
    """The same for an answer that huggingface-hub cannot read."""
    try:
        yield
    except HFValidationError:  # a ValueError that is about the question
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(
            f"{_host()} answers, but not as a hub does ({type(error).__name__}); is HF_ENDPOINT"
            f" right? It is {_endpoint()}"
        ) from error


def checked_token(token: str | None) -> str | None:
    """A token without what surrounds it. Raises HubError for one that cannot be sent."""
    token = token.strip() if token else ""
    if not all("!" <= letter <= "~" for letter in token):
        raise HubError(
            "the token has characters that no token has: expected letters, digits and `_`; copy it"
            " again from where it was made"
        )
    return token or None


def _refusal(asked: Asked, error: HfHubHTTPError) -> HubError:
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return HubError(
            f"{asked.repo} is gated: its authors want you to accept their terms first. Do that at"
            f" {_endpoint()}/{asked.repo}, {_token_advice()}"
        )
    if isinstance(error, RevisionNotFoundError):
        return HubError(f"{asked.repo} has no branch, tag or commit {asked.revision!r:.80}")
    if isinstance(error, RemoteEntryNotFoundError):
        return HubError(f"{asked.repo} has no file {asked.file} at {asked.revision!r:.80}")
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return HubError(
            f"{_host()} knows no {asked}, or does not show it to you ({status}): check the name;"
            f" if it is private, {_token_advice()}"
        )
    if status == 403:
        return HubError(
            f"{_host()} refuses {asked} (403): the token may not read it, or the access has not"
            f" been granted yet; {_token_advice()}"
        )
    if status in _WORTH_A_RETRY:
        return _passing(asked, error)
    return HubError(f"{_host()} answers {status} for {asked}{_server_words(error)}")


def _token_advice() -> str:
    return (
        f"make a token at {_endpoint()}/settings/tokens and give it as HF_TOKEN, or once"
        " with `hf auth login`"
    )


def _passing(asked: Asked, error: HfHubHTTPError) -> PassingError:
    status = error.response.status_code
    wait_s = _wanted_wait_s(error)
    if status == 429:
        when = f"in {wait_s:.0f} s" if wait_s is not None else "in a few minutes"
        return PassingError(
            f"{_host()} allows no more requests for now (429): try again {when}; with a token"
            " (HF_TOKEN) it allows more",
            wait_s,
        )
    return PassingError(
        f"{_host()} has a problem of its own ({status}) with {asked}{_server_words(error)}: try"
        " again later",
        wait_s,
    )


def _wanted_wait_s(error: HfHubHTTPError) -> float | None:
    headers = error.response.headers
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    after = headers.get("Retry-After", "")
    return float(after) if after.isascii() and after.isdecimal() and len(after) < 7 else None


def _no_way(asked: Asked, error: "httpx.TransportError") -> str:
    if isinstance(error, httpx.ProxyError):
        return f"the proxy does not let {asked} through: {_one_line(error)}"
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return (
            f"{_asked_host(error)} cannot be reached: {_one_line(error)}; check the network and"
            " HF_ENDPOINT (--offline uses what is on this machine)"
        )
    if isinstance(error, httpx.TimeoutException):
        return f"no answer for {constants.HF_HUB_DOWNLOAD_TIMEOUT} s about {asked}"
    return f"the connection for {asked} broke: {_one_line(error)}"


def _asked_host(error: "httpx.TransportError") -> str:
    """The server that did not answer: the hub, or one that it sends files from."""
    try:
        return error.request.url.netloc.decode("ascii", "replace")
    except RuntimeError:  # none was asked yet
        return _host()


def _host() -> str:
    return urlsplit(_endpoint()).netloc or _endpoint()


def _endpoint() -> str:
    return _PASSWORD.sub("", constants.ENDPOINT)


def _server_words(error: HfHubHTTPError) -> str:
    return f": {_one_line(error.server_message)}" if error.server_message else ""


def _one_line(error: object) -> str:
    """The words of an error or a server, short and on one line."""
    text = " ".join(_PASSWORD.sub("", str(error)).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
