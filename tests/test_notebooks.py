"""The notebooks run, and are stored without what they print."""

import os
import pathlib
import sys

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
jupyter_client = pytest.importorskip("jupyter_client")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LIMIT_SECONDS = 600


class ThisInterpreter(jupyter_client.AsyncKernelManager):
    """Starts the interpreter of the tests, whatever kernels are installed."""

    @property
    def kernel_spec(self):
        return jupyter_client.kernelspec.KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            display_name="Python 3",
            language="python",
        )


def name(path):
    return path.stem


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_a_notebook_is_stored_stripped(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.source
            assert "execution" not in cell.metadata, cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_a_notebook_runs(path, monkeypatch):
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", str(ROOT) + (os.pathsep + before if before else ""))
    # What measures takes a few prompts.
    monkeypatch.setenv("SPECJAX_NOTEBOOK_PROMPTS", "1")
    monkeypatch.setenv("SPECJAX_NOTEBOOK_GROUPS", "code,copy_editing")
    # Figures are drawn as in a browser, whatever the tests themselves draw with.
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        kernel_manager_class=ThisInterpreter,
        timeout=LIMIT_SECONDS,
        resources={"metadata": {"path": str(ROOT)}},
    )
    client.execute()
    outputs = [item for cell in notebook.cells for item in cell.get("outputs", [])]
    assert outputs
    assert not [item for item in outputs if item.output_type == "error"]
