"""The READMEs are true: their examples run as they stand and print what stands below them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rag_rerank.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
READMES = [
    "README.md",
    "integrations/langchain/README.md",
    "integrations/llama_index/README.md",
    "docs/pages/index.md",
    "docs/pages/scaling.md",
    "docs/pages/contributing.md",
]
EXAMPLE = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)


def examples(with_output: bool) -> list[object]:
    """(code, output) of every Python block, with its place in the file as its name."""
    return [
        pytest.param(match[1], match[2], id=f"{readme}-{number}")
        for readme in READMES
        for number, match in enumerate(EXAMPLE.finditer((ROOT / readme).read_text(encoding="utf-8")), 1)
        if bool(match[2]) == with_output
    ]


@pytest.mark.parametrize(("code", "printed"), examples(with_output=True))
def test_an_example_prints_what_stands_below_it(code: str, printed: str):
    """In an interpreter of its own, as a reader would try it."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout == printed


@pytest.mark.parametrize(("code", "printed"), examples(with_output=False))
def test_an_example_without_output_compiles(code: str, printed: None):
    """It needs a server or a vector store of yours."""
    compile(code, "README.md", "exec")


def family_table() -> str:
    """The README's table of models, from the one in rag_rerank.families."""
    score = {"head": "head", "bi-encoder": "cosine", "late-interaction": "MaxSim"}
    rows = ["| model | template; score from | `LocalScorer` | `vllm serve MODEL` and |", "|---|---|---|---|"]
    for family in FAMILIES:
        models = "<br>".join(family.models).replace("*", "\\*")
        source = score.get(family.method) or " against ".join(f"`{token}`" for token in reversed(family.tokens))
        template = f"{family.template.removesuffix('.jinja')}; " if family.template else ""
        flags = family.vllm_flags.replace("{template}", family.template or "")
        local = "yes" if family.local else "no"
        rows.append(f"| {models} | {template}{source} | {local} | {f'`{flags}`' if flags else ''} |")
    return "\n".join(rows)


def test_the_table_of_models_is_that_of_the_package():
    """To write it anew: python -m tests.test_readme."""
    assert family_table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tree_for_contributors_is_the_tree_of_the_package():
    """Every module stands in it, and nothing that is not there."""
    page = (ROOT / "docs" / "pages" / "contributing.md").read_text(encoding="utf-8")
    tree = page.partition("```text\n")[2].partition("integrations/")[0]
    named = sorted(re.findall(r"── (\w+\.py)\b", tree))
    there = sorted(path.name for path in (ROOT / "rag_rerank").rglob("*.py") if path.name != "__init__.py")
    assert named == there


if __name__ == "__main__":
    sys.stdout.write(family_table() + "\n")
