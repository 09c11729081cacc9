"""A small file that remembers how often each expert was asked for. Knows no slots.

With it a run begins with the experts that earlier runs used most. One JSON object: `format`,
`version`, `model` (what it belongs to) and `uses`, a list of n_expert counts for each layer.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from quant.gguf_file import GGUFFile
from runner.errors import OptionError
from runner.model_config import ModelConfig

FORMAT = "buddyrun-expert-uses"
VERSION = 1
_MAX_BYTES = 64 << 20
_MAX_USES = 1 << 53  # what JSON readers keep exact


class UsageFile:
    """The counts of one model in one file, which need not exist yet."""

    def __init__(self, path: str | Path, file: GGUFFile, config: ModelConfig) -> None:
        """Read the file, or make it.

        Raises OptionError when it cannot be read or made, is none of these files or another
        model's.
        """
        self._path = Path(path)
        self._model = {
            "n_layer": config.n_layer,
            "n_expert": config.n_expert,
            "size_bytes": file.size_bytes,
        }
        self.earlier = np.zeros((config.n_layer, config.n_expert), np.int64)
        if self._path.exists():
            self.earlier[:] = self._read()
        self.save(np.zeros_like(self.earlier))  # what cannot be written is told now

    def save(self, uses: np.ndarray) -> None:
        """Write earlier counts plus `uses` (n_layer, n_expert), whole or not at all.

        Raises OptionError when the file cannot be written.
        """
        total = np.minimum(self.earlier + uses, _MAX_USES)
        document = {
            "format": FORMAT, "version": VERSION, "model": self._model, "uses": total.tolist(),
        }  # fmt: skip
        target = Path(os.path.realpath(self._path))
        draft = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            draft.write_text(json.dumps(document) + "\n")
            os.replace(draft, target)
        except OSError as error:
            with suppress(OSError):
                draft.unlink()
            raise OptionError(
                f"--moe-cache-profile: cannot write {self._path}: {error.strerror}"
            ) from error

    def _read(self) -> Any:
        try:
            if not self._path.is_file() or self._path.stat().st_size > _MAX_BYTES:
                raise self._not_a_profile("it is no small regular file")
            document = json.loads(self._path.read_bytes())
        except OSError as error:
            raise OptionError(
                f"--moe-cache-profile: cannot read {self._path}: {error.strerror}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise self._not_a_profile("it is not JSON") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise self._not_a_profile(f"it lacks 'format': '{FORMAT}'")
        if document.get("version") != VERSION:
            raise self._not_a_profile(f"its version is {document.get('version')!r:.20}")
        if document.get("model") != self._model:
            raise self._not_a_profile("it belongs to another model")
        uses = document.get("uses")
        if not self._are_counts(uses):
            raise self._not_a_profile("its counts are not n_layer lists of n_expert whole numbers")
        return uses

    def _are_counts(self, uses: object) -> bool:
        n_layer, n_expert = self.earlier.shape
        return (
            isinstance(uses, list)
            and len(uses) == n_layer
            and all(isinstance(row, list) and len(row) == n_expert for row in uses)
            and all(type(n) is int and 0 <= n <= _MAX_USES for row in uses for n in row)
        )

    def _not_a_profile(self, reason: str) -> OptionError:
        return OptionError(
            f"--moe-cache-profile: {self._path} is no profile of this model: {reason}; "
            "name another file, or remove it"
        )
