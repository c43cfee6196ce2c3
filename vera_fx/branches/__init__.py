"""Kinds of branch, one folder each: parameters, maths, graphs, costs, configuration, checkpoint keys.

`kinds.KINDS` lists them; nothing outside of a kind's folder knows what its tensors are called.
"""
