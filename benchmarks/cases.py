"""What the data benchmark compares, and what it must show."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Case:
    """A line of the table.

    Attributes:
        key: its name on the command line.
        label: its name in the table.
        contestant: function of ``contestants.py``.
        workers: numbers of loader processes to try; None: those of the command line.
        cut: documents lose what is longer than a row.
    """

    key: str
    label: str
    contestant: str
    settings: dict[str, Any] = field(default_factory=dict)
    workers: tuple[int, ...] | None = None
    cut: bool = False


CASES = (
    Case("nano", "mlm_dist, nanotoken", "ours", {"backend": "nano"}),
    Case("hf", "mlm_dist, HF tokenizer", "ours", {"backend": "hf"}),
    Case("wds", "webdataset + HF tokenizer + HF collator, concatenated; the same tars", "webdataset_concat"),
    Case("wds-single", "the same, a document a member", "webdataset_concat_single"),
    Case("wds-pad", "the same, a document a row, cut or padded", "webdataset_pad", cut=True),
    Case("datasets", "datasets streaming, map + group + HF collator", "datasets_streaming"),
    Case("mosaicml", "mosaicml-streaming + HF tokenizer + HF collator, cut or padded", "mosaicml", cut=True),
    Case("nano-0", "mlm_dist, nanotoken, in process", "ours", {"backend": "nano"}, (0,)),
    Case("hf-0", "mlm_dist, HF tokenizer, in process", "ours", {"backend": "hf"}, (0,)),
    Case("encode", "encode_batch_fast alone, text in memory", "encode_batch_fast", {}, (0,)),
)


class Target(NamedTuple):
    """A ratio of two rates that is wanted.

    Attributes:
        case, against: (key, workers).
    """

    label: str
    case: tuple[str, int]
    against: tuple[str, int]
    least: float


TARGETS = (
    Target("nanotoken against webdataset + HF, 1 worker each", ("nano", 1), ("wds", 1), 20.0),
    Target("nanotoken, 1 worker against in process", ("nano", 1), ("nano-0", 0), 0.6),
    Target("HF tokenizer, 1 worker, against encode_batch_fast alone", ("hf", 1), ("encode", 0), 0.9),
)
