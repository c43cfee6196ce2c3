"""Serving and predicting on more than one machine: files to run, and to copy and change."""
