"""The README, the guides and the adapters' READMEs are true: their examples run and print what stands below them.

The examples of a page build on each other. The model that they name comes from a hub's cache, as on a reader's machine:
there it has the released weights of `tests.released`.
"""

import re
import sys
from pathlib import Path

import pytest

from rag_rerank import LocalScorer, embedded
from rag_rerank.evaluation import Collection
from rag_rerank.evaluation.retrieval import BM25
from rag_rerank.families import FAMILIES
from tests import released
from tests.examples import ROOT, examples, hub_with, printed_by

PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("integrations/*/README.md")),
    *sorted(ROOT.glob("docs/pages/*.md")),
    ROOT / "docs" / "skill" / "SKILL.md",
]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub_with(released.folder(), tmp_path_factory.mktemp("hub"))


@pytest.mark.parametrize("page", [page for page in PAGES if any(output for _, output in examples(page))], ids=name)
def test_examples_print_what_stands_below_them(page: Path, hub: Path):
    runnable = [(code, output) for code, output in examples(page) if output]
    assert printed_by([code for code, _ in runnable], sys.executable, hub) == [output for _, output in runnable]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_examples_without_output_compile(page: Path):
    """They need a server or a vector store of yours."""
    for code, _ in examples(page):
        compile(code, name(page), "exec")


def test_links_lead_somewhere():
    """Those to other files, and to chapters of other pages."""
    for page in PAGES:
        for target in re.findall(r"\]\(((?!https?:)[^)]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            file = (page.parent / path) if path else page
            assert file.exists(), f"{name(page)}: {target}"
            if anchor and "." not in anchor:  # names of the API reference have dots; mkdocs checks those
                chapters = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = [re.sub(r"[^\w\- ]", "", chapter).strip().lower().replace(" ", "-") for chapter in chapters]
                assert anchor in slugs, f"{name(page)}: {target}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_readme_begins_with_what_reranking_does():
    """The documents of its first table are those that BM25 and the released cross-encoder put on top."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    query = re.search(r"\*\*(.*?\?)\*\*", readme)[1]
    rows = re.findall(r"^\| [123] \| (.*?) \| (.*?) \|$", readme, re.MULTILINE)
    collection = Collection.load(embedded.collection_folder())
    found = list(BM25(collection.documents).retrieve(query, 20))
    with LocalScorer(released.folder()) as scorer:
        ranked = scorer.rerank(query, [collection.documents[each] for each in found], top_n=3)
    for cells, ids in [
        ([before for before, _ in rows], found[:3]),
        ([after for _, after in rows], [found[each.index] for each in ranked]),
    ]:
        for cell, document in zip(cells, ids, strict=True):
            text = " ".join(collection.documents[document].split())
            assert cell.strip("✓ *…") in text
            assert ("✓" in cell) == (
                document
                in collection.judgments[next(iter(key for key, value in collection.queries.items() if value == query))]
            )


def family_table() -> str:
    """The guide's table of models, from the one in rag_rerank.families."""
    score = {"head": "head", "bi-encoder": "cosine", "late-interaction": "MaxSim"}
    rows = ["| model | template; score from | `LocalScorer` | `vllm serve MODEL` and |", "|---|---|---|---|"]
    for family in FAMILIES:
        models = "<br>".join(family.models).replace("*", "\\*")
        source = score.get(family.method) or " against ".join(f"`{token}`" for token in reversed(family.tokens))
        template = f"{family.template.removesuffix('.jinja')}; " if family.template else ""
        flags = family.vllm_flags.replace("{template}", family.template or "")
        local = "yes" if family.local else "no"
        served = (f"`{flags}`" if flags else "") if family.served else "not served by vLLM"
        rows.append(f"| {models} | {template}{source} | {local} | {served} |")
    return "\n".join(rows)


def test_the_table_of_models_is_that_of_the_package():
    """To write it anew: python -m tests.test_readme."""
    assert family_table() in (ROOT / "docs" / "pages" / "models.md").read_text(encoding="utf-8")


def test_the_tree_for_contributors_is_the_tree_of_the_package():
    """Every module stands in it, and nothing that is not there."""
    page = (ROOT / "docs" / "pages" / "contributing.md").read_text(encoding="utf-8")
    tree = page.partition("```text\n")[2].partition("integrations/")[0]
    named = sorted(re.findall(r"── (\w+\.py)\b", tree))
    there = sorted(path.name for path in (ROOT / "rag_rerank").rglob("*.py") if path.name != "__init__.py")
    assert named == there


if __name__ == "__main__":
    sys.stdout.write(family_table() + "\n")
