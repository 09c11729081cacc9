"""The command `doctor`: asks the worker what ggml can compute on, looks for GPUs, prints both.

When native code ends the worker while it measures, the rest is told without the figures.
"""

import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict

from quant.ggml_library import SUPPORTED_LLAMA_CPP_PYTHON
from runner.doctor_report import Bandwidth, DoctorReport
from runner.errors import BuddyrunError
from runner.gpu_advice import Installer, judge, lacking_install
from runner.gpu_hardware import SystemPlaces, find_gpus
from runner.protocol import DoctorFields
from runner.terminal.cli_options import Params
from runner.terminal.doctor_text import Diagnosis, format_diagnosis
from runner.terminal.status_line import StatusLine
from runner.terminal.terminal_text import visible

_OVERRIDE = "LLAMA_CPP_LIB_PATH"


def examine_machine(params: Params, environment: Mapping[str, str]) -> int:
    """Print what was found; returns the exit status, 1 when ggml cannot be loaded."""
    report, notes = _ask(not params["no_measure"], params["verbose"])
    gpus = judge(find_gpus(SystemPlaces(search_path=environment.get("PATH", ""))), report)
    has_pip = importlib.util.find_spec("pip") is not None
    installer = Installer(sys.executable, has_pip, sys.platform == "win32")
    install = lacking_install(gpus, report, installer)
    diagnosis = Diagnosis(report, gpus, install, notes, environment.get(_OVERRIDE, ""))
    if params["as_json"]:
        print(json.dumps(_as_values(diagnosis), indent=2))
    else:
        print(visible(format_diagnosis(diagnosis)))
    return 1 if report.problem else 0


def _ask(measure: bool, is_verbose: bool) -> tuple[DoctorReport, tuple[str, ...]]:
    """The worker's report, and what went wrong on the way to it."""
    stage = ""

    def on_progress(text: str, done: int, total: int) -> None:
        nonlocal stage
        stage = text
        status.show_progress(text, done, total)

    from runner.engine_client import Client

    status = StatusLine(sys.stderr)
    with Client.start() as client:
        try:
            return client.doctor(DoctorFields(measure), on_progress), ()
        except BuddyrunError as error:
            if is_verbose:
                print(visible(client.log), file=sys.stderr)
            problem = str(error)
        finally:
            status.clear()
    if not stage:
        return _unusable(problem), ()
    report, _ = _ask(False, is_verbose)
    return report, (f"Nothing could be measured: {stage} failed. {problem}",)


def _unusable(problem: str) -> DoctorReport:
    """What is known when the worker cannot even list the devices."""
    return DoctorReport(problem, "", (), "", (), (), "", Bandwidth(None, "ggml cannot be loaded"))


def _as_values(diagnosis: Diagnosis) -> dict[str, object]:
    values = asdict(diagnosis)
    report = values.pop("report")
    return {"supported_llama_cpp_python": SUPPORTED_LLAMA_CPP_PYTHON, **report, **values}
