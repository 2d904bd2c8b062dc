"""What is ready to be submitted to other projects' lists says what the package says.

To write the recipes anew: python -m tests.test_listings.
"""

import math
import re
import shlex
import tomllib
from pathlib import Path

import yaml

from rag_rerank.families import FAMILIES, Family
from tests.examples import ROOT

LISTINGS = ROOT / "docs" / "listings"
TESTED = "0.32.0"  # the vLLM that the tests serve these families with; older ones may do

GUIDE = """\
## Launch

```bash
{commands}
```

{note}## Ask it

`POST /v1/rerank` or `/v1/score`, or with `pip install rag-rerank`:

```python
from rag_rerank import VLLMScorer

scorer = VLLMScorer("http://localhost:8000", model="{model}")
print(scorer.rerank("What do pandas eat?", ["Bread needs flour.", "The giant panda eats bamboo."]))
```

Is it well? `rag-rerank check http://localhost:8000`

## References

- [Model card]({card})
"""


def literal(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Write texts of several lines as they are."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


yaml.SafeDumper.add_representer(str, literal)


def model_of(family: Family) -> str:
    """The one that its card is of."""
    return family.card.removeprefix("https://huggingface.co/")


def size_of(family: Family) -> float | None:
    """Billions of parameters of that model; None where the family's sizes don't tell."""
    sizes = [float(each) / (1000 if unit == "M" else 1) for each, unit in re.findall(r"([\d.]+)([BM])", family.size)]
    named = re.search(r"(?<![\d.])([\d.]+)b\b", model_of(family).lower())
    return float(named[1]) if named and float(named[1]) in sizes else sizes[0] if len(sizes) == 1 else None


def recipe(family: Family, size: float) -> dict[str, object]:
    """What https://github.com/vllm-project/recipes/blob/main/CONTRIBUTING.md asks for."""
    model = model_of(family)
    owner, _, name = model.partition("/")
    commands = "\n".join(family.serve(model))
    count = f"{size:g}B" if size >= 1 else f"{size * 1000:g}M"
    template = [
        {"note": "The prompt that it was trained with", "command": f"pip install rag-rerank && {command}"}
        for command in family.serve(model)[:-1]
    ]
    return {
        "meta": {
            "title": name,
            "slug": name.lower(),
            "provider": owner,
            "description": f"Reranker of {count} parameters: scores how relevant a document is to a query",
            "date_added": "YYYY-MM-DD",
            "date_updated": "YYYY-MM-DD",
            "difficulty": "beginner",
            "tasks": ["embedding"],
            "related_recipes": [],
        },
        "model": {
            "model_id": model,
            "min_vllm_version": TESTED,
            "architecture": "dense",
            "parameter_count": count,
            "active_parameters": count,
            "context_length": family.max_length,
            "base_args": shlex.split(family.vllm_flags.replace("{template}", family.template or "")),
            "base_env": {},
        },
        **({"dependencies": template} if template else {}),
        "features": {},
        "opt_in_features": [],
        "variants": {
            "default": {
                "precision": "bf16",
                "vram_minimum_gb": math.ceil(size * 2 * 1.2),
                "description": "bfloat16 weights on one GPU",
            }
        },
        "compatible_strategies": ["single_node_tp"],
        "hardware_overrides": {},
        "strategy_overrides": {"single_node_tp": {"tp": 1}},
        "guide": GUIDE.format(commands=commands, note=f"{family.note}\n\n".lstrip(), model=model, card=family.card),
    }


def recipes() -> dict[Path, str]:
    """Each recipe's file and text: of the families that vLLM serves, whose model's size and window are known."""
    written = {}
    for family in FAMILIES:
        size = size_of(family)
        if family.served and size is not None and family.max_length is not None:
            path = LISTINGS / "vllm" / f"{model_of(family)}.yaml"
            written[path] = yaml.safe_dump(recipe(family, size), sort_keys=False, allow_unicode=True, width=math.inf)
    return written


def test_recipes_are_those_of_the_table():
    assert {path: path.read_text(encoding="utf-8") for path in LISTINGS.rglob("*.yaml")} == recipes()


def test_langchain_lists_the_package_that_is_there():
    [entry] = yaml.safe_load((LISTINGS / "langchain.yml").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / entry["path"] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert entry["name"] == project["name"]


if __name__ == "__main__":
    for path, text in recipes().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
