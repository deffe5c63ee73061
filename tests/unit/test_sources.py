import gzip
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlm_dist.data import sources as module
from mlm_dist.data.documents import read_part
from mlm_dist.data.members import LostDocument
from mlm_dist.data.sources import Source, SplitBy, find_parts, find_sources
from mlm_dist.errors import UserError


def documents(inputs: list[str], split_by: SplitBy = "auto", field: str = "text") -> list[str | LostDocument]:
    parts = find_parts(find_sources(inputs, split_by=split_by))
    return [document for part in parts for _, document in read_part(part, field)]


def write(path: Path, content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.ZstdCompressor().compress(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_ways_to_split(tmp_path: Path, suffix: str) -> None:
    text = "\n\none\ntwo ü\n\n \t\nthree\n\n\n"
    path = write(tmp_path / f"a.md{suffix}", text)
    assert documents([path]) == documents([path], "file") == [text.strip()]
    assert documents([path], "line") == ["one", "two ü", "three"]
    assert documents([path], "paragraph") == ["one\ntwo ü", "three"]
    lines = [json.dumps({"body": f"{i} \u2028 x"}) for i in range(4)]
    records = write(tmp_path / f"b.jsonl{suffix}", "\n".join([*lines, "", '{"body": " "}']))
    for split_by in ("auto", "paragraph", "record"):
        assert documents([records], split_by, "body") == [f"{i} \u2028 x" for i in range(4)]


def test_what_cannot_be_read_is_lost_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"good\n\nb\xe9d\n\nalso good\n")
    assert isinstance(documents([path])[0], LostDocument)
    for split_by in ("line", "paragraph"):
        good, lost, also = documents([path], split_by)
        assert (good, also) == ("good", "also good") and isinstance(lost, LostDocument)
    assert documents([write(tmp_path / "bom.txt", "\ufeffa\nb")], "line") == ["a", "b"]
    assert documents([write(tmp_path / "bom2.txt", "\ufeffa\nb")]) == ["a\nb"]


# Parts of a few bytes cut lines, characters, blank lines and paragraphs in every way.
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.sampled_from(["", " ", "a", "bc", "é", "longer line", '{"text": "t"}', "bad"]), max_size=12),
    last_newline=st.booleans(),
    part_bytes=st.integers(1, 30),
    split_by=st.sampled_from(["line", "paragraph", "record"]),
)
def test_parts_give_every_document_once(
    tmp_path: Path, lines: list[str], last_newline: bool, part_bytes: int, split_by: SplitBy
) -> None:
    path = tmp_path / ("x.jsonl" if split_by == "record" else "x.txt")
    path.write_text("\n".join(lines) + "\n" * last_newline)
    (source,) = find_sources([str(path)], split_by=split_by)
    whole = [(place, document) for part in find_parts([source]) for place, document in read_part(part, "text")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PART_BYTES", part_bytes)
        parts = find_parts([source])
    assert len(parts) == max(1, -(-source.size // part_bytes))
    assert [item for part in parts for item in read_part(part, "text")] == whole
    assert len({place for place, _ in whole}) == len(whole)


def test_finding_sources(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.rst.gz", "a/d.jsonl", "a/.hidden.txt", ".git/e.txt", "a/picture.png", "z.md"):
        write(tmp_path / name, b"x")
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    expected = ["a/c.rst.gz", "a/d.jsonl", "b.txt", "z.md"]

    def names(found: list[Source]) -> list[str]:
        return [Path(source.name).relative_to(tmp_path.resolve()).as_posix() for source in found]

    assert names(find_sources([str(tmp_path)])) == expected
    assert names(find_sources([str(tmp_path / "z.md"), str(tmp_path / "b.txt"), str(tmp_path)])) == expected
    assert names(find_sources([str(tmp_path / "**" / "*.rst.gz"), str(tmp_path / "*.txt")])) == ["a/c.rst.gz", "b.txt"]
    kinds = [source.kind for source in find_sources([str(tmp_path)], split_by="paragraph")]
    assert kinds == ["paragraph", "record", "paragraph", "paragraph"]


def test_inputs_that_cannot_be_used(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    pdf, text = write(tmp_path / "a.pdf", b"x"), write(tmp_path / "a.txt", b"x")
    for inputs, builtins, split_by, message in (
        ([], [], "auto", "no inputs"),
        (["none.txt"], [], "auto", "'none.txt' names no file"),
        ([str(empty)], [], "auto", "holds no text file"),
        ([pdf], [], "auto", "suffix '.pdf'"),
        ([text], [], "record", "needs .jsonl inputs"),
        ([], ["bible"], "auto", "'bible' is not known"),
    ):
        with pytest.raises(UserError, match=message):
            find_sources(inputs, builtins, split_by)  # type: ignore[arg-type]
    broken = tmp_path / "broken.txt.gz"
    broken.write_bytes(gzip.compress(b"x" * 1000)[:-6])
    with pytest.raises(UserError, match=r"broken\.txt\.gz cannot be read: .*cut before its end"):
        documents([str(broken)])


def test_python_docs() -> None:
    parts = find_parts(find_sources([], ["python-docs"]))
    texts = [document for part in parts for _, document in read_part(part, "text")]
    assert len(texts) > 60 and sum(len(text) for text in texts if isinstance(text, str)) > 300_000
