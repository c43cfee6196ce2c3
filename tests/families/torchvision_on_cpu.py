"""Pytest plugin (``-p tests.families.torchvision_on_cpu``) that lets torchvision be imported.

timm and transformers import torchvision where it is installed. Its wheels for CUDA cannot load
their operators beside a CPU build of torch, and then fail to import, since they give each operator
a shape function. No model of the matrix calls one, so the shape functions are left out.
"""

import importlib
import sys
import types


def _import() -> None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        shapes = "torchvision._meta_registrations"
        sys.modules[shapes] = types.ModuleType(shapes)
        importlib.import_module("torchvision")


_import()  # before anything imports transformers
