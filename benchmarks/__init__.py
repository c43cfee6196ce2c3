"""Paired measurements of vera_fx, PEFT and the frozen base. Run ``python -m benchmarks --help``."""
