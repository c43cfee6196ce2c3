"""What VeRA is worth on real data, beside LoRA, DVoRA, full fine-tuning and the head alone.

``python -m benchmarks.quality`` trains (`runner.py`), a line of JSON for each run; ``python -m
benchmarks.quality.page`` writes docs/quality.md and the figures of docs/recipes.md from these lines, and
``python -m benchmarks.quality.chart`` the picture.
"""
