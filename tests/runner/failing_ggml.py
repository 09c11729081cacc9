"""ggml whose allocations, copies and computations fail when they are told to. Knows no engine.

It stands where ggml's functions stand, so everything above them is real. It also knows what was
made and not freed.
"""

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from quant.errors import BackendError
from quant.ggml_library import Ggml, load_ggml
from runner.answer import Cancelled, Emit
from runner.config import GenerateRequest
from runner.protocol import GenerateResult
from runner.session import Session
from tests.paths import ROOT

FAILED, OUT_OF_MEMORY = -1, -2  # ggml's statuses
RAISES = object()  # in the place of a result: ggml itself cannot say that such a call failed

# What a function returns when it fails, each a fault of its own. `init` and `gallocr_new` are not
# here: where they find no memory ggml ends the process.
RESULTS: dict[str, tuple[object, ...]] = {
    "backend_dev_init": (None,),
    "backend_alloc_ctx_tensors": (None,),
    "backend_dev_buffer_from_host_ptr": (None,),
    "backend_buft_alloc_buffer": (None,),
    "backend_event_new": (None,),
    "gallocr_reserve": (False,),
    "gallocr_alloc_graph": (False,),
    "backend_tensor_alloc": (FAILED, OUT_OF_MEMORY),
    "backend_graph_compute": (FAILED, OUT_OF_MEMORY),
    "backend_graph_compute_async": (FAILED, OUT_OF_MEMORY),
    "backend_tensor_set": (RAISES,),
    "backend_tensor_get": (RAISES,),
    "backend_tensor_memset": (RAISES,),
    "backend_tensor_set_async": (RAISES,),
    "backend_tensor_get_async": (RAISES,),
    "backend_synchronize": (RAISES,),
    "backend_event_record": (RAISES,),
    "backend_event_synchronize": (RAISES,),
}
_FREES = {  # who frees what these made
    "init": "free",
    "backend_dev_init": "backend_free",
    "backend_alloc_ctx_tensors": "backend_buffer_free",
    "backend_dev_buffer_from_host_ptr": "backend_buffer_free",
    "backend_buft_alloc_buffer": "backend_buffer_free",
    "backend_event_new": "backend_event_free",
    "gallocr_new": "gallocr_free",
}
# These fail when they have waited: nothing of a queue goes on behind an error.
_WAITS = ("backend_synchronize", "backend_event_synchronize")
_RUNNER = str(ROOT / "runner") + "/"


@dataclass(frozen=True)
class Site:
    """Where in `runner` a function of ggml is called."""

    function: str
    lines: tuple[str, ...] = ()  # the nearest first, as "kv_cache.py:84"; () = anywhere

    def __str__(self) -> str:
        return f"{self.function} at {' < '.join(self.lines) or 'any place'}"


@dataclass(frozen=True)
class Fault:
    """A call that fails."""

    site: Site
    result: object  # one of RESULTS
    number: int = 1  # of the call, counted at the site; 0 = every call

    @property
    def is_out_of_memory(self) -> bool:
        """Whether it says that memory is short."""
        is_opening = self.site.function == "backend_dev_init"  # which has other reasons
        return not is_opening and self.result is not RAISES and self.result != FAILED

    def __str__(self) -> str:
        how = "raises" if self.result is RAISES else f"returns {self.result}"
        return f"call {self.number or 'after call'} of {self.site} {how}"


class FailingGgml:
    """Replaces functions of a loaded ggml until `close`."""

    def __init__(self, ggml: Ggml, depth: int = 1) -> None:
        """depth: lines that make a site."""
        self.live: dict[tuple[str, int], Site] = {}  # what was made and not freed, and where
        self._ggml, self._depth = ggml, depth
        self._lock = threading.Lock()
        self._counts: Counter[Site] = Counter()
        self._fault: Fault | None = None
        self._met_by: list[str] = []
        replaced = {*RESULTS, *_FREES, *_FREES.values()}
        self._originals = {name: getattr(ggml, name) for name in replaced}
        for name in {*RESULTS, *_FREES}:
            setattr(ggml, name, self._failing(name))
        for name in _FREES.values():
            setattr(ggml, name, self._freeing(name))

    def close(self) -> None:
        """Put the functions back."""
        for name, function in self._originals.items():
            setattr(self._ggml, name, function)

    @contextmanager
    def counting(self) -> Iterator[Counter[Site]]:
        """The calls of every site meanwhile."""
        with self._lock:
            self._counts = counts = Counter()
        yield counts
        with self._lock:
            self._counts = Counter()

    @contextmanager
    def failing(self, fault: Fault) -> Iterator[list[str]]:
        """Let calls made meanwhile fail; yields the names of the threads that met the fault."""
        with self._lock:
            self._counts, self._fault, self._met_by = Counter(), fault, []
        try:
            yield self._met_by
        finally:
            with self._lock:
                self._fault = None

    def _failing(self, name: str) -> Callable[..., Any]:
        function, frees = self._originals[name], _FREES.get(name)

        def call(*arguments: Any) -> Any:
            site = Site(name, self._lines())
            fault = self._count(site)
            if fault is not None and fault.result is RAISES:
                if name in _WAITS:
                    function(*arguments)
                raise BackendError("the device failed, as the test wants")
            if fault is not None:
                return fault.result
            result = function(*arguments)
            if frees is not None and result:
                self.live[frees, result] = site
            return result

        return call

    def _count(self, site: Site) -> Fault | None:
        """Count a call; the fault that it meets."""
        with self._lock:
            fault = self._fault
            self._counts[site] += 1
            if fault is None or fault.site not in (site, Site(site.function)):
                return None
            if fault.site != site:
                self._counts[fault.site] += 1
            if fault.number not in (0, self._counts[fault.site]):
                return None
            self._met_by.append(threading.current_thread().name)
            return fault

    def _freeing(self, name: str) -> Callable[[int], None]:
        function = self._originals[name]

        def free(handle: int) -> None:
            del self.live[name, handle]  # a KeyError: freed twice
            function(handle)

        return free

    def _lines(self) -> tuple[str, ...]:
        lines: list[str] = []
        frame = sys._getframe(2)
        while frame is not None and len(lines) < self._depth:
            path = frame.f_code.co_filename
            if path.startswith(_RUNNER):
                lines.append(f"{path.removeprefix(_RUNNER)}:{frame.f_lineno}")
            frame = frame.f_back
        return tuple(lines)


class FailingSession(Session):
    """A session of a worker; the prompt "FAIL function" is answered on a device that fails there,
    at a call in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self._ggml = FailingGgml(load_ggml())

    def generate(
        self,
        request: GenerateRequest,
        emit: Emit,
        cancelled: Cancelled,
        between: Callable[[], None] = lambda: None,
    ) -> GenerateResult:
        """As `Session.generate`."""
        word, _, function = (request.prompt or "").partition(" ")
        if word != "FAIL":
            return super().generate(request, emit, cancelled, between)
        fault = Fault(Site(function), RESULTS[function][0], number=5)
        with self._ggml.failing(fault):
            return super().generate(request, emit, cancelled, between)
