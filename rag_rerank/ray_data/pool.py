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


def import_ray() -> Any:
    """Import ``ray`` with ``ray.data``; a ConfigError where it is not installed."""
    try:
        import_module("ray.data")
        return import_module("ray")
    except ImportError as error:
        raise ConfigError(f"Ray Data can't be imported ({error}): pip install 'rag-rerank[ray]'") from error


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


@contextmanager
def quiet(ray: Any) -> Iterator[None]:
    """Keep the bars and notes of Ray Data off the terminal, for datasets made meanwhile; warnings are logged."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with ray.data.DataContext.current(context):
            yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True, slots=True)
class Pool:
    """How many actors there are, and what each gets of the machines.

    Attributes:
        actors: How many. None: one for each GPU, or one for each machine where there are none.
        cpus: CPUs of each, and threads of its scorer. None: an equal share of all there are; but at most one for a
            `remote` scorer, which only waits.
        gpus: GPUs of each; a part of one, such as 0.5, lets several share it. None: one where there are any, but none
            for a `remote` scorer.

    Raises:
        ConfigError: A number is out of range.
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


DEFAULT_POOL = Pool()


def pool_options(ray: Any, scorer: Scorer, pool: Pool, tasks: int | None = None) -> dict[str, Any]:
    """Make the options of ``map_batches`` for a pool of actors; a ConfigError if the machines don't have so much.

    No more actors are started than there are tasks. What each gets stays the same, so that the last shards of a run
    are scored as the others.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    all_gpus = int(sum(node.get("GPU", 0.0) for node in nodes))
    gpus = float(all_gpus > 0 and not scorer.remote) if pool.gpus is None else pool.gpus
    actors = pool.actors or (int(all_gpus / gpus) if gpus else len(nodes))
    cpus = pool.cpus
    if cpus is None:
        cpus = min(equal_share([node.get("CPU", 0.0) for node in nodes], actors), 1.0 if scorer.remote else math.inf)
    fitting = sum(_fitting(node, cpus, gpus) for node in nodes)
    if fitting < actors:
        has = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise ConfigError(
            f"{actors} actors of {cpus:g} CPUs and {gpus:g} GPUs don't fit on the machines ({has}), only {fitting}; "
            "ask for fewer actors, or less for each"
        )
    return {
        # One batch at a time: what waits at one actor, an idle one can't take.
        "compute": ray.data.ActorPoolStrategy(size=min(actors, tasks or actors), max_tasks_in_flight_per_actor=1),
        "num_cpus": cpus,
        "num_gpus": gpus or None,
        # An actor that dies is started again, and its task done again, without end: Ray Data's own defaults.
    }


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


def limit_threads() -> None:
    """Make the libraries that compute in this actor use as many threads as it has CPUs, at least one.

    Each would take all cores of the machine for itself, as would its neighbours. Ray sets ``OMP_NUM_THREADS``, but not
    where the user has set it, and the tokenizers' threads not at all.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return  # no actor: the caller's own process
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)
    threads = max(1, int(cpus))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = str(threads)  # read when a library is loaded
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)
