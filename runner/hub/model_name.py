"""ModelName: what a person writes to mean a model on a hub. Asks no hub and imports none.

`user/repo`, `user/repo:QUANT`, the same behind `hf.co/` or `hf://`, with `@REVISION` behind the
repository, a file's address as a browser shows it, or `hf://user/repo/file.gguf`. What would mean
something else in a revision or a path is written as in an address: `@refs%2Fpr%2F1`.
"""

import re
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote

from runner.errors import HubError

DEFAULT_REVISION = "main"
_SCHEME = "hf://"  # behind it stands a path in the repository, not a browser's address
_PREFIX = re.compile(
    r"hf://(?:models/)?|(?:https?://)?(?:www\.)?(?:hf\.co|huggingface\.co)/", re.IGNORECASE
)
_BODY = re.compile(
    r"(?P<repo>[^/:@\s]+/[^/:@\s]+)(?:@(?P<revision>[^:\s/]+))?"
    r"(?:/(?P<rest>[^\s:]+)|:(?P<quant>[\w.-]+))?/?",
    re.ASCII,
)
_VIEW = re.compile(r"(?:blob|resolve|tree|raw)/([^/]+)(?:/(.*))?")
_SPECIAL = re.compile(r"[\s:?%]+")  # in a path; more of it in a revision
_SPECIAL_IN_REVISION = re.compile(r"[\s:?%/@]+")
_REPO_PART = re.compile(r"[A-Za-z0-9_](?:[\w.-]*\w)?", re.ASCII)
_MAX_REPO = 96  # characters; the hub's limit


@dataclass(frozen=True)
class ModelName:
    """A model in a repository: by quantization, by file, or neither."""

    repo: str  # "user/repo"
    quant: str = ""  # "Q4_K_M"; "" = choose
    file: str = ""  # path in the repository
    revision: str = DEFAULT_REVISION  # branch, tag or commit

    def __str__(self) -> str:
        """As `parse` reads it."""
        at = (
            ""
            if self.revision == DEFAULT_REVISION
            else ("@" + _SPECIAL_IN_REVISION.sub(_percents, self.revision))
        )
        if self.file:
            return f"hf://{self.repo}{at}/{_SPECIAL.sub(_percents, self.file)}"
        return f"{self.repo}{at}:{self.quant}" if self.quant else f"{self.repo}{at}"


def looks_like_name(text: str) -> bool:
    """Whether `text`, which is no file on this machine, can only mean a model on a hub."""
    if _PREFIX.match(text):
        return True
    found = _BODY.fullmatch(text)
    if found is None or found["rest"] or text.startswith((".", "~")):
        return False
    return not found["repo"].lower().endswith(".gguf")


def parse(text: str) -> ModelName:
    """Raises HubError that says what a name looks like."""
    prefix = _PREFIX.match(text)
    body = text[prefix.end() :] if prefix else text
    found = _BODY.fullmatch(body.partition("?")[0])
    if found is None or (found["rest"] and not prefix):
        raise _no_name(text)
    _check_repo(text, found["repo"])
    name = ModelName(found["repo"], found["quant"] or "")
    if found["revision"]:
        name = replace(name, revision=unquote(found["revision"]))
    rest = (found["rest"] or "").rstrip("/")
    view = None if text.lower().startswith(_SCHEME) else _VIEW.fullmatch(rest)
    if view:
        return replace(name, revision=unquote(view[1]), file=unquote(view[2] or ""))
    return replace(name, file=unquote(rest))


def with_flags(name: ModelName, file: str | None, revision: str | None) -> ModelName:
    """The name after `-hff` and `--revision`. Raises HubError when one contradicts it."""
    if file:
        if name.quant or name.file not in ("", file):
            raise HubError(f"-hff {file} and {name} name two models: leave one of them out")
        name = replace(name, file=file)
    if revision:
        if name.revision not in (DEFAULT_REVISION, revision):
            raise HubError(f"--revision {revision} contradicts {name}: leave one of them out")
        name = replace(name, revision=revision)
    return name


def _percents(found: re.Match[str]) -> str:
    return quote(found.group(), safe="")


def _check_repo(text: str, repo: str) -> None:
    is_bad = "--" in repo or ".." in repo or repo.endswith(".git") or len(repo) > _MAX_REPO
    if is_bad or not all(_REPO_PART.fullmatch(part) for part in repo.split("/")):
        raise _no_name(text)


def _no_name(text: str) -> HubError:
    return HubError(
        f"{text!r:.120} is no name of a model on a hub; expected user/repo or user/repo:QUANT, such"
        " as mistralai/Mixtral-8x7B-GGUF:Q4_K_M"
    )
