"""The parts of the save-stall benchmark."""
