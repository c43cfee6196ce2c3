"""What only a GPU can tell; skipped where there is none.

``make gpu`` runs them. ``VERA_FX_TEST_DEVICE=cpu`` runs the same code on the CPU, to see that the tests
themselves are right.
"""
