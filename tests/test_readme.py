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
from rag_rerank.families import FAMILIES, family
from tests import released
from tests.examples import ROOT, examples, hub_with, printed_by
from tests.parity import PARITY, SAME

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


@pytest.mark.slow
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
    """The guide's table of models, from the one in rag_rerank.families and what tests saw."""
    titles = "model", "licence", "size", "window", "local", "vLLM", "parity"
    rows = [titles, ["---"] * len(titles)]
    for each in FAMILIES:
        models = "<br>".join(each.models).replace("*", "\\*")
        window = f"{each.max_length:,}" if each.max_length else ""
        flags = each.vllm_flags.replace("{template}", each.template or "")
        served = f"`{f'vllm serve MODEL {flags}'.strip()}`" if each.served else "no"
        local = each.local or f"no: {each.note.partition('. ')[0]}"
        rows.append([models, each.licence, each.size, window, local, served, _parity(each.name)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _parity(name: str) -> str:
    if name in PARITY:
        largest, test = PARITY[name]
        return f"{largest:.0e}, `{test}`".replace("e-0", "e-")
    return f"as {family(SAME[name]).models[0]}".replace("*", "\\*") if name in SAME else ""


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
