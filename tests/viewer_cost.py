"""What viewers cost a run: its speed with 0, 1 and 10 in turns, and what their thread takes.

    python -m tests.viewer_cost [ROUNDS] [MODEL]

Each viewer is a process that reads frames as `buddyrun top --json --follow` does. The engine is the
demo model with half of its experts, one thread, so that a core is left for the viewers.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from runner.config import EngineConfig, GenerateRequest, SamplingConfig
from runner.engine_client import Client
from runner.protocol import GenerateResult
from tests.paths import DEMO, ROOT

N_TOKENS = 900
TURNS = (0, 1, 10)
VIEWER = """
import sys
from runner.watch import Watch
frames = Watch(int(sys.argv[1])).frames()
next(frames)
print(flush=True)
for frame in frames: pass
"""


def main() -> None:
    n_rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    model = Path(sys.argv[2]) if len(sys.argv) > 2 else DEMO
    speeds: dict[int, list[float]] = {n: [] for n in TURNS}
    shares: dict[int, list[float]] = {n: [] for n in TURNS}
    with Client.start() as client:
        info = client.load(model, config())
        print(f"{info.name}, {N_TOKENS} tokens an answer, {n_rounds} rounds of {TURNS} viewers")
        answer(client)
        thread = viewers_thread(client.pid)
        for number in range(n_rounds):
            for n_viewers in TURNS if number % 2 else reversed(TURNS):
                with viewers(client.pid, n_viewers):
                    before_s = seconds(thread)
                    result = answer(client)
                    spent_s = seconds(thread) - before_s
                speeds[n_viewers].append(result.n_generated / result.generation_s)
                shares[n_viewers].append(spent_s / result.generation_s)
    for n_viewers in TURNS:
        ratios = [a / b for a, b in zip(speeds[n_viewers], speeds[0], strict=True)]
        print(
            f"{n_viewers:>2} viewers: {statistics.median(speeds[n_viewers]):7.1f} t/s,"
            f" ratio {statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f}),"
            f" their thread {statistics.median(shares[n_viewers]):.2%} of a core"
        )


def config() -> EngineConfig:
    return EngineConfig(n_ctx=2048, moe_cache_slots=4, buddy="auto", n_threads=1)


def answer(client: Client) -> GenerateResult:
    sampling = SamplingConfig(seed=1, ignore_eos=True)
    request = GenerateRequest(prompt="Once upon a time", n_predict=N_TOKENS, sampling=sampling)
    *_, result = client.generate(request)
    assert isinstance(result, GenerateResult) and result.n_generated == N_TOKENS
    return result


@contextmanager
def viewers(pid: int, n: int) -> Iterator[None]:
    """So many processes that watch, all of them connected."""
    with ExitStack() as owned:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", VIEWER, str(pid)], cwd=ROOT, stdout=subprocess.PIPE
            )
            for _ in range(n)
        ]
        for process in processes:
            owned.callback(process.communicate)
            owned.callback(process.kill)
        for process in processes:
            assert process.stdout is not None and process.stdout.readline()
        yield


def viewers_thread(pid: int) -> Path:
    """The thread that works while the engine does nothing and somebody watches."""
    with viewers(pid, 1):
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        before = {task: seconds(task) for task in tasks}
        time.sleep(5)
        return max(tasks, key=lambda task: seconds(task) - before[task])


def seconds(task: Path) -> float:
    """Processor time of a thread so far."""
    n_ns: str = (task / "schedstat").read_text().split()[0]
    return int(n_ns) / 1e9


if __name__ == "__main__":
    main()
