"""Widgets. They know values and messages, no engine."""
