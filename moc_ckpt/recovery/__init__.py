"""From what storage holds back to live state."""
