"""How a call goes: cut into requests, over-long documents cut, rejected documents found.

A generator (`rag_rerank.vllm.steps`): no socket and no clock of its own.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from rag_rerank.errors import BackendRejected, DocumentRejected
from rag_rerank.template import NEUTRAL
from rag_rerank.vllm.exchange import Exchange
from rag_rerank.vllm.steps import Steps, Together
from rag_rerank.vllm.wire import (
    Answer,
    Options,
    Server,
    read_relevance_scores,
    read_scores,
    rerank_request,
    score_request,
)

API = Literal["score", "rerank"]

_CUTS_DOCUMENTS = (0, 20)  # vLLM's max_tokens_per_doc
_MOST_TOKENS_OF_A_TEMPLATE = 1024  # beside query and document; a guess, only for whether to measure
MOST_TOKENS_OF_A_PLAIN_PAIR = 8  # "a" and "a": BERT 5, RoBERTa 6, a bi-encoder 6; the shortest template with an end 12


@dataclass(slots=True)
class Call:
    """The scoring of some pairs.

    Attributes:
        exchange: Gets requests answered.
        queries: One for all documents, or one each.
        documents: At least one.
        options: What requests say beside them.
        api: What is asked.
        fit: Whether to cut what is too long for the model. Where the server puts pairs into a template, documents are
            cut at the tokens that template and query leave (``max_tokens_per_doc``): vLLM's own truncation would cut
            the end of the prompt, where the score is read. Else the server cuts the longer of query and document.
    """

    exchange: Exchange
    queries: Sequence[str]
    documents: Sequence[str]
    options: Options
    api: API = "score"
    fit: bool = False
    _scores: list[float | None] = field(init=False)
    _refusals: dict[int, BackendRejected] = field(default_factory=dict)
    _sound: bool = False  # whether a request like ours has been accepted

    def __post_init__(self) -> None:
        self._scores = [None] * len(self.documents)

    def score(self) -> Steps[list[float]]:
        """One score per document, in order.

        Raises:
            DocumentRejected: The server takes the request, but not with these documents.
            BackendError, ConfigError: As the exchange raises them.
        """
        rooms = yield from self._rooms()
        pieces = deque(self._pieces(rooms))
        yield from self._side_by_side(pieces, lambda piece: self._score_piece(piece, rooms[piece[0]], pieces))
        scores = [score for score in self._scores if score is not None]
        if self._refusals:
            raise self._rejected()
        return scores

    def _side_by_side(self, work: "deque[list[int]]", do: Callable[[list[int]], Steps[None]]) -> Steps[None]:
        """Do all work, also what is added to it meanwhile, some of it at once."""

        def branch() -> Steps[None]:
            while work:
                yield from do(work.popleft())

        count = min(len(work), self.exchange.rules.max_concurrency)
        if count == 1:
            yield from branch()
        else:
            yield Together([branch() for _ in range(count)])

    def _pieces(self, rooms: Sequence[int | None]) -> list[list[int]]:
        """Positions of the pairs of each request: not too many, all cut alike, in a rerank API of one query."""
        groups: dict[tuple[int | None, str | None], list[int]] = {}
        for position, room in enumerate(rooms):
            query = self._query(position) if self.api == "rerank" else None
            groups.setdefault((room, query), []).append(position)
        size = self.exchange.rules.chunk_size
        return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]

    def _score_piece(self, piece: list[int], room: int | None, pieces: "deque[list[int]]") -> Steps[None]:
        """Score a piece; one that is refused goes back in halves, until it is known which documents are to blame.

        One rejected document of 32 costs 11 requests more, or 12 where nothing was accepted before.
        """
        queries = self.queries if len(self.queries) == 1 else [self.queries[position] for position in piece]
        options = self.options if room is None else replace(self.options, max_tokens_per_doc=room)
        try:
            documents = [self.documents[position] for position in piece]
            answer = yield from self._ask(queries, documents, options, positions=piece)
        except BackendRejected as refusal:
            if refusal.status not in (400, 413, 422):
                raise
            if refusal.status != 413 and not (yield from self._accepts_others()):
                raise
            if len(piece) == 1:
                self._refusals[piece[0]] = refusal
                return
            # By length: over-long documents end up in the same half. Those to blame are found with fewer requests.
            piece.sort(key=lambda position: len(self.documents[position]))
            middle = len(piece) // 2
            pieces.extendleft([piece[middle:], piece[:middle]])
            return
        self._sound = True
        for position, score in zip(piece, answer.scores, strict=True):
            self._scores[position] = score

    def _accepts_others(self) -> Steps[bool]:
        """Whether the server takes a request like ours with a document that can't be to blame."""
        if not self._sound:
            query = self.queries[0] if len(self.queries) == 1 else NEUTRAL
            try:
                yield from self._ask([query], [NEUTRAL], self.options, aside=True)
            except BackendRejected:
                return self._sound  # another branch may know better by now
            self._sound = True
        return True

    def _rejected(self) -> DocumentRejected:
        """The error for documents that can't be scored, with the scores of the others."""
        indices = sorted(self._refusals)
        first = self._refusals[indices[0]]
        several = f" and {len(indices) - 1} more" if len(indices) > 1 else ""
        error = self.exchange.error(
            DocumentRejected, f"documents[{indices[0]}]{several} rejected: {first.message}", first.remedy
        )
        error.indices, error.scores, error.status = tuple(indices), tuple(self._scores), first.status
        error.endpoint = first.endpoint
        error.__cause__ = first
        return error

    def _rooms(self) -> Steps[list[int | None]]:
        """At how many tokens to cut the document of each pair; None where the document is not to be cut so."""
        rooms: list[int | None] = [None] * len(self.documents)
        if not self.fit:
            return rooms
        server = yield from self.exchange.describe()
        if self.api == "rerank" and server.version is None:
            return rooms  # no vLLM server, as it seems: others may stumble over a field of vLLM's
        long = [position for position in range(len(rooms)) if self._may_be_long(position, server.window)]
        if not long or not (yield from self._templated(server)):
            self.options = replace(self.options, truncate_prompt_tokens=-1)
            return rooms
        window, given = server.window, self.options.max_tokens_per_doc
        if window is None or (server.version is not None and server.version < _CUTS_DOCUMENTS):
            return rooms
        measured: dict[str, int | None] = {}
        queries = deque([position] for position in {self._query(position): position for position in long}.values())

        def measure(piece: list[int]) -> Steps[None]:
            query = self._query(piece[0])
            try:
                measured[query] = yield from self._room(query, window)
            except BackendRejected:
                if len(self.queries) == 1:
                    raise
                measured[query] = None  # the server will say so of this query's pairs, and score the others

        yield from self._side_by_side(queries, measure)
        for position in range(len(rooms)):
            room = measured.get(self._query(position))
            rooms[position] = room if given is None or room is None else min(room, given)
        return rooms

    def _may_be_long(self, position: int, window: int | None) -> bool:
        """Whether a pair could have more tokens than the model reads; no tokenizer makes more tokens than bytes."""
        if window is None:
            return True
        texts = self._query(position), self.documents[position], self.options.instruction or ""
        size = sum(len(text.encode()) for text in texts)
        return size + _MOST_TOKENS_OF_A_TEMPLATE > window

    def _templated(self, server: Server) -> Steps[bool]:
        """Whether the server puts pairs into a template, which shows in the number of tokens that it reads."""
        if server.templated is not None:
            return server.templated
        answer = yield from self._ask([NEUTRAL], [NEUTRAL], self.options, aside=True)
        templated = (answer.prompt_tokens or 0) > MOST_TOKENS_OF_A_PLAIN_PAIR
        self.exchange.nodes.remember(templated=templated)
        return templated

    def _room(self, query: str, window: int) -> Steps[int | None]:
        """The tokens that template and query leave for a document."""
        try:
            answer = yield from self._ask([query], [NEUTRAL], self.options, aside=True)
        except BackendRejected as refusal:
            if "maximum context length" in refusal.message:
                raise self._no_room(window) from refusal
            raise
        if answer.prompt_tokens is None:
            return None
        if answer.prompt_tokens >= window:
            raise self._no_room(window)
        return window - answer.prompt_tokens

    def _no_room(self, window: int) -> BackendRejected:
        return self.exchange.error(
            BackendRejected,
            f"a query and its template leave no room for a document in the {window} tokens that the model reads",
            "Shorten the query or instruction, or set max_tokens_per_query.",
        )

    def _ask(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        options: Options,
        *,
        positions: Sequence[int] = (0,),
        aside: bool = False,
    ) -> Steps[Answer]:
        """One request, answered. `positions` are the documents' among the caller's."""
        if self.api == "rerank":
            return (
                yield from self.exchange.ask(
                    lambda server, request_id: rerank_request(server, queries[0], documents, options, request_id),
                    lambda body: read_relevance_scores(body, positions),
                    aside=aside,
                )
            )
        return (
            yield from self.exchange.ask(
                lambda server, request_id: score_request(server, queries, documents, options, request_id),
                lambda body: read_scores(body, positions),
                aside=aside,
            )
        )

    def _query(self, position: int) -> str:
        return self.queries[0 if len(self.queries) == 1 else position]
