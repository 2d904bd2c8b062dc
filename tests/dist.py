"""Prove what is about to be published: `make dist` runs this behind the build.

The three wheels are installed into empty environments as README's install line says, but from `dist/`. There, its
examples print what stands below them. What a user of a server installs has neither torch nor transformers.
"""

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from tests import released
from tests.examples import ROOT, examples, hub_with, printed_by

DIST = ROOT / "dist"
README = ROOT / "README.md"
WHEELS = {
    ".": "rag_rerank-*.whl",
    "./integrations/langchain": "langchain_rag_rerank-*.whl",
    "./integrations/llama_index": "llama_index_postprocessor_rag_rerank-*.whl",
}


def wheel(project: str) -> str:
    """The path of a project's only wheel."""
    (path,) = DIST.glob(WHEELS[project])
    return str(path)


def installed(packages: list[str], folder: Path) -> str:
    """The Python of a new environment that holds these packages alone."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    quiet = ["--quiet", "--disable-pip-version-check"]
    subprocess.run([python, "-m", "pip", "install", *quiet, *constraints, *packages], check=True)
    return python


def readme_packages() -> list[str]:
    """What README's first install line installs, with the wheels in the place of the folders."""
    line = re.search(r"^pip install (.*)$", README.read_text(encoding="utf-8"), re.MULTILINE)[1]
    packages = []
    for word in line.replace('"', "").split():
        project, bracket, extras = word.partition("[")
        packages.append(wheel(project) + bracket + extras if project in WHEELS else word)
    return packages


def check_contents() -> None:
    """Nothing of tests, notebooks, benchmarks or another package is in wheels or sources; the licence is in each."""
    for path in sorted(DIST.iterdir()):
        with zipfile.ZipFile(path) if path.suffix == ".whl" else tarfile.open(path) as archive:
            names = archive.namelist() if isinstance(archive, zipfile.ZipFile) else archive.getnames()
        assert any(name.endswith("LICENSE") for name in names), path
        assert not [
            name for name in names if {"tests", "notebooks", "benchmarks", "integrations"} & set(name.split("/"))
        ], path
        sys.stdout.write(f"{path.name}: {len(names)} files, {path.stat().st_size / 1024:.0f} KiB\n")


def main() -> None:
    check_contents()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        server = installed([wheel(".")], folder / "server")
        code = "import rag_rerank, importlib.util as u; rag_rerank.VLLMScorer('http://localhost:1').close()"
        absent = "assert not any(u.find_spec(name) for name in ('torch', 'transformers'))"
        subprocess.run([server, "-c", f"{code}; {absent}"], check=True, cwd=folder)
        sys.stdout.write("for a server: VLLMScorer works without torch and transformers\n")
        python = installed(readme_packages(), folder / "readme")
        runnable = [(code, output) for code, output in examples(README) if output]
        printed = printed_by([code for code, _ in runnable], python, hub_with(released.folder(), folder / "hub"))
        assert printed == [output for _, output in runnable], printed
        subprocess.run([str(Path(python).with_name("rag-rerank")), "--help"], check=True, capture_output=True)
        sys.stdout.write(f"README: {len(runnable)} examples print what stands below them\n")


if __name__ == "__main__":
    main()
