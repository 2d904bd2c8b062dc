"""Score templates: the prompt that a reranker was trained with, as a Jinja file in vLLM's own form.

One file serves all: ``vllm serve --chat-template FILE``, `LocalScorer`, and `VLLMScorer` where the client must render.
A template reads two messages, with the roles ``query`` and ``document``, and may read variables such as
``instruction``::

    <Query>: {{ (messages | selectattr("role", "eq", "query") | first).content }}
    <Document>: {{ (messages | selectattr("role", "eq", "document") | first).content }}

Rendering is that of transformers' ``apply_chat_template``, which vLLM calls: the same options, hence the same bytes;
and in a sandbox. Queries and documents are values, never template code. A template itself is code: take it from where
you would take a program from.
"""

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rag_rerank.errors import ConfigError

SHIPPED = Path(__file__).parent / "templates"

# For finding out where a template puts the texts. Spaces at the ends show whether it strips them.
_QUERY, _DOCUMENT = " \u2042query\u2042 ", " \u2042document\u2042 "


@dataclass(frozen=True, slots=True)
class Template:
    """A score template.

    Attributes:
        name: Of the family, the file, or ``"(text)"``.
        source: The Jinja text.

    Raises:
        ConfigError: At construction, if it is not Jinja, fails, reaches for what a template has no business with, or
            leaves the query or the document out.
    """

    name: str
    source: str

    def __post_init__(self) -> None:
        rendered = self.render(_QUERY, _DOCUMENT)
        for role, text in (("query", _QUERY), ("document", _DOCUMENT)):
            if text.strip() not in rendered:
                raise ConfigError(
                    f"the template {self.name!r} leaves the {role} out. It must read the message of that role: "
                    f'(messages | selectattr("role", "eq", "{role}") | first).content'
                )

    @classmethod
    def load(cls, template: "str | os.PathLike[str] | Template") -> "Template":
        """Find a template by family name, by path, or take the text itself.

        Args:
            template: ``"qwen3-reranker"`` and the like (`Template.shipped` lists them), a path to a file, or Jinja
                text, recognised by its braces.

        Raises:
            ConfigError: No such template or file, or see the class.
        """
        if isinstance(template, Template):
            return template
        text = os.fspath(template)
        if "{{" in text or "{%" in text:
            return cls("(text)", text)
        name = text.removesuffix(".jinja")
        path = SHIPPED / f"{name}.jinja" if name in cls.shipped() else Path(text)
        try:
            return cls(path.stem, path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            shipped = ", ".join(cls.shipped())
            raise ConfigError(f"there is no template {text!r}: none of {shipped}, and no file ({error})") from error

    @staticmethod
    def shipped() -> list[str]:
        """List the names of the templates that come with the package."""
        return sorted(path.stem for path in SHIPPED.glob("*.jinja"))

    def render(self, query: str, document: str, variables: Mapping[str, Any] | None = None) -> str:
        """Render the prompt for one pair.

        Args:
            query: The query.
            document: The document.
            variables: Such as ``{"instruction": ...}``; what is None is left to the template's default.

        Raises:
            ConfigError: The template fails, or is refused by the sandbox.
        """
        given = {name: value for name, value in (variables or {}).items() if value is not None}
        try:
            return _compiled(self.source).render({"tools": None, **self._given(query, document, given)})
        except jinja2.exceptions.SecurityError as error:
            raise ConfigError(f"the template {self.name!r} is refused: {error}") from error
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"the template {self.name!r} is not Jinja: line {error.lineno}: {error.message}"
            ) from error
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise ConfigError(f"the template {self.name!r} fails: {error}") from error

    def _given(self, query: str, document: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Make what the template reads: the two messages beside the variables. A checkpoint's own has others."""
        messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
        return {**variables, "messages": messages}

    def takes(self, variable: str) -> bool:
        """Tell whether the prompt changes with a variable, such as ``"instruction"``."""
        return self.render("q", "d", {variable: _QUERY}) != self.render("q", "d", {variable: _DOCUMENT})

    @property
    def document_first(self) -> bool:
        """Whether the document stands before the query."""
        rendered = self.render(_QUERY, _DOCUMENT)
        return rendered.index(_DOCUMENT.strip()) < rendered.index(_QUERY.strip())

    def split(self, variables: Mapping[str, Any] | None = None) -> "Halves":
        """Split the prompt in two halves, for servers that have no template and join query and document themselves.

        Raises:
            ConfigError: It can't be split: the document stands before the query, a text occurs more than once, or is
                changed on its way (stripped, for example).
        """
        rendered = self.render(_QUERY, _DOCUMENT, variables)
        before, query, rest = rendered.partition(_QUERY)
        between, document, after = rest.partition(_DOCUMENT)
        halves = Halves(before, *_at_last_line(between), after)
        if not query or not document or "".join(halves.of("q", "d")) != self.render("q", "d", variables):
            raise ConfigError(
                f"the template {self.name!r} can't be split into a query's and a document's half. "
                "Give it to the server instead: vllm serve ... --chat-template FILE"
            )
        return halves


@dataclass(frozen=True, slots=True)
class Halves:
    """The fixed text around query and document.

    Attributes:
        before_query, after_query: Around the query, in the first half.
        before_document, after_document: Around the document, in the second half.
    """

    before_query: str
    after_query: str
    before_document: str
    after_document: str

    def of(self, query: str, document: str) -> tuple[str, str]:
        """Make the two halves for a pair; joined, they are the prompt."""
        return (
            f"{self.before_query}{query}{self.after_query}",
            f"{self.before_document}{document}{self.after_document}",
        )


def _at_last_line(text: str) -> tuple[str, str]:
    """`text` cut behind its last line break: no tokenizer joins words over it, so the halves have all its tokens."""
    end = text.rfind("\n") + 1
    return text[:end], text[end:]


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, but loud: it would print an attribute that it forbids as nothing."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise jinja2.exceptions.SecurityError(f"it reaches for {attribute!r} of a {type(obj).__name__}")


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> jinja2.Template:
    # As transformers' apply_chat_template has it; another setting is another prompt.
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
    return environment.from_string(source)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(layout: str) -> str:
    return datetime.now().astimezone().strftime(layout)
