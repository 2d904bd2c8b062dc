"""Text as every tokenizer and JSON reader takes it, with nothing in it that a tokenizer takes for a command."""

import re

# How the tokenizers of rerankers spell their special tokens: <|im_end|> (Qwen, Llama 3, ModernBERT; DeepSeek with
# fullwidth bars), </s> (RoBERTa, Mistral), <end_of_turn> (Gemma), [SEP] (BERT), [INST] (Mistral), |||EMAIL_ADDRESS|||
# (ModernBERT). What matches is the first character only.
_SPECIAL_TOKEN = re.compile(
    r"""<(?=[|\uff5c][^<>|\uff5c\s]{1,64}[|\uff5c]>)
    | <(?=/?(?:s|pad|unk|mask|bos|eos|cls|sep|think|tool_call|tool_response|2mass|unused\d+|image|IMG_CONTEXT
        |(?:start|end)_of_(?:turn|image)|image_soft_token)>)
    | \[(?=(?:PAD|UNK|CLS|SEP|MASK|unused\d+|@BOS@
        |/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS|TOOL_CONTENT|IMG|PREFIX|MIDDLE|SUFFIX))\])
    | \|(?=\|\|[A-Z_]{1,32}\|\|\|)""",
    re.VERBOSE,
)


def clean(text: str) -> str:
    """`text` as every tokenizer and JSON reader takes it, and with nothing in it that a tokenizer takes for a command.

    Surrogate pairs are joined, lone surrogates (seen in text from PDFs) become U+FFFD. The spelling of a special token
    gets a space behind its first character, ``< |im_end|>``: tokenizers read it as the token even in the middle of a
    document, which could so end its turn and answer for itself. Done here because a server can't be told to do it, and
    a pair must score the same everywhere.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if "<" in text or "[" in text or "|||" in text:
        text = _SPECIAL_TOKEN.sub(r"\g<0> ", text)
    return text
