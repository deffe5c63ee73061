"""``mlm-dist report``: writes pages and pictures from run directories."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mlm_dist.errors import UserError
from mlm_dist.report.compare import draw_comparison, names
from mlm_dist.report.facts import headline
from mlm_dist.report.page import comparison, page
from mlm_dist.report.panels import draw_speed, draw_training
from mlm_dist.report.run import load
from mlm_dist.report.summary import draw
from mlm_dist.report.timeline import draw_timeline


def report(run_dir: str | Path, output: str | Path | None = None) -> list[Path]:
    """Write ``report.png``, the other pictures and ``report.html`` into ``output`` (by default the run directory); returns their paths.

    Raises:
        UserError: no run there, or the output directory cannot be written.
    """
    run = load(Path(run_dir))
    directory = Path(output) if output is not None else Path(run_dir)
    places = {"summary": directory / "report.png"}
    places |= {name: directory / f"report_{name}.png" for name in ("training", "speed", "timeline")}
    html = directory / "report.html"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        draw(run, headline(run), places["summary"])
        drawn = {
            "summary": True,
            "training": draw_training(run, places["training"]),
            "speed": draw_speed(run, places["speed"]),
            "timeline": draw_timeline(run, places["timeline"]),
        }
        for name in (name for name, there in drawn.items() if not there):
            places.pop(name).unlink(missing_ok=True)  # of an earlier report
        html.write_text(page(run, {name: place.read_bytes() for name, place in places.items()}), encoding="utf-8")
    except OSError as error:
        raise _cannot_write(directory, error) from error
    return [*places.values(), html]


def compare(run_dirs: Sequence[str | Path], output: str | Path) -> list[Path]:
    """Write ``compare.png`` and ``compare.html`` of several runs into ``output``; returns their paths.

    Raises:
        UserError: one is no run, or the output directory cannot be written.
    """
    paths = [Path(p) for p in run_dirs]
    runs = [load(path) for path in paths]
    labels = names(runs, paths)
    directory = Path(output)
    png, html = directory / "compare.png", directory / "compare.html"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        draw_comparison(runs, labels, png)
        html.write_text(comparison(runs, labels, png.read_bytes()), encoding="utf-8")
    except OSError as error:
        raise _cannot_write(directory, error) from error
    return [png, html]


def _cannot_write(directory: Path, error: OSError) -> UserError:
    return UserError(
        f"--output: {str(directory)!r} cannot be written ({error.strerror}); give a directory that you may write to"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``mlm-dist report``."""
    parser.description = (
        "A page (report.html, which needs no other file) and pictures of a run, running or ended: curves, speed and stalls, restarts and "
        "events, data delivered and lost. Of several runs: a page that compares them (compare.html)."
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run directory, such as runs/demo")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where to write (default: the run directory; of several runs, the working directory)",
    )


def run(args: argparse.Namespace) -> int:
    """``mlm-dist report``."""
    several = len(args.runs) > 1
    for path in compare(args.runs, args.output or Path()) if several else report(args.runs[0], args.output):
        print(path)
    return 0
