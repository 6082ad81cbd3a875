"""The Colab notebook, run from its first cell to its last on the CPU; only its parameters are others."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from traitlets.config import Config

ROOT = Path(__file__).parents[1]
NOTEBOOK = "notebooks/launch_1b_colab.ipynb"
PARAMETERS = """
DATA = "demo"
TOKENS = "1M"
RUN_ROOT = "my runs"
MOUNT_DRIVE = False
OPTIONS = "--device cpu --size nano --train-seq-len 64 --steps 12 --grad-accum 2 --eval-iters 1 --log-every 4"
PROMPT = "import "
"""


@pytest.fixture
def checkout(tmp_path):
    for name in ("oneb", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run_1b_launch.py", "prepare_fineweb.py", "requirements_runtime.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def text_of(cell) -> str:
    """What a cell printed."""
    return "".join(output.get("text", "") for output in cell.outputs)


def is_parameters(cell) -> bool:
    return "parameters" in cell.metadata.get("tags", ())


@pytest.fixture
def sockets() -> Iterator[Config]:
    """A kernel that is spoken to through files, of short names: a port that was free may be taken by now."""
    with tempfile.TemporaryDirectory() as folder:
        yield Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/kernel"}})


def test_the_notebook_trains_plots_and_samples(checkout, sockets, monkeypatch):
    # The kernel is this Python, whichever kernels the machine has.
    monkeypatch.setenv("JUPYTER_PATH", str(checkout / "jupyter"))
    write_kernel(checkout / "jupyter/kernels/python3")
    notebook = nbformat.read(checkout / NOTEBOOK, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if is_parameters(cell)]
    parameters.source = PARAMETERS
    client = NotebookClient(notebook, timeout=600, startup_timeout=300, kernel_name="python3", config=sockets,
                            resources={"metadata": {"path": str(checkout / "notebooks")}})
    client.execute()

    (run,) = (checkout / "my runs").iterdir()
    assert (run / "best.pt").is_file()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    (sample,) = [cell for cell in notebook.cells if "oneb sample" in cell.source]
    assert "\nimport " in text_of(sample).replace("\r", "")


def write_kernel(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(
        f'{{"argv": ["{sys.executable}", "-m", "ipykernel_launcher", "-f", "{{connection_file}}"], '
        '"display_name": "Python 3", "language": "python"}')


def test_the_notebook_is_clean_and_names_every_parameter_it_uses():
    notebook = nbformat.read(ROOT / NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    (parameters,) = [cell for cell in code if is_parameters(cell)]
    names = {line.split(" = ")[0] for line in parameters.source.splitlines() if " = " in line and line[0] != "#"}
    assert names == {line.split(" = ")[0] for line in PARAMETERS.split(os.linesep) if line}
    rest = "\n".join(cell.source for cell in code if cell is not parameters)
    assert all(name in rest for name in names)
