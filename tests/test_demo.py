"""`rag-rerank demo` shows one question before and after, what was gained over many, and that the frameworks agree."""

import io

import pytest
from rich.console import Console

from rag_rerank import LocalScorer, Scorer, VLLMScorer
from rag_rerank.cli.demo import run_demo
from rag_rerank.evaluation import Evaluation
from tests import commands
from tests.vllm_server import VLLMServer


def demonstrate(scorer: Scorer, queries: int) -> tuple[Evaluation, str]:
    console = Console(file=io.StringIO(), width=120)
    evaluation = run_demo(scorer, console, model="[the model]", queries=queries)
    return evaluation, console.file.getvalue()


@pytest.fixture(scope="module")
def shown(local: LocalScorer) -> tuple[Evaluation, str]:
    return demonstrate(local, 8)


@pytest.mark.slow
def test_one_question_before_and_after(shown: tuple[Evaluation, str]):
    """The first three places, and the right answer wherever it is."""
    before, after = shown[1].partition("BM25\n")[2].partition("\nreranked\n")[::2]
    assert [line.split()[0] for line in before.splitlines()[:4]] == ["1", "2", "3", "15"]
    assert before.splitlines()[3].startswith("15 ✓ General Python FAQ The standard documentation")
    assert after.startswith(" 1 ✓ General Python FAQ The standard documentation")
    assert "place 15 before, 1 now" in after


def test_both_frameworks_return_the_same_order(shown: tuple[Evaluation, str]):
    assert "LangChain: the same order" in shown[1]
    assert "LlamaIndex: the same order" in shown[1]


def test_what_was_gained(shown: tuple[Evaluation, str]):
    """On questions from all over the FAQ; and how to see all of them, and how long each of the two takes."""
    evaluation, text = shown
    assert list(evaluation.collection.queries)[:3] == ["q1", "q22", "q43"]
    assert evaluation.systems[0].deepest.gains["nDCG@10"].gain > 0.1
    assert "[the model]" in text
    assert "8 questions, one right answer each. This takes about" in text
    assert "nDCG@10" in text.partition("95 % interval")[2]
    assert "--queries 170" in text


def test_a_server_gives_the_same_figures(vllm_minilm: VLLMServer, local: LocalScorer):
    """`rag-rerank demo --base-url`."""
    with VLLMScorer(vllm_minilm.base_url, timeout=120) as remote:
        theirs, ours = (demonstrate(scorer, 2)[0].systems[0].deepest.values for scorer in (remote, local))
    assert theirs == ours


def test_a_file_that_can_not_be_written_is_told_first():
    """Before anything is scored or shown."""
    done = commands.run("demo", "--json", "/no/such/folder/figures.json")
    assert (done.returncode, done.stdout, "there is no such folder" in done.stderr) == (2, "", True)
