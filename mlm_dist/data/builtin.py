"""Text that every CPython carries, for runs that need no download."""

import ast
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

NAMES = ("python-docs", "python-docstrings")
# Not prose, or not in every installation.
_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "ensurepip",
    "pydoc_data",
    "__pycache__",
}
_SHORTEST = 100


@cache
def texts(name: str) -> tuple[str, ...]:
    """The documents of one of NAMES, the same each time for one release of Python.

    ``python-docs`` is the language reference by topic (``pydoc_data.topics``, about 80 texts, 0.5 MB); ``python-docstrings`` the docstrings of the standard
    library of at least 100 characters, each once (about 3,500 texts, 1.3 MB).
    """
    if name == "python-docs":
        from pydoc_data.topics import topics

        return tuple(text for _, text in sorted(topics.items()))
    return tuple(dict.fromkeys(_docstrings(Path(sysconfig.get_path("stdlib")))))


def _docstrings(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*.py")):
        if _LEFT_OUT.intersection(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates with a .py name
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= _SHORTEST:
                    yield text
