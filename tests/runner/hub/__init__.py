"""Tests of models from a hub, against a hub on this machine."""
