"""Adapters (PEFT), beside a model or for one that they name: read, and merged into its weights."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from rag_rerank.errors import ConfigError
from rag_rerank.local.checkpoint.files import Files, opened

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_CLASSES: Mapping[str, Any] = {
    "SEQ_CLS": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "CAUSAL_LM": MODEL_FOR_CAUSAL_LM_MAPPING,
    "FEATURE_EXTRACTION": MODEL_MAPPING,
}
_TASKS = {"sequence-classification": "SEQ_CLS", "text-generation": "CAUSAL_LM"}  # sentence-transformers' names


@dataclass(frozen=True, slots=True)
class Adapter:
    """What was trained, and for which model."""

    name: str  # of the checkpoint that it is in
    declared: Mapping[str, Any]
    weights: Path
    shapes: Mapping[str, tuple[int, ...]]  # of its tensors, by their names in the model
    base: Files
    folder: str  # of the model, within `base`

    def architecture(self, config: PreTrainedConfig, task: str | None) -> str | None:
        """Name the class of the model that it was trained in; None if that is the model's own.

        `task` is what sentence-transformers declares.
        """
        named: str | None = (self.declared.get("auto_mapping") or {}).get("base_model_class")
        task = self.declared.get("task_type") or _TASKS.get(task or "")
        if named is not None or task is None:
            return named
        if task not in _CLASSES:
            supported = ", ".join(_CLASSES)
            raise ConfigError(f"{self.name!r}: {_CONFIG}: task_type is {task!r}; supported are {supported}")
        return getattr(_CLASSES[task].get(type(config), None), "__name__", None)

    @property
    def labels(self) -> int | None:
        """How many labels the head has that was trained with it; None where there was none."""
        saved = tuple(f"{module}." for module in self.declared.get("modules_to_save") or ())
        rows = [shape[0] for name, shape in self.shapes.items() if name.startswith(saved) and len(shape) == 2]
        return min(rows, default=None) if saved else None

    @torch.no_grad()  # not inference_mode: weights that are made in it can't be changed any more
    def merge(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return the model with weights that score as `peft.PeftModel` does."""
        from peft import PeftConfig, PeftModel  # noqa: PLC0415 - not installed everywhere
        from peft.utils import ModulesToSaveWrapper  # noqa: PLC0415

        folder, tokens = str(self.weights.parent), torch.arange(1, 9, device=model.device).unsqueeze(0)
        try:
            embeddings = [each for each in model.named_modules() if isinstance(each[1], torch.nn.Embedding)]
            for place, part in embeddings:
                (rows, *_) = self.shapes.get(f"{place}.weight", (part.num_embeddings,))
                if rows != part.num_embeddings:  # trained with more words
                    model.resize_token_embeddings(rows, mean_resizing=False)
            wrapped: Any = PeftModel(model, PeftConfig.from_pretrained(folder))
            result = wrapped.load_adapter(folder, "default", torch_device="cpu")
            expected = wrapped(input_ids=tokens)[0].float()
            for place, part in list(model.named_modules()):
                if isinstance(part, ModulesToSaveWrapper):  # which most of PEFT's merging takes for a single layer
                    model.set_submodule(place, part.modules_to_save["default"])
            merged = wrapped.base_model.merge_and_unload()
            apart = (merged(input_ids=tokens)[0].float() - expected).abs().max() / expected.abs().max()
        except (AttributeError, KeyError, NotImplementedError, OSError, RuntimeError, TypeError, ValueError) as error:
            kind, reason = self.declared.get("peft_type"), " ".join([*str(error).split(), "Merge it by PEFT itself"])
            raise ConfigError(f"the adapter ({kind}) of {self.name!r} can't be merged: {reason}") from error
        keys = [*result.missing_keys, *result.unexpected_keys]
        # PEFT saves some twice: of a head and embeddings that are saved as a whole, and as a part of the model.
        names = {key: key.removeprefix("base_model.model.").replace(".modules_to_save", "") for key in keys}
        if left := [key for key in keys if names[key] not in self.shapes]:
            raise ConfigError(f"the adapter of {self.name!r} is not one for {self.base.name!r}: {left[0]} has no place")
        if not apart < (1e-4 if model.dtype == torch.float32 else 0.1):  # as with weights that two layers share
            raise ConfigError(f"the adapter of {self.name!r} can't be merged: outputs would be {apart:.1g} off")
        return cast("PreTrainedModel", merged)


def read_adapter(files: Files, folder: str) -> Adapter | None:
    """Read the adapter in a folder of a checkpoint, if there is one; without peft, ConfigError."""
    declared = files.json(folder, _CONFIG)
    if declared is None:
        return None
    name = files.name
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            f"{name!r} has an adapter ({_CONFIG}), without which its scores are others: pip install peft, or merge the "
            "adapter into its model and pass that"
        )
    weights = files.path(folder, _WEIGHTS)
    if weights is None:
        raise ConfigError(f"{name!r} has {_CONFIG} but no {_WEIGHTS}; only safetensors are read, pickle can run code")
    with opened(weights) as tensors:
        shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    shapes = {key.removeprefix("base_model.model."): shape for key, shape in shapes.items()}
    if files.path(folder, "config.json") is not None:  # as transformers has it: then the model is the one beside it
        return Adapter(name, declared, weights, shapes, files, folder)
    named = declared.get("base_model_name_or_path")
    if not named:
        raise ConfigError(
            f"{name!r}: {_CONFIG} names no base_model_name_or_path, and there is no config.json beside it"
        )
    try:
        base = Files(named, declared.get("revision"), files.cache_dir, files.local_files_only)
    except ConfigError as error:
        raise ConfigError(f"the model for the adapter {name!r}: {error}") from error
    if base.path(_CONFIG) is not None:
        raise ConfigError(f"the adapter {name!r} is for {named!r}, which has an adapter itself: merge that first")
    return Adapter(name, declared, weights, shapes, base, "")
