"""Hostile and broken input, in tables: each row ends with one sentence, and leaves nothing behind."""
