"""What is built is what is needed: three wheels, built here without a network."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import rag_rerank

ROOT = Path(__file__).resolve().parent.parent


def wheel_of(project: Path, target: Path) -> set[str]:
    """The names of all files in the project's wheel."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(target)]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    (wheel,) = target.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.parametrize(
    ("project", "expected"),
    [
        (
            ".",
            [
                "rag_rerank/__init__.py",
                "rag_rerank/py.typed",
                "rag_rerank/local/scorer.py",
                "rag_rerank/data/python_faq/corpus.jsonl",
                "rag_rerank/data/python_faq/LICENSE.rst",
                "rag_rerank/display.html.jinja",
                "rag_rerank/evaluation/report.html.jinja",
                "rag_rerank/evaluation/report.txt.jinja",
                "rag_rerank/evaluation/report.mplstyle",
                "rag_rerank/inputs/blank.png",
                "rag_rerank/families.toml",
                "rag_rerank/SKILL.md",
                "rag_rerank/templates/qwen3-reranker.jinja",
            ],
        ),
        ("integrations/langchain", ["langchain_rag_rerank/rerank.py", "langchain_rag_rerank/py.typed"]),
        (
            "integrations/llama_index",
            [
                "llama_index/postprocessor/rag_rerank/rerank.py",
                "llama_index/postprocessor/rag_rerank/py.typed",
            ],
        ),
    ],
)
def test_each_wheel_has_its_package_its_data_and_its_licence(project: str, expected: list[str], tmp_path: Path):
    """And nothing else: no tests, no `__init__.py` in LlamaIndex's namespaces."""
    names = wheel_of(ROOT / project, tmp_path)
    assert set(expected) <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not names & {"llama_index/__init__.py", "llama_index/postprocessor/__init__.py"}
    top = {name.partition("/")[0] for name in names}
    assert {part for part in top if not part.endswith(".dist-info")} == {expected[0].partition("/")[0]}


@pytest.mark.parametrize("project", ["integrations/langchain", "integrations/llama_index"])
def test_the_adapters_have_the_version_of_the_core(project: str):
    """And take no other minor version of it: their contract with it is checked for this one."""
    text = (ROOT / project / "pyproject.toml").read_text(encoding="utf-8")
    metadata = tomllib.loads(text)["project"]
    assert metadata["version"] == rag_rerank.__version__
    major, minor, _ = rag_rerank.__version__.split(".")
    assert f"rag-rerank>={major}.{minor}.0,<{major}.{int(minor) + 1}" in metadata["dependencies"]
