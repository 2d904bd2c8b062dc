"""Unknown arguments are refused, with a hint at the one that was meant."""

from typing import Any

from pydantic import BaseModel, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from rag_rerank import did_you_mean


class KnownNames(BaseModel):
    """Base of classes that take no argument but their fields."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, given: Any) -> Any:
        # As pydantic with extra="forbid", but with the hint, and without the value: it may be a key.
        fields = cls.model_fields.items()
        known = {alias for name, field in fields for alias in (name, field.alias, field.validation_alias)}
        errors: list[InitErrorDetails] = []
        for name in sorted(map(str, given.keys() - known if isinstance(given, dict) else ())):
            hint = did_you_mean(name, cls.model_fields)
            message = f"Extra inputs are not permitted{hint and f': {hint}'}"
            errors.append({"type": PydanticCustomError("extra_forbidden", message), "loc": (name,), "input": None})
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors, hide_input=True)
        return given
