"""Checkpoint files: stores, packs, manifests, commit, retention and verification. No torch in here."""
