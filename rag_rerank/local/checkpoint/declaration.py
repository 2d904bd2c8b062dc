"""What a checkpoint's files declare about how it scores, read once into one value.

The rules are those of sentence-transformers 6.2; PyLate and Stanford's ColBERT have their own words for the same. What
is declared and can't be done is refused by file and field: a score without it would be another model's.
"""

import ast
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, Literal, NoReturn, TypeVar, cast, get_args

from rag_rerank.errors import ConfigError

Kind = Literal["cross-encoder", "bi-encoder", "late-interaction"]
Side = Literal["query", "document"]
Similarity = Literal["cosine", "dot", "euclidean", "manhattan", "maxsim", "meanmaxsim"]

IDENTITY, SIGMOID = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Sigmoid"
SCORE_TEMPLATE = "rag_rerank_template"  # the entry of a config.json by which a decoder reads plain pairs: "none"
POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")

_MODULES, _MODEL = "modules.json", "config_sentence_transformers.json"
_TEXTS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_SIDES: tuple[Side, ...] = get_args(Side)
_KINDS: Mapping[str, Kind] = {
    "CrossEncoder": "cross-encoder",
    "SentenceTransformer": "bi-encoder",
    "MultiVectorEncoder": "late-interaction",
    "ColBERT": "late-interaction",  # PyLate's
}
_SIMILARITIES: Mapping[Kind, tuple[Similarity, ...]] = {  # the first is the default
    "cross-encoder": (),
    "bi-encoder": ("cosine", "dot", "euclidean", "manhattan"),
    "late-interaction": ("maxsim", "meanmaxsim"),
}
# What modules hand on to each other.
_TOKENS, _SENTENCE, _SCORES, _LOGITS = "token_embeddings", "sentence_embedding", "scores", "causal_logits"
_OUTPUTS = {
    "feature-extraction": _TOKENS,
    "sequence-classification": _SCORES,
    "text-generation": _LOGITS,
    "any-to-any": _LOGITS,
}
# Options of a transformer that make no difference to a score, or that are ours to choose.
_WITHOUT_EFFECT = {
    *("padding", "padding_side", "pad_to_multiple_of", "return_tensors", "return_attention_mask", "logits_to_keep"),
    *("attn_implementation", "device_map", "dtype", "torch_dtype", "low_cpu_mem_usage", "use_safetensors", "use_cache"),
    *("trust_remote_code", "use_fast", "verbose", "cache_dir", "local_files_only", "revision", "subfolder", "token"),
}
_PYLATE = {
    *("query_prefix", "document_prefix", "query_length", "document_length", "query_expansion", "skiplist_words"),
    *("do_query_expansion", "attend_to_expansion_tokens", "attend_to_mask_tokens"),
}
_QUERY_LENGTH = 32  # of ColBERT, where none is declared
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Layer:
    """A module behind the transformer."""

    kind: Literal["Dense", "LayerNorm", "Normalize"]
    folder: str = ""  # of its weights
    activation: str = IDENTITY  # the torch class that follows a Dense, by its full name
    residual: bool = False  # whether a Dense adds its input to its output


@dataclass(frozen=True, slots=True)
class Pooling:
    """How the states of a text's tokens become one vector."""

    modes: tuple[str, ...]  # of `POOLINGS`; the vectors of several are joined
    include_prompt: bool = True  # whether the tokens of the prompt before a text count


@dataclass(frozen=True, slots=True)
class Chat:
    """Texts are rendered with the tokenizer's chat template."""

    form: str = "auto"  # a message's content: "structured" in parts, "flat" text, or as the template reads it
    variables: Mapping[str, Any] = field(default_factory=dict)  # what the template is given besides


@dataclass(frozen=True, slots=True)
class Expansion:
    """How a short query is filled up, as in ColBERT."""

    length: int  # in tokens
    fixed: bool = True  # whether longer queries are cut to it
    attend: bool = False  # whether other tokens attend to those that are added
    token: str | None = None  # None: the tokenizer's mask, or its end of text where it has no mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What a text passes through."""

    folder: str = ""  # the transformer's, within the checkpoint
    task: str | None = None  # what sentence-transformers loads it for
    prompt: str = ""  # before each text
    max_length: int | None = None  # longest input in tokens, where sentence-transformers' files limit it
    lower_case: bool = False  # whether texts are lowered first
    chat: Chat | None = None  # None where texts are tokenized as they are
    tokenizer_options: Mapping[str, Any] = field(default_factory=dict)
    token_layers: tuple[Layer, ...] = ()  # what the state of each token passes through
    pooling: Pooling | None = None  # None where each token keeps its own vector, or the transformer has a head
    layers: tuple[Layer, ...] = ()  # what the pooled vector passes through


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """How a checkpoint scores."""

    kind: Kind
    modular: bool = False  # whether it comes with modules.json; without, `query` and `document` say nothing
    # The same, but for prompt and length, unless a Router parts them. The pair of a cross-encoder passes through
    # `document`, with its prompt before the query.
    query: Route = Route()
    document: Route = Route()
    answers: tuple[int, ...] = ()  # whose logits make the score: (true,), or (false, true) for the difference
    labels: int | None = None  # how many scores a head of modules makes of a pair
    activation: str | None = None  # the torch class that makes scores of logits, by its full name
    instruction: str | None = None  # what a chat template is given unless the caller names another
    similarity: Similarity = "cosine"
    dimensions: int | None = None  # how many numbers of each vector are compared; None for all
    expansion: Expansion | None = None  # of queries
    skipped_words: tuple[str, ...] = ()  # tokens that are not compared, on the sides that `skipped_in` names
    skipped_in: tuple[str, ...] = ("document",)
    kept_ids: tuple[int, ...] = ()  # if any, the only tokens of documents that are compared
    markers: tuple[str, ...] = ()  # prompts that were tokens of their own in training

    def as_vllm(self) -> "Declaration":
        """Give what vLLM makes of a declaration of late interaction: only the projection and its length."""
        query, document = (
            Route(folder=own.folder, token_layers=own.token_layers) for own in (self.query, self.document)
        )
        return Declaration(kind=self.kind, modular=self.modular, query=query, document=document, similarity="maxsim")


class _Refused(ConfigError):
    pass


def read_declaration(name: str, read: Callable[[str], Any], kind: Kind | None = None) -> Declaration:
    """Read what a checkpoint declares; ConfigError for a malformed file, or what can't be done.

    `read` returns the content of a JSON file of the checkpoint by its path, or None where there is no such file; `kind`
    is what the caller says that it is.
    """
    try:
        reader = _Reader(read)
        kind = kind or reader.kind()
        if reader.modules is None:
            return reader.stanford() if kind == "late-interaction" else reader.plain(kind)
        if kind == "cross-encoder":
            return reader.cross_encoder()
        return reader.bi_encoder() if kind == "bi-encoder" else reader.multi_vector()
    except _Refused as error:
        raise ConfigError(f"{name!r}: {error}. Correct the file, or use the library that wrote it") from error


@dataclass(frozen=True, slots=True)
class _File:
    """A JSON object and its path, for errors."""

    path: str
    content: Mapping[str, Any]

    def get(self, name: str, kind: type[_T]) -> _T | None:
        """Return a field; None where it is missing or null."""
        value = self.content.get(name)
        if value is None or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
            return value
        raise _Refused(f"{self.path}: {name} is {value!r}, which is no {kind.__name__}")

    def refuse(self, name: str, why: str) -> NoReturn:
        """Raise ConfigError for a field."""
        raise _Refused(f"{self.path}: {name} {why}")


class _Reader:
    def __init__(self, read: Callable[[str], Any]) -> None:
        self._read = read
        self.model = self.file(_MODEL)
        listed = read(_MODULES)
        if listed is not None and not (isinstance(listed, list) and all(isinstance(each, dict) for each in listed)):
            raise _Refused(f"{_MODULES} is not a list of modules")
        self.modules: list[Mapping[str, Any]] | None = listed

    def file(self, path: str) -> _File:
        """Read a JSON object; an empty one where there is no such file."""
        content = self._read(path)
        if not isinstance(content, Mapping | None):
            raise _Refused(f"{path} is no JSON object")
        return _File(path, content or {})

    def kind(self) -> Kind:
        """Tell what the checkpoint is: what it is called, else what it is made of."""
        named = self.model.get("model_type", str)
        if named is not None:
            if named not in _KINDS:
                self.model.refuse("model_type", f"is {named!r}; supported are {', '.join(_KINDS)}")
            return _KINDS[named]
        steps = self.steps("document")
        kinds = [kind for kind, _ in steps]
        folder = next((folder for kind, folder in steps if kind == "Transformer"), "")
        architectures = self.file(_path(folder, "config.json")).get("architectures", list) or [""]
        scores = kinds[-1:] == ["Dense"] and self._config(steps[-1][1]).get("module_output_name", str) == _SCORES
        classifies = kinds == ["Transformer"] and architectures[0].endswith("ForSequenceClassification")
        if scores or not kinds or "LogitScore" in kinds or classifies:
            named_so = architectures[0].startswith(("HF_ColBERT", "ColBERT"))
            return "late-interaction" if named_so and not scores else "cross-encoder"
        # Before there was a model_type, PyLate wrote a Transformer and its projection.
        late = set(kinds) == {"Transformer", "Dense"} or "MultiVectorMask" in kinds
        return "late-interaction" if late else "bi-encoder"

    def steps(self, side: Side) -> list[tuple[str, str]]:
        """List what a text passes through: the kind and folder of each module."""
        return [step for module in self.modules or [] for step in self._parted(_step(module, _MODULES), side)]

    def plain(self, kind: Kind) -> Declaration:
        """Read what a checkpoint without modules declares: only how long its inputs may be."""
        return Declaration(kind=kind, document=Route(max_length=self._max_length(self._texts(""))))

    def cross_encoder(self) -> Declaration:
        prompt = self._prompts()[None]
        if self.steps("query") != self.steps("document"):
            raise _Refused(f"{_MODULES} has a Router, but a cross-encoder reads query and document together")
        route, end = self._route("document", "", _SENTENCE)
        if end not in (_LOGITS, _SCORES):
            raise _Refused(f"{_MODULES} ends with {end}; a cross-encoder's last module makes {_SCORES}")
        heads = [self._config(folder) for kind, folder in self.steps("document") if kind == "Dense"]
        return Declaration(
            kind="cross-encoder",
            modular=True,
            query=route,
            document=route if route.chat else replace(route, prompt=prompt),
            answers=self._answers() if end == _LOGITS else (),
            labels=heads[-1].get("out_features", int) if heads else None,
            activation=self.model.get("activation_fn", str),
            instruction=(prompt or None) if route.chat else None,
        )

    def bi_encoder(self) -> Declaration:
        prompts = self._prompts()
        query, document = (self._vector_route(side, prompts[side], _SENTENCE) for side in _SIDES)
        return Declaration(
            kind="bi-encoder",
            modular=True,
            query=query,
            document=document,
            similarity=self._similarity("bi-encoder"),
            dimensions=self.model.get("truncate_dim", int),
        )

    def multi_vector(self) -> Declaration:
        # sentence-transformers' own have modules for all; PyLate's end with the projection.
        whole = self.model.get("model_type", str) == "MultiVectorEncoder"
        prefixes = {side: self.model.get(f"{side}_prefix", str) or "" for side in _SIDES}
        prompts, routes = self._prompts(), dict[Side, Route]()
        for side, prefix in prefixes.items():
            route = self._vector_route(side, prefix + prompts[side].removeprefix(prefix), _TOKENS)
            if not whole and not any(layer.kind == "Normalize" for layer in route.token_layers):
                route = replace(route, token_layers=(*route.token_layers, Layer("Normalize")))
            routes[side] = route
        masks = [folder for kind, folder in self.steps("document") if kind == "MultiVectorMask"]
        if len(masks) > 1:
            raise _Refused(f"{_MODULES} has several MultiVectorMask; one is supported")
        mask = self.file(_path(masks[0], "config.json")) if masks else self.model
        words, tasks = mask.get("skiplist_words", list), mask.get("skiplist_tasks", list)
        if words is None and not masks and (self.model.get("model_type", str) == "ColBERT" or any(prefixes.values())):
            words = list(string.punctuation)
        expansion = self._expansion()
        if expansion is not None:
            if whole and not masks:
                raise _Refused(
                    f"{_MODULES} has no MultiVectorMask, by which the tokens of query_expansion are compared"
                )
            limit = routes["query"].max_length
            limit = expansion.length if expansion.fixed else limit and max(limit, expansion.length)
            routes["query"] = replace(routes["query"], max_length=limit)
        return Declaration(
            kind="late-interaction",
            modular=True,
            query=routes["query"],
            document=routes["document"],
            similarity=self._similarity("late-interaction"),
            expansion=expansion,
            skipped_words=tuple(words or ()),
            skipped_in=("document",) if tasks is None else tuple(tasks),
            kept_ids=tuple(mask.get("keep_only_token_ids", list) or ()),
            markers=tuple(filter(None, prefixes.values())),
        )

    def stanford(self) -> Declaration:
        """Read what the ColBERT of its authors declares: one file, and settings with defaults."""
        metadata = self.file("artifact.metadata")
        markers = metadata.get("query_token_id", str) or "[unused0]", metadata.get("doc_token_id", str) or "[unused1]"
        length = metadata.get("query_maxlen", int) or _QUERY_LENGTH
        query, document = (
            Route(prompt=f"{marker} ", max_length=limit, token_layers=(Layer("Dense"), Layer("Normalize")))
            for marker, limit in zip(markers, (length, metadata.get("doc_maxlen", int)), strict=True)
        )
        skips = metadata.get("mask_punctuation", bool)
        return Declaration(
            kind="late-interaction",
            query=query,
            document=document,
            similarity="maxsim",
            expansion=Expansion(length, attend=bool(metadata.get("attend_to_mask_tokens", bool))),
            skipped_words=tuple(string.punctuation) if skips is not False else (),
            markers=markers,
        )

    def _parted(self, step: tuple[str, str], side: Side) -> list[tuple[str, str]]:
        """List the modules that a Router sends queries or documents through; give any other module as it is."""
        kind, folder = step
        if kind not in ("Router", "Asym"):
            return [step]
        router = self.file(_path(folder, "router_config.json"))
        if not router.content:
            router = self.file(_path(folder, "config.json"))
        types = router.get("types", dict) or {}
        structure = router.get("structure", dict) or {}
        mappings = (router.get("parameters", dict) or {}).get("route_mappings") or {}
        try:
            routes = {ast.literal_eval(key): route for key, route in mappings.items()}
        except (ValueError, SyntaxError):
            router.refuse("route_mappings", f"is {mappings!r}, which can't be read")
        keys = [(side, "text"), (side, None), (None, "text"), (None, None)]
        name = next((routes[key] for key in keys if key in routes), side if side in structure else "text")
        if name not in structure:
            router.refuse("structure", f"has no route for a {side}: only {', '.join(structure)}")
        modules = [{"type": types.get(module), "path": _path(folder, module)} for module in structure[name]]
        return [_step(module, router.path) for module in modules]

    def _vector_route(self, side: Side, prompt: str, output: str) -> Route:
        """Read what a text passes through on its way to vectors, without a head."""
        route, end = self._route(side, prompt, output)
        if end != output:
            raise _Refused(f"{_MODULES} declares {end} at the end; such a model is supported from text to {output}")
        return route

    def _route(self, side: Side, prompt: str, dense_input: str) -> tuple[Route, str]:
        """Read what a text passes through, and what comes out."""
        (kind, folder), *rest = self.steps(side) or [("nothing", "")]
        if kind != "Transformer":
            raise _Refused(f"{_MODULES} begins with {kind}; only a Transformer is supported there")
        texts = self._texts(folder)
        task = texts.get("transformer_task", str) or "feature-extraction"
        passed = texts.get("module_output_name", str) or _OUTPUTS.get(task)
        if passed is None or passed != _OUTPUTS.get(task):
            texts.refuse("transformer_task", f"is {task!r} with {passed}; supported are {', '.join(_OUTPUTS)}")
        chat = _chat(texts, task)
        token_layers: list[Layer] = []
        layers: list[Layer] = []
        pooling = None
        for kind, place in rest:
            config = self._config(place)
            reads = config.get("module_input_name", str)
            if kind == "Pooling":
                pooling, reads, makes = _pooling(config), _TOKENS, _SENTENCE
            elif kind == "Dense":
                reads = reads or dense_input
                makes = config.get("module_output_name", str) or reads
                activation = config.get("activation_function", str) or "torch.nn.modules.activation.Tanh"
                if makes == _SCORES and pooling is None:
                    config.refuse("module_output_name", f"is {_SCORES}, but no Pooling makes one vector of a text")
                layer = Layer("Dense", place, activation, bool(config.get("use_residual", bool)))
                (layers if pooling else token_layers).append(layer)
            elif kind in ("LayerNorm", "Normalize"):
                reads = reads or _SENTENCE
                if kind == "Normalize" and reads != passed:
                    continue  # of what nothing reads any more
                makes = config.get("module_output_name", str) or reads
                (layers if pooling else token_layers).append(Layer(cast("Any", kind), place))
            elif kind == "LogitScore":
                reads = makes = _LOGITS
            elif kind in ("MultiVectorMask", "Dropout"):
                continue
            else:
                raise _Refused(f"{_MODULES} has a {kind}, which is not supported")
            if reads != passed:
                raise _Refused(f"{config.path}: the {kind} reads {reads}, but the module before it makes {passed}")
            passed = makes
        route = Route(
            folder=folder,
            task=task,
            prompt=prompt,
            max_length=self._max_length(texts, chat, None if passed in (_SCORES, _LOGITS) else side),
            lower_case=bool(texts.get("do_lower_case", bool)),
            chat=chat,
            tokenizer_options=_tokenizer_options(texts),
            token_layers=tuple(token_layers),
            pooling=pooling,
            layers=tuple(layers),
        )
        return route, passed

    def _texts(self, folder: str) -> _File:
        """How texts become tokens; the name of the file has changed over the versions."""
        names = _TEXTS if self.modules is not None else _TEXTS[:1]
        files = (self.file(_path(folder, name)) for name in names)
        return next((file for file in files if file.content), _File(_path(folder, _TEXTS[0]), {}))

    def _config(self, folder: str) -> _File:
        return self.file(_path(folder, "config.json"))

    def _max_length(self, texts: _File, chat: Chat | None = None, side: Side | None = None) -> int | None:
        options = texts.get("processing_kwargs", dict) or {}
        groups = ("common", "text") if chat is None else ("chat_template", "text", "common")  # the first goes first
        sizes = [(options.get(group) or {}).get("max_length") for group in groups]
        if side is not None:  # a pair is neither
            sizes.append(texts.get(f"{side}_length", int) or self.model.get(f"{side}_length", int))
        sizes += [_options(texts, "processor_kwargs").get("model_max_length"), texts.get("max_seq_length", int)]
        return next((size for size in sizes if size), None)

    def _prompts(self) -> dict[str | None, str]:
        """Read what is put before a text: a query, a document (``encode_query``, ``encode_document``), by default."""
        prompts: dict[Any, Any] = {"query": None, "document": None, **(self.model.get("prompts", dict) or {})}
        name = self.model.get("default_prompt_name", str)
        if name is not None and name not in prompts:
            self.model.refuse("default_prompt_name", f"is {name!r}, which is not among its prompts")
        return {None: prompts.get(name) or "", **{side: prompts[side] or "" for side in _SIDES}}

    def _similarity(self, kind: Kind) -> Similarity:
        named, allowed = self.model.get("similarity_fn_name", str), _SIMILARITIES[kind]
        if kind == "late-interaction" and named is not None:  # PyLate writes MaxSim, or without meaning it cosine
            named = None if named in _SIMILARITIES["bi-encoder"] else named.lower()
        if named is not None and named not in allowed:
            self.model.refuse("similarity_fn_name", f"is {named!r}; supported are {', '.join(allowed)}")
        return named or allowed[0]

    def _answers(self) -> tuple[int, ...]:
        """Read the ids of LogitScore, as in `Declaration.answers`."""
        folders = [folder for kind, folder in self.steps("document") if kind == "LogitScore"]
        if not folders:
            raise _Refused(f"{_MODULES} has no LogitScore: which tokens answer is not declared")
        config = self._config(folders[0])
        true, false = config.get("true_token_id", int), config.get("false_token_id", int)
        if true is None:
            config.refuse("true_token_id", "is missing: which token answers is not declared")
        return (true,) if false is None else (false, true)

    def _expansion(self) -> Expansion | None:
        texts = self._texts(self.steps("query")[0][1])
        file = next((file for file in (texts, self.model) if "query_expansion" in file.content), None)
        if file is None:
            if not _PYLATE & self.model.content.keys() or self.model.get("do_query_expansion", bool) is False:
                return None
            attends = [self.model.get(f"attend_to_{tokens}_tokens", bool) for tokens in ("expansion", "mask")]
            attend = next((value for value in attends if value is not None), False)
            return Expansion(self.model.get("query_length", int) or _QUERY_LENGTH, attend=attend)
        declared = file.get("query_expansion", dict)
        if declared is None:
            return None
        expansion = _File(f"{file.path}, query_expansion", declared)
        strategy, length = expansion.get("strategy", str), expansion.get("length", int)
        if strategy not in ("fixed", "min") or length is None:
            expansion.refuse("strategy", f"is {strategy!r} with length {length!r}; it is fixed or min, with a length")
        token = expansion.get("token", str)
        return Expansion(length, strategy == "fixed", bool(expansion.get("attend", bool)), token)


def _path(folder: str, name: str) -> str:
    return str(PurePosixPath(folder, name))


def _step(module: Mapping[str, Any], file: str) -> tuple[str, str]:
    """Read the kind of a module, whose full name changed over the versions, and its folder."""
    kind, folder = str(module.get("type")), str(module.get("path", ""))
    if kind.partition(".")[0] not in ("sentence_transformers", "pylate"):
        raise _Refused(f"{file}: the module {kind} is code of the checkpoint's own, which is not run")
    if PurePosixPath(folder).is_absolute() or ".." in PurePosixPath(folder).parts:
        raise _Refused(f"{file}: the path {folder!r} leads out of the checkpoint")
    return kind.rpartition(".")[2], folder


def _pooling(config: _File) -> Pooling:
    """Its newer form (``pooling_mode``) or its older (one flag each)."""
    named = config.content.get("pooling_mode")
    if not config.content:
        config.refuse("pooling_mode", "is missing")
    if named is None:
        flags = [key for key, value in config.content.items() if key.startswith("pooling_mode_") and value is True]
        named = [flag.removeprefix("pooling_mode_").removesuffix("_token") for flag in flags]
        named = [mode if mode == "mean_sqrt_len_tokens" else mode.removesuffix("_tokens") for mode in named]
        named = sorted(named, key=lambda mode: POOLINGS.index(mode) if mode in POOLINGS else -1) or ["mean"]
    modes = (named,) if isinstance(named, str) else tuple(named)
    if not modes or not set(modes) <= set(POOLINGS):
        config.refuse("pooling_mode", f"is {' + '.join(map(str, modes))}; supported are {', '.join(POOLINGS)}")
    return Pooling(modes, config.get("include_prompt", bool) is not False)


def _options(texts: _File, name: str) -> Mapping[str, Any]:
    """Options for transformers' from_pretrained; their names have changed over the versions."""
    old = {"processor_kwargs": "tokenizer_args", "model_kwargs": "model_args", "config_kwargs": "config_args"}[name]
    return texts.get(name, dict) or texts.get(old, dict) or {}


def _tokenizer_options(texts: _File) -> Mapping[str, Any]:
    if texts.get("tokenizer_name_or_path", str) is not None:
        texts.refuse("tokenizer_name_or_path", "is not supported: the tokenizer belongs beside the weights")
    for name in ("model_kwargs", "config_kwargs"):
        for option in _options(texts, name).keys() - _WITHOUT_EFFECT:
            texts.refuse(f"{name}.{option}", "is not supported")
    options = _options(texts, "processor_kwargs").items()
    return {name: value for name, value in options if name not in _WITHOUT_EFFECT | {"model_max_length"}}


def _chat(texts: _File, task: str) -> Chat | None:
    processing = texts.get("processing_kwargs", dict) or {}
    for group, options in processing.items():
        known = {"max_length", "truncation"} | _WITHOUT_EFFECT
        for option, value in (options or {}).items():
            if option == "truncation" and value not in (True, "longest_first"):
                texts.refuse(f"processing_kwargs.{group}.truncation", f"is {value!r}; supported is longest_first")
            refused = {"chat_template", "continue_final_message"} if group == "chat_template" else None
            unknown = option in refused if refused else group not in ("text", "common") or option not in known
            if unknown or (option == "restore_suffix" and value is not True):
                texts.refuse(f"processing_kwargs.{group}.{option}", f"is {value!r}, which is not supported")
    ways = texts.get("modality_config", dict)
    if ways is None:
        return None
    name = "message" if "message" in ways else "text"
    way = ways.get(name)
    output = "last_hidden_state" if task == "feature-extraction" else "logits"
    expected = {"method": "forward", "method_output_name": output}
    if not isinstance(way, Mapping) or {key: way.get(key) for key in expected} != expected:
        texts.refuse(f"modality_config.{name}", f"is {way!r}; supported is {expected}")
    if name == "text":
        return None
    own = {"max_length", "truncation", "restore_suffix"} | _WITHOUT_EFFECT
    variables = {key: value for key, value in (processing.get("chat_template") or {}).items() if key not in own}
    return Chat(way.get("format", "auto"), variables)
