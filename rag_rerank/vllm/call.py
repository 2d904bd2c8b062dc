"""How a call goes: cut into requests, over-long documents cut, documents found that the server refuses.

Here documents that are refused (400, 413, 422) are found with fewer requests than the core needs for those that a back
end fails at (500, a reply that is none): those of a like length are tried together, and the other requests go on.
The prompt of a pair with an image in it is never truncated: vLLM answers 500 where an image's place in it is cut off,
and cuts its end otherwise. Texts beside images are cut where asked for, with tokens left for these places.
"""

import asyncio
import re
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rag_rerank.errors import BackendError, BackendRejected, BackendUnavailable, DocumentRejected
from rag_rerank.inputs import NEUTRAL
from rag_rerank.inputs.images import BLANK
from rag_rerank.inputs.multimodal import Link, Multimodal, Prepared, hidden
from rag_rerank.inputs.preparing import MANY, off_loop, text_only
from rag_rerank.isolation import Outcome
from rag_rerank.vllm.exchange import Exchange
from rag_rerank.vllm.wire import (
    SINCE,
    Answer,
    Options,
    ServerFacts,
    is_too_long,
    read_answer,
    scoring_request,
)

# Of one request, where it has more than one document: about 10 ms of encoding, in which an event loop stands still.
MAX_BYTES = 8 << 20
_LEAST_BYTES = 64 << 10  # no proxy's limit is lower; what refuses less counts something else
# The most tokens of an image or video in the prompt: Qwen-VL 3, Phi-3-vision 5. It stands before the text.
IMAGE_TOKENS = 16
# The most tokens of "a" and "a" without a template: BERT 5, RoBERTa 6, a bi-encoder 6. The shortest template has 12.
PLAIN_PAIR_TOKENS = 8
_TEMPLATE_TOKENS = 1024  # beside query and document, at most; a guess, only for whether to measure

Inputs = Sequence[Prepared]
Refusal = BackendRejected | BackendUnavailable


@dataclass(slots=True)
class Call:
    """The scoring of some pairs.

    With `fit`, what is too long for the model is cut. Where the server puts pairs into a template, documents are cut at
    the tokens that template and query leave (``max_tokens_per_doc``): vLLM's own truncation would cut the end of the
    prompt, where the score is read. Else the server cuts the longer of query and document.
    """

    exchange: Exchange
    queries: Inputs  # one for all documents, or one each
    documents: Inputs  # at least one
    options: Options
    fit: bool = False
    _facts: ServerFacts = field(init=False, repr=False)  # of one of the servers
    _whole: bool = False  # whether all documents go in one request, for they are scored together
    _is_text: bool = False  # whether there is nothing but text
    _is_sure: bool = False  # whether the servers were asked anew because of a refusal
    _most_bytes: int = MAX_BYTES
    _limits: dict[int, int] = field(default_factory=dict)  # by position, at how many tokens documents are cut
    _outcomes: dict[int, Outcome] = field(default_factory=dict)  # by position, as the refusals
    _refusals: dict[int, BackendRejected] = field(default_factory=dict)
    _accepted: set[bool] = field(default_factory=set)  # True: a request with an image; False: one with text only

    async def score(self) -> list[Outcome]:
        """Score each document, in order; one that the server rejects has its DocumentRejected there."""
        self._facts = await self.exchange.describe()
        self._most_bytes = self._facts.most_bytes or MAX_BYTES
        self._whole = self._facts.listwise and len(self.queries) == 1
        self._is_text = not (_is_mixed(self.queries) or _is_mixed(self.documents))
        if self.fit and not self._whole:
            await self._fit()
        positions = range(len(self.documents))
        chunks = deque(await off_loop(len(positions) > MANY, self._chunks, positions))
        await self._side_by_side(chunks, lambda chunk: self._score_chunk(chunk, chunks))
        for position, why in self._refusals.items():
            facts: dict[str, Any] = {"reason": why.message, "status": why.status, "endpoint": why.endpoint}
            self._outcomes[position] = self.exchange.error(
                DocumentRejected, why.message, why.remedy, __cause__=why, **facts
            )
        return [self._outcomes[position] for position in positions]

    async def _side_by_side(
        self, work: deque[list[int]], do: Callable[[list[int]], Awaitable[None]], at_once: int | None = None
    ) -> None:
        """Do all work, also what is added to it meanwhile, so much at once, or as much as is allowed."""

        async def branch() -> None:
            while work:
                await do(work.popleft())

        count = min(len(work), at_once or self.exchange.rules.max_concurrency)
        if count == 1:
            return await branch()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(count):
                    group.create_task(branch())
        except ExceptionGroup as errors:  # the first one has ended the others
            raise errors.exceptions[0] from errors.exceptions[0].__cause__

    def _chunks(self, positions: Sequence[int]) -> list[list[int]]:
        """Cut the call into requests, each the positions of its pairs: not too many or too large, all cut alike.

        Those of one query go together where it can be sent once instead of for each document: in a rerank API, and with
        an image in it. What the server has to fetch goes alone: the others don't wait for it, nor fail with it.
        """
        if self._whole:
            return [list(positions)]
        groups: dict[object, list[int]] = defaultdict(list)
        if self._is_text and self._facts.form.api == "score" and not self._limits:
            groups[None] += positions  # what most calls are, in half the time
        else:
            for position in positions:
                query, is_multimodal = self._query(position), self._is_multimodal(position)
                alone = query if self._facts.form.api != "score" or isinstance(query, Multimodal) else None
                cut = self._options(position) if is_multimodal else self._limits.get(position)
                groups[is_multimodal, cut, alone].append(position)
        chunks: list[list[int]] = []
        for group in groups.values():
            size = self._most_bytes + 1  # so that a chunk is begun
            for position in group:
                more = _size(self.documents[position]) + (0 if len(self.queries) == 1 else _size(self._query(position)))
                fetched = not self._is_text and bool(_links([self.documents[position]]))
                if fetched or size + more > self._most_bytes or len(chunks[-1]) == self.exchange.rules.chunk_size:
                    chunks.append([])
                    size = 0
                chunks[-1].append(position)
                size = self._most_bytes + 1 if fetched else size + more
        return chunks

    async def _score_chunk(self, chunk: list[int], chunks: deque[list[int]]) -> None:
        """Score a chunk; one that is refused goes back in halves, until it is known which documents are to blame.

        One rejected document of 32 costs 11 requests more, or 12 where nothing was accepted before.
        """
        several = len(self.queries) > 1 and self._facts.form.api == "score" and isinstance(self._query(chunk[0]), str)
        queries = [self._query(position) for position in (chunk if several else chunk[:1])]
        documents = [self.documents[position] for position in chunk]
        if self._limits and len(set(map(self._limits.get, chunk))) > 1:  # found out since it was planned
            chunks.extendleft(self._chunks(chunk))
            return
        options = self._options(chunk[0])
        try:
            answer = await self._ask(queries, documents, options, chunk)
        except (BackendRejected, BackendUnavailable) as error:
            for link in _links([*queries, *documents]):  # vLLM quotes an address that it can't fetch
                error.message = hidden(error.message, link.url)
                error.body = error.body and hidden(error.body, link.url)
            chunks.extendleft(await self._parts(error, chunk, options))
            return
        self._accepted.add(not self._is_text and _is_mixed(documents))
        self._outcomes.update(zip(chunk, answer.scores, strict=True))

    async def _parts(self, error: Refusal, chunk: list[int], sent: Options) -> list[list[int]]:
        """Cut a refused chunk into what is to be asked instead, the last first; raise what concerns the whole call."""
        if self._is_multimodal(chunk[0]):
            self._explain(error)
        if self._whole:
            error.remedy = "The model scores all documents of a query together: pass fewer, or shorter ones."
            raise error
        if await self._fits_after_all(error, chunk, sent):
            return self._chunks(chunk)
        if not await self._blames_documents(error, chunk) or isinstance(error, BackendUnavailable):
            raise error
        size = sum(_size(self.documents[position]) for position in chunk)
        if len(chunk) == 1:
            self._refusals[chunk[0]] = error
            return []
        if error.status == 413 and size > _LEAST_BYTES:
            self._most_bytes = min(self._most_bytes, size // 2)
            self.exchange.servers.remember(most_bytes=self._most_bytes)  # later calls need not meet the limit
        # By length: over-long documents end up in the same half. Those to blame are found with fewer requests.
        chunk.sort(key=lambda position: _size(self.documents[position]))
        return [chunk[len(chunk) // 2 :], chunk[: len(chunk) // 2]]

    async def _fits_after_all(self, error: BackendError, chunk: list[int], sent: Options) -> bool:
        """Cut a chunk that is too long although it did not seem so: its template is long; False where that is known."""
        if not (self.fit and is_too_long(error.message)) or self._is_multimodal(chunk[0]):
            return False
        if self._options(chunk[0]) == sent:  # else another branch has found out meanwhile
            if sent.max_tokens_per_doc != self.options.max_tokens_per_doc:
                if self._is_sure:
                    return False
                self._is_sure = True
                self.exchange.servers.forget()  # since a restart, the window may be another one
            await self._cut(chunk, at_once=1)
        return self._options(chunk[0]) != sent

    def _explain(self, error: Refusal) -> None:
        """Give an error that concerns an image the remedy that fits; ContentError for a model that reads text only."""
        # vLLM 0.32, entrypoints/pooling/scoring: for models of text, and for jina-reranker-v3.
        if re.search("MultiModalParam is not supported|only supports text as input", error.message):
            raise text_only(self._facts.model, self.queries, self.documents) from error
        if is_too_long(error.message):
            error.remedy = "Text beside an image is cut only by max_tokens_per_doc=; or scale it down (max_pixels=)."
        elif error.status == 500:  # vLLM's for an address out of reach, and for images that its model can't take in
            error.remedy = "Can the server reach its url, and does the model take in images of that shape?"

    async def _blames_documents(self, error: Refusal, chunk: list[int]) -> bool:
        """Find out whether a request may have been refused for single documents, not for all of it.

        A server that fails (500) at any image, also at a blank one, fails as a whole.
        """
        changing = [self.documents, self.queries] if len(self.queries) > 1 else [self.documents]
        with_image = any(_is_mixed([side[position] for position in chunk]) for side in changing)
        if isinstance(error, BackendRejected):
            if error.status == 413 and len(chunk) > 1:
                return True  # less is always less; a single one may be refused for the query's size
            return error.status in (400, 413, 422) and await self._accepts_harmless(with_image)
        if error.status == 500 and with_image:
            try:
                error.whole = not (await self._accepts_harmless(with_image))
            except BackendUnavailable:
                error.whole = True
        return False

    async def _accepts_harmless(self, with_image: bool) -> bool:
        """Find out whether the server takes a request like ours with a document that can't be to blame."""
        if with_image not in self._accepted:
            query = self.queries[0] if len(self.queries) == 1 else NEUTRAL
            document = Multimodal((BLANK,)) if with_image else NEUTRAL
            try:
                await self._ask([query], [document], self._options_for(query, document))
            except BackendRejected:
                return with_image in self._accepted  # another branch may know better by now
            self._accepted.add(with_image)
        return True

    async def _fit(self) -> None:
        """Cut the documents that may be too long, where that can be known and does no harm."""
        if self._facts.form.api == "tei":
            self.options = replace(self.options, truncate_prompt_tokens=-1)
        if self._facts.form.api != "score" and self._facts.version is None:
            self.fit = False  # no vLLM server, as it seems: others may stumble over a field of vLLM's
            return
        long = await off_loop(len(self.documents) > MANY, self._long)
        if long:
            await self._cut(long)

    def _long(self) -> list[int]:
        """List the pairs of texts that could exceed the window: no tokenizer makes more tokens than bytes."""
        window = self._facts.window
        beside = _TEMPLATE_TOKENS + _bytes(self.options.instruction or "")
        of_queries = list(map(_bytes, self.queries)) * (len(self.documents) // len(self.queries))
        return [
            position
            for position, document in enumerate(self.documents)
            if (window is None or beside + of_queries[position] + _bytes(document) > window)
            and not self._is_multimodal(position)
        ]

    async def _cut(self, long: Sequence[int], at_once: int | None = None) -> None:
        """Find at how many tokens to cut the documents of some pairs; as they are where the server can't tell."""
        facts = await self.exchange.describe(surely=True)
        has_template = await self._has_template(facts)
        if has_template is False:
            self.options = replace(self.options, truncate_prompt_tokens=-1)
        window, given = facts.window, self.options.max_tokens_per_doc
        old = facts.version is not None and facts.version < SINCE["max_tokens_per_doc"]
        if not has_template or window is None or old:
            return
        left: dict[Prepared, int | None] = {}  # by each query, for a document
        queries = deque([position] for position in {self._query(position): position for position in long}.values())

        async def measure(chunk: list[int]) -> None:
            query = self._query(chunk[0])
            try:
                left[query] = await self._left_by(query, window)
            except BackendRejected:  # of many queries: the server will say so of this one's pairs, and score the others
                if len(self.queries) == 1:
                    raise

        await self._side_by_side(queries, measure, at_once)
        for position in range(len(self.documents)):
            limit = None if self._is_multimodal(position) else left.get(self._query(position))
            if limit is not None:
                self._limits[position] = limit if given is None else min(limit, given)

    async def _has_template(self, facts: ServerFacts) -> bool | None:
        """Find out whether the server puts pairs into a template: it shows in the number of tokens that it reads."""
        if facts.has_template is not None:
            return facts.has_template
        tokens = (await self._ask([NEUTRAL], [NEUTRAL], self.options)).prompt_tokens
        has_template = None if tokens is None else tokens > PLAIN_PAIR_TOKENS  # a gateway may not pass it on
        self.exchange.servers.remember(has_template=has_template)
        return has_template

    async def _left_by(self, query: Prepared, window: int) -> int | None:
        """Measure the tokens that template and query leave for a document; None where they are not told."""
        cause = None
        try:
            tokens = (await self._ask([query], [NEUTRAL], self.options)).prompt_tokens
        except BackendRejected as refusal:
            if not is_too_long(refusal.message):
                raise
            cause, tokens = refusal, window
        if tokens is None or tokens < window:
            return None if tokens is None else window - tokens
        said = f"a query and its template leave no token for a document of the {window} that the model reads"
        remedy = "Shorten the query or instruction, or set max_tokens_per_query."
        raise self.exchange.error(BackendRejected, said, remedy, whole=True) from cause

    async def _ask(
        self, queries: Inputs, documents: Inputs, options: Options, positions: Sequence[int] | None = None
    ) -> Answer:
        """Get one request answered; without `positions` among the caller's documents a small one that takes no turn."""
        asked, sent = (
            [each if isinstance(each, str) else each.encoded() for each in side] for side in (queries, documents)
        )
        return await self.exchange.ask(
            lambda facts, request_id: scoring_request(facts, asked, sent, options, request_id),
            lambda body: read_answer(self._facts.form.api, body, positions or (0,)),
            takes_turn=positions is not None,
        )

    def _options(self, position: int) -> Options:
        return self._options_for(self._query(position), self.documents[position], self._limits.get(position))

    def _options_for(self, query: Prepared, document: Prepared, limit: int | None = None) -> Options:
        """Make the options for a pair, whose document is cut at that limit; or its texts, where images leave room."""
        options = self.options
        if isinstance(query, str) and isinstance(document, str):
            return options if limit is None else replace(options, max_tokens_per_doc=limit)
        of_query, of_doc = _room(options.max_tokens_per_query, query), _room(options.max_tokens_per_doc, document)
        return replace(options, truncate_prompt_tokens=None, max_tokens_per_query=of_query, max_tokens_per_doc=of_doc)

    def _is_multimodal(self, position: int) -> bool:
        return isinstance(self._query(position), Multimodal) or isinstance(self.documents[position], Multimodal)

    def _query(self, position: int) -> Prepared:
        return self.queries[0 if len(self.queries) == 1 else position]


def _size(value: Prepared) -> int:
    """Estimate how many bytes it takes in a request."""
    return len(value) if isinstance(value, str) else value.size


def _bytes(value: Prepared) -> int:
    """Count the bytes of a text."""
    text = value if isinstance(value, str) else ""
    return len(text) if text.isascii() else len(text.encode())


def _room(limit: int | None, value: Prepared) -> int | None:
    """Give a limit of text that leaves room for the images' places; None where there is none."""
    images = 0 if isinstance(value, str) else sum(not isinstance(part, str) for part in value.parts)
    return None if limit is None or limit < IMAGE_TOKENS * images else limit


def _links(inputs: Inputs) -> list[Link]:
    """List what the server has to fetch."""
    return [part for each in inputs if isinstance(each, Multimodal) for part in each.parts if isinstance(part, Link)]


def _is_mixed(inputs: Inputs) -> bool:
    """Tell whether there is more than text in any of them."""
    return any(isinstance(each, Multimodal) for each in inputs)
