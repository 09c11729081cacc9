"""A device that fails at any allocation, copy or computation, while a model loads or answers.

What comes out is an error that a user can read, and afterwards the same session loads and answers
as if nothing had been.
"""

import gc
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest

from quant.devices import cpu_device
from quant.ggml_library import load_ggml
from runner.config import MOE_CACHE_OFF, EngineConfig, GenerateRequest, SamplingConfig
from runner.devices import DeviceChoice
from runner.engine_client import Client
from runner.errors import BackendError, BuddyrunError, OptionError, OutOfMemoryError
from runner.process import worker_process
from runner.protocol import ModelInfo, TextPiece
from runner.session import Session
from tests.paths import DEMO, ROOT
from tests.runner.failing_ggml import RESULTS, FailingGgml, Fault, Site

LOAD, ANSWER = "load", "answer"
PROMPT = "The quick brown fox jumps over the lazy dog and then it goes on to"  # 20 tokens
BRIEF = "The quick brown fox"
MOST_S = 10.0  # from a fault to a right answer
FEWER_SLOTS = "The GPU had less memory than it said"
CONFIG = EngineConfig(
    n_ctx=256,
    n_batch=32,
    n_threads=1,
    moe_cache_slots=3,
    moe_miss="load",
    fit_margin_bytes=0,
    warmup=False,
)
NOT_NEEDED = ("backend_buft_alloc_buffer", "backend_event_new")  # there are slower ways

GPU = pytest.param("gpu", marks=pytest.mark.gpu)


@dataclass(frozen=True)
class Case:
    """Settings that lead through a part of the engine, and what is asked."""

    changes: dict[str, Any]
    prompt: str = PROMPT
    n_predict: int = 5
    is_exact: bool = True  # the text does not depend on what is resident


READ, ON_HOST = "missing experts are read", "missing experts are computed by the host"
WARM_UP = "the device is warmed up"
IN_PLACE = "experts are used in place"  # on the CPU only
STAND_INS = {"buddy_budget": 1.0, "buddy_profile": "off"}
CASES = {
    READ: Case({}),
    ON_HOST: Case({"moe_miss": "host"}),
    "all experts have slots": Case({"moe_cache_slots": 8}),
    "the context is shifted": Case({"n_ctx": 24, "context_shift": True}, n_predict=10),
    "residents stand in": Case(
        {"buddy": "resident", "buddy_min_rank": 1, **STAND_INS}, n_predict=8, is_exact=False
    ),
    "stand-ins are verified": Case(
        {"buddy": "router", "verify_every": 1, **STAND_INS}, is_exact=False
    ),
    WARM_UP: Case({"warmup": True}),
    IN_PLACE: Case({"moe_cache_slots": 0, "moe_cache_bytes": MOE_CACHE_OFF}),
}


# loading and answering


def load(session: Session, config: EngineConfig) -> ModelInfo:
    return session.load(str(DEMO), config, None, lambda *_: None, lambda: False)


def request(n_predict: int = 5, prompt: str = PROMPT) -> GenerateRequest:
    greedy = SamplingConfig(temperature=0, ignore_eos=True)
    return GenerateRequest(prompt=prompt, n_predict=n_predict, sampling=greedy)


def answer(session: Session, n_predict: int = 5, prompt: str = PROMPT) -> str:
    events: list[object] = []
    result = session.generate(request(n_predict, prompt), events.append, lambda: False)
    assert result.n_generated == n_predict
    return text_of(events)


def text_of(events: list[Any]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextPiece))


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a device; "like a GPU" is the CPU in the place of one with its own memory."""
    if request.param == "gpu":
        return str(request.getfixturevalue("gpu_device").name).lower()
    if request.param == "like a GPU":
        choice = DeviceChoice(replace(cpu_device(), name="GPU0", kind="gpu"))
        monkeypatch.setattr("runner.placement.choose_device", lambda name: choice)
    return "cpu"


@pytest.fixture
def ggml() -> Iterator[FailingGgml]:
    with closing(FailingGgml(load_ggml())) as ggml:
        yield ggml
        assert_all_is_freed(ggml)


@pytest.fixture
def deep_ggml() -> Iterator[FailingGgml]:
    """Tells calls apart by more of who asked for them."""
    with closing(FailingGgml(load_ggml(), depth=3)) as ggml:
        yield ggml
        assert_all_is_freed(ggml)


def assert_all_is_freed(ggml: FailingGgml) -> None:
    """Handles of ggml and the threads that read experts."""
    assert not ggml.live, [str(site) for site in ggml.live.values()]
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetcher"]


def n_open_files() -> int:
    gc.collect()  # a mapped file is closed with the last view of it
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


# one fault after the other


class Drill:
    """Loads and answers with the same settings again and again, a fault each time."""

    def __init__(self, ggml: FailingGgml, config: EngineConfig, case: Case) -> None:
        """Do both without a fault first."""
        self._ggml = ggml
        self._exact = config
        self._config = replace(config, **case.changes)
        self._case = case
        self.calls: dict[str, Counter[Site]] = {}
        self.survived: list[Fault] = []  # what was met and no error came of
        with closing(Session()) as session:
            for step in (LOAD, ANSWER):
                with ggml.counting() as self.calls[step]:
                    text = self._do(step, session)
            if not case.is_exact:
                load(session, config)
                text = answer(session)
        self._text = text
        assert_all_is_freed(ggml)

    def meets(self, step: str, fault: Fault) -> bool:
        """Let the fault happen in this step and see that all is well afterwards; False when the
        step came by without that call."""
        try:
            with closing(Session()) as session:
                if step == ANSWER:
                    load(session, self._config)
                with self._ggml.failing(fault) as met_by:
                    error = self._error_of(step, session)
                self._check(step, fault, met_by, error, session)
                started = time.monotonic()
                self._recover(session, is_loaded=step == ANSWER or error is None)
                assert time.monotonic() - started < MOST_S
            assert_all_is_freed(self._ggml)
        except BaseException as failure:
            failure.add_note(f"{step}: {fault}")
            raise
        return bool(met_by)

    def _do(self, step: str, session: Session) -> str:
        if step == ANSWER:
            return answer(session, self._case.n_predict, self._case.prompt)
        load(session, self._config)
        return ""

    def _error_of(self, step: str, session: Session) -> BuddyrunError | None:
        try:
            self._do(step, session)
        except BuddyrunError as error:
            return error
        return None

    def _check(
        self,
        step: str,
        fault: Fault,
        met_by: list[str],
        error: BuddyrunError | None,
        session: Session,
    ) -> None:
        if error is not None:
            assert met_by, error
            assert isinstance(error, OutOfMemoryError) == fault.is_out_of_memory
            assert_is_plain(str(error))
            if step == LOAD:
                with pytest.raises(OptionError, match="no model is loaded"):
                    session.snapshot()
                assert_all_is_freed(self._ggml)
        elif met_by:
            self.survived.append(fault)
            has_fewer_slots = step == LOAD and fault.is_out_of_memory
            if has_fewer_slots and fault.site.function not in NOT_NEEDED:
                notes = session._loaded().engine.notes
                assert any(note.startswith(FEWER_SLOTS) for note in notes)
            else:  # a read that nobody waited for, or what can be done without
                assert met_by == ["prefetcher"] or fault.site.function in NOT_NEEDED

    def _recover(self, session: Session, is_loaded: bool) -> None:
        if not is_loaded:
            load(session, self._config)
        text = answer(session, self._case.n_predict, self._case.prompt)
        if not self._case.is_exact:  # what is resident now, and so who stands in, may be others
            load(session, self._exact)
            text = answer(session)
        assert text == self._text


def assert_is_plain(text: str) -> None:
    """One or two sentences for a user."""
    assert 12 <= len(text) <= 250 and "\n" not in text
    assert len(text.split()) >= 5
    assert not any(word in text for word in ("Error(", "Traceback", "0x", "None"))


def first_faults(calls: Counter[Site]) -> list[Fault]:
    """One for every site."""
    return [
        Fault(site, RESULTS[site.function][0]) for site in calls if site.function in RESULTS
    ]  # fmt: skip


def many_faults(calls: Counter[Site], rng: Random) -> list[Fault]:
    """Every way to fail at every site: at the first call, at the last and at one between them."""
    faults = []
    for site, n_calls in calls.items():
        for result in RESULTS.get(site.function, ()):
            for number in sorted({1, rng.randint(1, n_calls), n_calls}):
                faults.append(Fault(site, result, number))
    return faults


def assert_all_is_well(drill: Drill, step: str, faults: list[Fault]) -> None:
    """With every fault; what is read in idle time depends on time, so some may not be met."""
    n_files = n_open_files()
    n_met = sum(drill.meets(step, fault) for fault in faults)
    print(f"{step}: {n_met} of {len(faults)} faults met, {len(drill.survived)} survived")
    assert len(faults) > 5 and n_met >= len(faults) / 2
    assert n_open_files() == n_files


def sweep(device: str, name: str, step: str, *marks: pytest.MarkDecorator) -> Any:
    return pytest.param(device, name, step, marks=marks, id=f"{device}, {name}, {step}")


SHORT_SWEEPS = [
    *(sweep(device, READ, step) for device in ("cpu", "like a GPU") for step in (LOAD, ANSWER)),
    *(sweep("gpu", READ, step, pytest.mark.gpu) for step in (LOAD, ANSWER)),
    sweep("gpu", ON_HOST, ANSWER, pytest.mark.gpu),
    sweep("like a GPU", WARM_UP, LOAD, pytest.mark.slow),
]
LONG_SWEEPS = [
    sweep(device, name, step, pytest.mark.slow)
    for device in ("cpu", "like a GPU")
    for name in CASES
    if name != WARM_UP
    for step in (LOAD, ANSWER)
    if (step == ANSWER or name in (READ, IN_PLACE)) and (device == "cpu" or name != IN_PLACE)
]


@pytest.mark.parametrize(("device", "name", "step"), SHORT_SWEEPS, indirect=["device"])
def test_after_a_fault_at_any_place_the_session_answers_as_before(
    device: str, name: str, step: str, ggml: FailingGgml
) -> None:
    case = CASES[name]
    if device != "cpu":  # where Mesa computes, a token takes a fifth of a second
        case = replace(case, prompt=BRIEF, n_predict=3)
    drill = Drill(ggml, replace(CONFIG, device=device), case)
    assert_all_is_well(drill, step, first_faults(drill.calls[step]))


@pytest.mark.parametrize(("device", "name", "step"), LONG_SWEEPS, indirect=["device"])
def test_every_way_to_fail_leaves_the_session_in_order(
    device: str, name: str, step: str, deep_ggml: FailingGgml
) -> None:
    drill = Drill(deep_ggml, replace(CONFIG, device=device), CASES[name])
    assert_all_is_well(drill, step, many_faults(drill.calls[step], Random(name)))


# a device with less memory than it said


@pytest.mark.parametrize("device", ["like a GPU", GPU], indirect=True)
@pytest.mark.parametrize("n_slots", [3, 8])
def test_a_device_that_refuses_the_slots_gets_fewer_and_the_user_is_told(
    device: str, n_slots: int, ggml: FailingGgml
) -> None:
    config = replace(CONFIG, device=device, moe_cache_slots=n_slots)
    with closing(Session()) as session:
        assert load(session, config).moe_cache_slots == (n_slots,) * 8
        expected = answer(session)
        slots = Site("backend_alloc_ctx_tensors", first_line(ggml, "device_slots.py"))
        with ggml.failing(Fault(slots, None)) as met_by:
            info = load(session, config)
        assert met_by == ["MainThread"]
        assert 0.7 * 8 * n_slots < sum(info.moe_cache_slots) <= 0.9 * 8 * n_slots
        (note,) = (note for note in info.notes if note.startswith(FEWER_SLOTS))
        per_layer = round(sum(info.moe_cache_slots) / 8, 1)
        assert f"{per_layer:g} slots per layer instead of {n_slots}." in note
        assert answer(session) == expected


def first_line(ggml: FailingGgml, file: str) -> tuple[str, ...]:
    """The line of a file that made a buffer which is there now."""
    (site,) = {
        site.lines
        for site in ggml.live.values()
        if site.function == "backend_alloc_ctx_tensors" and file in site.lines[0]
    }
    return site


@pytest.mark.parametrize("device", ["like a GPU", GPU], indirect=True)
@pytest.mark.parametrize("file", ["device_slots.py", "kv_cache.py", "expert_passes.py"])
def test_a_device_that_refuses_however_few_slots_it_should_hold_is_given_up(
    device: str, file: str, ggml: FailingGgml
) -> None:
    config = replace(CONFIG, device=device, moe_cache_slots=8)
    with closing(Session()) as session:
        load(session, config)
        expected = answer(session)
        refused = Site("backend_alloc_ctx_tensors", first_line(ggml, file))
        started = time.monotonic()
        with ggml.failing(Fault(refused, None, number=0)) as met_by:
            with pytest.raises(OutOfMemoryError) as caught:
                load(session, config)
        assert time.monotonic() - started < MOST_S
        assert_is_plain(str(caught.value))
        assert 10 < len(met_by) < 40  # a tenth less each time
        assert_all_is_freed(ggml)
        assert min(load(session, config).moe_cache_slots) == 8
        assert answer(session) == expected


# in the worker's process

PROGRAM = (
    f"sys.path.insert(0, {str(ROOT)!r}); from tests.runner.failing_ggml import FailingSession;"
    " from runner.worker import main; main(FailingSession)"
)


@pytest.mark.parametrize("device", ["cpu", GPU], indirect=True)
def test_the_same_worker_answers_again_after_its_device_failed(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "PROGRAM", PROGRAM)
    with Client.start() as client:
        client.load(DEMO, replace(CONFIG, device=device, warmup=True))
        pid, expected = client.pid, text_of(list(client.generate(request())))
        assert expected
        for fails in ("backend_graph_compute", "backend_tensor_get", "backend_tensor_set"):
            answer = client.generate(GenerateRequest(prompt=f"FAIL {fails}"))
            with pytest.raises(BackendError) as caught:
                list(answer)
            assert_is_plain(str(caught.value))
            assert text_of(list(client.generate(request()))) == expected
        assert (client.pid, client.log) == (pid, "")
