"""--exact, on the real command line with the real worker: nobody ever stands in."""

import io
import os
import sys
from types import TracebackType
from typing import Any
from unittest import mock

import pytest

from runner import engine_client
from runner.cli import main
from runner.engine_client import Client
from tests.paths import DEMO

# What would let others stand in wherever anything is missing, if nobody said --exact.
TWINS = {
    "BUDDYRUN_BUDDY": "router", "BUDDYRUN_BUDDY_BUDGET": "1", "BUDDYRUN_BUDDY_MIN_RANK": "1",
    "BUDDYRUN_MOE_CACHE_SLOTS": "3", "BUDDYRUN_TEMP": "0",
}  # fmt: skip
N_LAYER, N_USED = 8, 2


def snapshot_after(*arguments: str, stdin: str = "", **twins: str) -> dict[str, Any]:
    """Run a command line in this process; the worker's counters at its end."""
    seen: list[dict[str, Any]] = []

    class Watched(Client):
        def __exit__(
            self,
            kind: type[BaseException] | None,
            error: BaseException | None,
            trace: TracebackType | None,
        ) -> None:
            seen.append(self.stats())
            super().__exit__(kind, error, trace)

    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    with (
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()))),
        mock.patch.object(sys, "stdout", streams[0]),
        mock.patch.object(sys, "stderr", streams[1]),
        mock.patch.dict(os.environ, TWINS | twins),
        mock.patch.object(engine_client, "Client", Watched),
    ):
        status = main(["run", "-m", str(DEMO), *arguments])
    streams[1].flush()
    assert status == 0, streams[1].buffer.getvalue()  # type: ignore[attr-defined]
    (snapshot,) = seen
    return snapshot


def n_expected_pairs(snapshot: dict[str, Any]) -> int:
    """Of all tokens in all layers but the last, where only one of a batch goes on."""
    n_tokens = snapshot["n_tokens_prompt"] + snapshot["n_tokens_generated"]
    n_batches: int = snapshot["n_routings"] // N_LAYER
    return N_USED * ((N_LAYER - 1) * n_tokens + n_batches)


def assert_exact(snapshot: dict[str, Any]) -> None:
    assert snapshot["substituted"] == snapshot["dropped"] == [0] * N_LAYER
    assert (snapshot["buddy"], snapshot["buddy_budget"]) == ("", 0.0)
    assert snapshot["n_slots"] == [3] * N_LAYER and min(snapshot["loaded"]) > 0
    n_pairs = sum(sum(snapshot[way]) for way in ("hit", "loaded", "on_host"))
    assert n_pairs == n_expected_pairs(snapshot)


@pytest.mark.parametrize("how", ["flag", "twin"])
def test_exact_beats_every_setting_that_lets_others_stand_in(how: str) -> None:
    flags = ["--exact", "--buddy", "resident"] if how == "flag" else []
    twins = {"BUDDYRUN_EXACT": "1"} if how == "twin" else {}
    assert_exact(snapshot_after(*flags, "-p", "Once upon a time", "-n", "30", **twins))


def test_without_it_the_same_settings_have_stand_ins() -> None:
    snapshot = snapshot_after("-p", "Once upon a time", "-n", "30")
    assert (snapshot["buddy"], snapshot["buddy_budget"]) == ("router", 1.0)
    assert min(snapshot["substituted"]) > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_exact_never_substitutes_in_ten_thousand_tokens() -> None:
    """Four answers in one chat, whose context shifts every few hundred tokens."""
    lines = ["Tell me a story.", "Go on.", "And then?", "What is in a box?", "/bye"]
    snapshot = snapshot_after(
        *("--exact", "-cnv", "--simple-io", "--history", ""),
        *("-n", "2600", "--ignore-eos", "-c", "512", "--context-shift"),
        stdin="\n".join([*lines, ""]),
    )
    assert snapshot["n_tokens_generated"] >= 10_000
    assert_exact(snapshot)
