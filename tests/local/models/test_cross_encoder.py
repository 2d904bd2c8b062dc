"""Heads of cross-encoders, given states that are there already: against the whole model, one pair at a time."""

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from rag_rerank import BadReply, LocalScorer
from rag_rerank.local.loading import load
from rag_rerank.local.models.cross_encoder import Whole, classification_head
from rag_rerank.local.transformer.batching import Batching, TokenSequence
from rag_rerank.local.transformer.transformer import ENCODERS, Padded, Transformer, Unpadded, make_transformer
from tests.encoder_models import make_random_cross_encoder, random_encoder
from tests.models import MAX_LENGTH, spoil
from tests.pairs import largest_difference, pairs

TOLERANCE = 1e-5
LENGTHS = (5, 60, 33, 17, 130, 48, 2, 200, 64)

CASES = [
    *((kind, {}) for kind in sorted(ENCODERS)),
    ("gte", {"type_vocab_size": 2}),
    ("modernbert", {"classifier_pooling": "mean"}),
    ("eurobert", {"classifier_pooling": "bos"}),
    ("eurobert", {"classifier_pooling": "mean"}),
    ("eurobert", {"classifier_pooling": "late"}),
]


pytestmark = pytest.mark.usefixtures("one_thread")


def sequences(model: PreTrainedModel) -> list[TokenSequence]:
    """Pairs, with token types where the model knows some."""
    typed = getattr(model.config, "type_vocab_size", 1) > 1
    return [
        TokenSequence(
            torch.randint(10, 190, (length,), generator=torch.Generator().manual_seed(length)).tolist(),
            [int(place > length // 3) for place in range(length)] if typed else None,
        )
        for length in LENGTHS
    ]


@torch.inference_mode()
def whole(model: PreTrainedModel, pairs_: Sequence[TokenSequence]) -> Tensor:
    """Logits of a model as transformers wrote it, ``[pairs, 1]``."""
    types = [{} if pair.types is None else {"token_type_ids": torch.tensor([pair.types])} for pair in pairs_]
    return torch.cat(
        [
            model(input_ids=torch.tensor([pair.ids]), attention_mask=torch.ones(1, len(pair.ids)), **kinds).logits
            for pair, kinds in zip(pairs_, types, strict=True)
        ]
    )


@pytest.fixture(scope="module", params=CASES, ids=lambda case: " ".join([case[0], *map(str, case[1].values())]))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A cross-encoder that nobody has touched."""
    kind, options = request.param
    return random_encoder(kind, AutoModelForSequenceClassification, num_labels=1, **options)


def difference(first: Tensor, second: Tensor) -> float:
    assert first.shape == second.shape
    return (first - second).abs().max().item()


class TestHead:
    """Pooler, dense layers, activations, poolings of every architecture that is run without padding."""

    @pytest.mark.parametrize("unpadded", [True, False])
    def test_logits_are_those_of_the_whole_model(self, model: PreTrainedModel, unpadded: bool):
        """To 1e-5, whichever way the states came."""
        batch = sequences(model)
        expected = whole(model, batch)
        own = copy.deepcopy(model)
        transformer = make_transformer(own.base_model, own.config.pad_token_id, Batching(4096), unpadded=unpadded)
        assert isinstance(transformer, Unpadded if unpadded else Padded)
        logits = self.logits(own, transformer, batch)
        assert difference(logits, expected) <= TOLERANCE
        assert expected.max() - expected.min() > 0.1

    def test_the_model_stays_as_it_was(self, model: PreTrainedModel):
        """It has its transformer and its logits, before and after."""
        batch = sequences(model)
        base, names, before = model.base_model, list(model.state_dict()), whole(model, batch)
        self.logits(model, make_transformer(copy.deepcopy(base), 0, Batching(4096)), batch)
        assert model.base_model is base
        assert list(model.state_dict()) == names
        assert torch.equal(whole(model, batch), before)

    @torch.inference_mode()
    def logits(self, model: PreTrainedModel, transformer: Transformer, batch: Sequence[TokenSequence]) -> Tensor:
        """In two batches, of one head."""
        head = classification_head(model)
        parts = (batch[:4], batch[4:])
        return torch.cat([head(transformer.states(part)) for part in parts])


class TestFromACheckpoint:
    """As LocalScorer loads them."""

    @pytest.mark.parametrize(
        ("kind", "expected"),
        [("distilbert", Unpadded), ("albert", Whole), ("deberta-v2", Whole)],
    )
    def test_scores_are_those_of_transformers(self, kind: str, expected: type, tmp_path: Path):
        """To 1e-5: an architecture of ours by its parts, an unknown one as a whole, in padded batches."""
        folder = make_random_cross_encoder(tmp_path / kind, kind)
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        queries, documents = (texts[:43] for texts in pairs())
        options = {"truncation": "longest_first", "max_length": MAX_LENGTH, "return_tensors": "pt"}
        with torch.inference_mode():
            logits = [
                model(**tokenizer(*pair, **options)).logits.item() for pair in zip(queries, documents, strict=True)
            ]
        with LocalScorer(folder, dtype="float32", use_activation=False) as scorer:
            assert type(load(scorer._settings).score_type.transformer) is expected
            assert largest_difference(scorer.score(queries, documents), logits) <= TOLERANCE
        assert max(logits) - min(logits) > 0.1

    def test_a_document_without_a_number_spoils_no_other(self, cross_encoder: Path, tmp_path: Path):
        """Not those beside it in its row, of its call or of another's at the same time."""
        bad, texts = "zebra zigzag", ["a class", "a file", "a list of strings", "the module os"] * 4
        folder = spoil(cross_encoder, tmp_path / "spoilt", bad, [*texts, "which one"])
        with LocalScorer(cross_encoder, dtype="float32") as sound, LocalScorer(folder, dtype="float32") as scorer:
            expected = sound.score("which one", texts)
            with ThreadPoolExecutor(4) as pool:
                others = [pool.submit(scorer.score, "which one", texts) for _ in range(3)]
                with pytest.raises(BadReply) as caught:
                    scorer.score("which one", [*texts[:8], bad, *texts[8:]])
                assert all(largest_difference(other.result(), expected) <= TOLERANCE for other in others)
        assert caught.value.indices == (8,)
        assert largest_difference([*caught.value.scores[:8], *caught.value.scores[9:]], expected) <= TOLERANCE
