"""The monitor's widgets. They receive values through reactives and report through messages."""
