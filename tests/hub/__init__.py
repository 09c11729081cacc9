"""A hub on this machine, and what is built on it."""
