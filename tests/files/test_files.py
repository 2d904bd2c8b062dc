"""Files in, files out: nothing lost, nothing twice, whatever happens in between."""

import gzip
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_rerank.errors import (
    AuthError,
    BackendRejected,
    BackendUnavailable,
    BadReply,
    ConfigError,
    DeadlineExceeded,
    DocumentRejected,
)
from rag_rerank.files import Tally, partial_of, rejects_of, rerank_file
from rag_rerank.files.formats import Part
from tests import kept
from tests.scorers import Answers, WordOverlap, is_probe

ROWS: list[dict[str, Any]] = [
    {"query": "giant panda", "documents": ["a bear", "the giant panda", "a panda"], "id": 7, "tags": [None, 1.5]},
    {"query": "bread", "documents": [{"text": "flour", "url": "x"}, {"text": "bread", "url": "y"}]},
    {"query": "nothing", "documents": []},
]


def lines(*rows: object) -> bytes:
    """JSON Lines; bytes stand for themselves."""
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


def read(path: Path) -> list[dict[str, Any]]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.splitlines()]


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_bytes(lines(*ROWS))
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def rejecting(word: str, error: Callable[[list[int], list[float | None]], Exception]) -> Answers:
    """Scores a document by its length; what the error is where one has the word."""

    def answer(documents: list[str]) -> list[float]:
        bad = [index for index, document in enumerate(documents) if word in document]
        if bad:
            raise error(bad, [None if index in bad else 1.0 for index in range(len(documents))])
        return [float(len(document)) for document in documents]

    return Answers(answer)


class TestRows:
    """What becomes of a line."""

    def test_a_line_is_itself_and_its_ranking(self, source: Path, target: Path):
        """Other fields stay; nothing but the output is left."""
        assert rerank_file(WordOverlap(), source, target) == Tally(lines=3, ranked=3, documents=5)
        first, second, third = read(target)
        scores = [{"index": 1, "score": 1.0}, {"index": 2, "score": 0.5}, {"index": 0, "score": 0.0}]
        assert first == {**ROWS[0], "ranked": scores}
        assert [item["index"] for item in second["ranked"]] == [1, 0]
        assert third == {**ROWS[2], "ranked": []}
        assert left(source.parent) == {"in.jsonl", "out.jsonl"}

    def test_a_pair_gets_a_score(self, source: Path, target: Path):
        """Among rows with documents, too; a rank would mean nothing."""
        pairs = [{"query": "giant panda", "document": "a panda", "id": 1}, {"query": "q", "document": {"text": "q"}}]
        source.write_bytes(lines(pairs[0], ROWS[1], pairs[1], {"query": "q", "document": 3}, {"document": "d"}))
        assert rerank_file(WordOverlap(), source, target) == Tally(lines=5, ranked=3, rejected=2, documents=4)
        first, second, third = read(target)
        assert (first, third) == (pairs[0] | {"score": 0.5}, pairs[1] | {"score": 1.0})
        assert "ranked" in second
        errors = [reject["error"] for reject in read(rejects_of(target))]
        assert errors == [
            'document must be str or an object with a "text", got int',
            '"query" must be str, got nothing',
        ]
        for option in ({"top_n": 1}, {"score_threshold": 0.0}, {"min_n": 1}):
            with pytest.raises(ConfigError, match="line 1 is a pair"):
                rerank_file(WordOverlap(), source, target, **option)

    @pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
    def test_a_part_of_a_file(self, ending: str, source: Path, target: Path):
        """Its lines, with their numbers in the file."""
        rows: list[dict[str, Any]] = [{"query": str(number), "document": "d" * (number != 6)} for number in range(10)]
        rows[6]["document"] = None
        path = source.with_name(f"part{ending}")
        if ending == ".parquet":
            from pyarrow import Table, parquet

            parquet.write_table(Table.from_pylist(rows), path, row_group_size=4)
        else:
            path.write_bytes(gzip.compress(lines(*rows)) if ending == ".jsonl.gz" else lines(*rows))
        tally = rerank_file(WordOverlap(), path, target, part=Part(first=3, lines=5), group=2)
        assert (tally.lines, tally.ranked, tally.rejected) == (5, 4, 1)
        assert [row["query"] for row in read(target)] == ["3", "4", "5", "7"]
        assert read(rejects_of(target))[0]["line"] == 7

    def test_parquet_keeps_its_types(self, source: Path, target: Path):
        """Those that JSON has, also of a column of nothing but nulls: parts of one file must fit together."""
        import pyarrow as pa
        from pyarrow import parquet

        kept = {"query": pa.large_string(), "document": pa.string(), "n": pa.int32(), "x": pa.float32()}
        schema = pa.schema([*kept.items(), ("tags", pa.list_(pa.struct({"name": pa.string()}))), ("day", pa.date32())])
        path, out = source.with_suffix(".parquet"), target.with_suffix(".parquet")
        parquet.write_table(pa.table({name: pa.nulls(2, schema.field(name).type) for name in schema.names}), path)
        rerank_file(WordOverlap(), path, out)  # both rows are rejected
        written = parquet.read_schema(out)
        assert written.remove_metadata() == schema.remove(5).append(pa.field("score", pa.float64()))

    def test_gzip_in_and_out(self, source: Path, target: Path):
        """The same lines, and always the same bytes."""
        packed_in, packed_out = source.with_name("in.jsonl.gz"), source.with_name("out.jsonl.gz")
        packed_in.write_bytes(gzip.compress(source.read_bytes()))
        rerank_file(WordOverlap(), source, target)
        rerank_file(WordOverlap(), packed_in, packed_out)
        assert gzip.decompress(packed_out.read_bytes()) == target.read_bytes()
        before = packed_out.read_bytes()
        rerank_file(WordOverlap(), packed_in, packed_out)
        assert packed_out.read_bytes() == before

    def test_parquet_in_and_out(self, source: Path, target: Path):
        """Where pyarrow is installed; columns that only some rows have are null in the others."""
        pytest.importorskip("pyarrow")
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist([ROWS[0], {**ROWS[0], "query": None}]), source.with_suffix(".parquet"))
        out = target.with_suffix(".parquet")
        tally = rerank_file(WordOverlap(), source.with_suffix(".parquet"), out)
        assert (tally.ranked, tally.rejected) == (1, 1)
        rerank_file(WordOverlap(), source.with_suffix(".parquet"), target)
        assert parquet.read_table(out).to_pylist() == read(target)
        source.write_bytes(lines(ROWS[0], {"query": "q", "documents": [], "extra": {"a": 1}}))
        rerank_file(WordOverlap(), source, out)
        first, second = parquet.read_table(out).to_pylist()
        assert (first["extra"], second["extra"], second["id"]) == (None, {"a": 1}, None)
        source.write_bytes(lines(*ROWS))
        scorer = WordOverlap()
        with pytest.raises(ConfigError, match="no Parquet of these lines: column documents"):
            rerank_file(scorer, source, out)
        assert len(scorer.calls) == 1

    def test_parquet_finds_out_early(self, source: Path, target: Path):
        """In the group with the first value that has no place, also of a run that continues; then nothing is scored."""
        rows = [{"query": "q", "document": "d", "n": "many" if number > 5 else number} for number in range(9)]
        source.write_bytes(lines(*rows))
        out = target.with_suffix(".parquet")
        for calls in (4, 1):
            scorer = WordOverlap()
            with pytest.raises(ConfigError, match="no Parquet of these lines.*n.*Name a .jsonl file"):
                rerank_file(scorer, source, out, group=2)
            assert len(scorer.calls) == calls
            assert len(kept.output(partial_of(out)).splitlines()) == 6

    @pytest.mark.parametrize("extra", [{"a": {}}, {"a": [{}]}, {"a": 2**70}, {"a": "\ud800"}, {"\ud800": 1}])
    def test_what_parquet_cant_hold_is_found_out_early(self, extra: dict[str, Any], source: Path, target: Path):
        """Also what only the writer refuses, and what is no error of Arrow's."""
        source.write_bytes(lines(*[{"query": "q", "document": "d", **extra}] * 9))
        scorer = WordOverlap()
        with pytest.raises(ConfigError, match="no Parquet of these lines.*Name a .jsonl file"):
            rerank_file(scorer, source, target.with_suffix(".parquet"), group=2)
        assert len(scorer.calls) == 1

    def test_texts_in_parquet_may_be_bytes(self, source: Path, target: Path):
        """As writers leave them that do not tell texts from bytes."""
        from pyarrow import Table, parquet

        file = source.with_suffix(".parquet")
        parquet.write_table(Table.from_pylist([{"query": "é".encode(), "documents": [b"x\xff", "é".encode()]}]), file)
        rerank_file(WordOverlap(), file, target)
        [row] = read(target)
        assert (row["query"], row["documents"]) == ("é", ["x\ufffd", "é"])
        assert row["ranked"] == [{"index": 1, "score": 1.0}, {"index": 0, "score": 0.0}]

    def test_parquet_without_pyarrow(self, source: Path, monkeypatch: pytest.MonkeyPatch):
        """The way out is named, before anything is scored."""
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        with pytest.raises(ConfigError, match="pip install pyarrow"):
            rerank_file(WordOverlap(), source, source.with_suffix(".parquet"))

    def test_odd_texts_come_back_as_they_were(self, source: Path, target: Path):
        """Line separators that are none to JSON, lone surrogates, a byte order mark, CRLF, no end to the last line."""
        odd = {"query": "a\u2028b", "documents": ["\ud800", "\x00", "🎉"], "ключ": "値"}
        source.write_bytes(b"\xef\xbb\xbf" + lines(odd).replace(b"\n", b"\r\n") + lines(odd).rstrip())
        assert rerank_file(WordOverlap(), source, target).ranked == 2
        for row in read(target):
            assert {name: row[name] for name in odd} == odd

    def test_a_huge_line_and_an_empty_file(self, source: Path, target: Path):
        """20 MB are a line as any other."""
        source.write_bytes(lines({"query": "panda", "documents": ["x" * 10_000_000, "panda " * 1_700_000]}, ROWS[0]))
        assert rerank_file(WordOverlap(), source, target) == Tally(lines=2, ranked=2, documents=5)
        assert [item["index"] for item in read(target)[0]["ranked"]] == [1, 0]
        source.write_bytes(b"")
        assert rerank_file(WordOverlap(), source, target) == Tally()
        assert target.read_bytes() == b""


class TestRejects:
    """Lines that can't be reranked."""

    @pytest.mark.parametrize(
        ("bad", "words"),
        [
            (b"nope", "Expecting value"),
            (b'{"query": "q", "documents": ["cut off', "Unterminated"),
            (b"\xff\xfe", "utf-8"),
            (b"[1]", "must be an object"),
            (b"null", "must be an object"),
            (b'{"documents": []}', '"query" must be str, got nothing'),
            (b'{"query": null, "documents": []}', '"query" must be str, got NoneType'),
            (b'{"query": "q"}', '"documents" must be list, got nothing'),
            (b'{"query": "q", "documents": "d"}', '"documents" must be list, got str'),
            (b'{"query": "q", "documents": ["d", 3]}', "documents[1] must be str"),
            (b'{"query": "q", "documents": [{"txt": "d"}]}', "documents[0] must be str"),
            (b'{"query": "q", "documents": ["d"], "documents": ["e"]}', "there twice in an object"),
            (b"[" * 100_000, "recursion"),
            (b'{"query": "q", "documents": [], "n": ' + b"1" * 5000 + b"}", "digits"),
        ],
    )
    def test_a_malformed_line(self, bad: bytes, words: str, source: Path, target: Path):
        """It is kept as it was, with its number and what is wrong; the others are reranked."""
        source.write_bytes(lines(ROWS[0], b"  \n", bad + b"\n", ROWS[1]))
        tally = rerank_file(WordOverlap(), source, target)
        assert (tally.lines, tally.ranked, tally.rejected, tally.blank) == (4, 2, 1, 1)
        (reject,) = read(rejects_of(target))
        assert reject["line"] == 3
        assert words in reject["error"]
        assert reject["raw"].encode(errors="surrogateescape") == bad

    def test_a_clean_run_removes_the_rejects_of_the_last_one(self, source: Path, target: Path):
        """They are of another output; one that is interrupted leaves both."""
        source.with_name("in.jsonl.gz").write_bytes(gzip.compress(lines(*ROWS)))
        source.write_bytes(b"nope\n")
        rerank_file(WordOverlap(), source, target)
        with pytest.raises(KeyboardInterrupt):
            rerank_file(WordOverlap(stop_at=0), source.with_name("in.jsonl.gz"), target)
        assert left(source.parent) == {"in.jsonl", "in.jsonl.gz", "out.jsonl", "out.jsonl.rejects.jsonl"}
        source.with_name("in.jsonl.gz").unlink()
        source.write_bytes(lines(*ROWS))
        rerank_file(WordOverlap(), source, target)
        assert left(source.parent) == {"in.jsonl", "out.jsonl"}

    @pytest.mark.parametrize(
        "error",
        [
            lambda bad, scores: DocumentRejected(
                f"documents[{bad[0]}] rejected: odd", indices=bad, scores=scores, reason="odd"
            ),
            lambda bad, scores: BackendRejected("odd"),
            lambda bad, scores: BadReply("odd"),
        ],
    )
    def test_what_the_back_end_rejects(self, error: Any, source: Path, target: Path):
        """Only the line with it, whether or not the error says which."""
        bad = {"query": "q", "documents": ["fine", "bad"]}
        source.write_bytes(lines(ROWS[0], bad, ROWS[1], ROWS[0], bad))
        tally = rerank_file(rejecting("bad", error), source, target)
        assert (tally.ranked, tally.rejected) == (3, 2)
        assert [row["query"] for row in read(target)] == ["giant panda", "bread", "giant panda"]
        rejects = read(rejects_of(target))
        assert [reject["line"] for reject in rejects] == [2, 5]
        assert all("odd" in reject["error"] for reject in rejects)
        if isinstance(error([0], []), DocumentRejected):
            assert rejects[0]["error"] == "documents[1] rejected: odd"

    @pytest.mark.parametrize("later", [False, True])
    @pytest.mark.parametrize(
        "error", [BackendRejected("no"), AuthError("no"), BackendUnavailable("no"), DeadlineExceeded("no")]
    )
    def test_a_back_end_that_does_not_work_is_no_lines_fault(
        self, error: Exception, later: bool, source: Path, target: Path
    ):
        """At once, or as soon as it was asked who it is: the run ends, nothing is rejected, and nothing is left."""

        def answer(documents: list[str]) -> list[float]:
            if is_probe(documents) and later:
                return [0.0] * len(documents)
            raise error

        with pytest.raises(type(error)):
            rerank_file(Answers(answer), source, target)
        assert left(source.parent) == {"in.jsonl"}

    @pytest.mark.parametrize("error", [AuthError("no"), BackendUnavailable("no"), DeadlineExceeded("no")])
    def test_what_no_line_can_cause_ends_the_run(self, error: Exception, source: Path, target: Path):
        """Also where only some of a group's lines have met it; the groups before are kept."""
        source.write_bytes(lines(ROWS[0], ROWS[0], {"query": "q", "documents": ["bad"]}, ROWS[0]))
        with pytest.raises(type(error)):
            rerank_file(rejecting("bad", lambda bad, scores: error), source, target, group=4)
        assert len(kept.output(partial_of(target)).splitlines()) == 2
        assert not rejects_of(target).exists()


class TestFiles:
    """What is refused before any work."""

    @pytest.mark.parametrize(
        ("names", "words"),
        [
            (("in.csv", "out.jsonl"), "must end in"),
            (("in.jsonl", "out.json"), "must end in"),
            (("none.jsonl", "out.jsonl"), "there is no file"),
            (("folder.jsonl", "out.jsonl"), "is no file"),
            (("in.jsonl", "folder.jsonl"), "is a folder"),
            (("in.jsonl", "none/out.jsonl"), "there is no such folder"),
            (("in.jsonl", "in.jsonl"), "its own result"),
            (("out.jsonl.rejects.jsonl", "out.jsonl"), "its own result"),
        ],
    )
    def test_files_that_will_not_do(self, names: tuple[str, str], words: str, source: Path):
        """Each with its name; nothing is touched."""
        (source.parent / "folder.jsonl").mkdir()
        (source.parent / "out.jsonl.rejects.jsonl").touch()
        scorer = WordOverlap()
        with pytest.raises(ConfigError, match=words):
            rerank_file(scorer, source.parent / names[0], source.parent / names[1])
        assert scorer.calls == []
        assert left(source.parent) == {"in.jsonl", "folder.jsonl", "out.jsonl.rejects.jsonl"}

    def test_a_link_stays_one(self, source: Path, target: Path):
        """And what it leads to is written, in its place; paths may be texts."""
        (source.parent / "elsewhere").mkdir()
        target.symlink_to(source.parent / "elsewhere" / "real.jsonl")
        rerank_file(WordOverlap(), str(source), str(target))
        assert target.is_symlink()
        assert len(read(source.parent / "elsewhere" / "real.jsonl")) == len(ROWS)
        assert left(source.parent / "elsewhere") == {"real.jsonl"}

    def test_wrong_options(self, source: Path, target: Path):
        """As Scorer.rerank."""
        with pytest.raises(ValueError, match="top_n"):
            rerank_file(WordOverlap(), source, target, top_n=0)
        assert left(source.parent) == {"in.jsonl"}

    @pytest.mark.parametrize("cut", [5, -5])
    def test_a_damaged_input_is_no_malformed_line(self, cut: int, source: Path, target: Path):
        """What came before it is kept."""
        packed = source.with_name("in.jsonl.gz")
        packed.write_bytes(gzip.compress(os.urandom(100_000).hex().encode() + b"\n" + source.read_bytes())[:cut])
        with pytest.raises(ConfigError, match="damaged"):
            rerank_file(WordOverlap(), packed, target)
        assert not target.exists()


row = st.one_of(
    st.builds(
        lambda query, documents: lines({"query": query, "documents": documents}),
        st.text(max_size=5),
        st.lists(st.text(max_size=5), max_size=4),
    ),
    st.sampled_from([b"\n", b"nope\n", b"\xff\n", b'{"query": 1}\n']),
)


class TestResuming:
    """An interrupted run goes on."""

    @settings(max_examples=40)
    @given(
        rows=st.lists(row, min_size=1, max_size=12),
        stops=st.lists(st.integers(0, 4), max_size=4),
        group=st.integers(1, 5),
    )
    def test_it_ends_as_if_nothing_had_happened(self, rows: list[bytes], stops: list[int], group: int):
        """Byte for byte, rejects too, wherever it stopped."""
        with TemporaryDirectory() as folder:
            source, whole, target = (Path(folder, name) for name in ("in.jsonl", "whole.jsonl", "out.jsonl"))
            source.write_bytes(b"".join(rows))
            expected = rerank_file(WordOverlap(), source, whole, group=group)
            for stop in stops:
                try:
                    rerank_file(WordOverlap(stop_at=stop), source, target, group=group)
                    break
                except KeyboardInterrupt:
                    assert not target.exists()
            tally = rerank_file(WordOverlap(), source, target, group=group)
            assert (tally.lines, tally.ranked, tally.rejected) == (expected.lines, expected.ranked, expected.rejected)
            assert tally.documents == expected.documents
            assert target.read_bytes() == whole.read_bytes()
            assert rejects_of(target).exists() == rejects_of(whole).exists() == (expected.rejected > 0)
            if expected.rejected:
                assert rejects_of(target).read_bytes() == rejects_of(whole).read_bytes()
            assert not [name for name in left(Path(folder)) if "partial" in name]

    def test_nothing_is_scored_twice(self, source: Path, target: Path):
        """And progress says where it goes on."""
        with pytest.raises(KeyboardInterrupt):
            rerank_file(WordOverlap(stop_at=1), source, target, group=1)
        seen: list[tuple[Tally, float]] = []
        scorer = WordOverlap()
        rerank_file(scorer, source, target, group=1, progress=lambda *now: seen.append(now))
        assert [documents for _, documents, _ in scorer.calls] == [["flour", "bread"]]
        assert seen[0] == (Tally(lines=1, ranked=1, documents=3, resumed=1), 0.0)
        assert seen[-1] == (Tally(lines=3, ranked=3, documents=5, resumed=1), 1.0)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"top_n": 1}, "top_n: 1, before None"),
            ({"score_threshold": 0.5}, "score_threshold: 0.5, before None"),
            ({"min_n": 1}, "min_n: 1, before 0"),
            ({"group": 2}, "group: 2, before 1"),
            ({"weight": 0.5}, "scores of the probe: .*, before "),
            ({"touch": True}, "mtime: 1, before"),
        ],
    )
    def test_another_run_is_not_gone_on_with(self, change: dict[str, Any], words: str, source: Path, target: Path):
        """What differs is named; restart throws it away."""
        options: dict[str, Any] = {"group": 1}
        scorer = WordOverlap(weight=change.pop("weight", 1.0))
        with pytest.raises(KeyboardInterrupt):
            rerank_file(WordOverlap(stop_at=1), source, target, **options)
        if change.pop("touch", False):
            os.utime(source, ns=(1, 1))
        options |= change
        before = {path.name: path.read_bytes() for path in source.parent.iterdir()}
        with pytest.raises(ConfigError, match=words) as caught:
            rerank_file(scorer, source, target, **options)
        assert "--restart" in str(caught.value)
        assert scorer.calls == []
        assert {path.name: path.read_bytes() for path in source.parent.iterdir()} == before
        assert rerank_file(scorer, source, target, restart=True, **options) == Tally(3, 3, 0, 5, 0)

    @pytest.mark.parametrize("damaged", [b'{"query": "of an earlier version"}\n', b"SQLite format 3\0" * 300, None])
    def test_a_record_that_cant_be_read(self, damaged: bytes | None, source: Path, target: Path):
        """Named, with what to do, and left as it is; None: cut off."""
        with pytest.raises(KeyboardInterrupt):
            rerank_file(WordOverlap(stop_at=1), source, target, group=1)
        path = partial_of(target)
        path.write_bytes(path.read_bytes()[:-1] if damaged is None else damaged)
        before = path.read_bytes()
        with pytest.raises(ConfigError, match=rf"{path.name} can't be used: .*delete it to start over"):
            rerank_file(WordOverlap(), source, target, group=1)
        assert path.read_bytes() == before
        path.unlink()
        assert rerank_file(WordOverlap(), source, target, group=1) == Tally(3, 3, 0, 5, 0)

    def test_an_input_that_changes_meanwhile(self, source: Path, target: Path):
        """The result would be of no file that ever was."""

        def progress(tally: Tally, share: float) -> None:
            with source.open("ab") as file:
                file.write(lines(ROWS[0]))

        with pytest.raises(ConfigError, match="changed while it was read"):
            rerank_file(WordOverlap(), source, target, progress=progress)

    def test_two_at_a_time(self, source: Path, target: Path):
        """The second is refused, and the first ends as it should."""

        def progress(tally: Tally, share: float) -> None:
            with pytest.raises(ConfigError, match="another process"):
                rerank_file(WordOverlap(), source, target)

        assert rerank_file(WordOverlap(), source, target, progress=progress).ranked == 3
        assert len(read(target)) == 3

    def test_a_killed_process(self, source: Path, target: Path):
        """SIGKILL, anywhere: three times, and the fourth run ends in the bytes of one that nobody killed."""
        source.write_bytes(lines(*({**ROWS[0], "id": number} for number in range(300)), b"nope\n"))
        script = (
            "import sys; from pathlib import Path; from rag_rerank.files import rerank_file;"
            "from tests.scorers import WordOverlap\n"
            "rerank_file(WordOverlap(delay=0.01), Path(sys.argv[1]), Path(sys.argv[2]), group=3,"
            " progress=lambda tally, share: print(tally.lines, flush=True))"
        )
        done = 0
        for _ in range(3):
            command = [sys.executable, "-c", script, str(source), str(target)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            assert any(int(told) >= done + 20 for told in process.stdout)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            before, done = done, kept.lines(partial_of(target))
            assert done >= before + 20
            assert not target.exists()
        assert rerank_file(WordOverlap(), source, target, group=3).resumed == done
        whole = target.with_name("whole.jsonl")
        rerank_file(WordOverlap(), source, whole, group=3)
        assert target.read_bytes() == whole.read_bytes()
        assert rejects_of(target).read_bytes() == rejects_of(whole).read_bytes()


def test_memory_stays_flat(source: Path, target: Path):
    """20,000 lines, 12 MB, within 2 MB."""
    with source.open("wb") as file:
        for number in range(20_000):
            file.write(lines({"query": f"q {number}", "documents": ["x" * 190, "y" * 190, "z" * 190]}))
    scorer = Answers(lambda documents: [0.0] * len(documents))
    tracemalloc.start()
    tally = rerank_file(scorer, source, target)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tally.lines, tally.ranked, tally.documents) == (20_000, 20_000, 60_000)
    assert peak < 2_000_000
