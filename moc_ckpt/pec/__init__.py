"""Partial experts checkpointing: which experts a save takes, and what a recovery loses. Pure: no torch."""
