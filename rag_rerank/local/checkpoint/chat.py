"""A tokenizer's own chat template as a score template, rendered as sentence-transformers does."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from rag_rerank.local.checkpoint.declaration import Chat
from rag_rerank.template import Template

# By these sentence-transformers knows a template that reads the content of a message as a list of parts.
_PARTS = ("content[0]", ".type", "'type'", '"type"', "item.type", "message.content[")


@dataclass(frozen=True, slots=True)
class ChatTemplate(Template):
    """A chat template with messages of the roles ``query`` and ``document``."""

    structured: bool = False  # whether the content of a message is a list of parts
    system: bool = True  # whether an instruction is the system's message; if not, it is a variable
    variables: Mapping[str, Any] = field(default_factory=dict)  # what the template is given besides

    @classmethod
    def of(cls, chat: Chat, source: str) -> Self:
        """Make the template of a checkpoint that declares one."""
        structured = chat.form == "structured" or (chat.form == "auto" and any(part in source for part in _PARTS))
        made = cls("chat_template", source, structured, variables=chat.variables)
        return made if made.takes("instruction") else replace(made, system=False)

    def _given(self, query: str, document: str, variables: dict[str, Any]) -> dict[str, Any]:
        messages = {"query": query, "document": document}
        if self.system and variables.get("instruction"):
            variables = dict(variables)
            messages = {"system": variables.pop("instruction"), **messages}
        made = [
            {"role": role, "content": [{"type": "text", "text": text}] if self.structured else text}
            for role, text in messages.items()
        ]
        # Those that transformers always gives.
        return {"documents": None, "add_generation_prompt": False, **self.variables, **variables, "messages": made}
