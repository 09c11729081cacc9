"""An engine that only counts: frames as a real one sends them, with a router of fixed dice.

Every pair is counted once, so that all sums are right, and the slots are what was loaded last.
"""

import random
from collections import Counter
from dataclasses import dataclass, field, replace

from runner.expert_counts import ExpertCounts
from runner.frames import Frame, RunSettings
from runner.protocol import ModelInfo
from runner.stats import StatsSnapshot

START_S = 1_000_000.0


@dataclass
class FakeEngine:
    """Generates `tokens_per_frame` tokens a frame; slots == 0 is an engine without a cache."""

    n_layer: int = 32
    n_expert: int = 8
    n_used: int = 2
    slots: int = 4
    tokens_per_frame: int = 6
    settings: RunSettings = field(default_factory=lambda: RunSettings(False, "router", 0.08, False))
    name: str = "Fake 8x7B"
    pid: int = 4242
    dice: random.Random = field(default_factory=lambda: random.Random(1))

    def __post_init__(self) -> None:
        zeros = [[0] * self.n_expert for _ in range(self.n_layer)]
        self.grids = {
            name: [row[:] for row in zeros]
            for name in ("used", "missed", "substituted", "stood_in", "loaded")
        }
        self.classes = {name: [0] * self.n_layer for name in ("hit", "loaded", "substituted")}
        self.standins: Counter[tuple[int, int, int]] = Counter()
        n_slots = self.slots or self.n_expert
        self.residency = [list(range(n_slots)) for _ in range(self.n_layer)]
        self.n_tokens, self.n_frames, self.n_prompt = 0, 0, 24

    def frame(self, phase: str = "generating") -> Frame:
        """The next moment, a fifth of a second later."""
        self.n_frames += 1
        if phase == "generating" and not self.settings.is_paused:
            for _ in range(self.tokens_per_frame):
                self._token()
        return Frame(
            pid=self.pid,
            owner_pid=self.pid - 1,
            version="0.1.0",
            time_s=START_S + 0.2 * self.n_frames,
            phase=phase,
            memory_bytes=13_400_000_000,
            settings=self.settings,
            stats=self.stats(),
            model=self.model(),
        )

    def frames(self, n: int) -> list[Frame]:
        return [self.frame() for _ in range(n)]

    def model(self) -> ModelInfo:
        return ModelInfo(
            path="/models/fake.gguf", name=self.name, description="llama 8x7B Q4_K",
            architecture="llama", file_type="Q4_K - Medium", n_params=46_700_000_000,
            size_bytes=26_400_000_000, n_layer=self.n_layer, n_expert=self.n_expert,
            n_expert_used=self.n_used, n_ctx=8192, n_ctx_train=32768, n_threads=2, n_batch=512,
            cache_type_k="f16", cache_type_v="f16", chat_template="", device="AMD EPYC",
            load_s=0.5, ggml_version="0.9", moe_cache_bytes=12_000_000_000 if self.slots else 0,
            moe_cache_slots=(self.slots,) * self.n_layer if self.slots else (),
        )  # fmt: skip

    def stats(self) -> StatsSnapshot:
        zeros, nothing = (0,) * self.n_layer, (0.0,) * self.n_layer
        seconds = self.n_tokens * 0.03
        grids = {name: tuple(map(tuple, grid)) for name, grid in self.grids.items()}
        n_loaded = sum(self.classes["loaded"])
        n_pairs = max(1, self.n_tokens * self.n_used * self.n_layer)
        return StatsSnapshot(
            n_tokens_prompt=self.n_prompt, n_tokens_generated=self.n_tokens,
            n_past=self.n_prompt + self.n_tokens, n_ctx=8192, prompt_s=0.2, generation_s=seconds,
            compute_s=0.12 + seconds * 0.6, wait_s=0.06 + seconds * 0.3,
            python_s=0.02 + seconds * 0.1, n_routings=self.n_tokens * self.n_layer,
            hit=tuple(self.classes["hit"]), loaded=tuple(self.classes["loaded"]), on_host=zeros,
            substituted=tuple(self.classes["substituted"]), dropped=zeros,
            hit_weight=tuple(map(float, self.classes["hit"])),
            loaded_weight=tuple(map(float, self.classes["loaded"])), on_host_weight=nothing,
            substituted_weight=tuple(n / 2 for n in self.classes["substituted"]),
            dropped_weight=nothing, bytes_read=(n_loaded * 107_000_000, *zeros[1:]),
            n_evicted=zeros, n_slots=(self.slots,) * self.n_layer if self.slots else (),
            residency=tuple(map(tuple, self.residency)) if self.slots else (),
            read_s=n_loaded * 0.1, prefetch_used=0, prefetch_wasted=0,
            standin_share=sum(self.classes["substituted"]) / n_pairs / 2,
            buddy=self.settings.buddy, buddy_budget=self.settings.buddy_budget,
            output_entropy=1.5, repeated_4grams=0.0, n_verified=40, n_verified_agree=39,
            verified_kl_sum=0.3, verified_kl_max=0.1, verify_s=1.0,
            uptime_s=10 + 0.2 * self.n_frames,
            experts=ExpertCounts(
                **grids, buddies=tuple((*key, n) for key, n in sorted(self.standins.items()))
            ),
        )  # fmt: skip

    def _token(self) -> None:
        self.n_tokens += 1
        for layer in range(self.n_layer):
            weights = [
                1 / (1 + (expert + layer) % self.n_expert) for expert in range(self.n_expert)
            ]
            chosen: set[int] = set()
            while len(chosen) < self.n_used:
                chosen |= set(self.dice.choices(range(self.n_expert), weights))
            for expert in chosen:
                self._pair(layer, expert)

    def _pair(self, layer: int, expert: int) -> None:
        self.grids["used"][layer][expert] += 1
        slots = self.residency[layer]
        if expert in slots:
            self.classes["hit"][layer] += 1
            return
        self.grids["missed"][layer][expert] += 1
        if not self.settings.is_exact and self.dice.random() < 0.3:
            by = self.dice.choice(slots)
            self.classes["substituted"][layer] += 1
            self.grids["substituted"][layer][expert] += 1
            self.grids["stood_in"][layer][by] += 1
            self.standins[layer, expert, by] += 1
        else:
            self.classes["loaded"][layer] += 1
            self.grids["loaded"][layer][expert] += 1
            slots[self.dice.randrange(len(slots))] = expert


@dataclass
class FakeOwner:
    """Keeps what it was asked, or refuses with an error."""

    engine: FakeEngine
    error: Exception | None = None
    asked: list[dict[str, object]] = field(default_factory=list)

    def change(
        self,
        is_exact: bool | None = None,
        buddy: str | None = None,
        buddy_budget: float | None = None,
        is_paused: bool | None = None,
    ) -> None:
        values = {
            "is_exact": is_exact,
            "buddy": buddy,
            "buddy_budget": buddy_budget,
            "is_paused": is_paused,
        }
        wanted = {name: value for name, value in values.items() if value is not None}
        self.asked.append(wanted)
        if self.error is not None:
            raise self.error
        self.engine.settings = replace(self.engine.settings, **wanted)  # type: ignore[arg-type]
