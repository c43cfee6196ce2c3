"""Serving a classifier or an embedder and its adapters over HTTP; the parts import what the extra `server` brings."""
