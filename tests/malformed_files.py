"""All malformed files by name: `BUILDERS[name](path)` writes one and returns the path to open."""

from tests.gguf_writer import write_small_mixtral
from tests.malformed_cases import Builder, Cases
from tests.malformed_headers import add_header_cases
from tests.malformed_models import add_model_cases

__all__ = ["BUILDERS", "write_small_mixtral"]


def _all_builders() -> dict[str, Builder]:
    cases = Cases()
    add_header_cases(cases)
    add_model_cases(cases)
    return cases.builders


BUILDERS = _all_builders()
