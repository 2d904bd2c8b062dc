"""Images on the command line, in files of queries, and in tables to look at."""

import base64
import json
import re
import subprocess
from pathlib import Path

import pytest

from rag_rerank import Content, Image, Ranked, VLLMScorer
from rag_rerank.cli.scoring import _read
from rag_rerank.display import Reranked
from rag_rerank.files import rejects_of, rerank_file
from tests import commands, drawn
from tests.faulty_server import FaultyServer, oracle, spelled
from tests.test_display import cells, page

RED = drawn.png(size=(300, 200))
URL = f"data:image/png;base64,{base64.b64encode(RED).decode()}"
SENT = {"content": [{"type": "image_url", "image_url": {"url": URL}}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "PHOTO.JPEG").write_bytes(drawn.encoded(drawn.gradient((64, 48)), "JPEG"))
    (tmp_path / "notes.txt").write_text("\ufeffNotes on red.", encoding="utf-8")
    (tmp_path / "notes.bin").write_bytes(RED)
    (tmp_path / "latin.txt").write_text("grün", encoding="latin-1")
    return tmp_path


def run(folder: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return commands.run(*arguments, stdin=stdin, folder=folder, COLUMNS="100")


class TestCommandLine:
    """Documents that are image files, named by who types the command."""

    def test_files_are_read_and_shown(self, folder: Path):
        """Images by their sizes and names, texts by what they say; what names no such file is a text."""
        with FaultyServer() as server:
            arguments = (
                "rerank",
                "which?",
                "red.png",
                "PHOTO.JPEG",
                "notes.txt",
                "notes.bin",
                "--base-url",
                server.base_url,
            )
            done = run(folder, *arguments)
            assert done.returncode == 0, done.stderr
            assert re.search(r"0 │ +[=▲▼ 0-9]+ │ [0-9. █▏▎▍▌▋▊▉]+ │ \[image 300x200\] red.png ", done.stdout)
            assert "[image 64x48] PHOTO.JPEG" in done.stdout
            assert server.score_requests[-1].content.keys() >= {"text_1", "text_2"}
            documents = [each for request in server.score_requests for each in request.documents]
            assert "Notes on red." in documents
            assert "notes.bin" in documents
            assert SENT in documents
            assert "Notes on red." in done.stdout
            done = run(folder, "rerank", "which?", "latin.txt", "--base-url", server.base_url)
            assert (done.returncode, "latin.txt is not text in UTF-8" in done.stderr) == (2, True)

    def test_which_arguments_are_files(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys):
        """Files that exist and end so; --text: none. One that is missing is told about."""
        monkeypatch.chdir(folder)
        (folder / "folder.png").mkdir()
        given = ["red.png", "PHOTO.JPEG", "notes.bin", "none.png", "folder.png", "see red.png", "x" * 9000 + ".png"]
        read = _read(given, as_text=False)
        assert read is not None
        assert [isinstance(each, Image) for each in read] == [True, True] + [False] * 5
        assert read[2:] == given[2:]
        assert capsys.readouterr().err.count("there is no file") == 2
        assert _read(["notes.txt", "none.txt", "read notes.txt"], as_text=False) == [
            "Notes on red.",
            "none.txt",
            "read notes.txt",
        ]
        assert capsys.readouterr().err.count("there is no file none.txt") == 1
        assert _read(given, as_text=True) == given
        assert _read(None, as_text=False) is None

    def test_lines_of_json_never_name_files(self, folder: Path):
        """There, texts are texts, and images data or https URLs."""
        row = {"query": "red.png", "documents": ["red.png", str(folder / "red.png"), SENT]}
        with FaultyServer() as server:
            done = run(folder, "score", "--base-url", server.base_url, stdin=json.dumps(row))
            assert done.returncode == 0, done.stderr
            wanted = [oracle("red.png", spelled(each)) for each in row["documents"]]
            assert json.loads(done.stdout) == {"scores": wanted}
            row["documents"] = [{"content": [{"type": "image_url", "image_url": {"url": f"file://{folder}/red.png"}}]}]
            done = run(folder, "rerank", "--base-url", server.base_url, stdin=json.dumps(row))
            assert (done.returncode, "no https, http or data URL" in done.stderr) == (2, True)


class TestFiles:
    """Lines of a file of queries."""

    def test_content_is_scored_and_what_is_wrong_with_it_is_its_line_s(self, folder: Path):
        """Broken images, files, and things that are none; the other lines are ranked."""
        rows = [
            {"query": "q", "documents": ["text", SENT, {"text": "mapped", "content": "a field of the user's"}]},
            {"query": {"content": ["a", SENT["content"][0]]}, "documents": ["text"]},
            {"query": "q", "documents": [{"content": [{"type": "image_url", "image_url": {"url": URL[:90]}}]}]},
            {"query": "q", "documents": [{"content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}]},
            {"query": "q", "documents": [{"content": [5]}]},
            {"query": "red.png", "documents": [str(folder / "red.png")]},
        ]
        source, target = folder / "in.jsonl", folder / "out.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with FaultyServer() as server, VLLMScorer(server.base_url) as scorer:
            tally = rerank_file(scorer, source, target)
        assert (tally.ranked, tally.rejected) == (3, 3)
        first, second, last = map(json.loads, target.read_text().splitlines())
        found = {item["index"]: item["score"] for item in first["ranked"]}
        assert found == dict(enumerate(oracle("q", each) for each in ("text", spelled(SENT), "mapped")))
        asked = {"content": [{"type": "text", "text": "a"}, SENT["content"][0]]}
        assert second["ranked"] == [{"index": 0, "score": oracle(spelled(asked), "text")}]
        assert last["ranked"][0]["score"] == oracle("red.png", str(folder / "red.png"))
        errors = [json.loads(line)["error"] for line in rejects_of(target).read_text().splitlines()]
        assert [error.split(" ")[0] for error in errors] == ["documents[0]"] * 3


class TestTables:
    """Reranked images to look at."""

    def test_in_a_terminal_and_a_log(self, folder: Path):
        """By size; a query, too; nothing in a name is markup or a command to the terminal."""
        (folder / "[red]\x1b[2J.png").write_bytes(RED)
        documents = [
            Image(folder / "[red]\x1b[2J.png"),
            Content("Figure 2", Image(RED)),
            Image(url="https://a.b/c.png"),
        ]
        reranked = Reranked(Image(RED), documents, [Ranked(n, 1.0 - n) for n in range(3)])
        assert [row[-1] for row in cells(reranked)] == [
            r"[image 300x200] [red]\x1b[2J.png",
            "Figure 2 [image 300x200]",
            "[image] https://a.b/c.png",
        ]
        assert repr(reranked).startswith("Reranked('[image 300x200]', 3 documents")

    def test_in_a_notebook(self, folder: Path):
        """With small copies as data URLs, nothing to load; names are no markup."""
        (folder / "<script>&.png").write_bytes(drawn.encoded(drawn.gradient((2000, 1500)), "PNG"))
        documents = [Image(folder / "<script>&.png"), "text", Content("a", Image(RED)), Image(url="https://a.b/c.png")]
        reranked = Reranked("q", documents, [Ranked(n, 1.0 - n) for n in range(4)])
        html = reranked._repr_html_()
        shown = page(reranked)
        assert [row[-1] for row in shown.rows[1:]] == [
            " [image 2000x1500] <script>&.png",
            "text",
            " a [image 300x200]",
            "[image] https://a.b/c.png",
        ]
        assert "script" not in shown.tags
        sources = re.findall(r'src="([^"]*)"', html)
        assert len(sources) == 2
        assert all(source.startswith("data:image/jpeg;base64,") and len(source) < 8000 for source in sources)

    def test_what_is_gone_is_shown_without_its_size(self, folder: Path):
        """The table is for looking; the scores are there."""
        documents = [Image(folder / "gone.png"), Image(b"no image")]
        reranked = Reranked("q", documents, [Ranked(0, 1.0), Ranked(1, 0.5)])
        assert [row[-1] for row in cells(reranked)] == ["[image] gone.png", "[image]"]
        assert "<img" not in reranked._repr_html_()
