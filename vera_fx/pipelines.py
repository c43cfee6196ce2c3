"""Runs passes for the library: with its debugging knobs, and its own errors."""

import contextlib
from collections.abc import Iterator, Sequence

from torch.fx import GraphModule

from vera_fx._torch_graphs import LiveGraph
from vera_fx.debug import run_options
from vera_fx.errors import PassError, TargetError
from vera_fx.passes import (
    GraphPass,
    PassContractError,
    PipelineReport,
    RowError,
    SiteError,
    run_passes,
)


def run_pipeline(gm: GraphModule, passes: Sequence[GraphPass], stage: str) -> PipelineReport:
    """Apply ``passes`` to ``gm`` in order, in place.

    Args:
        gm: the graph.
        passes: what to do.
        stage: of the graph's life, which names the folder of a dump.

    Raises:
        TargetError: a target is used in a way that cannot be adapted.
        RowError: something cannot differ from row to row of a batch that mixes adapters.
        PassError: a pass failed or broke its contract.
    """
    with as_library_errors():
        report = run_passes(gm, passes, run_options(stage))
    if isinstance(gm, LiveGraph) and not gm.printed:
        gm.recompile()
    return report


@contextlib.contextmanager
def as_library_errors() -> Iterator[None]:
    """What passes raise, as the errors that users know."""
    try:
        yield
    except RowError:  # an answer to mixtures, not to users
        raise
    except SiteError as error:
        raise TargetError(str(error)) from error
    except PassContractError as error:
        where = f" at {error.site!r}" if error.site else ""
        remedy = (
            f"exclude_modules=[{error.site!r}] leaves it out" if error.site else "try another plan"
        )
        raise PassError(
            f"{error.pass_name} failed{where}: {error}\n"
            "  This is a fault of vera_fx, not of the model. Please report it with this message and the "
            f"graphs that VERA_FX_DUMP=folder writes. Until it is mended, {remedy}."
        ) from error
