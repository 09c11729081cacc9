"""Experts in slots of memory under a budget: which are resident, and where the others come from."""
