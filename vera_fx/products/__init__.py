"""Kinds of base product, one file each: which modules multiply by a weight, and what may be done to it.

`kinds.KINDS` lists them; a kind is added by a file and a line there.
"""
