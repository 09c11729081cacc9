"""Why a worker ended, in plain words, from its exit status and its last lines on stderr."""

import re
import signal
from dataclasses import dataclass
from pathlib import Path

# Windows ends a process with a status where others use a signal.
_WINDOWS_STATUS = {
    0xC0000005: "SIGSEGV",
    0xC0000006: "SIGBUS",
    0xC0000017: "SIGKILL",
    0xC000001D: "SIGILL",
    0xC0000409: "SIGABRT",
}
_GPU_ERROR = r"(?:CUDA|ROCm|MUSA) error: "
_DEVICE_MEMORY = re.compile(
    rf"OutOfDeviceMemory|{_GPU_ERROR}out of memory|cudaMalloc failed|"
    r"CUBLAS_STATUS_ALLOC_FAILED|resource allocation failed"
)
_DEVICE_LOST = re.compile(
    r"DeviceLost|device was lost|device lost|unspecified launch failure|fallen off|ECC error"
)
_OTHER_GPU = re.compile(r"no kernel image|unsupported toolchain|invalid device function")
_TELLING = re.compile(
    rf"GGML_ASSERT|{_GPU_ERROR}|failed to allocate|out of memory|OutOfDeviceMemory|DeviceLost|"
    r"bad_alloc|\.(?:c|cc|cpp|cu|cuh|h|hpp|m):\d+: (?!(?:CUDA|ROCm|MUSA) error)"
)
_NOT_A_CAUSE = re.compile(r"Fatal Python error|Extension modules:|Current thread|Thread 0x")


@dataclass(frozen=True)
class Circumstances:
    """What is remembered while a worker lives, to compare with when it has died."""

    model: Path | None = None
    model_bytes: int = 0
    oom_kills: int | None = None  # the kernel's count; None where it does not tell

    @staticmethod
    def now(model: Path | None) -> "Circumstances":
        """Take note of the model file and of how often memory has run out so far."""
        try:
            n_bytes = model.stat().st_size if model else 0
        except OSError:
            n_bytes = 0
        return Circumstances(model, n_bytes, _oom_kills())


def lacked_device_memory(status: int | None, log: str) -> bool:
    """Whether a worker with this exit status and stderr text ended because a GPU's memory ran
    out. That some was refused earlier, when the model was loaded, does not count."""
    is_abort = status is not None and _signal_name(status) == "SIGABRT"
    return is_abort and _DEVICE_MEMORY.search(_telling_line(log)) is not None


def explain(status: int | None, log: str, before: Circumstances) -> str:
    """One or two sentences on why a worker with this exit status and stderr text has ended;
    the status None means that it had to be killed."""
    if status is None:
        return "The engine's process stopped answering and was ended."
    match _signal_name(status):
        case "SIGBUS":
            return _sigbus(before)
        case "SIGABRT":
            return _sigabrt(log)
        case "SIGKILL":
            return _sigkill(before)
        case "SIGSEGV":
            return "The engine crashed (SIGSEGV: a wrong memory access in native code)."
        case "SIGILL":
            return (
                "The engine crashed (SIGILL): the installed llama-cpp-python uses instructions that"
                " this processor lacks; install a build made for it."
            )
        case "SIGTERM":
            return "The engine was ended from outside (SIGTERM)."
        case "":
            return _exited(status, log)
        case name:
            return f"The engine was ended by {name}."


def _signal_name(status: int) -> str:
    if status in _WINDOWS_STATUS:
        return _WINDOWS_STATUS[status]
    number = -status if status < 0 else status - 128
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}" if status < 0 else ""


def _sigbus(before: Circumstances) -> str:
    if before.model is None:
        return "The engine crashed (SIGBUS): a file that it reads was cut short."
    try:
        n_bytes = before.model.stat().st_size
    except FileNotFoundError:
        found = "it is no longer there"
    except OSError as error:
        found = error.strerror or str(error)
    else:
        found = "its disk may have failed or been removed"
        if n_bytes != before.model_bytes:
            found = f"it has {n_bytes} bytes now and had {before.model_bytes} when it was loaded"
    return (
        f"The engine could no longer read the model file {before.model} (SIGBUS): {found}."
        " A model must not change while it is in use."
    )


def _sigabrt(log: str) -> str:
    line = _telling_line(log)
    if _DEVICE_MEMORY.search(line):
        return f"The GPU ran out of memory ({line})."
    if _DEVICE_LOST.search(line):
        return (
            f"The GPU was lost ({line}): its driver gave up, as after an update, a standby or too"
            " much heat. --device cpu goes on without it."
        )
    if _OTHER_GPU.search(line):
        return (
            f"The installed llama-cpp-python was not built for this GPU ({line}): buddyrun doctor"
            " says how to build it, --device cpu goes on without it."
        )
    if "bad_alloc" in line or re.search("out of memory|failed to allocate", line):
        return f"The engine ran out of memory ({line}). A smaller context (-c) needs less."
    if not line:
        return "The engine stopped itself (SIGABRT) and did not say why."
    return f"The engine stopped itself because a check in native code failed: {line}"


def _sigkill(before: Circumstances) -> str:
    advice = " A smaller context (-c) or model needs less memory."
    kills = _oom_kills()
    if kills is None or before.oom_kills is None:
        return "The engine was killed (SIGKILL), most often because memory ran out." + advice
    if kills > before.oom_kills:
        return f"The system ran out of memory{_memory_limit()} and killed the engine." + advice
    return (
        "The engine was killed from outside (SIGKILL): by a person, or by a service that watches"
        " over memory or time."
    )


def _exited(status: int, log: str) -> str:
    line = _telling_line(log)
    missing = re.search(r"No module named '([\w.]+)'", line)
    if missing:
        package = missing[1].partition(".")[0]
        package = "llama-cpp-python" if package == "llama_cpp" else package
        return f"The engine could not start: the Python package {package} is not installed."
    said = f": {line}" if line else " and did not say why."
    return f"The engine ended with exit status {status}{said}"


def _telling_line(log: str) -> str:
    """The line that says what went wrong: an assertion if there is one, else the last line
    before the dump that Python adds."""
    lines = [line.strip() for line in log.splitlines()]
    for number, line in enumerate(lines):
        if _NOT_A_CAUSE.search(line):
            lines = lines[:number]
            break
    telling = [line for line in lines if _TELLING.search(line)]
    last = [line for line in lines if line][-1:]
    return (telling[-1:] or last or [""])[0][-500:]


def _oom_kills() -> int | None:
    """How many processes the kernel has killed for lack of memory, here or in any cgroup."""
    found = re.search(r"^oom_kill (\d+)$", _read("/proc/vmstat"), re.MULTILINE)
    return int(found[1]) if found else None


def _memory_limit() -> str:
    """The limit of this process's cgroup in words, or nothing."""
    groups = _read("/proc/self/cgroup")
    version_1 = re.search(r"^\d+:memory:/(.*)$", groups, re.MULTILINE)
    version_2 = re.search(r"^0::/(.*)$", groups, re.MULTILINE)
    limit = ""
    if version_1:
        limit = _read(f"/sys/fs/cgroup/memory/{version_1[1]}/memory.limit_in_bytes")
    elif version_2:
        limit = _read(f"/sys/fs/cgroup/{version_2[1]}/memory.max")
    if not limit.strip().isdigit() or int(limit) > 1 << 50:
        return ""
    return f" (the limit here is {int(limit) / 2**30:.1f} GiB)"


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
