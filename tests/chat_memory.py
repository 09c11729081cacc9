"""What a chat takes of anonymous memory, in a process of its own: python -m tests.chat_memory MODEL

Prints JSON, megabytes by process. The weights are file pages and do not count.
"""

import json
import sys
from pathlib import Path

from runner.client import Client
from runner.config import EngineConfig, GenerateRequest, SamplingConfig
from runner.protocol import GenerateResult

REQUEST = GenerateRequest(
    prompt="w1 w2 w3 " * 100, n_predict=64, sampling=SamplingConfig(ignore_eos=True)
)


def main() -> None:
    with Client.start() as client:
        client.load(sys.argv[1], EngineConfig(n_threads=2))
        *_, result = client.generate(REQUEST)
        assert isinstance(result, GenerateResult) and result.n_generated == 64
        used = {
            "the engine's process": anonymous_megabytes(str(client.pid)),
            "the terminal's process": anonymous_megabytes("self"),
        }
    print(json.dumps(used))


def anonymous_megabytes(pid: str) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
