"""Batches whose rows have adapters of their own."""
