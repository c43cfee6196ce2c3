"""The command line ``vera-fx``: what can be done with folders, without writing code."""
