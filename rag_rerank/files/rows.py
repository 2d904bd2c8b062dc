"""One line of the input: parsed, ranked in one call with others, written."""

import json
from codecs import BOM_UTF8
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rag_rerank.errors import BackendError, BadReply, ConfigError, RerankError
from rag_rerank.files.formats import encode
from rag_rerank.inputs.preparing import prepare
from rag_rerank.ranking import Ranked, Ranking
from rag_rerank.runs import Asker
from rag_rerank.scorer import Scorer

GROUP = 256  # documents of one call to the scorer: enough to fill its batches, soon enough done to lose little
_SERVER_DEADLINE = 300.0  # seconds for a call where nobody waits for the answer, and a server may be starting again


@dataclass(frozen=True, slots=True)
class Options(Ranking):
    """How lines are ranked; see `rerank_file`."""

    on_error: str = field(default="raise", init=False)
    may_return: bool = field(default=False, init=False)
    group: int = GROUP

    def check(self, scorer: Scorer) -> None:
        """Refuse before any work what this scorer can't do, as `Scorer.rerank` does."""
        scorer.rerank("", [], min_precision=self.min_precision, instruction=self.instruction)

    def deadline_of(self, scorer: Scorer) -> float | None:
        """Find how long a call to this scorer may take."""
        return _SERVER_DEADLINE if self.deadline is None and scorer.remote else self.deadline

    def refuse_pair(self, name: str) -> None:
        """Refuse options that mean nothing for a query with one document, with a ConfigError."""
        if self != Options(instruction=self.instruction, deadline=self.deadline, group=self.group):
            limits = "top_n, score_threshold, min_precision and min_n"
            raise ConfigError(f'{name} of a query and a document: {limits} are for lines with "documents"')

    def facts(self) -> dict[str, str]:
        """Write down what decides about the output."""
        others = ("deadline", "on_error", "may_return")
        return {name: str(value) for name, value in asdict(self).items() if name not in others}


@dataclass(slots=True)
class Line:
    """One line of the input, by its number from 1, and its result: `ranked`, or the `error` that says why not."""

    number: int
    raw: bytes
    row: dict[str, Any]  # a query with "documents", or a pair, a query with one "document"
    query: Any  # this and the documents are prepared for the scorer: texts, or content with images, which were read
    documents: list[Any]
    ranked: list[Ranked] | None = None
    error: str | None = None

    @property
    def is_pair(self) -> bool:
        """Whether it has one document, which gets a score and no rank."""
        return "documents" not in self.row

    def added(self) -> dict[str, Any]:
        """Give the field that its result adds to a line."""
        ranked = [{"index": item.index, "score": item.score} for item in self.ranked or ()]
        return {"score": ranked[0]["score"]} if self.is_pair else {"ranked": ranked}

    def result(self) -> bytes:
        """Write the line of the output."""
        return encode(self.row | self.added())

    def reject(self) -> bytes:
        """Write the line of the rejects."""
        # Bytes that are not UTF-8 become lone surrogates: raw.encode(errors="surrogateescape") restores them.
        return encode({"line": self.number, "error": self.error, "raw": self.raw.decode(errors="surrogateescape")})


def is_blank(raw: bytes) -> bool:
    """Tell a line with nothing on it, but perhaps the mark that some editors put before the first line."""
    return not raw.strip(b" \t\r\n\v\f" + BOM_UTF8)


def parse(number: int, raw: bytes) -> Line:
    """Read the line with this number of its file; it gets an `error` if it can't be scored."""
    raw = raw.rstrip(b"\r\n")
    try:
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        row = json.loads(text, object_pairs_hook=_unique)
        return Line(number, raw, row, *_contents(row))
    except json.JSONDecodeError as error:  # its own text calls every line the first
        return Line(number, raw, {}, "", [], error=f"not JSON: {error.msg} (character {error.pos + 1})")
    except (ValueError, TypeError, RecursionError) as error:  # not UTF-8, wrong fields, a bad image, nested too deep
        return Line(number, raw, {}, "", [], error=str(error))


def _unique(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(row := dict(fields)) < len(fields):  # the output would lack what stands under the same name
        raise ValueError(f"a name is there twice in an object with {', '.join(row)}")
    return row


def _contents(row: Any) -> tuple[Any, list[Any]]:
    """Read a line's query and documents; a ValueError or TypeError says what is wrong with the line."""
    if not isinstance(row, dict):
        raise ValueError(f'must be an object with "query" and "documents", got {type(row).__name__}')  # noqa: TRY004
    if "document" in row and "documents" not in row:
        document = _content_of(row["document"], "document")
        return _contents({**row, "documents": []})[0], [document]
    for name, kind in (("query", str), ("documents", list)):
        if not isinstance(row.get(name), kind) and not (name == "query" and _has_parts(row.get(name))):
            got = type(row[name]).__name__ if name in row else "nothing"
            raise ValueError(f'"{name}" must be {kind.__name__}, got {got}')
    documents = [_content_of(document, f"documents[{position}]") for position, document in enumerate(row["documents"])]
    return prepare(row["query"], "query"), documents


def _content_of(document: Any, name: str) -> Any:
    """Find what of a line's document is scored: its text, or its content with images."""
    content: Any = document.get("text") if isinstance(document, dict) else document
    if content is None and _has_parts(document):
        content = document
    if not isinstance(content, str) and not _has_parts(content):
        raise ValueError(f'{name} must be str or an object with a "text", got {type(document).__name__}')
    return prepare(content, name)


def _has_parts(value: Any) -> bool:
    """Tell content with images, as vLLM and OpenAI write it."""
    return isinstance(value, dict) and isinstance(value.get("content"), list)


def rank(asker: Asker, lines: Sequence[Line], options: Options) -> None:
    """Give each line its ranking; or its error, if the back end works but can't score that line."""
    lines = [line for line in lines if line.error is None]
    outcomes = asker.ask([line.query for line in lines], [line.documents for line in lines]) if lines else []
    for line, outcome in zip(lines, outcomes, strict=True):
        if isinstance(outcome, RerankError):
            line.error = _reason(outcome, line)
        else:
            line.ranked = options.rank(outcome)


def _reason(error: RerankError, line: Line) -> str:
    """Say why a line has no ranking, with the positions of its documents that are to blame."""
    if not isinstance(error, BackendError) or not error.indices:
        return str(error)
    names = "document" if line.is_pair else ", ".join(f"documents[{position}]" for position in error.indices)
    return f"{names} {'' if isinstance(error, BadReply) else 'rejected: '}{error.reason or error.message}"


def results(lines: Sequence[Line]) -> tuple[list[bytes], list[bytes], int]:
    """Write lines for the output and lines for the rejects, and count the documents of the former."""
    ranked, rejects, documents = list[bytes](), list[bytes](), 0
    for line in lines:
        if line.error is None:
            try:
                ranked.append(line.result())
                documents += len(line.documents)
                continue
            except RecursionError as error:  # nested as deep as could just be read
                line.error = str(error)
        rejects.append(line.reject())
    return ranked, rejects, documents


def likely_cause(reject: bytes) -> str:
    """Guess from its first reject why a whole file was rejected, and say what to do."""
    found = json.loads(reject)
    raw = found["raw"].lstrip("\ufeff \t")
    if raw.startswith("\x1f\udc8b"):
        return "it is compressed; the name of such a file must end in .jsonl.gz"
    if "\0" in raw or raw.startswith(("\udcff\udcfe", "\udcfe\udcff")):
        return "it looks like UTF-16; convert it with: iconv -f UTF-16 -t UTF-8"
    if raw.startswith("["):
        return "it looks like one JSON array; make it one object a line with: jq -c '.[]'"
    if raw.strip() == "{":
        return "it looks like indented JSON; make it one object a line with: jq -c ."
    if not raw.startswith("{") and any(mark in raw for mark in ",;\t"):
        return 'it looks like CSV; make of it one JSON object a line, with "query" and "documents"'
    return f"line {found['line']}: {found['error']}"
