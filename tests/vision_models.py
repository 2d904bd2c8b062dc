"""A tiny reranker that sees: a Qwen3-VL that the tests make, and what plain transformers makes of it.

As in `tests.causal_models`: a real architecture, random but wide weights, a tokenizer trained on the bundled
collection.
"""

import io
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerFast

from rag_rerank.template import Template
from tests.causal_models import _QWEN_WORDS, ANSWERS, VOCABULARY
from tests.models import CORPUS

NAME = "Qwen3-VL-Reranker-tiny"
"""Names the family, so that template and answers are found."""
MAX_POSITIONS = 1024
PATCH, MERGE = 16, 2
SIDE = PATCH * MERGE  # what a token stands for, in pixels
LEAST, MOST = 4 * SIDE**2, 144 * SIDE**2
LEVELS = 2  # states of the tower that are added behind the decoder's first layers

_SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)


def make_vision_reranker(folder: Path, *, seed: int = 0) -> Path:
    """Save a two-layer ``Qwen3VLForConditionalGeneration`` with its tokenizer and processor settings into `folder`."""
    tokenizer = _tokenizer()
    ids = dict(zip(_SPECIALS, tokenizer.convert_tokens_to_ids(list(_SPECIALS)), strict=True))
    config = CONFIG_MAPPING["qwen3_vl"](
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,  # heads of 32: vLLM's CPU attention knows no 16
            "num_key_value_heads": 1,
            "head_dim": 32,
            "max_position_embeddings": MAX_POSITIONS,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "bos_token_id": ids["<|im_start|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": list(range(LEVELS)),
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    _widen(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen3VLProcessor",
        "size": {"shortest_edge": LEAST, "longest_edge": MOST},
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.25, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    video = processor | {"image_processor_type": None, "video_processor_type": "Qwen3VLVideoProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    return folder


def make_vision_classifier(folder: Path, *, seed: int = 0) -> Path:
    """The same model as a ``Qwen3VLForSequenceClassification``: the row of yes less that of no as its head."""
    make_vision_reranker(folder, seed=seed)
    weights = load_file(folder / "model.safetensors")
    no, yes = _tokenizer().convert_tokens_to_ids(["no", "yes"])
    answers = weights["model.language_model.embed_tokens.weight"]
    weights.pop("lm_head.weight", None)
    head = {"score.weight": (answers[yes] - answers[no])[None].clone()}
    save_file(weights | head, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Qwen3VLForSequenceClassification"], "id2label": {"0": "relevant"}}
    (folder / "config.json").write_text(json.dumps(config | {"label2id": {"relevant": 0}, "num_labels": 1}))
    return folder


def make_jina_m0(folder: Path, *, seed: int = 0) -> Path:
    """Save a jina-reranker-m0 as its repository has it: a Qwen2-VL under its first names, a head of two layers."""
    tokenizer = _tokenizer()
    ids = dict(zip(_SPECIALS, tokenizer.convert_tokens_to_ids(list(_SPECIALS)), strict=True))
    config = {
        "architectures": ["JinaVLForRanking"],
        "auto_map": {"AutoModel": "modeling.JinaVLForRanking"},
        "model_type": "qwen2_vl",
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": 64,
        "image_token_id": ids["<|image_pad|>"],
        "intermediate_size": 128,
        "max_position_embeddings": MAX_POSITIONS,
        "max_window_layers": 2,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": [4, 6, 6], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_sliding_window": False,
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": {
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": 64,
            "in_chans": 3,
            "mlp_ratio": 2,
            "model_type": "qwen2_vl",
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "spatial_patch_size": PATCH,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_token_id": ids["<|video_pad|>"],
        "vocab_size": len(tokenizer),
    }
    torch.manual_seed(seed)
    given = {name: value for name, value in config.items() if name not in ("architectures", "auto_map", "model_type")}
    model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING["qwen2_vl"](**given), dtype=torch.float32)
    _widen(model)
    weights = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): weight
        for name, weight in model.state_dict().items()
        if name != "lm_head.weight"  # tied
    }
    for name, shape in {"0.weight": (64, 64), "0.bias": (64,), "2.weight": (1, 64), "2.bias": (1,)}.items():
        weights[f"score.{name}"] = torch.randn(shape) / 4
    tokenizer.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "modeling.py").write_text("raise AssertionError('code of the repository is run')", encoding="utf-8")
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "min_pixels": LEAST,
        "max_pixels": MOST,
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    return folder


def _widen(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                # As in tests.causal_models; and pictures that outshout the words around them no more than words do.
                weight.normal_(std=0.35 if "embed_tokens" in name else 0.1 if "visual" in name else 0.25)


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(_QWEN_WORDS), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in _SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [json.loads(line)["text"] for line in CORPUS.read_text(encoding="utf-8").splitlines()[:200]]
    tokenizer.train_from_iterator([*texts, *ANSWERS * 500], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token in _SPECIALS if token not in ("<|im_end|>", "<|endoftext|>")],
    )


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Blobs of color: noise, scaled up."""
    noise = torch.randint(0, 256, (6, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.frombytes("RGB", (6, 6), bytes(noise.flatten().tolist())).resize((width, height))


def png(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """The file."""
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


class PlainTransformers:
    """The score as a model card's code would compute it: one pair at a time, transformers' own model and processor.

    The processor is the one that needs no torchvision; it differs in rounding from what a server runs unless pictures
    need no scaling.
    """

    def __init__(self, folder: Path, template: str = "qwen3-vl-reranker") -> None:
        from transformers import AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.template = Template.load(template)
        self.model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.no, self.yes = self.tokenizer.convert_tokens_to_ids(["no", "yes"])

    @torch.inference_mode()
    def logit(self, query: Sequence[str | Image.Image], document: Sequence[str | Image.Image]) -> float:
        """The logit of yes less that of no for a query and a document, each as its parts."""
        inputs = self.inputs(_images(query) + _images(document), self.template.render(_flat(query), _flat(document)))
        logits = self.model(**inputs).logits[0, -1]
        return float(logits[self.yes] - logits[self.no])

    def inputs(self, images: Sequence[Image.Image], text: str, end: Sequence[int] = ()) -> dict[str, torch.Tensor]:
        """What transformers' model takes for a prompt with placeholders, and the tokens `end` behind it."""
        pixels = {}
        if images:
            pixels = dict(self.processor(images=images, return_tensors="pt"))
            for _, high, wide in pixels["image_grid_thw"].tolist():
                text = text.replace("<|image_pad|>", "<|tmp|>" * (high * wide // MERGE**2), 1)
        text = text.replace("<|tmp|>", "<|image_pad|>")
        ids = torch.tensor([[*self.tokenizer(text)["input_ids"], *end]])
        return {"input_ids": ids, "mm_token_type_ids": (ids == self.model.config.image_token_id).int(), **pixels}


def _images(parts: Sequence[str | Image.Image]) -> list[Image.Image]:
    return [part for part in parts if not isinstance(part, str)]


def _flat(parts: Sequence[str | Image.Image]) -> str:
    images = sum(not isinstance(part, str) for part in parts)
    return "<|vision_start|><|image_pad|><|vision_end|>" * images + "\n".join(
        part for part in parts if isinstance(part, str)
    )
