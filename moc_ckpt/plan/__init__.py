"""Who saves what: pure planning, without torch or deepspeed."""
