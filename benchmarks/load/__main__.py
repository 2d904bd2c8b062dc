"""Many callers at once: real vLLM servers, one and two, and one LocalScorer that threads share.

    make load                                              # everything, less than ten minutes
    .venv/bin/python -m benchmarks.load --only local       # or servers
    .venv/bin/python -m benchmarks.load --seconds 2        # shorter measurements

Servers and callers are all on this machine: each server has one core to itself as far as the callers leave it. So two
servers show that a list in ``base_url`` is enough to use both, not how fast a larger machine would be. What is shown:

- throughput and waiting by the number of callers, and where more callers bring no more (closed loop);
- what comes of calls beyond that, where each has two seconds (open loop): with a queue that has no end, and bounded by
  the server (``--max-num-queued-reqs``) or by the client (``max_waiting_calls``);
- how long calls of 10 documents wait where others have 1,000;
- one LocalScorer shared by threads, against the same behind a lock.
"""

import argparse
import datetime
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks.load import local, servers, show
from benchmarks.models import folder, tiny
from benchmarks.rerank import OUT, cpu, shown
from tests import vllm_server

FACTORS = (0.5, 1.0, 2.0, 4.0)


def measure_servers(model: str, seconds: float, console: Console, progress: Progress) -> dict[str, Any]:
    """All about servers."""
    path = tiny() if model == "tiny" else folder(model)
    options = ["--dtype", "bfloat16"] if model != "tiny" else []
    about = f"{model}, {servers.DOCUMENTS} documents of {servers.SHORT} words a call"
    with servers.started(path, [options, options], progress) as addresses:
        points = servers.sweep(addresses, seconds, progress)
        console.print(show.sweep(points, f"vLLM, a core each, {about}"))
        fair = servers.fairness(addresses[0], 2 * seconds, progress)
        console.print(show.fairness(fair, f"One of the servers, {about}, beside one call of {servers.LARGE:,}"))
    capacity = max(point.calls for point in points if point.what == "one server")
    most = round(capacity * servers.BACKLOG * servers.DOCUMENTS)  # to vLLM each document is a request
    with servers.started(path, [options, [*options, "--max-num-queued-reqs", str(most)]], progress) as addresses:
        beyond = servers.overload(addresses[0], addresses[1], capacity, 2 * seconds, FACTORS, progress)
        title = f"One of the servers ({capacity:,.0f} calls/s), each call with {servers.DEADLINE:g} s, {about}"
        console.print(show.overload(beyond, title))
    return {"sweep": points, "overload": beyond, "fairness": fair}


def measure_local(rounds: int, console: Console, progress: Progress) -> dict[str, Any]:
    """All about LocalScorer."""
    first, *others = local.SHAPES[1], local.SHAPES[0], *local.SHAPES[2:]
    results = local.versus(first, (1, 4, 16, 64), rounds, progress)
    for shape in others:
        results += local.versus(shape, (64,), rounds, progress)
    console.print(show.versus(results))
    beside = local.fairness(progress)
    console.print(show.beside(beside))
    return {"versus": results, "beside": beside}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("servers", "local"), help="both if not given")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a closed loop; an open one takes twice as long")
    parser.add_argument("--rounds", type=int, default=3, help="of LocalScorer")
    parser.add_argument("--model", choices=("minilm", "tiny"), default="minilm", help="on the servers")
    parser.add_argument("--json", type=Path, default=OUT / "load.json")
    parser.add_argument("--plot", type=Path, default=OUT / "load.png")
    return parser.parse_args()


def main() -> None:
    arguments, console = parse(), Console(width=130)
    about = f"{cpu()}, {os.cpu_count()} cores"
    console.print(about)
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": about,
    }
    try:
        with shown(console) as progress:
            if arguments.only != "local":
                if (reason := vllm_server.why_not()) is None:
                    results |= measure_servers(arguments.model, arguments.seconds, console, progress)
                else:
                    console.print(f"no servers: {reason}")
            if arguments.only != "servers":
                results |= measure_local(arguments.rounds, console, progress)
    except KeyboardInterrupt:
        sys.exit(130)
    show.save(results, arguments.json)
    show.draw(results.get("sweep", []), results.get("overload", []), results.get("versus", []), arguments.plot)
    console.print(f"written: {arguments.json} and {arguments.plot}")


if __name__ == "__main__":
    main()
