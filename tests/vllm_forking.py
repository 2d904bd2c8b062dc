"""Imported ahead by what forks vLLM servers, see `tests.vllm_server`: all that their three processes need.

They are forked, too, as vLLM does by itself elsewhere than on CPUs.
"""

import os
from typing import Any

import vllm.v1.worker.cpu_worker  # noqa: F401
from vllm.platforms.cpu import CpuPlatform

_update = CpuPlatform.check_and_update_config.__func__


def _update_and_fork(cls: type, config: Any) -> None:
    _update(cls, config)
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"


CpuPlatform.check_and_update_config = classmethod(_update_and_fork)
