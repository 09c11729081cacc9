"""Cases: a table of named files, each made from the small good one by one change."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.gguf_writer import Gguf, small_mixtral

Builder = Callable[[Path], Path]

NORM = "blk.0.attn_norm.weight"


@dataclass
class Cases:
    """Builders by name; each writes its file at the path it is given, returns the one to open."""

    builders: dict[str, Builder] = field(default_factory=dict)

    def add(self, case: str, build: Callable[[], Gguf | bytes]) -> None:
        """A file made of the bytes, or of the parts, that `build` returns."""

        def write(path: Path) -> Path:
            made = build()
            path.write_bytes(made if isinstance(made, bytes) else made.packed())
            return path

        assert case not in self.builders, case
        self.builders[case] = write

    def add_sparse(self, case: str, build: Callable[[], bytes], n_bytes: int) -> None:
        """A file that starts with some bytes and is zeros up to its length, taking no space."""

        def write(path: Path) -> Path:
            path.write_bytes(build())
            os.truncate(path, n_bytes)
            return path

        self.builders[case] = write

    def add_key(self, case: str, key: str, type_: int, value: Any) -> None:
        """The good file with one metadata key set."""
        self.add(case, lambda: small_mixtral().with_key(key, type_, value))

    def add_tensor(self, case: str, tensor: str = NORM, /, **changes: Any) -> None:
        """The good file with one tensor's entry changed."""
        self.add(case, lambda: small_mixtral().with_tensor(tensor, **changes))
