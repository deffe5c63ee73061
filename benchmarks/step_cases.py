"""What the step benchmark compares, on which models, and what it must show."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Case:
    """A line of the table.

    Attributes:
        key: its name on the command line.
        label: its name in the table.
        contestant: function of ``step_contestants.py``.
        settings: what else that function looks at.
    """

    key: str
    label: str
    contestant: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> dict[str, Any]:
        """Its part of the specification."""
        return {"contestant": self.contestant, **self.settings}


CASES = (
    Case("lines", "Trainer as in run_mlm --line_by_line: a document a row, cut, padded to the batch's longest", "trainer", {"layout": "lines"}),
    Case("groups", "Trainer as in run_mlm: group_texts", "trainer", {"layout": "groups"}),
    Case("plain", "plain PyTorch loop, stock BERT, a document a row, cut or padded to S", "plain", {"layout": "padded"}),
    Case("bare", "plain PyTorch loop, mlm_dist's model and stream", "bare"),
    *(Case(f"zero{n}", f"mlm_dist, ZeRO-{n}", "ours", {"zero": f"zero{n}"}) for n in range(4)),
)  # fmt: skip


class Model(NamedTuple):
    """A BERT with the tokenizer's vocabulary.

    Attributes:
        sizes: by their names in BertConfig.
        lr: peak learning rate.
        row_tokens: places of a step, a row length times a number of rows; None: 16 rows whatever their length.
        at_once: how many contestants' states fit a device of 80 GB together.
    """

    sizes: dict[str, int]
    lr: float
    row_tokens: int | None = None
    at_once: int = len(CASES)


def _sizes(hidden: int, layers: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": 512,
    }


MODELS = {
    "small": Model(_sizes(256, 4), 5e-4),
    "base": Model(_sizes(768, 12), 1e-4, 32768),
    "large": Model(_sizes(1024, 24), 1e-4, 32768, 4),
}


class Setting(NamedTuple):
    """A table."""

    model: str
    seq_len: int
    precision: str

    @property
    def rows(self) -> int:
        """Rows of a step."""
        places = MODELS[self.model].row_tokens
        return 16 if places is None else places // self.seq_len

    @property
    def title(self) -> str:
        """In words."""
        sizes = MODELS[self.model].sizes
        return f"BERT {sizes['num_hidden_layers']} x {sizes['hidden_size']}, S = {self.seq_len}, {self.rows} rows, {self.precision}"


SMALL = tuple(Setting("small", length, precision) for length in (128, 512) for precision in ("bf16", "fp32"))
BIG = tuple(Setting(model, length, "bf16") for model in ("base", "large") for length in (128, 512))


class Target(NamedTuple):
    """A value that is wanted.

    Attributes:
        device: cpu or cuda.
        settings: where it holds.
        case, against: keys; what of the first over the second.
        what: ``rate`` (useful tokens per second), ``memory``, or ``mfu`` (of ``case`` alone).
        least: lowest good value; None: ``most`` is the highest.
    """

    label: str
    device: str
    settings: tuple[Setting, ...]
    what: str
    case: str
    against: str | None = None
    least: float | None = None
    most: float | None = None

    def is_met(self, value: float) -> bool:
        """Whether a measured value is good."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


def _large(length: int) -> tuple[Setting, ...]:
    return tuple(s for s in BIG if (s.model, s.seq_len) == ("large", length))


TARGETS = (
    Target("ZeRO-1 against run_mlm line by line, useful tokens/s", "cpu", SMALL, "rate", "zero1", "lines", least=2.0),
    Target("ZeRO-1 against run_mlm group_texts, useful tokens/s", "cpu", SMALL, "rate", "zero1", "groups", least=1.5),
    Target("ZeRO-1 against run_mlm line by line, memory", "cpu", SMALL, "memory", "zero1", "lines", most=1.0),
    Target("ZeRO-1 against run_mlm group_texts, memory", "cpu", SMALL, "memory", "zero1", "groups", most=1.0),
    Target("ZeRO-0 against the plain loop with its model, useful tokens/s", "cpu", SMALL, "rate", "zero0", "bare", least=1 / 1.05),
    Target("ZeRO-1 against the plain loop with its model, useful tokens/s", "cpu", SMALL, "rate", "zero1", "bare", least=1 / 1.05),
    Target("ZeRO-1 against run_mlm line by line, useful tokens/s", "cuda", BIG, "rate", "zero1", "lines", least=2.0),
    Target("ZeRO-1 against run_mlm group_texts, useful tokens/s", "cuda", BIG, "rate", "zero1", "groups", least=2.0),
    Target("ZeRO-0 against the plain loop with its model, useful tokens/s", "cuda", BIG, "rate", "zero0", "bare", least=1 / 1.05),
    Target("ZeRO-1 against the plain loop with its model, useful tokens/s", "cuda", BIG, "rate", "zero1", "bare", least=1 / 1.05),
    Target("MFU on useful tokens, BERT-large at 512", "cuda", _large(512), "mfu", "zero1", least=0.5),
    Target("MFU on useful tokens, BERT-large at 128", "cuda", _large(128), "mfu", "zero1", least=0.45),
)  # fmt: skip
