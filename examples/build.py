"""Makes each notebook from its script and runs it: ``python examples/build.py``."""

from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

for script in sorted(Path(__file__).parent.glob("*.py")):
    if "\n# %%" in script.read_text():
        notebook = jupytext.read(script)
        NotebookClient(notebook, timeout=300, record_timing=False).execute()
        for number, cell in enumerate(notebook.cells):
            cell["id"] = f"cell-{number}"  # not at random, so that only what changes differs
            if cell.cell_type == "code":  # warnings name files of this machine
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        nbformat.write(notebook, script.with_suffix(".ipynb"))
        print(f"made {script.with_suffix('.ipynb')}")
