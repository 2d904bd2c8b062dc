"""The shipped prompts are those of the model cards to the last byte; the table finds models and never guesses."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rag_rerank.errors import ConfigError
from rag_rerank.families import FAMILIES, Family, family, find_family

TEMPLATES = Path(__file__).parent.parent / "rag_rerank" / "templates"
SHIPPED = sorted(TEMPLATES.glob("*.jinja"))

QWEN3_SYSTEM = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
MXBAI_HEAD = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n"
)
MXBAI_TAIL = (
    "\nYou are a search relevance expert who evaluates how well documents match search queries. For each "
    "query-document pair, carefully analyze the semantic relationship between them, then provide your binary relevance "
    "judgment (0 for not relevant, 1 for relevant).\nRelevance:<|im_end|>\n<|im_start|>assistant\n"
)


@dataclasses.dataclass(frozen=True)
class Card:
    """What a model's card says, written down here without a look at the template.

    Attributes:
        plain: The prompt without an instruction of the caller's; ``⟦q⟧`` and ``⟦d⟧`` stand for the texts.
        instructed: The prompt with one, ``⟦i⟧``.
        suffix: How both end, where a text does not end them.
    """

    plain: str
    instructed: str
    suffix: str = ""


CARDS = {
    # Qwen's card: prefix + format_instruction(...) + suffix
    "qwen3-reranker": Card(
        QWEN3_SYSTEM + "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n"
        "<Query>: ⟦q⟧\n<Document>: ⟦d⟧<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        QWEN3_SYSTEM + "<Instruct>: ⟦i⟧\n<Query>: ⟦q⟧\n<Document>: ⟦d⟧<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n",
        suffix="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    # The card's scripts/qwen3_vl_reranker.py, put through Qwen3-VL's chat template with a generation prompt
    "qwen3-vl-reranker": Card(
        QWEN3_SYSTEM + "<Instruct>: Given a search query, retrieve relevant candidates that answer the query."
        "<Query>:⟦q⟧\n<Document>:⟦d⟧<|im_end|>\n<|im_start|>assistant\n",
        QWEN3_SYSTEM + "<Instruct>: ⟦i⟧<Query>:⟦q⟧\n<Document>:⟦d⟧<|im_end|>\n<|im_start|>assistant\n",
        suffix="<|im_end|>\n<|im_start|>assistant\n",
    ),
    # The package mxbai-rerank: the pieces that MxbaiRerankV2.prepare_inputs strings together
    "mxbai-rerank-v2": Card(
        MXBAI_HEAD + "query: ⟦q⟧\ndocument: ⟦d⟧" + MXBAI_TAIL,
        MXBAI_HEAD + "instruction: ⟦i⟧\nquery: ⟦q⟧\ndocument: ⟦d⟧" + MXBAI_TAIL,
        suffix="\nRelevance:<|im_end|>\n<|im_start|>assistant\n",
    ),
    # The card's get_inputs; <bos> is the tokenizer's
    "bge-reranker-v2-gemma": Card(
        "A: ⟦q⟧\nB: ⟦d⟧\nGiven a query A and a passage B, determine whether the passage contains an answer to the "
        "query by providing a prediction of either 'Yes' or 'No'.",
        "A: ⟦q⟧\nB: ⟦d⟧\n⟦i⟧",
    ),
    # pygaggle's MonoT5; </s> is the tokenizer's, and it takes no instruction
    "monot5": Card("Query: ⟦q⟧ Document: ⟦d⟧ Relevant:", "Query: ⟦q⟧ Document: ⟦d⟧ Relevant:"),
    # The card's prompt_template; it takes no instruction
    "nemotron-rerank": Card("question:⟦q⟧ \n \n passage:⟦d⟧", "question:⟦q⟧ \n \n passage:⟦d⟧"),
    # The checkpoint's chat template: query as system, document as user; instruction as ZeroEntropy advises
    "zerank-2": Card(
        "<|im_start|>system\n⟦q⟧<|im_end|>\n<|im_start|>user\n⟦d⟧<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\n<query>⟦q⟧</query>\n<instruction>⟦i⟧</instruction><|im_end|>\n"
        "<|im_start|>user\n⟦d⟧<|im_end|>\n<|im_start|>assistant\n",
        suffix="<|im_end|>\n<|im_start|>assistant\n",
    ),
    # The checkpoint's formatting_prompts_func; it takes no instruction
    "jina-reranker-m0": Card("**Document**:\n⟦d⟧\n**Query**:\n⟦q⟧", "**Document**:\n⟦d⟧\n**Query**:\n⟦q⟧"),
    # The card's format_prompts
    "ctxl-rerank-v2": Card(
        "Check whether a given document contains information helpful to answer the query.\n<Document> ⟦d⟧\n"
        "<Query> ⟦q⟧ ??",
        "Check whether a given document contains information helpful to answer the query.\n<Document> ⟦d⟧\n"
        "<Query> ⟦q⟧ ⟦i⟧ ??",
        suffix=" ??",
    ),
}

TEXTS = {
    "plain": ("what do pandas eat?", "Bamboo."),
    "unicode": ("¿qué comen los pandas? 🐼", "竹子。\u2028e\u0301 \u202eabc"),
    "template code": ("{{ 7*7 }}", "{% raw %}{{ messages }}{# x #}{%- endraw -%}"),
    "line breaks": ("\nwhy\n\n", "\r\n one\n\n two \n"),
    "empty document": ("why", ""),
    "spaces at the ends": ("  why ", "\t because  "),
}


def fill(layout: str, query: str, document: str, instruction: str = "") -> str:
    """Put texts into a card's layout, all at once, so that a text that looks like a mark stays text."""
    values = {"q": query, "d": document, "i": instruction}
    return re.sub("⟦(.)⟧", lambda mark: values[mark[1]], layout)


def render(path: Path, query: str, document: str, **variables: object) -> str:
    """As transformers' apply_chat_template and so vLLM render it, with Jinja alone."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
    return environment.from_string(path.read_text(encoding="utf-8")).render(messages=messages, **variables)


class TestTemplates:
    """Every byte of every prompt."""

    def test_each_has_its_card_here(self):
        """A template that is not checked must not ship."""
        assert [path.stem for path in SHIPPED] == sorted(CARDS)

    @pytest.mark.parametrize("text", TEXTS)
    @pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
    def test_the_prompt_is_the_cards(self, path: Path, text: str):
        """With the default instruction and with another; None and nothing mean the default."""
        query, document = TEXTS[text]
        card = CARDS[path.stem]
        assert render(path, query, document) == fill(card.plain, query, document)
        assert render(path, query, document, instruction=None) == fill(card.plain, query, document)
        assert render(path, query, document, instruction="") == fill(card.plain, query, document)
        for instruction in ("Find the {{ 7*7 }} bears", "zwei\nZeilen\n", '"ja" & <nein>'):
            expected = fill(card.instructed, query, document, instruction)
            assert render(path, query, document, instruction=instruction) == expected

    @pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
    def test_it_ends_with_the_cards_suffix(self, path: Path):
        """A score is read at the last token, and Jinja likes to eat line breaks."""
        assert render(path, "q", "d").endswith(CARDS[path.stem].suffix or fill(CARDS[path.stem].plain[-8:], "q", "d"))

    @pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
    def test_the_order_of_the_messages_and_other_roles_mean_nothing(self, path: Path):
        """They are told apart by their roles."""
        source = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(path.read_text())
        roles = {"document": "d", "system": "s", "query": "q"}
        messages = [{"role": role, "content": content} for role, content in roles.items()]
        assert source.render(messages=messages) == render(path, "q", "d")

    @pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
    def test_editors_cannot_change_it(self, path: Path):
        """Line breaks of another system, or more or none at the end of the file, leave the prompt as it is."""
        source = path.read_text(encoding="utf-8")
        messages = [{"role": "query", "content": "q"}, {"role": "document", "content": "d"}]
        for variant in (source.replace("\n", "\r\n"), source.rstrip(), source + "\n\n", "\n" + source):
            template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(variant)
            assert template.render(messages=messages) == render(path, "q", "d")

    @pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
    def test_it_names_its_card(self, path: Path):
        """In a comment at the top; and the table has the same card."""
        comment = re.match(r"\{#-(.*?)-#\}", path.read_text(encoding="utf-8"), re.DOTALL)
        assert comment
        assert family(path.stem).card in re.findall(r"https://huggingface\.co/\S+", comment[1])

    @pytest.mark.parametrize("text", TEXTS)
    @pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
    def test_transformers_renders_the_same(self, path: Path, text: str):
        """The call that vLLM makes, with a tokenizer of our own."""
        tokenizers = pytest.importorskip("tokenizers")
        transformers = pytest.importorskip("transformers")
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
        query, document = TEXTS[text]
        messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
        source = path.read_text(encoding="utf-8")
        for variables in ({}, {"instruction": "Find bears"}):
            rendered = tokenizer.apply_chat_template(
                messages, chat_template=source, tools=None, tokenize=False, **variables
            )
            assert rendered == render(path, query, document, **variables)


class TestTable:
    """FAMILIES is consistent with itself and with the templates."""

    def test_names_are_unique(self):
        """They are keys."""
        assert len({known.name for known in FAMILIES}) == len(FAMILIES)

    def test_every_template_has_a_family_of_its_name(self):
        """So that the name of the family is the name to ask the template for."""
        for path in SHIPPED:
            assert family(path.stem).template == path.name

    @pytest.mark.parametrize("known", FAMILIES, ids=lambda known: known.name)
    def test_a_row_holds_together(self, known: Family):
        """Templates exist, tokens fit the method, cards are addresses, patterns don't match everything."""
        assert known.template is None or known.template in {path.name for path in SHIPPED}
        assert len(known.tokens) == {"two-token": 2, "single-token": 1}.get(known.method, 0)
        assert known.template is not None or not known.instruction
        assert known.card.removeprefix("https://huggingface.co/").count("/") == 1
        for pattern in known.models:
            owner, _, name = pattern.partition("/")
            assert re.match(r"[\w.-]{6,}", name), "too little of the name stands before the wildcard"
            assert owner
            assert "*" not in owner

    @pytest.mark.parametrize("known", FAMILIES, ids=lambda known: known.name)
    def test_the_default_instruction_is_the_templates(self, known: Family):
        """None means that the prompt without an instruction has none."""
        if known.template is None:
            return
        path = TEMPLATES / known.template
        if known.instruction is not None:
            assert render(path, "q", "d") == render(path, "q", "d", instruction=known.instruction)
            assert known.instruction in render(path, "q", "d")

    @pytest.mark.parametrize("known", FAMILIES, ids=lambda known: known.name)
    def test_the_flags_can_be_given_to_a_shell(self, known: Family):
        """JSON is JSON, and the tokens in it are the table's."""
        arguments = shlex.split(known.vllm_flags.replace("{template}", "/t.jinja"))
        for argument in arguments:
            if argument.startswith("{"):
                assert json.loads(argument).get("classifier_from_token", []) in ([], list(known.tokens))
        if "--chat-template" in arguments:
            assert known.template
            assert arguments[arguments.index("--chat-template") + 1] == "/t.jinja"
        elif known.served:
            assert known.template in (None, "jina-reranker-m0.jinja")  # the one that vLLM has built in

    def test_rows_are_frozen(self):
        """They are shared."""
        with pytest.raises(dataclasses.FrozenInstanceError):
            FAMILIES[0].name = "mine"


class TestFinding:
    """By the name of the model alone."""

    @pytest.mark.parametrize(
        ("model_name", "name"),
        [
            ("Qwen/Qwen3-Reranker-0.6B", "qwen3-reranker"),
            ("Qwen/Qwen3-Reranker-8B", "qwen3-reranker"),
            ("tomaarsen/Qwen3-Reranker-4B-seq-cls", "qwen3-reranker-seq-cls"),
            ("Qwen/Qwen3-VL-Reranker-2B", "qwen3-vl-reranker"),
            ("mixedbread-ai/mxbai-rerank-base-v2", "mxbai-rerank-v2"),
            ("mixedbread-ai/mxbai-rerank-large-v2", "mxbai-rerank-v2"),
            ("mixedbread-ai/mxbai-rerank-large-v1", "mxbai-rerank-v1"),
            ("BAAI/bge-reranker-v2-gemma", "bge-reranker-v2-gemma"),
            ("zeroentropy/zerank-2", "zerank-2"),
            ("zeroentropy/zerank-2-reranker", "zerank-2"),
            ("zeroentropy/zerank-1-small", "zerank-2"),
            ("polaria-tech/zerank-2-reranker-vllm", "zerank-2-seq-cls"),
            ("ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b", "ctxl-rerank-v2"),
            ("ContextualAI/ctxl-rerank-v2-instruct-multilingual-6b", "ctxl-rerank-v2-6b"),
            ("nvidia/llama-nemotron-rerank-1b-v2", "nemotron-rerank"),
            ("nvidia/llama-nemotron-rerank-vl-1b-v2", "nemotron-rerank-vl"),
            ("jinaai/jina-reranker-m0", "jina-reranker-m0"),
            ("jinaai/jina-reranker-v3", "jina-reranker-v3"),
            ("castorini/monot5-base-msmarco-10k", "monot5"),
            ("unicamp-dl/mt5-base-mmarco-v2", "mt5-mmarco"),
            ("Alibaba-NLP/gte-multilingual-reranker-base", "gte-multilingual-reranker"),
            ("lightonai/GTE-ModernColBERT-v1", "colbert-modernbert"),
        ],
    )
    def test_hub_ids_and_folders(self, model_name: str, name: str):
        """The same model, wherever it lies, however its name is written."""
        owner, own_name = model_name.split("/")
        places = [
            model_name,
            f"/data/models/{own_name}",
            f"./{own_name}/",
            f"C:\\models\\{own_name}",
            own_name.lower(),
            f"/hub/models--{owner}--{own_name}/snapshots/0123abc",
        ]
        for place in places:
            found = find_family(place, [])
            assert found is not None, place
            assert found.name == name, place
            if found.architectures:
                assert find_family(place, found.architectures) is found

    @pytest.mark.parametrize(
        "model_name",
        [
            "",
            "/",
            ".",
            "model",
            "Qwen/Qwen3-0.6B",
            "Qwen/Qwen3-Embedding-0.6B",
            "me/my-Qwen3-Reranker-0.6B",
            "BAAI/bge-reranker-v2-minicpm-layerwise",
            "BAAI/bge-reranker-v2.5-gemma2-lightweight",
            "/data/Qwen3-Reranker-0.6B/checkpoint-500",
            "BAAI/bge-reranker-v2-m3",  # its files say all
        ],
    )
    def test_what_is_not_in_the_table_is_not_found(self, model_name: str):
        """A wrong prompt gives wrong scores without any error, so none is guessed."""
        assert find_family(model_name, []) is None

    def test_the_architecture_tells_a_classifier_from_the_model_it_was_made_of(self):
        """They share name and prompt; the scores arise differently."""
        causal = find_family("/models/Qwen3-Reranker-0.6B", ["Qwen3ForCausalLM"])
        classifier = find_family("/models/Qwen3-Reranker-0.6B", ["Qwen3ForSequenceClassification"])
        assert (causal, classifier) == (family("qwen3-reranker"), family("qwen3-reranker-seq-cls"))

    def test_a_namesake_of_another_architecture_is_not_found(self):
        """Whatever it is, it isn't that model."""
        assert find_family("me/bge-reranker-v2-gemma", ["BertForSequenceClassification"]) is None

    def test_some_architectures_are_a_family_of_their_own(self):
        """Under any name: vLLM has prompt and scale built in, too."""
        assert find_family("/models/mine", ["JinaVLForRanking"]) is family("jina-reranker-m0")
        assert find_family("/models/mine", ["JinaForRanking"]) is family("jina-reranker-v3")

    def test_an_unknown_name_is_answered_with_the_known_ones(self):
        """And with the one that was meant."""
        with pytest.raises(ConfigError, match=r"no family 'Qwen3-Rerank'\. Did you mean 'qwen3-reranker'\? Known are"):
            family("Qwen3-Rerank")
        with pytest.raises(ConfigError, match=r"no family 'xyz'\. Known are .*zerank-2"):
            family("xyz")

    def test_the_table_costs_nothing_to_read(self):
        """Neither models nor template engine come with it."""
        heavy = "{'torch', 'transformers', 'jinja2', 'httpx'} & set(sys.modules)"
        code = f"import sys, rag_rerank.families; assert not {heavy}, {heavy}"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=TEMPLATES.parent.parent)
