"""The errors a user can cause at the level of files and devices. Knows no model."""


class BuddyrunError(Exception):
    """A problem that the user can understand and act on: what was found, expected, what to do.

    Everything below `BuddyrunError` is printed as one message without a traceback.
    """


class GGUFError(BuddyrunError):
    """A GGUF file is not what it says it is: what was found, where, what was expected."""


class BackendError(BuddyrunError):
    """The ggml libraries are missing, do not fit, or a device refused an operation."""


class OutOfMemoryError(BackendError):
    """A device has not as much memory as was asked for."""
