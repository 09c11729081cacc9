"""The errors a user can cause while running a model, and how they cross the process boundary."""

from quant.errors import BackendError, BuddyrunError, GGUFError, OutOfMemoryError

__all__ = [
    "BackendError",
    "BuddyrunError",
    "CancelledError",
    "ContextFullError",
    "GGUFError",
    "HubError",
    "InternalError",
    "ModelError",
    "OptionError",
    "OutOfMemoryError",
    "ProfileError",
    "TemplateError",
    "WorkerDiedError",
]


class ModelError(BuddyrunError):
    """The file is a valid GGUF, but its model cannot be run: wrong keys, shapes or architecture."""


class HubError(BuddyrunError):
    """A model cannot be got from a hub or kept on this machine; says what to do."""


class OptionError(BuddyrunError):
    """A setting has a value that cannot work; the message names the setting and its range."""


class ProfileError(BuddyrunError):
    """A profile of buddies cannot be made, read or used with this model; says what to do."""


class ContextFullError(BuddyrunError):
    """The prompt, or prompt and answer together, do not fit the context; carries token counts."""


class TemplateError(BuddyrunError):
    """The chat template failed, took too long or refused the conversation."""


class WorkerDiedError(BuddyrunError):
    """The engine's process ended by itself; the message says why in plain words."""


class CancelledError(Exception):
    """The user stopped a computation; not an error, and never shown."""


class InternalError(BuddyrunError):
    """A mistake in buddyrun itself, met in the engine's process; the trace is in its log."""
