"""Imported ahead by what forks commands, see `tests.commands`: what most of them need."""

import httpx  # noqa: F401
import torch  # noqa: F401
from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: F401
from transformers.models.bert import modeling_bert  # noqa: F401

import rag_rerank.vllm.scorer  # noqa: F401
