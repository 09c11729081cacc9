"""The worker's process: how it is started, where it lives, why it ended."""
