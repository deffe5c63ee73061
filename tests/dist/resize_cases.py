"""What the ranks of the resize matrix run: states saved by some engines, restored into others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mlm_dist import distributed
from mlm_dist.combinations import Combination, Precision
from mlm_dist.engine import Engine
from tests.dist.engine_cases import OPTIM, Saved, gather_all, make_engine, restore_all, run_steps, same_tensors


class Setup(NamedTuple):
    """What a state is saved from or resumed in."""

    world: int
    stage: int
    offload: bool
    precision: Precision

    @property
    def combination(self) -> Combination:
        return Combination(self.stage, self.offload, self.precision, "adamw")

    def engine(self, **model: Any) -> Engine:
        """Its engine. At stage 3 nearly everything is cut into parts, of which the last ranks' are padded."""
        changes = {"stage": self.stage, **({"stage3_param_persistence_threshold": 40} if self.stage == 3 else {})}
        template = ({0: "zero0", 3: "zero3"}.get(self.stage, "zero2") + "_offload" * self.offload, changes)
        return make_engine(template, clip=0.5, precision=self.precision, layers=1, **model)


class Origin(NamedTuple):
    """A state: of `setup` after `at` steps, which itself went on to `stop`."""

    setup: Setup
    at: int
    stop: int
    dropout: float = 0.0

    def path(self, folder: str) -> Path:
        return Path(folder) / ("-".join(map(str, (*self.setup, self.at, self.stop, self.dropout))) + ".pt")


class Resume(NamedTuple):
    """The first `steps` steps after a state's, in `target`, compared with those of `reference`."""

    origin: Origin
    target: Setup
    steps: int
    reference: Origin


def run(folder: str, origins: Sequence[Origin] = (), resumes: Sequence[Resume] = ()) -> list[dict[str, Any]]:
    """One launch: saves the origins, or gives what came of each of the resumes; all have the launch's world."""
    distributed.init(120)
    control = distributed.ControlGroup(120)
    for origin in origins:
        save(control, origin, folder)
    results = resume(control, resumes, folder)
    distributed.shutdown()
    return results


def save(control: distributed.ControlGroup, origin: Origin, folder: str) -> None:
    engine = origin.setup.engine(dropout=origin.dropout)
    first = run_steps(engine, control, 0, origin.at)
    state = gather_all(engine)
    rest = run_steps(engine, control, origin.at, origin.stop)
    saved = {"state": state, "record": {key: first[key] + rest[key] for key in first}, "end": gather_all(engine)}
    engine.close()
    if control.rank == 0:
        torch.save(saved, origin.path(folder))


def resume(control: distributed.ControlGroup, resumes: Sequence[Resume], folder: str) -> list[dict[str, Any]]:
    """Resumes that follow each other in one target share an engine, so a state is also restored over another's."""
    results: list[dict[str, Any]] = []
    engine: Engine | None = None
    made: Any = None
    for one in resumes:
        if (one.target, one.origin.dropout) != made:
            if engine is not None:
                engine.close()
            made = one.target, one.origin.dropout
            engine = one.target.engine(seed=1234, dropout=one.origin.dropout)
        assert engine is not None
        saved, reference = (torch.load(origin.path(folder)) for origin in (one.origin, one.reference))
        results.append({"resume": one, **outcome(control, engine, one, saved["state"], reference)})
    if engine is not None:
        engine.close()
    return results


def outcome(
    control: distributed.ControlGroup, engine: Engine, one: Resume, state: Saved, reference: dict[str, Any]
) -> dict[str, Any]:
    restore_all(engine, state)
    faults = [] if same_state(gather_all(engine), state) else ["state"]
    faults += layout(engine)
    start, stop = one.origin.at, one.origin.at + one.steps
    got = run_steps(engine, control, start, stop)
    faults += layout(engine)
    expected = {key: values[start:stop] for key, values in reference["record"].items()}
    differences = [abs(a - b) for a, b in zip(got["losses"], expected["losses"], strict=True)]
    return {
        "faults": faults,
        "difference": max(differences) if all(map(math.isfinite, got["losses"])) else math.inf,
        "to the bit": got == expected
        and (stop != one.reference.stop or same_state(gather_all(engine), reference["end"])),
    }


def same_state(a: Saved, b: Saved) -> bool:
    """Weights, moments and all that the optimizer knows; the scale of fp16's losses where both have one."""
    metas = [saved["meta"] for saved in (a, b)]
    if any(meta["scaler"] is None for meta in metas):
        metas = [{**meta, "scaler": None} for meta in metas]
    return metas[0] == metas[1] and same_tensors(a, b)


def layout(engine: Engine) -> list[str]:
    """What is wrong with the tied weight and with the groups that the optimizer steps."""
    model = engine._module.model
    embedding, decoder = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tied = embedding is decoder and embedding.data_ptr() == decoder.data_ptr()
    decays = [group["weight_decay"] for group in engine._engine.basic_optimizer.param_groups]
    return ["tie"] * (not tied) + ["groups"] * (decays != [OPTIM.weight_decay, 0.0])
