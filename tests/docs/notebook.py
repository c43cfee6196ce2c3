"""Run a notebook as Jupyter does, in a folder of its own; keep it with its outputs beside the pages.

python -m tests.docs.notebook docs/five_minutes.ipynb build/site/five_minutes.ipynb
"""

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def main(source: Path, target: Path) -> None:
    """Raises the error of a cell that fails."""
    notebook = nbformat.read(source, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    nbformat.write(notebook, target)
    count = sum(cell.cell_type == "code" for cell in notebook.cells)
    sys.stdout.write(f"{source}: {count} cells ran\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
