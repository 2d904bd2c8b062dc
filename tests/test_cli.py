"""The command line, run as a user runs it."""

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import rag_rerank
from rag_rerank import LocalScorer
from rag_rerank.cli.options import ScorerOptions
from rag_rerank.families import FAMILIES
from rag_rerank.template import SHIPPED
from tests.causal_models import make_causal_lm
from tests.commands import run
from tests.faulty_server import FaultyServer, Request, Steps, http, oracle
from tests.vllm.test_forms import TEI
from tests.vllm_server import VLLMServer

QUERY, DOCUMENTS = "capital of France", ["Bananas are yellow.", "Paris is the capital [of] France."]


def local_options(folder: Path) -> list[str]:
    return ["--model", str(folder), "--dtype", "float32"]


class TestLocal:
    """With a model in this process."""

    def test_rerank_prints_a_table_best_first(self, minilm: Path):
        """Index, score, document; brackets in a document are text, not markup."""
        result = run("rerank", QUERY, *DOCUMENTS, *local_options(minilm))
        assert result.returncode == 0, result.stderr
        rows = [line for line in result.stdout.splitlines() if "yellow" in line or "Paris" in line]
        assert "Paris is the capital [of] France." in rows[0]
        assert "│     1 │" in rows[0]
        assert "│     0 │" in rows[1]

    def test_score_reads_json_lines_and_writes_json_lines(self, minilm: Path, local: LocalScorer):
        """One line of scores for every line of input."""
        lines = [{"query": QUERY, "documents": DOCUMENTS}, {"query": "x", "documents": []}]
        result = run("score", *local_options(minilm), stdin="\n".join(map(json.dumps, lines)))
        assert result.returncode == 0, result.stderr
        first, second = map(json.loads, result.stdout.splitlines())
        assert first["scores"] == pytest.approx(local.score(QUERY, DOCUMENTS), abs=1e-5)
        assert second == {"scores": []}

    def test_lines_of_stdin_are_those_of_a_file(self):
        """A byte order mark, blank lines, CRLF, documents with a text, pairs; and what is wrong is said by its line."""
        rows = [
            {"query": "q", "documents": [{"text": "a", "url": "x"}, "b"]},
            {"query": "q", "document": {"text": "a"}},
            {"query": "ü", "documents": ["ß"]},
        ]
        encoded = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
        with FaultyServer() as server:
            where = ["--base-url", server.base_url]
            done = run("score", *where, VLLM_API_KEY="", stdin=b"\xef\xbb\xbf\r\n" + b"\r\n\r\n".join(encoded))
            assert list(map(json.loads, done.stdout.splitlines())) == [
                {"scores": [oracle("q", "a"), oracle("q", "b")]},
                {"score": oracle("q", "a")},
                {"scores": [oracle("ü", "ß")]},
            ]
            done = run("rerank", *where, VLLM_API_KEY="", stdin=encoded[1])
            assert json.loads(done.stdout) == {"score": oracle("q", "a")}
            done = run("rerank", *where, "--top-n", "1", VLLM_API_KEY="", stdin=encoded[1])
            assert (done.returncode, "stdin, line 1 is a pair" in done.stderr) == (2, True)
            done = run("rerank", *where, VLLM_API_KEY="", stdin=encoded[0] + b"\n\n" + "ü".encode("latin-1"))
            assert (done.returncode, "stdin, line 3: 'utf-8' codec can't decode" in done.stderr) == (2, True)
            assert len(done.stdout.splitlines()) == 1

    @pytest.mark.parametrize("command", ["score", "rerank"])
    def test_a_closed_stdin(self, command: str):
        """As if nothing was piped in."""
        shell = f"{sys.executable} -m rag_rerank {command} --base-url http://127.0.0.1:9 <&-"
        done = subprocess.run(["/bin/sh", "-c", shell], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert "pipe JSON Lines in" in done.stderr
        assert "Traceback" not in done.stderr

    def test_a_closed_stdout(self):
        """Nothing can be shown, and nothing breaks."""
        with FaultyServer() as server:
            shell = f"{sys.executable} -m rag_rerank score q d --base-url {server.base_url} >&-"
            done = subprocess.run(["/bin/sh", "-c", shell], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")

    def test_what_stdin_may_be_is_guessed_from_its_first_line(self):
        """As for a file of which every line is rejected."""
        for command in ("score", "rerank"):
            done = run(command, "--base-url", "http://127.0.0.1:9", stdin="query,document\na,b\n")
            assert (done.returncode, "stdin, it looks like CSV" in done.stderr) == (2, True)

    def test_rerank_takes_top_n_and_threshold(self, minilm: Path):
        """As Scorer.rerank does; --json writes one object."""
        result = run("rerank", QUERY, *DOCUMENTS, "--json", "--top-n", "1", *local_options(minilm))
        assert [item["index"] for item in json.loads(result.stdout)["ranked"]] == [1]
        result = run("rerank", QUERY, *DOCUMENTS, "--json", "--score-threshold", "2", *local_options(minilm))
        assert json.loads(result.stdout) == {"ranked": []}

    def test_example_shows_the_three_patterns(self, minilm: Path):
        """1:1, 1:N and N:N, with the prompts as vLLM's example client prints them."""
        result = run("score", "--example", *local_options(minilm))
        assert result.returncode == 0, result.stderr
        for pattern in (
            "text_1 and text_2 are both strings",
            "text_1 is string and text_2 is a list",
            "text_1 and text_2 are both lists",
        ):
            assert f"Prompt when {pattern}:" in result.stdout
        assert result.stdout.count("Score Response:") == 3
        assert result.stdout.count("'score':") == 5


class TestRemote:
    """With a vLLM server."""

    def test_a_server_is_named_by_url_or_by_host_and_port(self, vllm_minilm: VLLMServer, local: LocalScorer):
        """And answers with the same scores as the local model."""
        host, port = vllm_minilm.base_url.removeprefix("http://").split(":")
        expected = pytest.approx(local.score(QUERY, DOCUMENTS), abs=1e-4)
        for where in (["--base-url", vllm_minilm.base_url], ["--host", host, "--port", port]):
            result = run("score", QUERY, *DOCUMENTS, "--json", *where)
            assert result.returncode == 0, result.stderr
            assert json.loads(result.stdout)["scores"] == expected

    def test_the_key_comes_from_the_environment(self, vllm_cross_encoder: VLLMServer):
        """Command lines are visible to everyone on the machine."""
        arguments = ("score", QUERY, *DOCUMENTS, "--json", "--logits", "--base-url", vllm_cross_encoder.base_url)
        without = run(*arguments, VLLM_API_KEY="")
        assert without.returncode == 1
        assert "VLLM_API_KEY" in without.stderr
        assert len(json.loads(run(*arguments, VLLM_API_KEY=vllm_cross_encoder.api_key).stdout)["scores"]) == 2


def test_headers_go_along():
    """--header, as often as a gateway wants."""
    with FaultyServer() as server:
        arguments = ("score", QUERY, "a", "--json", "--base-url", server.base_url)
        result = run(*arguments, "--header", "X-Tenant: search", "--header", "X-Team:b", VLLM_API_KEY="")
        assert result.returncode == 0, result.stderr
        headers = server.score_requests[-1].headers
        wrong = run(*arguments, "--header", "X-Tenant", VLLM_API_KEY="")
    assert (headers["x-tenant"], headers["x-team"]) == ("search", "b")
    assert "--header" in wrong.stderr


class TestScorerOptions:
    """What says which scorer is meant has the same name for every command."""

    NAMES = ("--instruction", "--template", "--max-length", "--long-documents", "--timeout", "--endpoint", "--header")

    @pytest.mark.parametrize("command", ["score", "rerank", "eval", "calibrate", "check"])
    def test_every_command_has_them(self, command: str):
        shown = run(command, "--help", COLUMNS="200").stdout
        assert not [name for name in self.NAMES if f" {name} " not in shown]

    def test_they_reach_a_server(self):
        """As the scorer's arguments of these names."""
        with FaultyServer() as server:
            where = ["--base-url", server.base_url]
            done = run("rerank", "q", "a", "--json", "--instruction", "find it", *where, VLLM_API_KEY="")
            assert (done.returncode, server.score_requests[-1].content["instruction"]) == (0, "find it"), done.stderr
            done = run("score", "q", "a", "--json", "--template", "qwen3-reranker", *where, VLLM_API_KEY="")
            assert "<Query>: q" in str(server.score_requests[-1].content), done.stderr

    def test_the_embedded_model_has_a_name(self, minilm: Path):
        """So that a first try needs no network."""
        with ScorerOptions(model="embedded").make() as scorer:
            assert scorer.model_name == str(minilm)

    def test_they_reach_a_local_model(self, cross_encoder: Path):
        """Its long documents are read in parts, or cut."""
        texts = "python module " * 60, "the function returns " * 60
        long, options = [texts[0] + texts[1], texts[1] + texts[0]], {"max_length": 64, "dtype": "float32"}
        scores = {}
        for how in ("truncate", "max-passage"):
            with LocalScorer(cross_encoder, long_documents=how, **options) as expected:
                scores[how] = expected.score("honey", long)
            with ScorerOptions(model=str(cross_encoder), long_documents=how, **options).make() as scorer:
                assert scorer.score("honey", long) == scores[how]
        assert scores["truncate"] != scores["max-passage"]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--base-url", "http://x", "--max-length", "9"], "--max-length is for local models"),
            (["--base-url", "http://x", "--dtype", "auto", "--device", "cpu"], "--device is for local models"),
            (["--timeout", "9", "--header", "a: b"], "--timeout and --header are for a server"),
            (["--base-url", "http://x", "--timeout", "0"], "timeout must be"),
        ],
    )
    def test_what_does_not_go_together_is_refused(self, arguments: list[str], words: str):
        """Rather than left out."""
        result = run("score", "q", "d", *arguments)
        assert (result.returncode, words in result.stderr) == (2, True), result.stderr

    def test_precision_needs_probabilities(self):
        """--min-precision, for arguments and for files alike."""
        with FaultyServer() as server:
            result = run("rerank", "q", "d", "--min-precision", "0.5", "--base-url", server.base_url, VLLM_API_KEY="")
        assert (result.returncode, "min_precision needs probabilities" in result.stderr) == (2, True)


class TestTemplates:
    """What the package knows about models."""

    def test_a_template_is_printed_as_the_file_that_it_is(self):
        """For vllm serve --chat-template, by its own or its family's name."""
        shown = run("template", "show", "qwen3-reranker-seq-cls").stdout
        assert shown == (SHIPPED / "qwen3-reranker.jinja").read_text(encoding="utf-8")
        assert run("template", "show", "qwen3-reranker").stdout == shown
        assert run("template", "show", "Qwen/Qwen3-Reranker-0.6B").stdout == shown

    def test_the_list_names_every_family(self):
        """With its template and answers."""
        listed = run("template", "list", COLUMNS="200").stdout
        assert all(family.name in listed for family in FAMILIES)
        assert "two-token (no / yes)" in listed

    def test_the_list_as_json_lines(self):
        """With all that is known of each."""
        listed = [json.loads(line) for line in run("template", "list", "--json").stdout.splitlines()]
        assert [each["name"] for each in listed] == [family.name for family in FAMILIES]

    @pytest.mark.parametrize(
        ("model", "commands", "note"),
        [
            (
                "zeroentropy/zerank-2-reranker",
                ["rag-rerank template show zerank-2 > zerank-2.jinja", "vllm serve zeroentropy/zerank-2-reranker "],
                "",
            ),
            ("my models/any", ["vllm serve 'my models/any'"], "note: my models/any is in no family"),
        ],
    )
    def test_how_a_model_is_served(self, model: str, commands: list[str], note: str):
        """With its flags and template; of an unknown one, that nothing is known."""
        result = run("template", "serve", model)
        lines = result.stdout.splitlines()
        assert all(line.startswith(command) for line, command in zip(lines, commands, strict=True))
        assert (result.returncode, result.stderr.startswith(note), bool(result.stderr)) == (0, True, bool(note))

    @pytest.mark.parametrize(("name", "words"), [("qwen3-rerank", "Did you mean"), ("lfm2-colbert", "has no template")])
    def test_what_has_no_template_is_said(self, name: str, words: str):
        """Unknown, or scored as a pair."""
        result = run("template", "show", name)
        assert (result.returncode, words in result.stderr) == (2, True)


class TestConvert:
    """A causal reranker becomes a classifier."""

    def test_a_known_model_needs_no_more_than_its_name(self, tmp_path: Path):
        """Answers and template come from the table; the result scores the same, without either."""
        source = make_causal_lm(tmp_path / "Qwen3-Reranker-0.6B", "qwen3")
        out = tmp_path / "converted"
        result = run("convert", str(source), str(out))
        assert result.returncode == 0, result.stderr
        assert result.stdout == f"vllm serve {out} --chat-template {out}/chat_template.jinja\n"
        with LocalScorer(source, dtype="float32") as before, LocalScorer(out, dtype="float32") as after:
            assert after.score(QUERY, DOCUMENTS) == pytest.approx(before.score(QUERY, DOCUMENTS), abs=1e-5)

    def test_an_unknown_model_needs_its_answers(self, tmp_path: Path):
        """One or two."""
        source = make_causal_lm(tmp_path / "mine", "gemma")
        out = tmp_path / "out"
        assert "--token no --token yes" in run("convert", str(source), str(out)).stderr
        assert run("convert", str(source), str(out), "--token", "Yes").stdout == f"vllm serve {out}\n"


class TestMistakes:
    """One line on stderr, nothing on stdout, and an exit code."""

    @pytest.mark.parametrize(
        ("arguments", "stdin", "code", "words"),
        [
            (["score", "q"], "", 2, "at least one document"),
            (["score"], "nope", 2, "stdin, line 1"),
            (["score"], '{"query": "q"}', 2, "stdin, line 1"),
            (
                ["rerank"],
                '{"query": "q", "documents": [null]}',
                2,
                'documents[0] must be str or an object with a "text", got NoneType',
            ),
            (["rerank", "q", "d", "--top-n", "0"], "", 2, "top_n must be at least 1"),
            (["rerank", "q", "caf\udce9"], "", 2, "the argument 'caf\\udce9' is no text in utf-8"),
            (["score", "q", "d", "--model", "/no/such/folder"], "", 2, "there is no folder"),
            (["score", "q", "d", "--base-url", "ftp://x"], "", 2, "http://"),
            (["score", "q", "d", "--base-url", "http://x", "--port", "1"], "", 2, "either --base-url or"),
            (["score", "q", "d", "--base-url", "http://x", "--dtype", "float32"], "", 2, "local models"),
        ],
    )
    def test_a_mistake_is_one_line(self, arguments: list[str], stdin: str, code: int, words: str, cross_encoder: Path):
        """Without a traceback."""
        if "--model" not in arguments and "--base-url" not in arguments:
            arguments = [*arguments, "--model", str(cross_encoder)]
        result = run(*arguments, stdin=stdin)
        assert result.returncode == code
        assert words in result.stderr
        assert "Traceback" not in result.stderr
        assert result.stdout == ""

    def test_a_server_that_is_not_there(self):
        """Exit code 1, for scripts that try again later."""
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        result = run("score", "q", "d", "--port", str(port))
        assert result.returncode == 1
        assert f"localhost:{port}" in result.stderr


@pytest.mark.parametrize("command", ["score", "rerank", "check"])
def test_servers_of_other_makes(command: str):
    """--endpoint says how to ask, or finds out."""
    with FaultyServer(TEI) as server:
        asked = [server.base_url] if command == "check" else ["q", "a", "b", "--json", "--base-url", server.base_url]
        result = run(command, *asked, "--endpoint", "auto", VLLM_API_KEY="")
        wrong = run(command, *asked, "--endpoint", "v2", VLLM_API_KEY="")
    if command == "check":
        assert "text-embeddings-inference answers" in result.stdout
    else:
        assert str(oracle("q", "a")) in result.stdout
    assert (wrong.returncode, '"tei" or "auto"' in wrong.stderr) == (2, True)


class TestCheck:
    """A server is examined."""

    def test_a_server_that_scores_at_random(self):
        """A line for each finding, remedies below, the verdict last; exit code 1."""
        with FaultyServer() as server:
            result = run("check", server.base_url, VLLM_API_KEY="")
        assert (result.returncode, result.stderr) == (1, "")
        lines = [line.rstrip() for line in result.stdout.splitlines()]
        assert lines[0].startswith(f"✓ Reachable      {server.label} answers in ")
        (ranking,) = [number for number, line in enumerate(lines) if line.startswith("✗ Ranking")]
        assert lines[ranking + 1].startswith("                 → ")
        assert lines[-1] == "1 problem, 1 warning, 3 notes."

    def test_the_same_as_json_lines(self):
        """One object a finding, and the same exit code."""
        with FaultyServer() as server, FaultyServer() as other:
            result = run("check", server.base_url, other.base_url, "--model", "m", "--json", VLLM_API_KEY="")
        assert (result.returncode, result.stderr) == (1, "")
        findings = [json.loads(line) for line in result.stdout.splitlines()]
        assert {tuple(finding) for finding in findings} == {("title", "verdict", "says", "remedy")}
        assert [finding["title"] for finding in findings[:2]] == ["Reachable", "Reachable"]
        assert [finding["title"] for finding in findings if finding["verdict"] == "problem"] == ["Ranking"]

    def test_a_servers_words_are_shown_and_nothing_more(self):
        """Its names are neither markup nor commands to the terminal."""

        def behave(request: Request) -> Steps | None:
            named = json.dumps({"data": [{"id": "[red]m\x1b]0;x\x07", "root": "bge-reranker-base $(x)"}]})
            return [http(named)] if request.path == "/v1/models" else None

        with FaultyServer(behave) as server:
            result = run("check", server.base_url, VLLM_API_KEY="")
        assert "It serves [red]m\\x1b]0;x\\x07, from bge-reranker-base $(x)." in result.stdout
        assert "\x1b" not in result.stdout

    def test_nobody_there(self):
        """One problem."""
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        result = run("check", f"http://127.0.0.1:{port}/v1")
        assert (result.returncode, result.stderr) == (1, "")
        assert result.stdout.startswith("✗ Reachable")
        assert result.stdout.endswith("\n1 problem.\n")

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ([], "Missing argument"),
            (["ftp://x"], "http://"),
            (["https://x", "--timeout", "0"], "timeout must be"),
            (["http://x"], "unencrypted"),
        ],
    )
    def test_wrong_arguments(self, arguments: list[str], words: str):
        """Exit code 2, and nothing on stdout."""
        result = run("check", *arguments, VLLM_API_KEY="k3y")
        assert (result.returncode, result.stdout) == (2, "")
        assert words in result.stderr

    def test_a_real_server_in_good_health(self, vllm_minilm: VLLMServer):
        """Exit code 0."""
        result = run("check", vllm_minilm.base_url, VLLM_API_KEY="")
        assert (result.returncode, result.stderr) == (0, ""), result.stdout
        assert "12 of 12 known answers" in result.stdout
        assert "✗" not in result.stdout
        assert result.stdout.endswith("\nIt can be used: 1 note.\n")

    def test_a_real_server_of_random_weights(self, vllm_cross_encoder: VLLMServer):
        """It does not pass (by luck with a warning, exit code 0); the key from the environment is not shown."""
        result = run("check", vllm_cross_encoder.base_url, VLLM_API_KEY=str(vllm_cross_encoder.api_key))
        assert (result.returncode, result.stderr) == ("✗" in result.stdout, "")
        assert "✗ Ranking" in result.stdout or "! Ranking" in result.stdout
        assert "! Key" in result.stdout
        assert str(vllm_cross_encoder.api_key) not in result.stdout


class TestCommon:
    """What is the same for all commands."""

    def test_version_and_help(self):
        """As other tools do it."""
        command = [sys.executable, "-m", "rag_rerank", "--version"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert printed == f"rag-rerank {rag_rerank.__version__}\n"
        assert run("score", "-h").stdout == run("score", "--help").stdout

    def test_an_error_is_one_line_and_with_traceback_all_of_them(self):
        """Both with the same exit code."""
        command = ["eval", "nowhere"]
        short, long = run(*command), run("--traceback", *command)
        assert short.stderr.startswith("error: nowhere")
        assert short.stderr.count("\n") == 1
        assert "Traceback" in long.stderr
        assert (short.returncode, long.returncode) == (2, 1)

    def test_nothing_is_cut_where_it_is_piped(self):
        """Names and documents are whole, whatever the width of terminals."""
        assert "qwen3-vl-reranker" in run("template", "list", COLUMNS="").stdout
        with FaultyServer() as server:
            options = ["--base-url", server.base_url]
            shown = run("score", "q", "word " * 60, *options, COLUMNS="", VLLM_API_KEY="").stdout
            narrow = [
                run("rerank", "q", "word " * 60, *options, COLUMNS=width, VLLM_API_KEY="").stdout
                for width in ("40", "8", "0")  # 0 is what a terminal says that has no size
            ]
        assert "word " * 59 in shown
        assert all("word" in table for table in narrow)

    def test_what_the_encoding_lacks_is_escaped(self):
        """As on Windows, where output goes to a file."""
        environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "VLLM_API_KEY": "", "COLUMNS": "80"}
        with FaultyServer() as server:
            command = [sys.executable, "-m", "rag_rerank", "rerank", "--base-url", server.base_url, "q", "ä", "日"]
            done = subprocess.run(command, capture_output=True, env=environment, check=True)
        assert b"\xe4" in done.stdout
        assert b"\\u65e5" in done.stdout

    def test_texts_are_no_commands_to_the_terminal(self):
        """Escape sequences and what turns the text around it are shown as they are written."""
        with FaultyServer() as server:
            shown = run("score", "a\x1b[31mb", "c\u202ed", "--base-url", server.base_url, VLLM_API_KEY="").stdout
        assert "a\\x1b[31mb" in shown
        assert "c\\u202ed" in shown

    def test_nor_are_a_server_s_words(self):
        """In the name of its model, which a table and a bar show, and in an error."""
        evil = json.dumps({"data": [{"id": "m\x1b[31m"}]})

        def behave(request: Request) -> Steps | None:
            if request.wants_scores:
                return [http(json.dumps({"error": {"message": "odd \x1b]0;x\x07"}}), 400)]
            return [http(evil)] if "models" in request.path else None

        with FaultyServer(behave) as server:
            done = run("score", "q", "d", "--base-url", server.base_url, VLLM_API_KEY="")
        assert done.returncode == 1
        assert "odd \\x1b]0;x\\x07" in done.stderr
        assert "\x1b" not in done.stderr

    def test_a_file_that_is_not_read_is_told(self, tmp_path: Path):
        """Its name is scored, for it is neither text nor an image."""
        (tmp_path / "report.pdf").write_bytes(b"%PDF-1.7")
        (tmp_path / "notes.txt").write_text("what is in it", encoding="utf-8")
        with FaultyServer() as server:
            done = run("score", "q", "report.pdf", "notes.txt", "--base-url", server.base_url, folder=tmp_path)
        assert done.stderr == "note: the file report.pdf is not read: its name is scored as a text\n"
        assert "report.pdf" in done.stdout
        assert "what is in it" in done.stdout


class TestFiles:
    """`rerank --in --out`."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        path = tmp_path / "in.jsonl"
        row = json.dumps({"query": QUERY, "documents": DOCUMENTS, "id": 1})
        path.write_text(f"{row}\n\nnope\n{row}\n", encoding="utf-8")
        return path

    def test_a_file_is_reranked(self, minilm: Path, source: Path, local: LocalScorer):
        """Every line is accounted for on stderr; rejects are a failure only if that is asked for."""
        out = source.with_name("out.jsonl")
        files = ["rerank", "--in", str(source), "--out", str(out), "--top-n", "1"]
        result = run(*files, *local_options(minilm), COLUMNS="40")
        assert (result.returncode, result.stdout) == (0, "")
        assert result.stderr.endswith(
            f"4 lines: 2 reranked (4 documents), 1 rejected, 1 blank; written to {out}.\n"
            f"warning: 1 rejected, see {out}.rejects.jsonl\n"
        )
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        assert rows[0] == rows[1]
        assert (rows[0]["id"], rows[0]["documents"]) == (1, DOCUMENTS)
        score = pytest.approx(local.score(QUERY, DOCUMENTS[1])[0], abs=1e-5)
        assert rows[0]["ranked"] == [{"index": 1, "score": score}]
        with FaultyServer() as server:
            assert run(*files, "--base-url", server.base_url, "--strict", VLLM_API_KEY="").returncode == 1

    def test_ctrl_c_and_on(self, source: Path):
        """What is done is kept; the same command goes on behind it, another is refused, --restart begins anew."""
        out, asked = source.with_name("out.jsonl.gz"), 0
        row = json.dumps({"query": QUERY, "documents": DOCUMENTS * 80})
        source.write_text(f"{row}\n" * 4, encoding="utf-8")
        process: subprocess.Popen[str] | None = None
        interrupted = threading.Event()

        def behave(request: Request) -> Steps | None:
            nonlocal asked
            asked += len(request.documents) if request.wants_scores else 0
            if asked > 500 and process is not None:  # in the second group
                if not interrupted.is_set():  # once: a second one may come as the interpreter ends
                    interrupted.set()
                    process.send_signal(signal.SIGINT)
                process.wait(300)
            return None

        with FaultyServer(behave) as server:
            files = ["rerank", "--in", str(source), "--out", str(out), "--base-url", server.base_url]
            process = subprocess.Popen(
                [sys.executable, "-m", "rag_rerank", *files],
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "VLLM_API_KEY": ""},
            )
            stderr = process.communicate(timeout=300)[1]
            assert process.returncode == 130, stderr
            assert stderr == f"The finished lines are kept in {out}.partial: the same command continues behind them.\n"
            assert not out.exists()
            other = run(*files, "--top-n", "1", VLLM_API_KEY="")
            assert (other.returncode, "top_n: 1, before None" in other.stderr) == (2, True)
            result = run(*files, VLLM_API_KEY="")
        assert result.returncode == 0, result.stderr
        assert result.stderr.startswith(
            f"2 lines of {source} were finished before.\n4 lines: 4 reranked (640 documents)"
        )
        assert len(gzip.decompress(out.read_bytes()).splitlines()) == 4
        assert {path.name for path in source.parent.iterdir()} == {"in.jsonl", "out.jsonl.gz"}

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (json.dumps({"query": "q", "documents": []}).encode("utf-16"), "looks like UTF-16"),
            (json.dumps({"query": "q", "documents": []}).encode("utf-16-le"), "looks like UTF-16"),
            (b"query,document\na,b\n", "looks like CSV"),
            (b'[{"query": "q", "document": "d"}]', "looks like one JSON array"),
            (b'{\n  "query": "q"\n}', "looks like indented JSON"),
            (gzip.compress(b"{}", mtime=0), "such a file must end in .jsonl.gz"),
            (b'{"question": "q", "document": "d"}', 'line 1: "query" must be str, got nothing'),
        ],
    )
    def test_a_file_of_which_every_line_is_rejected(self, content: bytes, words: str, source: Path):
        """Exit code 1, with the likely cause last."""
        source.write_bytes(content)
        with FaultyServer() as server:
            files = ["--in", str(source), "--out", str(source.with_name("out.jsonl"))]
            result = run("rerank", *files, "--base-url", server.base_url, VLLM_API_KEY="")
        assert (result.returncode, result.stdout) == (1, "")
        assert "error: every line was rejected: " in result.stderr.splitlines()[-1]
        assert words in result.stderr.splitlines()[-1]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--in", "a.jsonl"], "both --in and --out"),
            (["--in", "a.jsonl", "--out", "/"], "/ must end in .jsonl"),
            (["q", "d", "--strict"], "both --in and --out"),
            (["q", "d", "--in", "a.jsonl", "--out", "b.jsonl"], "either a query"),
            (["--in", "/no/a.jsonl", "--out", "b.jsonl"], "there is no file"),
            (["--in", "a.jsonl", "--out", "b.csv"], "must end in"),
        ],
    )
    def test_wrong_arguments(self, arguments: list[str], words: str):
        """Exit code 2, before any model is loaded."""
        result = run("rerank", *arguments, "--model", "/no/such/folder")
        assert (result.returncode, result.stdout) == (2, "")
        assert words in result.stderr
        assert "Traceback" not in result.stderr


class TestTable:
    """What is shown on a terminal."""

    @pytest.mark.parametrize("command", ["score", "rerank"])
    def test_long_documents_are_cut_and_numbers_are_not(self, command: str):
        """Every document has a row, on 80 columns; rerank's are those of rag_rerank.display."""
        with FaultyServer() as server:
            where = ["--base-url", server.base_url]
            result = run(
                command, QUERY, *DOCUMENTS, *["so long a text " * 40] * 12, *where, COLUMNS="80", VLLM_API_KEY=""
            )
        assert result.returncode == 0, result.stderr
        rows = [
            [cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if line[0] == "│"
        ]
        assert len(rows) == 14
        assert sum(row[-1].endswith("…") for row in rows) == 12
        index = 1 if command == "rerank" else 0
        assert {row[index] for row in rows} == set(map(str, range(14)))
        if command == "rerank":
            assert rows[0][3].endswith(" ████████")
            assert {row[2][:1] for row in rows} <= {"▲", "▼", "="}
