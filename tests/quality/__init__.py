"""The quality benchmark: its runs, its results, its pages."""
