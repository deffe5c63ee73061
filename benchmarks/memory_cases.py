"""One rank's training steps under a counting allocator: what `benchmarks.memory` runs in processes of their own."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from mlm_dist.model import families
from mlm_dist.plan_job import Job, Model

COLLECTIVES = (
    "all_reduce",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_gather",
    "all_gather_into_tensor",
)
# Longest wait for gloo's threads after a collective.
SETTLE_S = 0.5
SHARED_S = 0.03
# Names in the profile, by which the peak is told per phase, begin so.
MARK = "## "


@dataclass(frozen=True)
class Setting:
    """A run to measure.

    Attributes:
        zero: values that replace the template's in `zero_optimization`. DeepSpeed takes its buckets whole however small the model; smaller ones keep them from
            drowning everything else.
        selected: share of the tokens that carry a label.
        micro_batches: of a step.
        head_chunk: see `model.head_chunk`.
    """

    template: str = "zero0"
    zero: dict[str, Any] = field(default_factory=dict)
    world: int = 1
    precision: Any = "fp32"
    hidden: int = 256
    layers: int = 4
    vocab: int = 8192
    seq_len: int = 128
    micro_batch: int = 4
    selected: float = 0.15
    checkpoint: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.1
    micro_batches: int = 2
    head_chunk: int = 2048
    model_type: str = "bert"

    def model(self) -> dict[str, Any]:
        """`model.config`."""
        family = families.FAMILIES[self.model_type]
        wide = 3 * self.hidden // 2 if family.gated else 4 * self.hidden
        sizes = (self.vocab, self.hidden, self.layers, max(1, self.hidden // 64), wide)
        positions = max(128, self.seq_len) + (2 if family.after_padding else 0)
        found = dict(zip(family.sizes, sizes, strict=True)) | {"max_position_embeddings": positions}
        if "embedding_size" in family.counts:
            found["embedding_size"] = self.hidden // 2
        return found | {"model_type": self.model_type}

    def template_dict(self) -> dict[str, Any]:
        """The DeepSpeed template."""
        from mlm_dist.ds_config import load_template

        template = load_template(self.template)
        template["zero_optimization"] |= self.zero
        return template

    def job(self) -> Job:
        """The same for the planner."""
        from mlm_dist.model.attention import resolve_attention

        return Job(
            Model.of(_config(self)),
            self.template_dict()["zero_optimization"],
            self.world,
            self.micro_batch,
            self.seq_len,
            self.selected,
            precision=self.precision,
            attention=resolve_attention("auto", device_type="cpu", dropout=self.attention_dropout),
            attention_dropout=self.attention_dropout,
            hidden_dropout=self.hidden_dropout,
            checkpoint_activations=self.checkpoint,
            head_chunk=self.head_chunk,
            accumulate=self.micro_batches > 1,
            device="cpu",
        )


def _section(setting: Setting) -> Any:
    from mlm_dist.model.bert import ModelConfig

    return ModelConfig(
        config=setting.model(),
        hidden_dropout=setting.hidden_dropout,
        attention_dropout=setting.attention_dropout,
        checkpoint_activations=setting.checkpoint,
    )


def _config(setting: Setting) -> Any:
    from mlm_dist.model.bert import load_config

    return load_config(_section(setting), vocab_size=setting.vocab, pad_token_id=0)


def module(setting: Setting) -> torch.nn.Module:
    """The model as runs train it, in fp32 on the CPU."""
    from mlm_dist.model.bert import build
    from mlm_dist.model.head import MaskedLM

    return MaskedLM(build(_section(setting), _config(setting), seed=1), head_chunk=setting.head_chunk)


def measure(setting: Setting) -> dict[str, int]:
    """Peak bytes of this rank by phase (`start`, `forward`, `backward`, `apply`), from before the model is built to the end of the second step."""
    from mlm_dist import distributed

    with settled_collectives():  # before DeepSpeed looks them up
        distributed.init(120)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            with record_function(MARK + "start"):
                engine = _engine(setting, torch.device("cpu"))
            for name, owner, method in (
                ("forward", engine._engine, "forward"),
                ("backward", engine._engine, "backward"),
                ("apply", engine, "_apply"),
            ):
                setattr(owner, method, _marked(MARK + name, getattr(owner, method)))
            _steps(setting, engine)
    found = peaks(profiler) | {"host": host_bytes(engine)}
    distributed.shutdown()
    return found


def measure_cuda(setting: Setting, cap: int) -> int:
    """Peak bytes of torch's CUDA allocator over two steps, when it may have `cap`. Raises torch.OutOfMemoryError."""
    from mlm_dist import distributed

    distributed.init(120)
    device = _capped(cap)
    _steps(setting, _engine(setting, device))
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    distributed.shutdown()
    return peak


def notebook_cuda(sizes: dict[str, int], seq_len: int, cap: int) -> bool:
    """Whether the tutorial's loop (see `measure_notebook`) runs two steps within `cap` bytes of a CUDA device."""
    try:
        _notebook(sizes, seq_len, _capped(cap))
        return True
    except torch.OutOfMemoryError:
        return False


def _capped(cap: int) -> torch.device:
    device = torch.device("cuda", 0)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), device)
    return device


def _engine(setting: Setting, device: torch.device) -> Any:
    from mlm_dist.ds_config import merge
    from mlm_dist.engine import Engine
    from mlm_dist.optim import OptimConfig

    return Engine(
        module(setting),
        ds_config=merge(
            setting.template_dict(), precision=setting.precision, clip=1.0, micro_batch=setting.micro_batch
        ),
        optim=OptimConfig(),
        device=device,
    )


def _steps(setting: Setting, engine: Any) -> None:
    """Two, so that the second one finds the optimizer's state."""
    batch = micro_batch(setting.micro_batch, setting.seq_len, setting.selected, setting.vocab)
    batches = [{name: value.clone() for name, value in batch.items()} for _ in range(setting.micro_batches)]
    selected = len(batch["labels"]) * setting.micro_batches * setting.world
    for _ in range(2):
        engine.step(batches, selected_total=selected, lr=1e-4, seeds=list(range(setting.micro_batches)))


def host_bytes(engine: Any) -> int:
    """Bytes that would be on the host beside a device: all that DeepSpeed's offload keeps there."""
    optimizer = engine._engine.optimizer
    if not getattr(optimizer, "cpu_offload", getattr(optimizer, "offload_optimizer", False)):
        return 0
    masters = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_partitioned_groups_flat
    states = [value for state in optimizer.optimizer.state.values() for value in state.values()]
    others = [
        *getattr(optimizer, "param_buffer_of_bit16_for_cpu_offload_groups", []),
        *getattr(optimizer, "accumulated_grads_in_cpu", {}).values(),
        getattr(optimizer, "temp_grad_buffer_for_cpu_offload", None),
        getattr(optimizer, "grad_partitions_flat_buffer", None),
    ]
    tensors = [*masters, *(master.grad for master in masters), *states, *others]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if torch.is_tensor(t)}
    return sum(storages.values())


def measure_notebook(sizes: dict[str, int], seq_len: int) -> dict[str, int]:
    """The tutorial's loop, batch 1: fp32 BertForMaskedLM with a label on every token, torch's AdamW. Peak as `measure` has it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _notebook(sizes, seq_len, torch.device("cpu"))
    return peaks(profiler)


def _notebook(sizes: dict[str, int], seq_len: int, device: torch.device) -> None:
    from transformers import BertConfig, BertForMaskedLM

    model = BertForMaskedLM(BertConfig(**sizes)).train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    tokens = torch.randint(5, model.config.vocab_size, (1, seq_len), device=device)
    for _ in range(2):
        loss = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def micro_batch(rows: int, seq_len: int, share: float, vocab: int) -> dict[str, torch.Tensor]:
    """Full rows of one segment each."""
    generator = torch.Generator().manual_seed(0)
    tokens = rows * seq_len
    selected = torch.randperm(tokens, generator=generator)[: int(share * tokens)].sort().values
    return {
        "input_ids": torch.randint(5, vocab, (rows, seq_len), generator=generator),
        "position_ids": torch.arange(seq_len).repeat(rows, 1),
        "segment_ids": torch.ones(rows, seq_len, dtype=torch.int64),
        "selected": selected,
        "labels": torch.randint(5, vocab, (len(selected),), generator=generator),
    }


def _marked(name: str, function: Any) -> Any:
    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return marked


@contextlib.contextmanager
def settled_collectives() -> Iterator[None]:
    """Collectives return only when gloo's own threads have let go of their tensors.

    The profiler counts what the calling thread frees; a tensor whose last owner is another thread, a moment after the collective, would count for ever.
    """
    real = {name: getattr(dist, name) for name in COLLECTIVES}

    def settled(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, list) else [a])]
            tensors = [t for t in tensors if isinstance(t, torch.Tensor)]
            owners = [t._use_count() for t in tensors]  # type: ignore[attr-defined]
            work = function(*args, **kwargs)
            if work is not None:  # it owns the tensors, and the thread shares it: who is the last cannot be seen
                work.wait()
                time.sleep(SHARED_S)
                return work
            deadline = time.monotonic() + SETTLE_S
            while time.monotonic() < deadline and any(
                t._use_count() > n  # type: ignore[attr-defined]
                for t, n in zip(tensors, owners, strict=True)
            ):
                time.sleep(0.001)
            return work

        return call

    try:
        for name, function in real.items():
            setattr(dist, name, settled(function))
        yield
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def peaks(profiler: profile) -> dict[str, int]:
    """Peak of the bytes that torch's CPU allocator had given out, by phase, and over all as `peak`.

    Copies that gloo makes for itself inside a collective do not count: NCCL makes none, and gloo's threads free them unseen.
    """
    changes: list[tuple[int, int, int, bool]] = []
    marks: list[tuple[int, str]] = []
    nodes = [(root, False) for root in profiler.profiler.kineto_results.experimental_event_tree()]  # type: ignore[union-attr]
    while nodes:
        node, scratch = nodes.pop()
        if node.tag == _EventType.Allocation:
            changes.append((node.start_time_ns, node.extra_fields.alloc_size, node.extra_fields.ptr, scratch))
            continue
        if node.name.startswith(MARK):
            marks += [(node.start_time_ns, node.name.removeprefix(MARK)), (node.end_time_ns, "")]
        nodes += [(child, scratch or node.name.startswith("c10d::")) for child in node.children]
    timeline: list[tuple[int, int, str]] = [(at, 0, mark) for at, mark in marks]
    ignored: set[int] = set()
    for at, nbytes, address, scratch in sorted(changes):
        if nbytes > 0 and scratch:
            ignored.add(address)
        elif nbytes < 0 and address in ignored:
            ignored.remove(address)
        else:
            ignored.discard(address)
            timeline.append((at, nbytes, ""))
    current, phase, found = 0, "", {"peak": 0}
    for _, nbytes, mark in sorted(timeline, key=lambda item: item[0]):
        if not nbytes:
            phase = mark
        current += nbytes
        for key in ("peak", phase):
            if key:
                found[key] = max(found.get(key, 0), current)
    return found
