"""The tables of ``mlm-dist eval`` and ``mlm-dist probe``: models one below the other, on a terminal or as Markdown."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlm_dist.errors import UserError
from mlm_dist.files import write_atomically
from mlm_dist.json_lines import plain


@dataclass(frozen=True)
class Table:
    """A title, the names of the columns, and rows of as many cells, the first of each a name."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """As a pipe table."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"**{self.title}**\n\n{body}\n"


def print_tables(tables: Sequence[Table], *, markdown: bool = False) -> None:
    """To stdout."""
    if markdown:
        print("\n".join(table.markdown() for table in tables))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    # Into a file or a pipe whole lines, however long.
    console = Console() if sys.stdout.isatty() else Console(width=240)
    for table in tables:
        shown = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD)
        for number, column in enumerate(table.columns):
            shown.add_column(column, justify="right" if number else "left", overflow="fold")
        for row in table.rows:
            shown.add_row(*(Text(cell) for cell in row))  # Text, since a name may look like markup
        console.print(shown)


def as_json(facts: dict[str, Any]) -> str:
    """The numbers for other programs. Those that JSON has no word for, NaN and the infinite, become null."""
    return json.dumps(plain(facts), indent=1) + "\n"


def check_json(path: Path | None) -> None:
    """Raises UserError, before the work, where ``publish`` could not write its file."""
    if path is not None and str(path) != "-" and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(f"--json {path}: cannot be written; give a file in a directory that is there, or - for stdout")


def publish(
    facts: dict[str, Any], shown: Sequence[Table], lines: Sequence[str], *, path: Path | None, markdown: bool
) -> None:
    """Tables and lines to stdout, then the numbers into the file; where that is ``-``, the numbers alone to stdout.

    Raises:
        UserError: the file cannot be written.
    """
    if str(path) == "-":
        print(as_json(facts), end="")
        return
    print_tables(shown, markdown=markdown)
    for line in lines:
        print(line)
    if path is None:
        return
    try:
        write_atomically(path, as_json(facts).encode())
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror})") from error


def tables(facts: dict[str, Any]) -> list[Table]:
    """Those of ``mlm-dist eval``; ``facts`` as it writes them in JSON."""
    models = facts["models"]
    s = facts["settings"]
    counts = _by_frequency(
        facts, "masked tokens (different words)", lambda row: f"{row['selected']:,} ({row['words']:,})"
    )
    if len({tuple(row[1:]) for row in counts.rows}) == 1:
        counts = replace(counts, rows=[["all", *counts.rows[0][1:]]])
    made = [
        Table(
            f"{facts['data']}: {s['rate']:.0%} masked, seed {s['seed']}, rows of {s['seq_len']} tokens, {facts['precision']}",
            ["model", "loss", "perplexity", "accuracy", "top 5", "masked tokens", "unigram entropy"],
            [
                [
                    m["label"],
                    _number(m["loss"], ".4f"),
                    _number(m["perplexity"], ".2f"),
                    _number(m["accuracy"], ".2%"),
                    _number(m["top5_accuracy"], ".2%"),
                    f"{m['selected']:,}",
                    _number(m["unigram_entropy"], ".4f"),
                ]
                for m in models
            ],
        ),
        _by_frequency(facts, "accuracy", lambda row: _number(row["accuracy"], ".2%")),
        _by_frequency(facts, "loss", lambda row: _number(row["loss"], ".4f")),
        counts,
    ]
    if models[0].get("pseudo"):
        p = models[0]["pseudo"]
        made.append(
            Table(
                f"pseudo-perplexity of {p['documents']:,} documents, {p['words']:,} words, {p['bytes']:,} bytes",
                ["model", "pseudo-perplexity", "nats a token", "nats a word", "bits a byte", "tokens", "unknown"],
                [
                    [
                        m["label"],
                        f"{m['pseudo']['pseudo_perplexity']:.3f}",
                        f"{m['pseudo']['nats_per_token']:.4f}",
                        f"{m['pseudo']['nats_per_word']:.4f}",
                        f"{m['pseudo']['bits_per_byte']:.4f}",
                        f"{m['pseudo']['tokens']:,}",
                        f"{m['pseudo']['unknown']:,}",
                    ]
                    for m in models
                ],
            )
        )
    return made


def _by_frequency(facts: dict[str, Any], what: str, cell: Callable[[dict[str, Any]], str]) -> Table:
    models = facts["models"]
    bins = [i for i, row in enumerate(models[0]["by_frequency"]) if any(m["by_frequency"][i]["words"] for m in models)]
    rows = [[m["label"], *(cell(m["by_frequency"][i]) for i in bins)] for m in models]
    return Table(
        f"{what} by the word's rank of frequency in {facts['frequencies']}",
        ["model", *(models[0]["by_frequency"][i]["ranks"] for i in bins)],
        rows,
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def notes(facts: dict[str, Any]) -> list[str]:
    """What a reader of the tables must know besides."""
    lines = []
    lost = max(m["lost_documents"] for m in facts["models"])
    if lost:
        lines.append(
            f"note: {lost:,} of {facts['documents']:,} documents cannot be read; the numbers are of the others"
        )
    if lost := max(m["lost_frequencies"] for m in facts["models"]):
        lines.append(
            f"note: {lost:,} documents of {facts['frequencies']} cannot be read; how frequent words are is of the others"
        )
    if not any(m["selected"] for m in facts["models"]):
        lines.append("note: the data set holds no text to predict; nothing is measured")
    if len({m["tokenizer"] for m in facts["models"]}) > 1:
        lines.append(
            "note: the models' tokenizers differ, so their masks do, and loss, perplexity and accuracy do not compare; "
            "bits a byte (--pseudo-perplexity) do"
        )
    return lines
