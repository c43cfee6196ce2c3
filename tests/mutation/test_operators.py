"""The mutants are what they say, and leave alone what computes nothing."""

import ast

from tests.mutation.operators import mutants

SOURCE = '''
"""A docstring with 1 number."""
LIMIT: "1 + 2" = 3

def f(a, b):
    """Another one."""
    if a < b and not b:
        raise ValueError(f"{a + 1}")
    total = g(a, b) - 1
    total += a
    h(total)
    return total
'''


def test_every_fault_is_made_once() -> None:
    found = [mutant.what for mutant in mutants(SOURCE)]

    assert len(set(found)) == len(found)
    assert set(found) == {
        "3 -> 4",
        "if a < b and (not b): -> if False:",
        "if a < b and (not b): -> if True:",
        "a < b and (not b) -> a < b or not b",
        "a < b -> a <= b",
        "not b -> not not b",
        "g(a, b) - 1 -> g(a, b) + 1",
        "g(a, b) -> g(b, a)",
        "1 -> 2",
        "total += a -> pass",
        "h(total) -> pass",
    }


def test_every_mutant_is_a_module_and_another_one() -> None:
    original = ast.unparse(ast.parse(SOURCE))
    for mutant in mutants(SOURCE):
        compile(mutant.source, "mutant", "exec")
        assert mutant.source != original
