"""Parquet files and Hugging Face datasets as inputs of `prepare`. They are made here; nothing is downloaded."""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlm_dist.data import sources as module
from mlm_dist.data.documents import read_part
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.members import LostDocument
from mlm_dist.data.prepare import prepare
from mlm_dist.data.prepare_options import PrepareOptions
from mlm_dist.data.sources import find_parts, find_sources
from mlm_dist.data.tables import load_saved
from mlm_dist.errors import UserError
from tests.unit.test_prepare import documents, files

TEXTS = [f"row {i} " + "word " * (i % 30) for i in range(1000)]
STRIPPED = [text.strip() for text in TEXTS]


def rows(inputs: list[str], field: str = "text", **options: Any) -> list[tuple[int, str | LostDocument]]:
    parts = find_parts(find_sources(inputs, field=field, **options))
    return [item for part in parts for item in read_part(part, field)]


def write(path: Path, texts: Any, rows_a_group: int = 100, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": list(range(len(texts))), "text": texts, "nested": [{"text": "no"}] * len(texts)})
    pq.write_table(table, path, row_group_size=rows_a_group, **options)
    return path


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_every_row_of_a_parquet_file(tmp_path: Path, kind: pa.DataType, compression: str) -> None:
    column = pa.array(TEXTS).cast(kind) if kind != pa.string_view() else pa.array(TEXTS, kind)
    path = write(tmp_path / "a.parquet", column, compression=compression)
    assert rows([str(path)]) == list(enumerate(STRIPPED))


def test_row_groups_are_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", TEXTS)
    (source,) = find_sources([str(path)])
    assert len(source.groups) == 10 and len(find_parts([source])) == 1
    assert 0.5 < source.text_size / sum(map(len, TEXTS)) < 1.5
    for part_bytes in (1, 2 * max(source.groups)):
        monkeypatch.setattr(module, "_PART_BYTES", part_bytes)
        parts = find_parts([source])
        assert [part.start for part in parts[1:]] == [part.end for part in parts[:-1]]
        assert len(parts) == (10 if part_bytes == 1 else 4) and sum(part.size for part in parts) == source.text_size
        assert [item for part in parts for item in read_part(part, "text")] == list(enumerate(STRIPPED))


def test_what_is_no_text_is_lost_with_its_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ["one", None, " ", "two"], rows_a_group=2)
    (_, one), (place, lost), (_, two) = rows([str(path)])
    assert (one, place, two) == ("one", 1, "two") and lost == LostDocument("the column 'text' is null")
    # Arrow does not check what another writer put into a column of strings.
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a\xff", b"b"]).buffers())
    (_, lost), (_, fine) = rows([str(write(tmp_path / "b.parquet", broken))])
    assert lost == LostDocument("not UTF-8: byte 0xff at 1") and fine == "b"
    for field, cause in (("id", "of type int64, not a string"), ("nested", "not a string")):
        found = rows([str(path)], field)
        assert len(found) == 4 and all(isinstance(lost, LostDocument) and cause in lost.cause for _, lost in found)
    options = PrepareOptions(field="id", val_fraction=0)
    with pytest.raises(
        UserError, match=r"no document that can be read\n  a\.parquet at 0: the column 'id' is of type int64"
    ):
        prepare([str(path)], tmp_path / "out", options)


def test_inputs_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(UserError, match=r"no column 'body' \(--field\); its columns are id, text, nested"):
        find_sources([str(path)], field="body")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(UserError, match=r"b\.parquet' cannot be read as parquet"):
        find_sources([str(tmp_path / "b.parquet")])
    content = bytearray(path.read_bytes())
    content[100:5000] = b"\0" * 4900
    (tmp_path / "c.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"c\.parquet' cannot be read from row \d+ on"):
        rows([str(tmp_path / "c.parquet")])
    with pytest.raises(UserError, match=r"suffix '\.gz'"):
        find_sources([str(write(tmp_path / "d.parquet.gz", TEXTS))])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"a \.parquet input needs the package pyarrow: pip install 'mlm-dist\[hf\]'"):
        find_sources([str(path)])


def test_memory_is_bounded_by_the_batch_not_the_row_group(tmp_path: Path) -> None:
    texts = [f"{i} " + f"{i * 7919 % 10007} " * 4000 for i in range(2000)]  # 48 MB in one row group
    write(tmp_path / "a.parquet", texts, rows_a_group=10_000, use_dictionary=False, compression="none")
    del texts
    before = pa.total_allocated_bytes()
    most = 0
    count = 0
    for part in find_parts(find_sources([str(tmp_path / "a.parquet")])):
        for _ in read_part(part, "text"):
            count += 1
            most = max(most, pa.total_allocated_bytes() - before)
    assert count == 2000 and most < 32 << 20


def test_directories_and_globs_of_tables(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a" / "1.parquet", TEXTS[:300])
    write(tmp_path / "in" / "2.parquet", TEXTS[300:600])
    (tmp_path / "in" / "3.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS[600:]))
    for inputs in (
        [str(tmp_path / "in")],
        [str(tmp_path / "in" / "**" / "*.parquet"), str(tmp_path / "in" / "*.jsonl")],
    ):
        assert sorted(text for _, text in rows(inputs)) == sorted(STRIPPED)  # type: ignore[type-var]


def test_shards_of_tables_are_the_same_for_any_workers(tmp_path: Path) -> None:
    import datasets

    write(tmp_path / "in" / "a.parquet", TEXTS[:500])
    write(tmp_path / "in" / "b.parquet", TEXTS[500:])
    datasets.Dataset.from_dict({"text": TEXTS[:100]}).save_to_disk(tmp_path / "in" / "saved")
    options = PrepareOptions(shard_size=10_000, val_fraction=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PART_BYTES", 3000)
        patch.setattr("mlm_dist.data.reading._MIN_UNIT_BYTES", 5000)
        patch.setattr("mlm_dist.data.reading._MAX_UNIT_BYTES", 5000)
        prepare([str(tmp_path / "in")], tmp_path / "three", options, workers=3)
    prepare([str(tmp_path / "in" / name) for name in ("saved", "b.parquet", "a.parquet")], tmp_path / "one", options)
    assert files(tmp_path / "three") == files(tmp_path / "one")
    manifests = [Manifest.read(tmp_path / "one" / name) for name in ("manifest.json", "val.json")]
    assert sorted(text for manifest in manifests for text in documents(manifest)) == sorted(STRIPPED + STRIPPED[:100])
    assert manifests[0].info["sources"]["files"] == 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets on disk: `one` in three files, `two` with the splits train and test, `picked` shuffled rows of the first."""
    import datasets

    root = tmp_path_factory.mktemp("saved")
    one = datasets.Dataset.from_dict({"id": list(range(1000)), "text": [*TEXTS[:-1], None]})
    one.save_to_disk(root / "one", num_shards=3)
    datasets.DatasetDict({"train": one, "test": one.select(range(10))}).save_to_disk(root / "two")
    one.shuffle(seed=3).select(range(500)).save_to_disk(root / "picked")
    return root


def test_a_saved_dataset(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [*enumerate(STRIPPED[:-1]), (999, LostDocument("the column 'text' is null"))]
    assert rows([str(saved / "one")]) == expected == rows([str(saved / "two")])
    assert rows([str(saved / "two")], split="test") == expected[:10]
    monkeypatch.setattr(module, "_PART_BYTES", 5000)
    sources = find_sources([str(saved / "one")])
    assert len(find_parts(sources)) > 10 and rows([str(saved / "one")]) == expected
    assert sources[0].label == "one" and find_sources([str(saved / "two")])[0].label == "two/train"
    picked = rows([str(saved / "picked")])
    assert len(picked) == 500 and len({text for _, text in picked}) == 500 and picked[0][1] != STRIPPED[0]
    # A directory above finds them all, each once.
    assert [source.label for source in find_sources([str(saved)])] == ["one", "picked", "two/train"]
    assert len(rows([str(saved / "*")])) == 2500


def test_saved_datasets_that_cannot_be_used(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no split 'dev' \(--split\); there is test, train"):
        find_sources([str(saved / "two")], split="dev")
    with pytest.raises(UserError, match=r"no column 'body' .* its columns are id, text"):
        find_sources([str(saved / "one")], field="body")
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="cannot be read as a dataset"):
        find_sources([str(tmp_path)])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the package datasets: pip install 'mlm-dist\[hf\]'"):
        load_saved(saved / "one", "train")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("cache")
def test_a_named_dataset_without_a_script(tmp_path: Path) -> None:
    write(tmp_path / "repo" / "data" / "train-00000.parquet", TEXTS[:600])
    write(tmp_path / "repo" / "data" / "train-00001.parquet", TEXTS[600:])
    write(tmp_path / "repo" / "data" / "test-00000.parquet", TEXTS[:7])
    name = str(tmp_path / "repo")
    assert rows([], dataset=name) == list(enumerate(STRIPPED))
    assert len(rows([], dataset=name, split="test")) == 7
    assert len(rows([], dataset=name, split="train[:10%]")) == 100
    assert find_sources([], dataset=name)[0].label == "dataset:repo:train"
    options = PrepareOptions(shard_size=10_000, val_fraction=0.1)
    written = []
    for workers in (1, 2):
        from mlm_dist.data.prepare import prepare_part

        output = tmp_path / str(workers)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_PART_BYTES", 3000)
            patch.setattr("mlm_dist.data.reading._MIN_UNIT_BYTES", 5000 * workers)
            prepare_part(find_sources([], dataset=name), output, options, workers=workers)
        written.append(files(output))
    assert written[0] == written[1] and len(written[0]) > 4


@pytest.mark.usefixtures("cache")
def test_a_named_dataset_of_records_with_configurations(tmp_path: Path) -> None:
    for config in ("de", "en"):
        path = tmp_path / "repo" / config / "train.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("\n".join(json.dumps({"body": f"{config} {i}"}) for i in range(5)))
    (tmp_path / "repo" / "README.md").write_text(
        "---\nconfigs:\n- config_name: de\n  data_files: de/train.jsonl\n- config_name: en\n  data_files: en/train.jsonl\n---\n"
    )
    name = str(tmp_path / "repo")
    assert [text for _, text in rows([], "body", dataset=name, config="de")] == [f"de {i}" for i in range(5)]
    assert find_sources([], field="body", dataset=name, config="en")[0].label == "dataset:repo:en:train"
    with pytest.raises(UserError, match=r"--dataset .* could not be loaded: .*[Cc]onfig name is missing"):
        find_sources([], field="body", dataset=name)
    with pytest.raises(UserError, match=r'could not be loaded: .*"dev"'):
        find_sources([], field="body", dataset=name, config="de", split="dev")
    with pytest.raises(UserError, match=r"no column 'text' .* its columns are body"):
        find_sources([], dataset=name, config="de")


@pytest.mark.usefixtures("cache")
def test_no_code_of_a_dataset_is_run(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    repo.mkdir()
    (repo / "repo.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="could not be loaded"):
        find_sources([], dataset=str(repo))
    assert not (tmp_path / "ran").exists()
