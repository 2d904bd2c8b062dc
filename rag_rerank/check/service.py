"""How a server serves: whether answers can be told apart, whether batches change scores, and how fast it is."""

import statistics
import time

from rag_rerank.check.access import ROUGHLY_ROUNDED, ROUNDED, largest_difference
from rag_rerank.check.checked_server import CheckedServer
from rag_rerank.check.finding import Finding, failure, listwise
from rag_rerank.check.texts import KNOWN, known_pairs, passages
from rag_rerank.errors import BackendError, BadReply, DeadlineExceeded
from rag_rerank.vllm.wire import Failure

_ROUNDS, _COUNTS, _BATCH = 3, (1, 10, 100), 32


def batches(server: CheckedServer) -> Finding:
    """See whether a pair's score depends on what it is scored with."""
    if server.facts.listwise:
        return listwise(server.score)
    queries, documents = (texts[:_BATCH] for texts in known_pairs())
    chosen = range(0, _BATCH, 8)
    alone = [server.score(queries[position], [documents[position]])[0] for position in chosen]
    together = server.score(queries, documents, together=_BATCH)
    of_one = server.score(queries[0], documents, together=_BATCH)[:1]
    if largest_difference(alone[:1], of_one) > ROUGHLY_ROUNDED > largest_difference(alone[:1], together[:1]):
        said = "A document's score depends on the others of its query, as a listwise model's does."
        return Finding("Batches", "warning", said, "Pass chunk_size= as large as your largest call.")
    apart = largest_difference(alone, [together[position] for position in chosen])
    if apart <= ROUNDED:
        said = f"A pair scores the same alone and among {_BATCH} (largest difference {apart:.1g})."
        return Finding("Batches", "good", said)
    remedy = "Half precision is a likely cause: start it with --dtype float32 if the third digit matters."
    said = f"A pair's score alone and among {_BATCH} differs by up to {apart:.1g}."
    return Finding("Batches", "warning", said, remedy)


def request_ids(server: CheckedServer) -> Finding:
    """See whether answers carry the id of their request."""
    sent = "rag-rerank-check"
    outcome = server.send(server.request(sent))
    try:
        answer_id = "" if isinstance(outcome, Failure) else server.read(outcome.body).id or ""
    except BadReply:
        answer_id = ""
    if answer_id.endswith(sent):
        return Finding("Request ids", "good", "It gives ids back, so that no answer is taken for another request's.")
    said = "Ids do not come back, as behind a gateway that makes its own: mixed-up answers would not be noticed."
    return Finding("Request ids", "note", said, "Have the gateway pass X-Request-Id and request_id on.")


def speed(server: CheckedServer) -> Finding:
    """Measure how long calls take."""
    medians, timeout = [], server.client.timeout
    for count in _COUNTS:
        documents = "1 document" if count == 1 else f"{count} documents"
        try:
            medians.append(statistics.median(_seconds(server, count, seed) for seed in range(_ROUNDS)))
        except DeadlineExceeded:
            said = f"{documents} of 100 words took longer than the {timeout:g} s that a call may take."
            remedy = "Raise timeout=, or pass fewer documents or shorter ones (max_tokens_per_doc=)."
            return Finding("Speed", "problem", said, remedy)
        except BackendError as error:
            return failure("Speed", error)
    times = ", ".join(f"{count} in {1000 * median:.0f} ms" for count, median in zip(_COUNTS, medians, strict=True))
    said = f"Documents of 100 words: {times} (medians of {_ROUNDS}), so {_COUNTS[-1] / medians[-1]:,.0f} documents/s"
    if medians[-1] > timeout / 3:
        remedy = "Raise timeout=, pass fewer documents, or add servers: base_url=[...] takes several."
        return Finding("Speed", "warning", f"{said}: more than a third of the {timeout:g} s of a call.", remedy)
    return Finding("Speed", "good", said + ".")


def _seconds(server: CheckedServer, count: int, seed: int) -> float:
    documents = passages(count, seed=1000 * count + seed)
    began = time.perf_counter()
    server.score(KNOWN[0][0], documents)
    return time.perf_counter() - began
