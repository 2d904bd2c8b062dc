"""Ray itself: imported, started where none runs, and what an actor gets of the machines."""

import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from rag_rerank.errors import ConfigError
from rag_rerank.scorer import Scorer


def import_ray(module: str = "ray") -> Any:
    """Import Ray, or a module of it; a ConfigError where it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(f"Ray can't be imported ({error}): pip install 'rag-rerank[ray]'") from error


@contextmanager
def connected() -> Iterator[Any]:
    """Connect to the Ray that is running, to the cluster at ``RAY_ADDRESS``, or to a new local one, for this block."""
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a run on a laptop tells nobody
    # Ray warns of actors that can't be started again once the driver is gone; nor need they be.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ConfigError(f"no Ray cluster answers at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


@dataclass(frozen=True, slots=True)
class Pool:
    """How many actors there are, and what each gets of the machines.

    Attributes:
        actors: How many. None: one for each GPU, or one for each machine where there are none.
        cpus: CPUs of each, and threads of its scorer. None: an equal share of all there are; but at most one for a
            `remote` scorer, which only waits.
        gpus: GPUs of each; a part of one, such as 0.5, lets several share it. None: one where there are any, but none
            for a `remote` scorer.
    """

    actors: int | None = None
    cpus: float | None = None
    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.actors is not None and (isinstance(self.actors, bool) or self.actors < 1):
            raise ConfigError(f"actors must be 1 or more, got {self.actors!r}")
        for name, value in (("cpus", self.cpus), ("gpus", self.gpus)):
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{name} must be 0 or more, got {value!r}")

    def fit(self, ray: Any, scorer: Scorer) -> tuple[int, dict[str, Any]]:
        """Find how many actors there are and Ray's options for each; a ConfigError if the machines have less."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        all_gpus = int(sum(node.get("GPU", 0.0) for node in nodes))
        gpus = float(all_gpus > 0 and not scorer.remote) if self.gpus is None else self.gpus
        actors = self.actors or (int(all_gpus / gpus) if gpus else len(nodes))
        cpus = self.cpus
        if cpus is None:
            share = equal_share([node.get("CPU", 0.0) for node in nodes], actors)
            cpus = min(share, 1.0 if scorer.remote else math.inf)
        fitting = sum(_fitting(node, cpus, gpus) for node in nodes)
        if fitting < actors:
            has = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
            raise ConfigError(
                f"{actors} actors of {cpus:g} CPUs and {gpus:g} GPUs don't fit on the machines ({has}), only "
                f"{fitting}; ask for fewer actors, or less for each"
            )
        # Each actor's libraries would take all cores for themselves. Ray sets OMP_NUM_THREADS, but not where the user
        # has set it, and the tokenizers' threads not at all.
        names = "OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"
        threads = dict.fromkeys(names, str(max(1, int(cpus))))
        return actors, {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": threads}}


DEFAULT_POOL = Pool()


def equal_share(cpus: list[float], actors: int) -> float:
    """Find the CPUs of each actor, such that all fit on nodes with these; a whole number where there is one each."""
    for each in range(int(max(cpus, default=0.0)), 0, -1):
        if sum(int(node // each) for node in cpus) >= actors:
            return float(each)
    together = -(-actors // max(1, sum(map(int, cpus))))  # actors of one CPU
    return 10_000 // together / 10_000  # Ray counts no finer


def _fitting(node: dict[str, float], num_cpus: float, num_gpus: float) -> int:
    wanted = [(node.get(name, 0.0), each) for name, each in (("CPU", num_cpus), ("GPU", num_gpus)) if each]
    return min((int((have + 1e-4) / each) for have, each in wanted), default=sys.maxsize)
