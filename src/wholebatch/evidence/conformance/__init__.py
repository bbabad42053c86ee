"""What do systems make of a window? The traps of gradient accumulation as an executable suite."""
