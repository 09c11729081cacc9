"""How many experts each eviction policy finds in memory, on real text of six domains.

    python -m tests.cache_hits [MODEL] [--slots 2,3,4] [--policies lru,lfu,static] [--tokens N]

Prints a Markdown table per number of slots: the share of hits over decoded tokens, in percent. The
router's choices are recorded once and replayed for every policy; that a replay counts what an
engine counts is checked first. MODEL must fit into memory: elsewhere an engine fills its slots
before the first token.
"""

import argparse
import sys
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np

from quant.gguf_file import GGUFFile
from runner.batch_graph import BatchGraph
from runner.checks.read_model import read_model
from runner.config import MOE_CACHE_OFF, EngineConfig
from runner.engine import Engine
from runner.experts.slot_table import EMPTY, SlotTable
from runner.tokenizer import Tokenizer
from tests.paths import DEMO, HELD_OUT

ALL = "all in a row"
MAX_CTX = 1024  # then the context is emptied and the text goes on


# what is recorded


def held_out_tokens(path: Path, n_tokens: int) -> dict[str, list[int]]:
    """The first tokens of each domain's text."""
    with Tokenizer(path) as tokenizer:
        return {
            text.stem: tokenizer.tokenize(text.read_text(), add_special=True, parse_special=True)[
                :n_tokens
            ]
            for text in sorted(HELD_OUT.glob("*.txt"))
        }


def decode_all(engine: Engine, tokens: list[int]) -> None:
    """Decode a text token by token, its own tokens whatever the model says."""
    engine.reset()
    for token in tokens:
        if engine.n_past == engine.n_ctx:
            engine.reset()
        engine.decode(token)


def record(path: Path, texts: dict[str, list[int]], n_threads: int) -> dict[str, np.ndarray]:
    """The router's choices in each text: (n_tokens, n_layer, n_expert_used)."""
    config = EngineConfig(n_threads=n_threads, n_ctx=MAX_CTX, moe_cache_bytes=MOE_CACHE_OFF)
    seen: list[np.ndarray] = []
    route = BatchGraph.route

    def route_and_keep(graph: BatchGraph, layer: int) -> np.ndarray:
        expert_ids = route(graph, layer)
        seen.append(expert_ids[0].copy())  # the next layer overwrites it
        return expert_ids

    engine = Engine(path, config)
    choices = {}
    with patch.object(BatchGraph, "route", route_and_keep):
        for name, tokens in texts.items():
            seen.clear()
            decode_all(engine, tokens)
            choices[name] = np.reshape(seen, (len(tokens), engine.model_config.n_layer, -1))
    engine.close()
    return choices


# what is replayed


def replayed_hits(choices: np.ndarray, n_expert: int, n_slots: int, policy: str) -> int:
    """Hits of an empty cache that serves these choices as the engine does."""
    table = SlotTable((n_slots,) * choices.shape[1], n_expert, policy)
    _fill(table, 0, [0])  # the engine reads one expert to measure how long that takes
    table.unpin(0, [0])  # which nobody asked for
    return sum(
        _serve(table, layer, expert_ids)
        for token in choices
        for layer, expert_ids in enumerate(token)
    )


def _serve(table: SlotTable, layer: int, expert_ids: np.ndarray) -> int:
    """Bring one token's experts into slots; returns how many were there."""
    table.record_use(layer, expert_ids[None])
    slots = table.slot_of[layer, expert_ids]
    hits, missing = slots[slots != EMPTY], expert_ids[slots == EMPTY]
    if len(missing):
        table.hold_only(layer, hits)
        worth = table.worth(layer)
        _fill(table, layer, sorted(missing.tolist(), key=lambda expert: (worth[expert], expert)))
        table.release(layer)
    return len(hits)


def _fill(table: SlotTable, layer: int, experts: Sequence[int]) -> None:
    """Load experts, the first of them making room for the others if it must."""
    waiting = deque(experts)
    while waiting:
        if not table.can_take(layer):
            table.release(layer)  # what is computed may leave
        taken = []
        while waiting and table.can_take(layer):
            taken.append(table.take(layer, waiting.popleft()))
        for slot in taken:
            table.commit(layer, slot)


def counted_hits(path: Path, tokens: list[int], n_slots: int, policy: str, n_threads: int) -> int:
    """What an engine with this cache counts in a text."""
    config = EngineConfig(
        n_threads=n_threads,
        n_ctx=MAX_CTX,
        moe_cache_slots=n_slots,
        moe_cache_policy=policy,
        moe_miss="load",
    )
    engine = Engine(path, config)
    decode_all(engine, tokens)
    n_hit = sum(engine.snapshot().hit)
    engine.close()
    return n_hit


# what no cache can do better


def most_hits(choices: np.ndarray, n_slots: int) -> int:
    """The hits of a cache that knows the future: it keeps what is asked for again soonest.

    An upper bound for every policy, since a missing expert need not stay. L. A. Belady, "A study of
    replacement algorithms for a virtual-storage computer", IBM Systems Journal 5 (1966).
    """
    return sum(
        _most_hits_of_layer(choices[:, layer], n_slots, {0} if layer == 0 else set())
        for layer in range(choices.shape[1])
    )


def _most_hits_of_layer(choices: np.ndarray, n_slots: int, resident: set[int]) -> int:
    """choices (n_tokens, n_expert_used) of one layer; resident: what is there at the start."""
    coming: dict[int, deque[int]] = defaultdict(deque)  # the tokens that ask for each expert
    for token, experts in enumerate(choices.tolist()):
        for expert in experts:
            coming[expert].append(token)
    n_hit = 0
    for experts in choices.tolist():
        n_hit += len(resident.intersection(experts))
        for expert in experts:
            coming[expert].popleft()
        wanted = [expert for expert in resident.union(experts) if coming[expert]]
        resident = set(sorted(wanted, key=lambda expert: coming[expert][0])[:n_slots])
    return n_hit


# the tables


def rows(
    choices: dict[str, np.ndarray], n_expert: int, n_slots: int, policies: list[str]
) -> Iterator[tuple[str, list[float]]]:
    """Name and share of hits in each text, policy by policy and then the bounds."""
    for policy in policies:
        yield (
            policy,
            [replayed_hits(c, n_expert, n_slots, policy) / c.size for c in choices.values()],
        )
    yield "best possible", [most_hits(c, n_slots) / c.size for c in choices.values()]
    yield "chance", [n_slots / n_expert] * len(choices)


def check_replay(
    path: Path, text: list[int], choices: np.ndarray, n_expert: int, options: argparse.Namespace
) -> None:
    """End with an error when an engine counts other hits than a replay."""
    n_slots = options.slots[0]
    for policy in options.policies:
        counted = counted_hits(path, text, n_slots, policy, options.threads)
        replayed = replayed_hits(choices, n_expert, n_slots, policy)
        if counted != replayed:
            sys.exit(f"{policy}, {n_slots} slots: an engine counts {counted} hits, not {replayed}")
        print(f"{policy}: an engine counts {counted} hits too", file=sys.stderr, flush=True)


def main() -> None:
    options = parsed()
    texts = held_out_tokens(options.model, options.tokens)
    choices = record(options.model, texts, options.threads)
    n_expert = expert_count(options.model)
    first = next(iter(texts))
    check_replay(options.model, texts[first], choices[first], n_expert, options)
    choices[ALL] = np.concatenate(list(choices.values()))
    print(f"{len(choices[ALL])} tokens, {n_expert} experts, {choices[ALL].shape[2]} of them used")
    for n_slots in options.slots:
        print(f"\n| {n_slots} slots, hits in % | " + " | ".join(choices) + " |")
        print("|---" * (len(choices) + 1) + "|")
        for name, shares in rows(choices, n_expert, n_slots, options.policies):
            print(f"| {name} | " + " | ".join(f"{100 * s:.1f}" for s in shares) + " |", flush=True)


def expert_count(path: Path) -> int:
    with GGUFFile.open(path) as file:
        return read_model(file).n_expert


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path, default=DEMO)
    parser.add_argument("--slots", type=lambda s: [int(n) for n in s.split(",")], default=[3])
    parser.add_argument("--policies", type=lambda s: s.split(","), default=["lru", "lfu", "static"])
    parser.add_argument("--tokens", type=int, default=1500, help="of each domain")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
