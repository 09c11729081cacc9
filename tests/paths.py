"""Where the files lie that tests read."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "runner" / "demo" / "buddy-demo-q8_0.gguf"
HELD_OUT = ROOT / "tests" / "data" / "held_out"
