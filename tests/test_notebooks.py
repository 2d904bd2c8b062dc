"""The notebooks run, as they are and against a server, and what is committed below their cells is what they say.

The reranker that they name is on a hub; here they get the released one's folder.
"""

import ast
import math
import re
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import released
from tests.vllm_server import VLLMServer

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))
WITH_BACKEND = [name for name in NAMES if '"backend"' in (FOLDER / name).read_text(encoding="utf-8")]
WITH_SERVER = "04_vllm_server.ipynb"

# Arithmetic differs a little from one CPU to the next, and what is shown is rounded; the bars of scores, to a percent.
TOLERANCE = 2e-3
TOLERANCE_OF_BARS = 1
_NUMBER = re.compile(r"(?:width:)?-?\d+(?:\.\d+)?")


def read(name: str) -> Any:
    notebook = nbformat.read(FOLDER / name, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell: Any) -> list[str]:
    return cell.metadata.get("tags", [])


def execute(notebook: Any, folder: Path) -> Any:
    """Run it in a kernel of this interpreter, whatever kernels are installed elsewhere; a failing cell raises."""
    client = NotebookClient(notebook, timeout=600, coalesce_streams=True, resources={"metadata": {"path": str(folder)}})
    manager = client.create_kernel_manager()
    manager.kernel_spec.argv[0] = sys.executable
    return client.execute()


def texts(cell: Any) -> list[str]:
    """What stands below a cell, one text for each output; of a figure, only that there is one."""
    found = []
    for output in cell.outputs:
        if output.output_type == "stream":
            found.append(output.text)
        else:
            data = output.data
            found.append("figure" if "image/png" in data else data.get("text/html", data.get("text/plain")))
    return found


def same(committed: str, now: str) -> bool:
    if _NUMBER.sub("#", committed) != _NUMBER.sub("#", now):
        return False
    return all(map(near, _NUMBER.findall(committed), _NUMBER.findall(now)))


def near(one: str, other: str) -> bool:
    tolerance = TOLERANCE_OF_BARS if one.startswith("width:") else TOLERANCE
    values = [float(number.removeprefix("width:")) for number in (one, other)]
    return math.isclose(*values, rel_tol=0, abs_tol=tolerance)


def assert_as_committed(name: str, executed: Any) -> None:
    for committed, now in zip(code_cells(read(name)), code_cells(executed), strict=True):
        if "varies" in tags(committed):
            continue
        before, after = texts(committed), texts(now)
        assert len(before) == len(after), (name, committed.id, before, after)
        for one, other in zip(before, after, strict=True):
            assert same(one, other), f"{name}, cell {committed.id}\n--- committed\n{one}\n--- now\n{other}"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub, no server and no chat model: what this machine has must not change what a notebook says."""
    for variable in ("VLLM_API_KEY", "CHAT_MODEL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("VLLM_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("RERANKER", str(released.folder()))


@pytest.mark.parametrize("name", NAMES)
def test_is_fit_to_be_committed(name: str) -> None:
    source = (FOLDER / name).read_text(encoding="utf-8")
    for path in ("/work", "/root", "/tmp", "/home", "site-packages"):  # noqa: S108 - looked for, not written to
        assert path not in source
    notebook = read(name)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert len(notebook.cells) < 25
    for number, cell in enumerate(code_cells(notebook), 1):
        assert cell.execution_count == number  # run from top to bottom
        assert set(cell.metadata) <= {"tags"}  # no times
        assert all(output.get("name") != "stderr" and output.output_type != "error" for output in cell.outputs)


def installed_by(requirement: Requirement, found: set[tuple[str, str]]) -> None:
    """Add the distributions that it brings to what is found, each with the extra that asks for it."""
    for extra in ("", *requirement.extras):
        name = canonicalize_name(requirement.name)
        if (name, extra) not in found:
            found.add((name, extra))
            for line in requires(name) or ():
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    installed_by(needed, found)


@pytest.mark.parametrize("name", NAMES)
def test_installs_all_that_it_imports(name: str) -> None:
    """Where there is no checkout, as on Colab: what its first cell installs brings every module of the other cells."""
    first, *others = code_cells(read(name))
    found: set[tuple[str, str]] = set()
    for line in re.findall(r"%pip install --quiet (.*)", first.source):
        for word in line.replace('"', "").split():
            installed_by(Requirement(word), found)
    distributions = packages_distributions()  # not those installed as editable, which are called as their module is
    brought = {distribution for distribution, _ in found} | {"ipython"}  # which every notebook runs in
    for cell in others:
        for node in ast.walk(ast.parse(re.sub(r"^\s*[%!].*", "", cell.source, flags=re.MULTILINE))):
            modules = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in {each.split(".")[0] for each in modules} - sys.stdlib_module_names:
                assert brought & set(map(canonicalize_name, distributions.get(module, [module]))), (module, name)


@pytest.mark.parametrize("name", [name for name in NAMES if name != WITH_SERVER])
def test_says_the_same_offline(name: str, offline: None, tmp_path: Path) -> None:
    assert_as_committed(name, execute(read(name), tmp_path))


def test_says_that_no_server_answers(offline: None, tmp_path: Path) -> None:
    shown = "".join(text for cell in code_cells(execute(read(WITH_SERVER), tmp_path)) for text in texts(cell))
    assert "No server answers" in shown
    assert "same order" not in shown  # nothing was compared


@pytest.mark.parametrize("name", WITH_BACKEND)
def test_says_the_same_with_one_cell_changed(
    name: str, offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vllm_released: VLLMServer
) -> None:
    monkeypatch.setenv("VLLM_BASE_URL", vllm_released.base_url)
    notebook = read(name)
    [cell] = [cell for cell in notebook.cells if "backend" in tags(cell)]
    local, server = cell.source.rsplit("\n", 2)[-2:]
    assert "Local" in local
    assert server.startswith("# ")
    server_line = server.removeprefix("# ").replace("VLLMScorer()", "VLLMScorer(timeout=600)")  # for slow machines
    cell.source = cell.source.replace(local, "").replace(server, server_line)
    assert_as_committed(name, execute(notebook, tmp_path))


def test_says_the_same_with_a_server(
    offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vllm_minilm: VLLMServer
) -> None:
    monkeypatch.setenv("VLLM_BASE_URL", vllm_minilm.base_url)
    assert_as_committed(WITH_SERVER, execute(read(WITH_SERVER), tmp_path))
