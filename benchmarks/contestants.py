"""One measurement of the data benchmark, in a process of its own: text to batches on the tokens' way to a model.

    python -P benchmarks/contestants.py '{"contestant": "webdataset", "workers": 1, ...}'

prints one line of JSON. Each contestant is written as its users write it: a function of the specification that gives endless batches and imports what it
needs itself, for this file runs in other environments than ours, too.
"""

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

Spec = dict[str, Any]
Batches = Iterator[tuple[int, int]]  # (useful tokens, places) of each batch
BATCH = 32


def counted(batch: Any) -> tuple[int, int]:
    """(tokens that are not padding, places) of a transformers batch."""
    return int(batch["attention_mask"].sum()), batch["input_ids"].numel()


# ---- ours ----


def ours(spec: Spec) -> Batches:
    """The stream of a run config, rank 0 of 1, collated to micro-batches as the training loop does."""
    from mlm_dist.config import load
    from mlm_dist.inputs import DataInputs

    settings = {
        "data.manifest": spec["manifest"],
        "data.tokenizer": spec["tokenizer"],
        "data.tokenizer_backend": spec["backend"],
        "data.seq_len": spec["seq_len"],
        "data.packing": spec["packing"],
        "data.workers": spec["workers"],
        "train.steps": 10**9,
        "train.global_batch": 256,
        "train.micro_batch": BATCH,
    }
    config = Path(spec["scratch"]) / "ours.yaml"
    config.write_text("{}\n")
    inputs = DataInputs(load(["--config", str(config), *[f"--{k}={v}" for k, v in settings.items()]]).config)
    if (inputs.tokenizer.nano is not None) != (spec["backend"] == "nano"):
        raise RuntimeError("; ".join(inputs.notes))
    stream = inputs.stream(0, 1)
    for batch in stream.batches():
        for micro_batch in stream.collate(batch):
            yield int((micro_batch["segment_ids"] != 0).sum()), micro_batch["input_ids"].numel()


def encode_batch_fast(spec: Spec) -> Batches:
    """The tokenizers library alone, in one thread, on text that is in memory: what no pipeline around it can exceed."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(spec["tokenizer"]) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    texts = [text for file in spec["jsonl"] for text in _texts(Path(file).read_bytes())]
    while True:
        for i in range(0, len(texts), 256):
            tokens = sum(len(encoding) for encoding in tokenizer.encode_batch_fast(texts[i : i + 256]))
            yield tokens, tokens


def _texts(lines: bytes) -> list[str]:
    return [json.loads(line)["text"] for line in lines.splitlines()]


# ---- webdataset, transformers' tokenizer and collator ----


def _tokenizer_and_collator(spec: Spec) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling
    from transformers.utils import logging

    logging.set_verbosity_error()  # documents longer than the model are meant
    tokenizer = AutoTokenizer.from_pretrained(spec["tokenizer"])
    return tokenizer, DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)


def _loaded(dataset: Any, spec: Spec, collator: Any) -> Batches:
    from torch.utils.data import DataLoader

    while True:
        for batch in DataLoader(dataset, batch_size=BATCH, num_workers=spec["workers"], collate_fn=collator):
            yield counted(batch)


def webdataset_concat(spec: Spec) -> Batches:
    """Documents of .jsonl members tokenized a member at a time, put end to end and cut into rows."""
    import webdataset as wds

    tokenizer, collator = _tokenizer_and_collator(spec)
    length = spec["seq_len"]

    def rows(samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, list[int]]]:
        buffer: list[int] = []
        for sample in samples:
            for ids in tokenizer(_texts(sample["jsonl"]), return_attention_mask=False)["input_ids"]:
                buffer += ids
            while len(buffer) >= length:
                yield {"input_ids": buffer[:length]}
                del buffer[:length]

    dataset = wds.WebDataset(spec["shards"], shardshuffle=100, seed=0).repeat().shuffle(16).compose(rows)
    return _loaded(dataset, spec, collator)


def webdataset_concat_single(spec: Spec) -> Batches:
    """The same with one document a member, tokenized one at a time."""
    import webdataset as wds

    tokenizer, collator = _tokenizer_and_collator(spec)
    length = spec["seq_len"]

    def rows(samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, list[int]]]:
        buffer: list[int] = []
        for sample in samples:
            buffer += tokenizer(sample["txt"], return_attention_mask=False)["input_ids"]
            while len(buffer) >= length:
                yield {"input_ids": buffer[:length]}
                del buffer[:length]

    dataset = wds.WebDataset(spec["single"], shardshuffle=100, seed=0).repeat().shuffle(1000).decode().compose(rows)
    return _loaded(dataset, spec, collator)


def webdataset_pad(spec: Spec) -> Batches:
    """One document a member and a row: cut after the row's length, or padded to it."""
    import webdataset as wds

    tokenizer, collator = _tokenizer_and_collator(spec)
    length = spec["seq_len"]

    def row(sample: dict[str, Any]) -> Any:
        return tokenizer(sample["txt"], truncation=True, max_length=length, padding="max_length")

    dataset = wds.WebDataset(spec["single"], shardshuffle=100, seed=0).repeat().shuffle(1000).decode().map(row)
    return _loaded(dataset, spec, collator)


# ---- datasets ----


def datasets_streaming(spec: Spec) -> Batches:
    """As transformers' run_mlm.py with --streaming: map the tokenizer, map the grouping, collate."""
    from datasets import load_dataset

    tokenizer, collator = _tokenizer_and_collator(spec)
    length = spec["seq_len"]

    def tokenize(examples: dict[str, list[str]]) -> Any:
        return tokenizer(examples["text"], return_special_tokens_mask=True)

    def group(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {key: [x for part in parts for x in part] for key, parts in examples.items()}
        total = len(joined["input_ids"]) // length * length
        return {key: [values[i : i + length] for i in range(0, total, length)] for key, values in joined.items()}

    dataset = load_dataset("json", data_files=spec["jsonl"], split="train", streaming=True)
    dataset = dataset.shuffle(seed=0, buffer_size=1000)
    dataset = dataset.map(tokenize, batched=True, remove_columns=["text"]).map(group, batched=True)
    return _loaded(dataset, spec, collator)


# ---- mosaicml-streaming ----


def _let_streaming_be_imported() -> None:
    """It imports torchvision for pictures; the usual wheel of that is for CUDA, and beside a CPU build of torch it does not load what it then registers."""
    import types

    import torch

    if torch.version.cuda is None:
        sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")


def mosaicml(spec: Spec) -> Batches:
    """Text in MDS shards, tokenized in __getitem__, cut after the row's length or padded to it, as LLM Foundry's StreamingTextDataset does."""
    _let_streaming_be_imported()
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    tokenizer, collator = _tokenizer_and_collator(spec)
    length = spec["seq_len"]

    class TextDataset(StreamingDataset):
        def __getitem__(self, index: int) -> Any:
            return tokenizer(
                super().__getitem__(index)["text"], truncation=True, max_length=length, padding="max_length"
            )

    dataset = TextDataset(local=spec["mds"], shuffle=True, shuffle_seed=0, batch_size=BATCH)
    return _loaded(dataset, spec, collator)


def make_mds(spec: Spec) -> None:
    """Write the text as MDS shards."""
    _let_streaming_be_imported()
    from streaming import MDSWriter

    with MDSWriter(out=spec["mds"], columns={"text": "str"}, size_limit=1 << 22) as out:
        for file in spec["jsonl"]:
            for text in _texts(Path(file).read_bytes()):
                out.write({"text": text})


CONTESTANTS: dict[str, Callable[[Spec], Batches]] = {
    f.__name__: f
    for f in (
        ours,
        encode_batch_fast,
        webdataset_concat,
        webdataset_concat_single,
        webdataset_pad,
        datasets_streaming,
        mosaicml,
    )
}
PACKAGES = ("torch", "transformers", "tokenizers", "webdataset", "datasets", "mosaicml-streaming", "nanotoken", "numpy")


def measure(spec: Spec) -> dict[str, Any]:
    """Time to the first batch since ``spec["start"]`` (s of CLOCK_MONOTONIC), then tokens per second over ``spec["seconds"]`` after ``spec["warmup"]``."""
    batches = CONTESTANTS[spec["contestant"]](spec)
    next(batches)
    first = time.monotonic()
    while time.monotonic() < first + spec["warmup"]:
        next(batches)
    begun = now = time.monotonic()
    tokens = places = count = 0
    while now < begun + spec["seconds"]:
        useful, size = next(batches)
        tokens, places, count, now = tokens + useful, places + size, count + 1, time.monotonic()
    return {
        "first_batch_s": first - spec["start"],
        "tokens_per_s": tokens / (now - begun),
        "useful": tokens / places,
        "batches": count,
    }


def versions() -> dict[str, str]:
    """Of the packages that this environment has."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    """See the module."""
    spec = json.loads(sys.argv[1])
    if spec["contestant"] == "make_mds":
        make_mds(spec)
    elif spec["contestant"] == "versions":
        print(json.dumps(versions()))
    else:
        print(json.dumps(measure(spec)), flush=True)
        if spec["contestant"] != "mosaicml":  # it must give back its shared memory
            os._exit(0)  # who started this ends the loader workers


if __name__ == "__main__":
    main()
