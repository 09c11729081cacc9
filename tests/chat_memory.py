"""What a chat takes of anonymous memory, measured in a process of its own.

    python -m tests.chat_memory MODEL [N_WORDS]

Prints JSON, megabytes by process, after a prompt of N_WORDS words and 64 tokens of answer. The
weights are file pages and do not count; keys and values take memory as the context fills.
"""

import json
import sys
from pathlib import Path

from runner.config import EngineConfig, GenerateRequest, SamplingConfig
from runner.engine_client import Client
from runner.protocol import GenerateResult

N_WORDS = 300


def main() -> None:
    n_words = int(sys.argv[2]) if len(sys.argv) > 2 else N_WORDS
    request = GenerateRequest(
        prompt="w1 " * n_words, n_predict=64, sampling=SamplingConfig(ignore_eos=True)
    )
    with Client.start() as client:
        client.load(sys.argv[1], EngineConfig(n_threads=2))
        *_, result = client.generate(request)
        assert isinstance(result, GenerateResult) and result.n_generated == 64
        print(f"{result.n_past} tokens in the context", file=sys.stderr)
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
