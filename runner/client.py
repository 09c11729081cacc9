"""The names that screens may use, and no others: `tui` imports this module only.

Nothing here loads native code, numpy or torch.
"""

from runner.byte_sizes import bytes_text
from runner.chat import Chat
from runner.config import BUDDY_POLICIES, EngineConfig, GenerateRequest
from runner.engine_client import Client
from runner.errors import BuddyrunError, CancelledError, OptionError, WorkerDiedError
from runner.expert_counts import ExpertCounts
from runner.frames import Frame, RunSettings
from runner.protocol import GenerateResult, ModelInfo, PromptProgress, TextPiece
from runner.recording import Recorder, Replay
from runner.screens import ChatRequest, MonitorRequest, Screens
from runner.stats import StatsRates, StatsSnapshot
from runner.terminal.chat_commands import complete
from runner.terminal.chat_input import is_open
from runner.terminal.chat_view import eight_labels, info_lines, remarks_on_end, summary
from runner.terminal.conversation import ChatSettings, Conversation
from runner.terminal.history import LineHistory
from runner.terminal.terminal_text import visible, visible_line
from runner.terminal.thinking import Part, ThinkingSplitter
from runner.version import version
from runner.watch import Running, Watch, find

__all__ = [
    "BUDDY_POLICIES",
    "BuddyrunError",
    "CancelledError",
    "Chat",
    "ChatRequest",
    "ChatSettings",
    "Client",
    "Conversation",
    "EngineConfig",
    "ExpertCounts",
    "Frame",
    "GenerateRequest",
    "GenerateResult",
    "LineHistory",
    "ModelInfo",
    "MonitorRequest",
    "OptionError",
    "Part",
    "PromptProgress",
    "Recorder",
    "Replay",
    "RunSettings",
    "Running",
    "Screens",
    "StatsRates",
    "StatsSnapshot",
    "TextPiece",
    "ThinkingSplitter",
    "Watch",
    "WorkerDiedError",
    "bytes_text",
    "complete",
    "eight_labels",
    "find",
    "info_lines",
    "is_open",
    "remarks_on_end",
    "summary",
    "version",
    "visible",
    "visible_line",
]
