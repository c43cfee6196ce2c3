"""The bank: adapters, vectors, projections and slots, the whole state of an adapted model.

Nothing here runs a graph or touches a file; graphs read what `AdapterBank.bind` puts in place.
"""

from vera_fx.bank.bank import AdapterBank
from vera_fx.bank.bank import _rebind as _rebind  # named so in pickles of version 0.1

__all__ = ["AdapterBank"]
