"""The notebooks run from the first cell to the last."""

import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_quickstart(tmp_path, monkeypatch):
  notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
  (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
  parameters.source = (
    f'repository = ""\nconfig_file = "configs/quickstart.py:tiny"\nworkdir = "{tmp_path}/run"'
  )
  # One CPU device, as where a person opens it.
  monkeypatch.setenv("XLA_FLAGS", "")
  resources = {"metadata": {"path": str(ROOT / "notebooks")}}
  nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()

  printed = "".join(
    output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
  )
  assert "step 20/20" in printed
  assert "test: " in printed
  assert "She had been " in printed
  assert "linear_scan on" in printed
  figures = [
    output
    for cell in notebook.cells
    for output in cell.get("outputs", [])
    if "image/png" in output.get("data", {})
  ]
  assert len(figures) == 2
