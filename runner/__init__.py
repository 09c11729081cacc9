"""The engine, its worker process and the commands. Knows no widget."""
