"""Which buddyrun this is."""

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version


def version() -> str:
    """The installed version, "not installed" in a bare checkout."""
    try:
        return installed_version("buddyrun")
    except PackageNotFoundError:
        return "not installed"
