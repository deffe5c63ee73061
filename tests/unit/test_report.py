"""The report, read back from its files: pixels of the PNG, elements of the page."""

import argparse
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mlm_dist.errors import UserError
from mlm_dist.report import command, facts
from mlm_dist.report.command import report
from mlm_dist.report.run import load
from mlm_dist.report.style import smooth, thin

PNG = b"\x89PNG\r\n\x1a\n"


def write_run(run_dir: Path, records: list[dict[str, Any]], **files: Any) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for name, content in files.items():
        (run_dir / name.replace("__", ".")).write_text(content if isinstance(content, str) else json.dumps(content))
    return run_dir


def step(number: int, attempt: int = 1, **more: Any) -> dict[str, Any]:
    loss = 9.0 * math.exp(-number / 50)
    return {
        "kind": "train",
        "step": number,
        "attempt": attempt,
        "time": 1.79e9 + number,
        "loss": loss,
        "accuracy": 0.01 * number,
        "lr": 1e-4,
        "tokens": 100 * number,
        "tokens_per_s": 1000.0,
        "world_size": 2,
    } | more


def val(number: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"kind": "val", "step": number, "attempt": 1, "time": 1.79e9 + number, "loss": loss, "accuracy": 0.25} | more


class _Page(HTMLParser):
    """Tags, attributes and the facts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("th", "td"):
            self._in_cell = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells[-1] += data

    def fact(self, key: str) -> str:
        return self.cells[self.cells.index(key) + 1]


def test_a_restarted_run(tmp_path: Path) -> None:
    records = [step(n) for n in range(1, 61)] + [step(n, attempt=2, skipped=3) for n in range(41, 101)]
    records += [val(50, 4.0), val(100, 3.0, perplexity=20.1)]
    write_run(tmp_path / "demo", records, status__json={"state": "finished", "step": 100, "unigram_entropy": 6.5})
    run = load(tmp_path / "demo")
    assert run.restarts == [41] and run.unigram_entropy == 6.5
    assert [r["step"] for r in run.train] == list(range(1, 101))
    png, *_, page = report(tmp_path / "demo")
    assert png.read_bytes().startswith(PNG)
    shown = _Page(page.read_text())
    assert shown.fact("State") == "finished"
    assert shown.fact("Best validation loss") == "3.000 at step 100"
    assert shown.fact("Restarts at steps") == "41"
    assert shown.fact("Unigram entropy") == "6.500 nats"
    assert shown.fact("Skipped steps") == "3"
    assert shown.fact("Useful tokens") == "10 k"
    assert shown.fact("Median throughput") == "1 k useful tokens/s"


def test_the_page_needs_no_other_file_and_shows_hostile_text_as_text(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>"
    run_dir = write_run(
        tmp_path / "a&b",
        [step(1)],
        status__json={"state": "failed", "reason": attack},
        config__yaml=f"data:\n  manifest: https://user:hunter2@host/m.json\n  note: '{attack}'\n",
        events__jsonl=json.dumps({"time": 1.79e9, "kind": attack, "password": "hunter2"}) + "\nnot json\n",
    )
    text = report(run_dir)[-1].read_text()
    tags = _Page(text).tags
    names = [name for name, _ in tags]
    assert "script" not in names and "link" not in names
    for _, attributes in tags:
        for value in (attributes.get("src"), attributes.get("href")):
            assert value is None or value.startswith("data:image/png;base64,")
    assert names.count("img") >= 2 and "a&amp;b" in text
    assert "hunter2" not in text


@pytest.mark.parametrize(
    "records",
    [
        [{"kind": "train", "step": 1, "loss": 9.0}],
        [{"kind": "val", "step": 7, "loss": 9.0}],
        [{"kind": "train", "step": 1, "loss": None, "skipped": True}],
        [{"kind": "train", "step": n, "loss": 3.0, "lr": 0.0, "tokens_per_s": 0.0} for n in range(5)],
        [step(n, attempt=n) for n in range(1, 9)],
        [step(n, loss_scale=0.0, grad_norm=0.0, step_time=1.0) for n in (1, 2)],
        [step(0, step_time=1.0)],
    ],
    ids=[
        "one step",
        "one validation",
        "only a skipped step",
        "constants",
        "a restart at each step",
        "scale 0",
        "step 0",
    ],
)
def test_sparse_runs_draw_without_a_warning(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png, *_, page = report(write_run(tmp_path / "r", records), tmp_path / "out")
    assert png.parent == tmp_path / "out" and png.read_bytes().startswith(PNG)
    assert page.read_text().endswith("</html>\n")


def test_the_picture_shows_the_entropy_the_restart_and_both_curves(tmp_path: Path) -> None:
    """Each of them changes pixels of the loss panel."""
    from matplotlib.image import imread

    def pixels(name: str, records: list[dict[str, Any]], **status: Any) -> Any:
        run_dir = write_run(tmp_path / name / "run", records, status__json=status)
        return imread(report(run_dir)[0])[180:, :1000]

    base = [step(n) for n in range(1, 101)]
    plain = pixels("plain", base)
    assert plain.shape == pixels("again", base).shape and (plain == pixels("same", base)).all()
    assert (plain != pixels("entropy", base, unigram_entropy=6.0)).any()
    assert (plain != pixels("restart", base[:50] + [step(n, attempt=2) for n in range(51, 101)])).any()
    assert (plain != pixels("val", [*base, val(50, 4.0)])).any()


def test_smoothing_has_no_lag() -> None:
    line = [3.0 - 0.1 * i for i in range(30)]
    assert smooth(line, 5) == pytest.approx(line, abs=1e-12)
    assert smooth([1.0, 5.0, 3.0], 1) == [1.0, 3.0, 3.0]
    assert smooth([], 3) == []


def test_a_thinned_curve_keeps_its_ends_and_every_peak() -> None:
    ys = [float(i % 7) for i in range(100_000)]
    ys[54_321], ys[77_777] = 500.0, -500.0
    xs, thinned = thin(list(range(len(ys))), ys, most=1000)
    assert len(xs) == len(thinned) <= 1002
    assert (xs[0], xs[-1]) == (0, 99_999) and {(54_321, 500.0), (77_777, -500.0)} <= set(zip(xs, thinned, strict=True))
    assert xs == sorted(xs) and all(ys[int(x)] == y for x, y in zip(xs, thinned, strict=True))
    assert thin([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0])


def test_what_cannot_be_reported_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        report(tmp_path / "none")
    with pytest.raises(UserError, match=r"metrics\.jsonl: no such file"):
        report(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="no step logged"):
        report(tmp_path)
    (tmp_path / "file").touch()
    write_run(tmp_path, [step(1)])
    with pytest.raises(UserError, match="--output"):
        report(tmp_path, tmp_path / "file")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    write_run(tmp_path / "r", [step(1), step(2)])
    assert command.run(parser.parse_args([str(tmp_path / "r"), "--output", str(tmp_path / "o")])) == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert printed[0] == tmp_path / "o" / "report.png" and printed[-1] == tmp_path / "o" / "report.html"
    assert set(printed) == set((tmp_path / "o").iterdir())


def test_one_is_told_as_one(tmp_path: Path) -> None:
    one = facts.headline(load(write_run(tmp_path / "one", [step(1, world_size=1)])))
    assert "1 step " in one and one.endswith("1 rank")
    assert "2 steps" in (two := facts.headline(load(write_run(tmp_path / "two", [step(2)])))) and "2 ranks" in two


def test_speed_is_told_by_what_a_step_is_spent_on(tmp_path: Path) -> None:
    spent = {"step_time": 2.0, "data_wait": 0.1, "time_forward": 0.5, "time_backward": 1.0, "time_communication": 0.2}
    records = [step(n, mfu=0.5, **spent) for n in (10, 20)] + [step(30)]
    found = dict(facts.facts(load(write_run(tmp_path / "run", records))))
    assert found["A step's time"] == "backward 50%, forward 25%, communication 10%, waiting for data 5%"
    assert found["Median MFU"].startswith("50.0%")
