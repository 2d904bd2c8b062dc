"""Examines a vLLM server, or several, as a doctor does: ``rag-rerank check``.

    for finding in check(VLLMScorer("http://localhost:8000")):
        print(finding.verdict, finding.says, finding.remedy)

The modules: `finding` (what is found), `patient` (one server, and the ways to ask it), `texts` (what it is asked to
score), and what is looked at: `server` (what it is), `scores` (what its scores mean) and `service` (how it serves).
"""

from collections.abc import Iterator

from rag_rerank.check import scores, server, service
from rag_rerank.check.finding import Finding, Verdict, failure
from rag_rerank.check.patient import Patient
from rag_rerank.errors import RerankError
from rag_rerank.vllm.scorer import VLLMScorer

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
    for endpoint in scorer._endpoints:
        patient = Patient(scorer, endpoint)
        finding = server.reach(patient)
        if finding.verdict == "good":
            answering.append(patient)
        yield finding
    if answering:
        try:
            yield from _examine(answering[0], answering[1:])
        except RerankError as error:
            yield failure("Answers", error)


def _examine(patient: Patient, others: list[Patient]) -> Iterator[Finding]:
    """All about one server that answers, and whether others are like it."""
    for look in (server.version, server.model, server.api):
        for finding in look(patient):
            yield finding
            if finding.verdict == "problem":
                return  # there are no scores
    yield from server.key(patient)
    sample = scores.sample(patient)
    causes = [*scores.scale(patient, sample), *scores.template(patient, sample)]
    yield from causes
    yield from scores.ranking(sample, explained=any(cause.remedy and cause.verdict != "note" for cause in causes))
    yield from scores.window(patient)
    yield from scores.long_documents(patient, sample)
    yield from service.batches(patient)
    if others:
        yield from server.alike(patient, others)
    yield from service.request_ids(patient)
    yield from service.speed(patient)
