"""The notebooks run, and are stored without what they print."""

import os
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LIMIT_SECONDS = 600

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
kernels = pytest.importorskip("jupyter_client.kernelspec")
managers = pytest.importorskip("jupyter_client.manager")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")


class RunningInterpreter(kernels.KernelSpecManager):
    """Finds no installed kernels, only the interpreter of the tests."""

    def get_kernel_spec(self, kernel_name):
        return kernels.KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            display_name=kernel_name,
            language="python",
        )


def names(paths):
    return [path.stem for path in paths]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_a_notebook_is_stored_stripped(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
# The client library and the event loop it starts warn about themselves, each in its own way.
@pytest.mark.filterwarnings("default")
def test_a_notebook_runs(path, monkeypatch):
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", str(ROOT) + (os.pathsep + before if before else ""))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(path, as_version=4)
    manager = managers.AsyncKernelManager(kernel_spec_manager=RunningInterpreter())
    client = nbclient.NotebookClient(
        notebook,
        km=manager,
        timeout=LIMIT_SECONDS,
        resources={"metadata": {"path": str(ROOT)}},
    )
    client.execute()
    outputs = [item for cell in notebook.cells for item in cell.get("outputs", [])]
    assert outputs
    assert not [item for item in outputs if item.output_type == "error"]
