"""The command line: ``rag-rerank demo | score | rerank | eval | check | template | convert`` (extra `cli`).

Results go to stdout, everything else to stderr. The exit code is 0; 1 for a back end that gave no scores, that
``check`` found a problem with, or for rejected lines under ``--strict``; 2 for wrong arguments or input; 130 after
Ctrl-C.
"""

import io
import sys

from rag_rerank.errors import ConfigError, RerankError


def main() -> None:
    """Run the command line; errors that a user can mend are one line, with ``--traceback`` all of them."""
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, io.TextIOWrapper):  # else a notebook's, or None: closed by the shell
            stream.reconfigure(errors="backslashreplace")  # not all encodings have ▲
    try:
        from rag_rerank.cli.app import app
    except ModuleNotFoundError as error:
        _fail(f"the command line needs {error.name}: pip install 'rag-rerank[cli]'", code=2)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    try:
        app()
    except (RerankError, TypeError, ValueError, OSError) as error:
        if "--traceback" in sys.argv:
            raise
        failed = isinstance(error, RerankError) and not isinstance(error, ConfigError)
        _fail(str(error), code=1 if failed else 2)


def _fail(message: str, code: int) -> None:
    from rag_rerank.display import printable  # a server's words may be in it

    lines = "\n".join(map(printable, message.split("\n")))
    sys.stderr.write(f"error: {lines}\n")
    raise SystemExit(code) from None
