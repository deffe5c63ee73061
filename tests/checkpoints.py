"""Checkpoints of made-up tensors, written by as many ranks as are asked for, and what harms them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from mlm_dist import checkpoint
from mlm_dist.checkpoint import CheckpointConfig, Reader, Writer, assign, committed

NAMES = ("bert.embeddings.word.weight", "bert.layer.0.bias", "cls.bias", "scalar")
OPTIMIZER = {"class": "AdamW", "step": 3, "eps": 1e-08, "groups": [{"names": list(NAMES), "weight_decay": 0.1}]}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Values of every awkward kind: subnormal, infinite, not a number, minus zero, no dimension."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in zip(NAMES, [(50, 8), (8,), (3, 1, 2), ()], strict=True):
        for key in (f"param/{name}", f"state/exp_avg/{name}", f"state/exp_avg_sq/{name}"):
            out[key] = torch.randn(shape, generator=g)
    out["param/cls.bias"].view(-1)[:5] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42, 3e38])
    return out


def write(
    run: Path,
    step: int,
    world: int = 1,
    attempt: int = 1,
    seed: int | None = None,
    config: CheckpointConfig | None = None,
    loss: float | None = None,
) -> list[Writer]:
    """A checkpoint by ``world`` ranks, each with a Writer as its process would have; returns them when it is written."""
    whole = tensors(step if seed is None else seed)
    owners = assign({k: t.numel() for k, t in whole.items()}, world)
    writers = [Writer(run, config or CheckpointConfig(keep=9), rank, world, attempt) for rank in range(world)]
    for rank, writer in enumerate(writers):
        mine = {k: t for k, t in whole.items() if owners[k] == rank}
        trainer: dict[str, Any] = {"step": step, "x": 0.1 + 0.2}
        if loss is not None:
            trainer["validation"] = {"step": step, "loss": loss}
        writer.save(step, mine, owners, OPTIMIZER, trainer if rank == 0 else {})
    for writer in writers:
        writer.wait()
    return writers


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()


def place(run: Path, step: int) -> Path:
    return run / "checkpoints" / checkpoint.name(step)


def part_of(path: Path) -> Path:
    return sorted(path.glob("part-*.safetensors"))[-1]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def as_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def recommit(path: Path, **changes: Any) -> None:
    """Make the checkpoint whole again over whatever its files are now."""
    index = json.loads((path / "index.json").read_text())
    for name in index["files"]:
        data = (path / name).read_bytes()
        index["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    data = json.dumps({**index, **changes}).encode()
    (path / "index.json").write_bytes(data)
    (path / "COMMIT").write_text(hashlib.sha256(data).hexdigest())


def steps(run: Path) -> list[int]:
    return [Reader(p).step for p in committed(run)]


def read_all(path: Path) -> dict[str, torch.Tensor]:
    reader = Reader(path)
    return {key: reader.tensor(key) for key in reader.index["tensors"]}
