"""One rank of the checkpoint benchmark: contestants save and load the state of the same engine, in turns, while it goes on training."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from benchmarks.memory_cases import Setting, micro_batch, module
from mlm_dist import checkpoint, distributed
from mlm_dist.ds_config import load_template, merge
from mlm_dist.engine import Engine
from mlm_dist.optim import OptimConfig

Wait = Callable[[], None]


class Job:
    """A model in training on this rank."""

    def __init__(self, stage: int, setting: Setting):
        self.control = distributed.ControlGroup(600)
        template = load_template(f"zero{stage}")
        config = merge(template, precision="fp32", clip=1.0, micro_batch=setting.micro_batch)
        device = torch.device("cpu")
        self.engine = Engine(module(setting), ds_config=config, optim=OptimConfig(), device=device)
        self._batch = micro_batch(setting.micro_batch, setting.seq_len, setting.selected, setting.vocab)
        self._selected = len(self._batch["labels"]) * setting.world
        sizes = {name: shape.numel() for name, shape in self.engine.shapes().items()}
        numels = {f"param/{n}": size for n, size in sizes.items()}
        numels |= {f"state/{key}/{n}": size for key in self.engine.state_keys() for n, size in sizes.items()}
        self.owners = checkpoint.assign(numels, setting.world)

    def steps(self, count: int) -> float:
        """Train; returns seconds."""
        dist.barrier()
        begun = time.perf_counter()
        for step in range(count):
            self.engine.step([dict(self._batch)], selected_total=self._selected, lr=1e-4, seeds=[step])
        dist.barrier()
        return time.perf_counter() - begun

    def weights(self) -> dict[str, torch.Tensor]:
        """Copies of the whole weights, at every rank."""
        return {name: self.engine.gather_parameter(name) for name in self.engine.names()}


class Ours:
    """mlm_dist: a copy to host memory, then a thread; or waited for."""

    def __init__(self, job: Job, waited: bool):
        self.job, self.waited = job, waited

    def save(self, path: Path, step: int) -> Wait:
        """Begin; returns what waits for the end."""
        job = self.job
        writer = checkpoint.Writer(path, checkpoint.CheckpointConfig(), dist.get_rank(), dist.get_world_size(), 1)
        mine = job.engine.snapshot(job.owners)
        writer.save(step, mine, job.owners, job.engine.optimizer_meta(), {"step": step})

        def wait() -> None:
            failure = writer.settle(job.control, last=True)
            assert failure is None, failure

        if self.waited:
            wait()
            return lambda: None
        return wait

    def load(self, path: Path, step: int) -> None:
        """As a resume does: rank 0 finds the newest whole one, then each rank reads everything."""
        found = checkpoint.newest(path) if dist.get_rank() == 0 else None
        reader = checkpoint.Reader(self.job.control.broadcast(found))
        self.job.engine.restore(reader.parameter, reader.state, reader.optimizer)


class DeepSpeed:
    """`save_checkpoint` and `load_checkpoint` of the same engine."""

    def __init__(self, job: Job):
        self.engine = job.engine._engine

    def save(self, path: Path, step: int) -> Wait:
        """Returns when all is written."""
        self.engine.save_checkpoint(str(path), tag=f"step{step}")
        return lambda: None

    def load(self, path: Path, step: int) -> None:
        """On as many ranks at the same stage."""
        found, _ = self.engine.load_checkpoint(str(path), tag=f"step{step}")
        assert found is not None


class Distributed:
    """torch.distributed.checkpoint of weights and moments, which at stage 0 every rank has; it shares out the writing."""

    def __init__(self, job: Job, asynchronous: bool):
        self.job, self.asynchronous = job, asynchronous

    def _state(self) -> dict[str, Any]:
        engine = self.job.engine
        parameters = engine._parameters
        state = {f"param/{name}": p.detach() for name, p in parameters.items()}
        for key in engine.state_keys():
            state |= {f"state/{key}/{name}": engine._state.read(p, key) for name, p in parameters.items()}
        return state

    def save(self, path: Path, step: int) -> Wait:
        """Begin; returns what waits for the end."""
        if not self.asynchronous:
            dcp.save(self._state(), checkpoint_id=path)
            return lambda: None
        future = dcp.async_save(self._state(), checkpoint_id=path)

        def wait() -> None:
            future.result()  # type: ignore[union-attr]
            dist.barrier()

        return wait

    def load(self, path: Path, step: int) -> None:
        """Into the tensors as they are."""
        dcp.load(self._state(), checkpoint_id=path)


def contestants(job: Job, stage: int) -> dict[str, Any]:
    """By name."""
    found: dict[str, Any] = {
        "mlm_dist": Ours(job, waited=False),
        "mlm_dist, waited for": Ours(job, waited=True),
        "DeepSpeed save_checkpoint": DeepSpeed(job),
    }
    if stage == 0:
        found["torch.distributed.checkpoint async_save"] = Distributed(job, asynchronous=True)
        found["torch.distributed.checkpoint save"] = Distributed(job, asynchronous=False)
    return found


def measure(stage: int, setting: Setting, rounds: int, steps: int, folder: str) -> list[dict[str, Any]]:
    """Each round, each contestant: ``steps`` steps without and as many after a save, then the end of the writing; at the end loads, checked.

    Returns:
        One result for each round and contestant: seconds `stall` (from the call to the return), `base` and `after` (of the steps), `written` (from the call
        to the end of the writing), `load`; `bytes` and `files`.
    """
    distributed.init(600)
    job = Job(stage, setting)
    job.steps(2)
    rank, root = dist.get_rank(), Path(folder)
    results: list[dict[str, Any]] = []
    every = contestants(job, stage)
    for number in range(-1, rounds):  # the first round allocates what later ones use again
        for name, contestant in every.items():
            path = root / f"{number}-{name}"
            base = job.steps(steps)
            begun = time.perf_counter()
            wait = contestant.save(path, number + 1)
            stall = time.perf_counter() - begun
            after = job.steps(steps)
            wait()
            dist.barrier()
            written = time.perf_counter() - begun
            files = [p for p in path.rglob("*") if p.is_file()]
            facts = {"bytes": sum(p.stat().st_size for p in files), "files": len(files)}
            seconds = {"base": base, "stall": stall, "after": after, "written": written}
            results.append({"contestant": name, "round": number, **seconds, **facts})
            dist.barrier()
            if rank == 0 and number < rounds - 1:
                shutil.rmtree(path)
    for name, contestant in every.items():
        path = root / f"{rounds - 1}-{name}"
        contestant.load(path, rounds)  # once to have the weights as they were saved
        expected = job.weights()
        for result in (r for r in results if r["contestant"] == name):
            job.steps(1)
            dist.barrier()
            begun = time.perf_counter()
            contestant.load(path, rounds)
            dist.barrier()
            result["load"] = time.perf_counter() - begun
        now = job.weights()
        assert all(torch.equal(now[n], expected[n]) for n in expected), name
    dist.barrier()
    distributed.shutdown()
    return [r for r in results if r["round"] >= 0]
