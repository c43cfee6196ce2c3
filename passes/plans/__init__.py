"""Choosing how each site's branch is computed."""
