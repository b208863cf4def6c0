"""Host to storage."""
