"""The documentation keeps its word: code runs, figures are measured ones, links lead somewhere."""
