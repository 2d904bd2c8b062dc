"""Every architecture of transformers with a head for classification: right, or refused."""

import pytest
import torch
import transformers

from tests.local.architectures import PAGE, page, rows


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_none_is_wrong_and_the_page_says_what_was_seen():
    """Alone, beside a document 20 times as long, and once more. The page is of one version of transformers."""
    seen = list(rows())
    assert [row for row in seen if row.outcome == "wrong"] == []
    assert torch.get_default_dtype() == torch.float32
    written = PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}:" in written:
        assert page(seen) == written
