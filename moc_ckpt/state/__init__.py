"""What exists: fragments, units, the catalog. `fragment` and `unit` are pure; the rest needs torch."""
