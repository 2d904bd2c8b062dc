"""How a call goes: cut into requests, over-long documents cut, rejected documents found.

"Seen" is a pair with more in it than text. Its prompt is never truncated: vLLM answers 500 where a picture's place in
it is cut off, and cuts its end otherwise. Texts beside pictures are cut where asked for, with room for the places.

A generator (`rag_rerank.vllm.steps`): no socket and no clock of its own.
"""

import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from rag_rerank.errors import BackendRejected, BackendUnavailable, DocumentRejected
from rag_rerank.inputs.images import BLANK
from rag_rerank.inputs.multimodal import Multimodal, Prepared, hidden
from rag_rerank.inputs.preparing import text_only
from rag_rerank.isolation import NEUTRAL
from rag_rerank.vllm.exchange import Exchange
from rag_rerank.vllm.pieces import cut, has_image, links, places, size_of
from rag_rerank.vllm.steps import Steps, Together
from rag_rerank.vllm.wire import (
    Answer,
    Encoded,
    Options,
    Sent,
    Server,
    read_relevance_scores,
    read_scores,
    rerank_request,
    score_request,
)

API = Literal["score", "rerank"]

# vLLM 0.32, entrypoints/pooling/scoring: for models of text, and for jina-reranker-v3.
_BLIND = re.compile("MultiModalParam is not supported|only supports text as input")
_CUTS_DOCUMENTS = (0, 20)  # vLLM's max_tokens_per_doc
_MOST_TOKENS_OF_A_TEMPLATE = 1024  # beside query and document; a guess, only for whether to measure
NEUTRAL_IMAGE = Multimodal((BLANK,))
MOST_TOKENS_OF_A_PLACE = 16  # of an image or video in the prompt: Qwen-VL 3, Phi-3-vision 5; it stands before the text
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
    queries: Sequence[Prepared]
    documents: Sequence[Prepared]
    options: Options
    api: API = "score"
    fit: bool = False
    _scores: list[float | None] = field(init=False)
    _refusals: dict[int, BackendRejected | BackendUnavailable] = field(default_factory=dict)
    _sound: set[bool] = field(
        default_factory=set
    )  # whether a request like ours, with or without pictures, was accepted
    _encoded: dict[int, Encoded] = field(default_factory=dict)  # by id of what stands in queries and documents

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
        """Positions of the pairs of each request: not too many or too large, all cut alike.

        Those of one query where it can be sent once instead of for each document: in a rerank API, and with pictures.
        """
        groups: dict[tuple[int | None, Prepared | None, tuple[int | None, int | None] | None], list[int]] = {}
        for position, room in enumerate(rooms):
            query, document = self._query(position), self.documents[position]
            asked = query if self.api == "rerank" or isinstance(query, Multimodal) else None
            seen = isinstance(query, Multimodal) or isinstance(document, Multimodal)
            limits = self._limits(query, document) if seen else None
            groups.setdefault((room, asked, limits), []).append(position)
        queries = None if len(self.queries) == 1 else self.queries
        size = self.exchange.rules.chunk_size
        return [piece for group in groups.values() for piece in cut(group, size, self.documents, queries)]

    def _score_piece(self, piece: list[int], room: int | None, pieces: "deque[list[int]]") -> Steps[None]:
        """Score a piece; one that is refused goes back in halves, until it is known which documents are to blame.

        One rejected document of 32 costs 11 requests more, or 12 where nothing was accepted before.
        """
        one = len(self.queries) == 1 or self.api == "rerank" or isinstance(self._query(piece[0]), Multimodal)
        queries = [self._query(position) for position in (piece[:1] if one else piece)]
        documents = [self.documents[position] for position in piece]
        seen = self._seen(piece[0])
        options = self.options if room is None else replace(self.options, max_tokens_per_doc=room)
        options = self._untruncated(queries[0], documents[0]) if seen else options
        try:
            answer = yield from self._ask(queries, documents, options, positions=piece)
        except (BackendRejected, BackendUnavailable) as refusal:
            for link in links([*queries, *documents]):  # vLLM quotes an address that it can't fetch
                refusal.message = hidden(refusal.message, link.url)
            refusal.args = (refusal.message,)
            if not (yield from self._blames_documents(refusal, queries, documents, seen)):
                raise
            if len(piece) == 1:
                self._refuse(piece[0], refusal)
                return
            # By length: over-long documents end up in the same half. Those to blame are found with fewer requests.
            piece.sort(key=lambda position: size_of(self.documents[position]))
            middle = len(piece) // 2
            pieces.extendleft([piece[middle:], piece[:middle]])
            return
        self._sound.add(has_image(documents))
        for position, score in zip(piece, answer.scores, strict=True):
            self._scores[position] = score
            self._encoded.pop(id(self.documents[position]), None)

    def _blames_documents(
        self,
        refusal: BackendRejected | BackendUnavailable,
        queries: Sequence[Prepared],
        documents: Sequence[Prepared],
        seen: bool,
    ) -> Steps[bool]:
        """Whether it may be due to single documents of a request that it was refused, and not to all of it.

        Raises:
            ContentError: It is due to the model, which reads text only.
        """
        if seen and _BLIND.search(refusal.message):
            raise text_only(self.exchange.model_name, self.queries, self.documents) from refusal
        # vLLM answers 500 where it can't reach the address of a picture, and for pictures that its model can't take in.
        odd = seen and isinstance(refusal, BackendUnavailable) and refusal.status == 500
        if not odd and (isinstance(refusal, BackendUnavailable) or refusal.status not in (400, 413, 422)):
            return False
        if refusal.status == 413:
            return True
        pictured = has_image(documents) or (len(self.queries) > 1 and has_image(queries))
        return (yield from self._accepts_others(pictured, again=odd))

    def _accepts_others(self, pictured: bool, *, again: bool = False) -> Steps[bool]:
        """Whether the server takes a request like ours with a document that can't be to blame.

        Args:
            pictured: Whether that is a picture.
            again: Ask even if it has done so before.
        """
        if again or pictured not in self._sound:
            query = self.queries[0] if len(self.queries) == 1 else NEUTRAL
            document = NEUTRAL_IMAGE if pictured else NEUTRAL
            seen = pictured or isinstance(query, Multimodal)
            options = self._untruncated(query, document) if seen else self.options
            try:
                yield from self._ask([query], [document], options, aside=True)
            except (BackendRejected, BackendUnavailable) as refusal:
                if isinstance(refusal, BackendUnavailable) and not again:
                    raise
                return pictured in self._sound and not again  # another branch may know better by now
            self._sound.add(pictured)
        return True

    def _refuse(self, position: int, refusal: BackendRejected | BackendUnavailable) -> None:
        """Note that a document can't be scored."""
        if self._seen(position):
            if re.search("maximum (context|model) length", refusal.message):
                refusal.remedy = (
                    "The text beside an image is cut only by max_tokens_per_doc=; or scale it down (max_pixels=)."
                )
            elif isinstance(refusal, BackendUnavailable):
                refusal.remedy = "Can the server reach its url, and does the model take in images of that shape?"
        self._refusals[position] = refusal
        self._encoded.pop(id(self.documents[position]), None)

    def _rejected(self) -> DocumentRejected:
        """The error for documents that can't be scored, with the scores of the others."""
        indices = sorted(self._refusals)
        first = self._refusals[indices[0]]
        several = f" and {len(indices) - 1} more" if len(indices) > 1 else ""
        error = self.exchange.error(
            DocumentRejected, f"documents[{indices[0]}]{several} rejected: {first.message}", first.remedy
        )
        error.indices, error.scores, error.status = tuple(indices), tuple(self._scores), first.status
        error.reason = first.message
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
        measured: dict[Prepared, int | None] = {}
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
            room = None if self._seen(position) else measured.get(self._query(position))
            rooms[position] = room if given is None or room is None else min(room, given)
        return rooms

    def _may_be_long(self, position: int, window: int | None) -> bool:
        """Whether a pair is to be cut, and could have more tokens than the model reads.

        No tokenizer makes more tokens than bytes.
        """
        query, document = self._query(position), self.documents[position]
        if not (isinstance(query, str) and isinstance(document, str)):
            return False
        if window is None:
            return True
        size = sum(len(text.encode()) for text in (query, document, self.options.instruction or ""))
        return size + _MOST_TOKENS_OF_A_TEMPLATE > window

    def _templated(self, server: Server) -> Steps[bool]:
        """Whether the server puts pairs into a template, which shows in the number of tokens that it reads."""
        if server.templated is not None:
            return server.templated
        answer = yield from self._ask([NEUTRAL], [NEUTRAL], self.options, aside=True)
        templated = (answer.prompt_tokens or 0) > MOST_TOKENS_OF_A_PLAIN_PAIR
        self.exchange.nodes.remember(templated=templated)
        return templated

    def _room(self, query: Prepared, window: int) -> Steps[int | None]:
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
        queries: Sequence[Prepared],
        documents: Sequence[Prepared],
        options: Options,
        *,
        positions: Sequence[int] = (0,),
        aside: bool = False,
    ) -> Steps[Answer]:
        """One request, answered. `positions` are the documents' among the caller's."""
        asked, sent = [self._sent(query) for query in queries], [self._sent(document) for document in documents]
        if self.api == "rerank":
            return (
                yield from self.exchange.ask(
                    lambda server, request_id: rerank_request(server, asked[0], sent, options, request_id),
                    lambda body: read_relevance_scores(body, positions),
                    aside=aside,
                )
            )
        return (
            yield from self.exchange.ask(
                lambda server, request_id: score_request(server, asked, sent, options, request_id),
                lambda body: read_scores(body, positions),
                aside=aside,
            )
        )

    def _sent(self, value: Prepared) -> Sent:
        """As it is sent; encoded once, and kept until it has its score."""
        if isinstance(value, str):
            return value
        if id(value) not in self._encoded:
            self._encoded[id(value)] = Encoded.of(value)
        return self._encoded[id(value)]

    def _untruncated(self, query: Prepared, document: Prepared) -> Options:
        """The options for a seen pair."""
        of_query, of_document = self._limits(query, document)
        return replace(
            self.options,
            truncate_prompt_tokens=None,
            max_tokens_per_query=of_query,
            max_tokens_per_doc=of_document,
        )

    def _limits(self, query: Prepared, document: Prepared) -> tuple[int | None, int | None]:
        """At how many tokens to cut the text of each side of a seen pair."""
        options = self.options
        given = ((options.max_tokens_per_query, query), (options.max_tokens_per_doc, document))
        of_query, of_document = (
            None if limit is None or limit < MOST_TOKENS_OF_A_PLACE * places(each) else limit for limit, each in given
        )
        return of_query, of_document

    def _seen(self, position: int) -> bool:
        return isinstance(self._query(position), Multimodal) or isinstance(self.documents[position], Multimodal)

    def _query(self, position: int) -> Prepared:
        return self.queries[0 if len(self.queries) == 1 else position]
