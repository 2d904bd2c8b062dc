"""Lets torchvision be imported beside a torch that it was not built for: put this folder into PYTHONPATH.

PyPI's torchvision is built for CUDA. Beside the torch for CPUs its extension does not load, which it would put up with,
were there not two operators that it takes for granted. vLLM asks of it only what is written in Python: scaling images.
"""

import contextlib

with contextlib.suppress(ImportError):
    import torch

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
