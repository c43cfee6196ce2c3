"""Adapters in the base's weights: folded in, told what that costs, taken out again; plain modules for good."""
