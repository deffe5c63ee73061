"""A run directory's files as the report takes them: of the shape that it counts on and without secrets. What is otherwise is left out and counted."""

from pathlib import Path
from typing import Any

from mlm_dist.files import parse_object, read_json, read_yaml
from mlm_dist.redact import redact

Record = dict[str, Any]
# Far deeper than anything that a run writes, and so flat that what walks it need not fear for the stack.
_DEEPEST = 30


def lines(path: Path) -> tuple[list[Record], int]:
    """The objects of a file that holds one a line, and how many of its lines are none."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError:
        return [], 1
    found = [parse_object(line) for line in data.split(b"\n") if line.strip()]
    kept = [r for r in found if r is not None and _flat(r)]
    return kept, len(found) - len(kept)


def whole_file(path: Path) -> tuple[Record, int]:
    """The object that a JSON file holds, and 1 where it holds none."""
    value = read_json(path)
    if value is None or not _flat(value):
        return {}, int(path.exists())
    return redact(value), 0


def config(run_dir: Path) -> tuple[dict[str, Any], int]:
    """The sections of ``config.yaml``, and how many of its parts are none."""
    path = run_dir / "config.yaml"
    value = read_yaml(path)
    sections = {name: section for name, section in value.items() if isinstance(section, dict) and _flat(section)}
    return redact(sections), len(value) - len(sections) if value else int(path.exists())


def identity(run_dir: Path) -> tuple[dict[str, Any], int]:
    """What the run is tied to, and 1 where ``identity.json`` does not tell."""
    value, lost = whole_file(run_dir / "identity.json")
    found = value.get("identity", {})
    return (found, lost) if isinstance(found, dict) else ({}, 1)


def _flat(value: Any, levels: int = _DEEPEST) -> bool:
    if not isinstance(value, dict | list):
        return True
    return levels > 0 and all(_flat(v, levels - 1) for v in (value.values() if isinstance(value, dict) else value))
