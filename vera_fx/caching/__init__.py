"""Captures on disk: what a process captured, a later one of the same model need not capture again."""
