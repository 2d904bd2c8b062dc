"""What is chosen for a device, where the caller leaves it open."""

import pytest
import torch

from rag_rerank.local.hardware import choose_dtype


class TestDtype:
    @pytest.mark.parametrize(
        ("capabilities", "dtype"),
        [
            pytest.param({"amx_bf16": True, "avx512_bf16": True}, torch.bfloat16, id="Intel with AMX"),
            pytest.param({"avx512_bf16": True}, torch.float32, id="Intel without: bfloat16 is slower there"),
            pytest.param({"avx512_bf16": True, "sse4a": True}, torch.bfloat16, id="AMD from Zen 4 on"),
            pytest.param({"avx512_bf16": False, "sse4a": True}, torch.float32, id="AMD before"),
            pytest.param({}, torch.float32, id="a torch that does not tell"),
        ],
    )
    def test_auto_is_the_fastest_that_the_processor_computes(self, monkeypatch, capabilities, dtype):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        assert choose_dtype("auto", torch.device("cpu")) == dtype

    def test_one_that_is_named_is_taken(self):
        assert choose_dtype("float16", torch.device("cpu")) == torch.float16
