"""Examines a vLLM server, or several: ``rag-rerank check``.

for finding in check(VLLMScorer("http://localhost:8000")):
    print(finding.verdict, finding.says, finding.remedy)
"""

from collections.abc import Iterator

from rag_rerank import VLLMScorer
from rag_rerank.check import access, scores, service
from rag_rerank.check.checked_server import CheckedServer
from rag_rerank.check.finding import Finding, Verdict, failure
from rag_rerank.errors import RerankError

__all__ = ["Finding", "Verdict", "check"]


def check(scorer: VLLMScorer) -> Iterator[Finding]:
    """Examine the servers of a scorer with its settings; each finding comes as soon as it is made.

    It ends early where nobody answers, the key is refused or there are no scores. Several servers are compared with the
    first one that answers, which is examined in full. A server is sent about 30 requests, some without the key.

    Args:
        scorer: Its timeout holds for each of the calls. It must stay open until the end; it is not changed.

    Yields:
        What was found. Nothing is raised for what is wrong with a server.
    """
    answering = []
    for position in range(len(scorer.client.servers)):
        server = CheckedServer(scorer.client, position)
        finding = access.reach(server)
        if finding.verdict == "good":
            answering.append(server)
        yield finding
    if answering:
        try:
            yield from _examine(answering[0], answering[1:])
        except RerankError as error:
            yield failure("Answers", error)


def _examine(server: CheckedServer, others: list[CheckedServer]) -> Iterator[Finding]:
    """Look at all about one server that answers, and whether others are like it."""
    for look in (access.version, access.model, access.api):
        finding = look(server)
        yield finding
        if finding.verdict == "problem":
            return  # there are no scores
    yield access.key(server)
    sample = scores.sample(server)
    causes = [cause for cause in (scores.scale(server, sample), scores.template(server, sample)) if cause]
    yield from causes
    if server.facts.version is None:
        yield scores.options(server, sample)
    yield scores.ranking(sample, explained=any(cause.remedy and cause.verdict != "note" for cause in causes))
    yield scores.window(server)
    yield scores.long_documents(server, sample)
    yield service.batches(server)
    if others:
        yield from access.alike(server, others)
    yield service.request_ids(server)
    yield service.speed(server)
