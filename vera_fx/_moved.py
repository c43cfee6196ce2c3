"""Modules under the names that they had before, for what was pickled then.

A pickle names classes by module. Version 0.1 kept all modules in one folder; those of its names that
pickles of adapted models hold can still be imported.
"""

import importlib
import sys

MOVED = {
    "vera_fx.adapted": "vera_fx.model.model_class",
    "vera_fx.adapter": "vera_fx.bank.adapter",
    "vera_fx.hooks": "vera_fx.bank.hooks",
    "vera_fx.mixer": "vera_fx.mixing.mixer",
    "vera_fx.packed": "vera_fx.bank.packed",
    "vera_fx.reference": "vera_fx.branches.vera.reference",
    "vera_fx.projections": "vera_fx.bank.projections",
    "vera_fx.slots": "vera_fx.bank.slots",
}


NAMES = {("vera_fx.config", "VeraConfig"): "vera_fx.branches.vera.config"}
"""Classes whose module has a room of its own now, while the old one is still there."""


def know_old_names() -> None:
    """Let modules and classes be found under their old names, too."""
    for old, new in MOVED.items():
        sys.modules[old] = importlib.import_module(new)
    for (module, name), new in NAMES.items():
        setattr(sys.modules[module], name, getattr(importlib.import_module(new), name))
