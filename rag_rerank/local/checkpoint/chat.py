"""A tokenizer's own chat template as a score template, rendered as sentence-transformers does."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from rag_rerank.local.checkpoint.declaration import Chat, Side
from rag_rerank.template import Template

# By these sentence-transformers knows a template that reads the content of a message as a list of parts.
_PARTS = ("content[0]", ".type", "'type'", '"type"', "item.type", "message.content[")


@dataclass(frozen=True, slots=True)
class ChatTemplate(Template):
    """A chat template with messages of the roles ``query`` and ``document``, or with one text of the role ``user``."""

    structured: bool = False  # whether the content of a message is a list of parts
    system: bool = True  # whether an instruction is the system's message; if not, it is a variable
    variables: Mapping[str, Any] = field(default_factory=dict)  # what the template is given besides
    alone: bool = False  # whether query and document are one text, of which either may be empty: it is embedded

    @classmethod
    def of(cls, chat: Chat, source: str) -> Self:
        """Make the template of a cross-encoder that declares one."""
        made = cls("chat_template", source, _structured(chat, source), variables=chat.variables)
        return made if made.takes("instruction") else replace(made, system=False)

    @classmethod
    def of_texts(cls, chat: Chat, source: str, side: Side) -> Self:
        """Make the template by which a checkpoint embeds queries or documents: it may ask which (``task``)."""
        variables = {"task": side, **chat.variables}
        return cls("chat_template", source, _structured(chat, source), variables=variables, alone=True)

    def _given(self, query: str, document: str, variables: dict[str, Any]) -> dict[str, Any]:
        messages = {"user": query + document} if self.alone else {"query": query, "document": document}
        if self.system and variables.get("instruction"):
            variables = dict(variables)
            messages = {"system": variables.pop("instruction"), **messages}
        made = [
            {"role": role, "content": [{"type": "text", "text": text}] if self.structured else text}
            for role, text in messages.items()
        ]
        # Those that transformers always gives.
        return {"documents": None, "add_generation_prompt": False, **self.variables, **variables, "messages": made}


def _structured(chat: Chat, source: str) -> bool:
    return chat.form == "structured" or (chat.form == "auto" and any(part in source for part in _PARTS))
