"""Score templates: vLLM's form, transformers' bytes, a sandbox, and texts that stay text."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_rerank import ConfigError
from rag_rerank.template import Template

QUERY = '(messages | selectattr("role", "eq", "query") | first).content'
DOCUMENT = '(messages | selectattr("role", "eq", "document") | first).content'
PLAIN = (
    f"Instruct: {{{{ instruction | default('find it') }}}}\nQ: {{{{ {QUERY} }}}}\nD: {{{{ {DOCUMENT} }}}}\nAnswer:\n"
)


class TestRendering:
    """The bytes that a vLLM server makes of the same file."""

    def test_query_document_and_variables_are_put_in(self):
        """None leaves a variable to the template's default; Jinja drops one newline at the end of a file."""
        template = Template.load(PLAIN)
        assert template.render("q", "d") == "Instruct: find it\nQ: q\nD: d\nAnswer:"
        assert template.render("q", "d", {"instruction": None}) == template.render("q", "d")
        assert template.render("q", "d", {"instruction": "i"}) == "Instruct: i\nQ: q\nD: d\nAnswer:"

    @given(st.text(), st.text(), st.text())
    def test_it_is_what_transformers_renders(self, query: str, document: str, instruction: str):
        """For all texts; apply_chat_template is what vLLM calls."""
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
        [expected], _ = render_jinja_template([messages], chat_template=PLAIN, instruction=instruction)
        assert Template.load(PLAIN).render(query, document, {"instruction": instruction}) == expected

    @pytest.mark.parametrize("text", ["{{ 7 * 7 }}", "{% raw %}", "{# note #}", "{{ cycler.__init__ }}", "{{"])
    def test_template_code_in_a_text_stays_text(self, text: str):
        """Documents are values."""
        assert Template.load(PLAIN).render(text, text).count(text) == 2


class TestLoading:
    """By name, by path, or the text itself."""

    def test_by_path(self, tmp_path: Path):
        """The file's name is the template's."""
        (tmp_path / "mine.jinja").write_text(PLAIN)
        assert Template.load(tmp_path / "mine.jinja") == Template("mine", PLAIN)
        assert Template.load(str(tmp_path / "mine.jinja")).source == PLAIN

    @pytest.mark.parametrize("name", Template.shipped())
    def test_by_name(self, name: str):
        """Every shipped one loads, and loads as the file that it is for --chat-template."""
        assert Template.load(name).name == name

    def test_an_unknown_name_is_answered_with_the_known_ones(self):
        """They are few."""
        with pytest.raises(ConfigError, match="no template 'qwen4'.*qwen3-reranker"):
            Template.load("qwen4")

    @pytest.mark.parametrize(
        ("source", "words"),
        [
            (f"{{{{ {QUERY} }}}}", "leaves the document out"),
            (f"{{{{ {DOCUMENT} }}}}", "leaves the query out"),
            ("{{ messages[0].content ", "not Jinja: line 1"),
            ("{{ 1 / 0 }}", "fails: division by zero"),
            ("{{ raise_exception('no') }}", "fails: no"),
            ("{{ nothing.at.all }}", "fails: 'nothing' is undefined"),
        ],
    )
    def test_what_cannot_be_a_score_template_is_refused(self, source: str, words: str):
        """When it is loaded, not with the first query."""
        with pytest.raises(ConfigError, match=words):
            Template.load(source)


class TestSandbox:
    """A template can't reach out of itself."""

    @pytest.mark.parametrize(
        "code",
        [
            "''.__class__",
            "''['__class__']",
            "'' | attr('__class__')",
            "''.__class__.__mro__",
            "cycler.__init__.__globals__.os.popen('touch CANARY').read()",
            "messages.__class__.__base__.__subclasses__()",
            "self._TemplateReference__context",
            "range(10 ** 9) | list",
            "messages.append(1)",
            "lipsum.__globals__['os'].system('touch CANARY')",
            "joiner.__init__.__globals__",
        ],
    )
    def test_what_it_has_no_business_with_is_refused(self, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """ConfigError, and nothing was touched."""
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConfigError):
            Template.load(f"{PLAIN}{{{{ {code} }}}}")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("code", ["include 'secret.txt'", "import 'secret.txt' as s", "extends 'secret.txt'"])
    def test_other_files_cannot_be_read(self, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """There is no loader."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "secret.txt").write_text("secret")
        with pytest.raises(ConfigError, match="no loader"):
            Template.load(f"{PLAIN}{{% {code} %}}")


class TestHalves:
    """For servers that join query and document themselves."""

    @given(st.text(), st.text())
    def test_the_halves_joined_are_the_prompt(self, query: str, document: str):
        """Cut behind the last line break before the document."""
        template = Template.load(PLAIN)
        first, second = template.split().of(query, document)
        assert first + second == template.render(query, document)
        assert first == f"Instruct: find it\nQ: {query}\n"

    def test_variables_go_into_the_halves(self):
        """As into the whole."""
        assert Template.load(PLAIN).split({"instruction": "i"}).before_query == "Instruct: i\nQ: "

    @pytest.mark.parametrize(
        "source",
        [
            f"{{{{ {DOCUMENT} }}}} {{{{ {QUERY} }}}}",
            f"{{{{ {QUERY} }}}} {{{{ {DOCUMENT} }}}} {{{{ {QUERY} }}}}",
            f"{{{{ {QUERY} }}}} {{{{ {DOCUMENT} | trim }}}}",
            f"{{{{ {QUERY} }}}} {{{{ {DOCUMENT} }}}}{{{{ 'long' if ({DOCUMENT} | length) > 5 }}}}",
        ],
    )
    def test_a_template_that_cannot_be_split_is_refused(self, source: str):
        """Document first, a text twice, or changed on its way."""
        with pytest.raises(ConfigError, match="can't be split"):
            Template.load(source).split()
