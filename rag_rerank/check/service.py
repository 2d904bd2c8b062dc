"""How a server serves: whether answers can be told apart, whether batches change scores, and how fast it is."""

import statistics
import time
from collections.abc import Iterator

from rag_rerank.check.finding import Finding, failure
from rag_rerank.check.patient import Patient
from rag_rerank.check.server import ROUNDED, largest_difference
from rag_rerank.check.texts import KNOWN, known_pairs, passages
from rag_rerank.errors import BackendError, BadReply, DeadlineExceeded
from rag_rerank.vllm.steps import Failure

_ROUNDS = 3
_COUNTS = 1, 10, 100
_BATCH = 32


def batches(patient: Patient) -> Iterator[Finding]:
    """Whether a pair's score depends on what it is scored with."""
    queries, documents = (texts[:_BATCH] for texts in known_pairs())
    chosen = range(0, _BATCH, 8)
    alone = [patient.score(queries[position], documents[position])[0] for position in chosen]
    together = patient.score(queries, documents, together=_BATCH)
    apart = largest_difference(alone, [together[position] for position in chosen])
    if apart <= ROUNDED:
        said = f"A pair scores the same alone and among {_BATCH} (largest difference {apart:.1g})."
        yield Finding("Batches", "good", said)
    else:
        remedy = "Half precision is a likely cause: start it with --dtype float32 if the third digit matters."
        said = f"A pair's score alone and among {_BATCH} differs by up to {apart:.1g}."
        yield Finding("Batches", "warning", said, remedy)


def request_ids(patient: Patient) -> Iterator[Finding]:
    """Whether answers carry the id of their request."""
    sent = "rag-rerank-check"
    outcome = patient.send(patient.request("a", "a", sent))
    try:
        answer = None if isinstance(outcome, Failure) else patient.read(outcome.body)
    except BadReply:
        answer = None
    if answer is not None and answer.id is not None and answer.id.endswith(sent):
        yield Finding("Request ids", "good", "It gives ids back, so that no answer is taken for another request's.")
    else:
        said = "Ids do not come back, as behind a gateway that makes its own: mixed-up answers would not be noticed."
        yield Finding("Request ids", "note", said, "Have the gateway pass X-Request-Id and request_id on.")


def speed(patient: Patient) -> Iterator[Finding]:
    """How long calls take."""
    medians = []
    for count in _COUNTS:
        documents = "1 document" if count == 1 else f"{count} documents"
        try:
            medians.append(statistics.median(_seconds(patient, count, seed) for seed in range(_ROUNDS)))
        except DeadlineExceeded:
            said = f"{documents} of 100 words took longer than the {patient.timeout:g} s that a call may take."
            remedy = "Raise timeout=, or pass fewer documents or shorter ones (max_tokens_per_doc=)."
            yield Finding("Speed", "problem", said, remedy)
            return
        except BackendError as error:
            yield failure("Speed", error)
            return
    times = ", ".join(f"{count} in {1000 * median:.0f} ms" for count, median in zip(_COUNTS, medians, strict=True))
    rate = _COUNTS[-1] / medians[-1]
    said = f"Documents of 100 words: {times} (medians of {_ROUNDS}), so {rate:,.0f} documents/s"
    if medians[-1] > patient.timeout / 3:
        remedy = "Raise timeout=, pass fewer documents, or add servers: base_url=[...] takes several."
        yield Finding("Speed", "warning", f"{said}: more than a third of the {patient.timeout:g} s of a call.", remedy)
    else:
        yield Finding("Speed", "good", said + ".")


def _seconds(patient: Patient, count: int, seed: int) -> float:
    documents = passages(count, seed=1000 * count + seed)
    began = time.perf_counter()
    patient.score(KNOWN[0][0], documents)
    return time.perf_counter() - began
