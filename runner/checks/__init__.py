"""Refuses in plain words what native code would answer by ending the process."""
