"""The command `pull`, and fetching a model that another command needs. Decides nothing itself."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from runner.byte_sizes import bytes_text
from runner.config import DEVICE_AUTO
from runner.errors import BuddyrunError, HubError
from runner.hub.cached_models import find_cached
from runner.hub.model_name import ModelName, parse, with_flags
from runner.terminal.cli_options import Params
from runner.terminal.terminal_text import visible, visible_line

if TYPE_CHECKING:
    from quant.gguf_file import GGUFFile
    from runner.hub.preflight import Preflight
    from runner.hub.pull import PullPlan
    from runner.hub.repository import Hub
    from runner.show import ReportedDevice


def pull_model(params: Params) -> bool:
    """Fetch a model, or with --dry-run say what would happen; False when it makes no sense.

    Raises BuddyrunError.
    """
    name = name_in(params)
    if is_offline(params):
        if params["local_dir"]:
            raise HubError(
                "--local-dir is for files that a hub sends, and none may be asked (--offline or"
                " HF_HUB_OFFLINE): leave one of them out"
            )
        _report(params, name, required_path(name), None, None)
        return True
    from runner.hub.repository import Hub

    hub = Hub(params["hf_token"] or None)
    folder = Path(os.path.expanduser(params["local_dir"])) if params["local_dir"] else None
    plan, preflight = _planned(hub, name, folder)
    if params["dry_run"]:
        _report(params, name, plan.path, plan, preflight)
        return preflight is None or not preflight.refusals
    _refuse(name, preflight, params["force"])
    if preflight is not None and not params["as_json"]:
        _print_rows(preflight, sys.stderr.isatty())
    path = _fetch(hub, plan)
    _report(params, name, path, plan, preflight)
    return True


def fetched_path(name: ModelName, params: Params) -> Path:
    """The file of a model on this machine, fetched first if it is not here. Raises HubError."""
    found = find_cached(name)
    if found is not None:
        return found
    if is_offline(params):
        return required_path(name)
    from runner.hub.repository import Hub

    hub = Hub(params.get("hf_token") or None)
    try:
        plan, preflight = _planned(hub, name, None)
    except HubError as error:
        found = find_cached(name, is_any_good=True)
        if found is None:
            raise
        print(f"buddyrun: {visible(str(error))}; using {visible_line(found.name)}", file=sys.stderr)
        return found
    _refuse(name, preflight, is_forced=False)
    if plan.missing_bytes:
        size = bytes_text(plan.missing_bytes)
        print(f"buddyrun: fetching {visible_line(str(name))}, {size}", file=sys.stderr, flush=True)
    return _fetch(hub, plan)


def opened_there(text: str, params: Params) -> "Path | GGUFFile":
    """What `show` reads of a model on a hub: its file if that is here, else its header there.

    Raises BuddyrunError.
    """
    name = name_in({**params, "word": text})
    found = find_cached(name)
    if found is not None:
        return found
    if is_offline(params):
        return required_path(name)
    from runner.hub.pull import plan_pull
    from runner.hub.remote_header import open_remote
    from runner.hub.repository import Hub

    hub = Hub(params["hf_token"] or None)
    plan = plan_pull(hub, name)
    return open_remote(hub, plan.contents, plan.variant)


def name_in(params: Params) -> ModelName:
    """The model that a command's parameters name. Raises HubError."""
    name = parse(params.get("hf_repo") or params["word"])
    return with_flags(name, params.get("hf_file"), params.get("revision"))


def is_offline(params: Params) -> bool:
    """Whether no hub may be asked."""
    from huggingface_hub import constants

    return bool(params.get("offline")) or constants.is_offline_mode()


def required_path(name: ModelName) -> Path:
    """The file of a model that is here. Raises HubError."""
    path = find_cached(name, is_any_good=True)
    if path is None:
        raise HubError(
            f"{name} is not on this machine, and no hub may be asked (--offline or HF_HUB_OFFLINE);"
            " `buddyrun list` says what is here"
        )
    return path


def _planned(
    hub: "Hub", name: ModelName, folder: Path | None
) -> tuple["PullPlan", "Preflight | None"]:
    """What is to come, and how it would run; None when nothing is missing."""
    from runner.hub.preflight import check
    from runner.hub.pull import plan_pull

    plan = plan_pull(hub, name, folder)
    return plan, check(hub, plan, _device()) if plan.missing_bytes else None


def _device() -> "ReportedDevice | None":
    from runner.terminal.reported_device import reported_device

    try:
        return reported_device(DEVICE_AUTO)
    except BuddyrunError:
        return None  # no ggml that works; `doctor` says why


def _refuse(name: ModelName, preflight: "Preflight | None", is_forced: bool) -> None:
    if preflight is None or not preflight.refusals:
        return
    reasons = "; ".join(preflight.refusals)
    if not is_forced:
        raise HubError(
            f"{name} is not fetched: {reasons}. `buddyrun pull {name} --force` fetches it all"
            " the same"
        )
    print(f"buddyrun: {visible_line(reasons)}; fetching it all the same", file=sys.stderr)


def _fetch(hub: "Hub", plan: "PullPlan") -> Path:
    from runner.hub.download import Download
    from runner.terminal.download_progress import watching

    try:
        with watching(plan.variant.files, plan.missing_bytes) as watcher:
            return Download(hub, plan.contents, plan.place, watcher).fetch(plan.variant.files)
    except KeyboardInterrupt:
        print("\nStopped. What came is kept: the same command goes on with it.", file=sys.stderr)
        raise


def _print_rows(preflight: "Preflight", is_terminal: bool) -> None:
    """What is known before the download, for a person."""
    if is_terminal:
        print(_text(preflight), file=sys.stderr)


def _text(preflight: "Preflight") -> str:
    from runner.hub.preflight import rows

    lines = [f"{name:<8} {value}" for name, value in rows(preflight)]
    lines += [f"note     {note}" for note in preflight.notes]
    lines += [f"but      {refusal}" for refusal in preflight.refusals]
    return "\n".join(map(visible_line, lines))


def _report(
    params: Params,
    name: ModelName,
    path: Path,
    plan: "PullPlan | None",
    preflight: "Preflight | None",
) -> None:
    """The path alone, or all as JSON; after --dry-run what would happen."""
    if params["as_json"]:
        print(json.dumps(_as_json(name, path, plan, preflight), indent=2))
    elif params["dry_run"]:
        for line in (f"{'model':<8} {name}", *_file_lines(plan)):
            print(visible_line(line))
        print(_text(preflight) if preflight else visible_line(f"{'here':<8} {path}"))
    else:
        print(visible_line(str(path)) if sys.stdout.isatty() else path)


def _file_lines(plan: "PullPlan | None") -> Sequence[str]:
    files = plan.variant.files if plan else ()
    return [f"{'file':<8} {file.path}, {bytes_text(file.n_bytes)}" for file in files]


def _as_json(
    name: ModelName, path: Path, plan: "PullPlan | None", preflight: "Preflight | None"
) -> dict[str, object]:
    found: dict[str, object] = {"name": str(name), "path": str(path)}
    if plan is not None:
        found |= {
            "revision": plan.contents.revision,
            "commit": plan.contents.commit,
            "files": [asdict(file) for file in plan.variant.files],
        }
    return found | {"preflight": asdict(preflight) if preflight else None}
