"""Serving a classifier and its adapters over HTTP; the parts import what the extra `server` brings."""
