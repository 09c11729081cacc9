"""Whether the model's file is still the one that was loaded. Reads no weights."""

from quant.gguf_file import GGUFFile
from runner.errors import ModelError


def check_unchanged(file: GGUFFile) -> None:
    """Raise ModelError when bytes of the open file may have changed since it was opened.

    A file that was deleted or replaced by another one keeps its old bytes while it is open.
    """
    change = file.find_change()
    if change is not None and not change.is_data_intact:
        raise ModelError(
            f"{change.path} {change.description} since it was loaded; its weights can no "
            "longer be trusted: load the model again"
        )
