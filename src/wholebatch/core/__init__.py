"""Arithmetic and decisions: what must be true, whatever the framework. Standard library only."""
