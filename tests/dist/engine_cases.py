"""What the ranks of the engine's tests run: a tiny BERT, batches that are a function of the step alone, and the plain
loop to compare with."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mlm_dist import distributed
from mlm_dist.combinations import Combination
from mlm_dist.ds_config import load_template, merge
from mlm_dist.engine import Engine, MicroBatch
from mlm_dist.errors import UserError
from mlm_dist.loss_scale import LossScaler
from mlm_dist.model.bert import ModelConfig, build, load_config
from mlm_dist.model.head import MaskedLM
from mlm_dist.optim import OptimConfig, build_adamw, build_optimizer

VOCABULARY = 211
LENGTH = 32
ROWS = 12
OPTIM = OptimConfig(lr=2e-3, weight_decay=0.05)

# A template, or one with other values in its zero_optimization.
Template = str | tuple[str, dict[str, Any]]
# What a run did: losses, numbers right, norms by step.
Record = dict[str, list[float]]
# What a checkpoint holds.
Saved = dict[str, Any]


def make_module(
    *, seed: int = 7, dropout: float = 0.0, checkpoint_activations: bool = False, layers: int = 2
) -> MaskedLM:
    """A BERT small and odd in its sizes, so that partitions over 2 or 3 ranks are padded."""
    cfg = ModelConfig(
        config={
            "vocab_size": VOCABULARY,
            "hidden_size": 36,
            "num_hidden_layers": layers,
            "num_attention_heads": 3,
            "intermediate_size": 70,
            "max_position_embeddings": LENGTH,
        },
        hidden_dropout=dropout,
        attention_dropout=dropout,
        checkpoint_activations=checkpoint_activations,
    )
    config = load_config(cfg, vocab_size=VOCABULARY, pad_token_id=0)
    return MaskedLM(build(cfg, config, seed=seed), "auto")


def make_row(step: int, index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [S], selected positions, labels of one row. Even rows select 20 positions, odd ones 2, row 3 none."""
    # Three batches in turn, so that the loss falls and an error in an update shows in the losses after it.
    generator = torch.Generator().manual_seed(1000 * (step % 3) + index)
    tokens = torch.randint(5, VOCABULARY, (LENGTH,), generator=generator)
    count = 0 if index == 3 else (20 if index % 2 == 0 else 2)
    selected = torch.randperm(LENGTH, generator=generator)[:count].sort().values
    return tokens, selected, tokens.flip(0)[selected]


def make_batch(step: int, indices: list[int]) -> MicroBatch:
    """A micro-batch of the rows `indices` of a step; with none, one empty row."""
    if not indices:
        tokens = torch.tensor([[1, 2]])
        empty = torch.empty(0, dtype=torch.int64)
        return {
            "input_ids": tokens,
            "position_ids": torch.tensor([[0, 1]]),
            "segment_ids": torch.ones_like(tokens),
            "selected": empty,
            "labels": empty,
        }
    return collate([make_row(step, index) for index in indices])


def collate(rows: list[tuple[Tensor, Tensor, Tensor]]) -> MicroBatch:
    """Rows of one segment and LENGTH tokens as a micro-batch."""
    return {
        "input_ids": torch.stack([tokens for tokens, _, _ in rows]),
        "position_ids": torch.arange(LENGTH).expand(len(rows), -1).contiguous(),
        "segment_ids": torch.ones(len(rows), LENGTH, dtype=torch.int64),
        "selected": torch.cat([selected + LENGTH * row for row, (_, selected, _) in enumerate(rows)]),
        "labels": torch.cat([labels for _, _, labels in rows]),
    }


def parts(step: int, rank: int, world: int, accumulation: int) -> list[MicroBatch]:
    """A rank's micro-batches. On 2 ranks, rank 0 has the even rows: 120 selected tokens against 10."""
    mine = list(range(rank, ROWS, world))
    size = -(-len(range(0, ROWS, world)) // accumulation)
    return [make_batch(step, mine[start : start + size]) for start in range(0, size * accumulation, size)]


def selected_total(step: int) -> int:
    return sum(len(make_row(step, index)[2]) for index in range(ROWS))


def accumulation_at(step: int, accumulation: int) -> int:
    """The number of micro-batches at a step: fixed, or with 0 changing between 1 and 3."""
    return accumulation or (1, 3, 2)[step % 3]


def learning_rate(step: int) -> float:
    return OPTIM.lr * min(1.0, (step + 1) / 5)


@cache
def plain(steps: int, clip: float, optimizer_name: Any = "adamw") -> Record:
    """Plain PyTorch on the whole batch in one process: what every engine must give."""
    module = make_module()
    if optimizer_name in ("adamw", "cpu_adam"):
        groups = build_adamw(module, OPTIM).param_groups
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, foreach=False, fused=False)
    else:
        optimizer = build_optimizer(module, replace(OPTIM, name=optimizer_name))
    record: Record = {"losses": [], "correct": [], "norms": []}
    for step in range(steps):
        loss_sum, correct = module(**make_batch(step, list(range(ROWS))))
        loss = loss_sum / selected_total(step)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), clip or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        record["losses"].append(float(loss.detach()))
        record["norms"].append(float(norm))
        record["correct"].append(int(correct))
    return record


def make_engine(
    template: Template,
    *,
    clip: float = 0.0,
    precision: Any = "fp32",
    optimizer: Any = "adamw",
    module: nn.Module | None = None,
    leaves: list[type[nn.Module]] | None = None,
    **model: Any,
) -> Engine:
    name, changes = (template, {}) if isinstance(template, str) else template
    config = load_template(name)
    config["zero_optimization"] |= changes
    return Engine(
        make_module(**model) if module is None else module,
        ds_config=merge(config, precision=precision, clip=clip, micro_batch=4, optimizer=optimizer),
        optim=replace(OPTIM, name=optimizer),
        device=distributed.Topology.from_env().device,
        leaves=leaves or [],
    )


def run_steps(
    engine: Engine, control: distributed.ControlGroup, start: int, stop: int, accumulation: int = 1
) -> Record:
    """The steps [start, stop): mean losses and numbers right over all ranks, norms."""
    record: Record = {"losses": [], "correct": [], "norms": []}
    for step in range(start, stop):
        batches = parts(step, control.rank, control.world_size, accumulation_at(step, accumulation))
        seeds = [step * 100 + index * 10 + control.rank for index in range(len(batches))]
        result = engine.step(batches, selected_total=selected_total(step), lr=learning_rate(step), seeds=seeds)
        assert not result.skipped
        sums = control.gather((float(result.loss_sum), int(result.correct)))
        loss, correct = control.broadcast(tuple(map(sum, zip(*sums, strict=True))) if sums else None)
        record["losses"].append(loss / selected_total(step))
        record["correct"].append(correct)
        record["norms"].append(float(result.grad_norm))
    return record


def gather_all(engine: Engine) -> Saved:
    """Everything that a checkpoint holds of an engine."""
    tensors = {f"param/{name}": engine.gather_parameter(name) for name in engine.names()}
    for key in engine.state_keys():
        tensors |= {f"state/{key}/{name}": engine.gather_state(key, name) for name in engine.names()}
    mine = engine.snapshot(dealt(engine))
    assert mine.keys() == {key for key, rank in dealt(engine).items() if rank == distributed.Topology.from_env().rank}
    assert all(torch.equal(mine[key], tensors[key]) for key in mine), "a snapshot differs from what was gathered"
    return {"tensors": tensors, "meta": engine.optimizer_meta()}


def dealt(engine: Engine) -> dict[str, int]:
    """Owners for a snapshot: each rank in turn."""
    names, keys = engine.names(), engine.state_keys()
    tensors = [f"param/{name}" for name in names] + [f"state/{key}/{name}" for key in keys for name in names]
    return {tensor: number % engine.world_size for number, tensor in enumerate(tensors)}


def restore_all(engine: Engine, saved: Saved) -> None:
    tensors = saved["tensors"]
    engine.restore(
        lambda name: tensors[f"param/{name}"], lambda key, name: tensors[f"state/{key}/{name}"], saved["meta"]
    )


def same_tensors(a: Saved, b: Saved) -> bool:
    tensors = a["tensors"], b["tensors"]
    return all(torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0] | tensors[1])


def same_bits(a: Saved, b: Saved) -> bool:
    return a["meta"] == b["meta"] and same_tensors(a, b)


# ---- the cases: each is called on every rank ----


def run(jobs: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Cases by name with their arguments, one after the other in one launch, as starting a rank takes seconds."""
    distributed.init(60)
    control = distributed.ControlGroup(60)
    results = [globals()[name](control, **args) for name, args in jobs]
    distributed.shutdown()
    return results


def parity(control: distributed.ControlGroup, cases: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Each case: template, accumulation, clip, precision, model. What the engine did, and what `plain` did."""
    results = []
    for case in cases:
        clip = case.get("clip", 0.0)
        engine = make_engine(
            case["template"], clip=clip, precision=case.get("precision", "fp32"), **case.get("model", {})
        )
        got = run_steps(engine, control, 0, steps, case.get("accumulation", 1))
        engine.close()
        results.append({"case": case, "got": got, "plain": plain(steps, clip)})
    return results


def save(
    control: distributed.ControlGroup,
    templates: list[Template],
    at: int,
    stop: int,
    path: str,
    precision: Any = "fp32",
    **model: Any,
) -> None:
    """Each template: the state before the first step and after `at` steps, and what going on to `stop` did."""
    saved = []
    for template in templates:
        engine = make_engine(template, clip=0.5, precision=precision, **model)
        case: dict[str, Any] = {"template": template, "fresh": gather_all(engine)}
        case["first"] = run_steps(engine, control, 0, at, accumulation=0)
        case["state"] = gather_all(engine)
        case["rest"] = run_steps(engine, control, at, stop, accumulation=0)
        case["end"] = gather_all(engine)
        saved.append(case)
        engine.close()
    if control.rank == 0:
        torch.save(saved, path)


def resume(
    control: distributed.ControlGroup, pairs: list[tuple[Template, str]], at: int, stop: int
) -> list[dict[str, Any]]:
    """Each template from the first state in a file, in an engine that began with other weights."""
    results = []
    for template, path in pairs:
        case = torch.load(path)[0]
        engine = make_engine(template, clip=0.5, seed=1234)
        restore_all(engine, case["state"])
        restored = same_bits(gather_all(engine), case["state"])
        rest = run_steps(engine, control, at, stop, accumulation=0)
        results.append(
            {"template": template, "path": path, "restored": restored, "got": rest, "expected": case["rest"]}
        )
        engine.close()
    return results


def resume_same(
    control: distributed.ControlGroup, path: str, at: int, stop: int, precision: Any = "fp32", **model: Any
) -> list[dict[str, Any]]:
    """Each saved state in the template that it is from; then, in the same engine, back to before the first step."""
    results = []
    for case in torch.load(path):
        engine = make_engine(case["template"], clip=0.5, precision=precision, seed=1234, **model)
        restore_all(engine, case["state"])
        rest = run_steps(engine, control, at, stop, accumulation=0)
        end = gather_all(engine)
        restore_all(engine, case["fresh"])
        again = run_steps(engine, control, 0, at, accumulation=0)
        results.append(
            {
                "template": case["template"],
                "rest": rest == case["rest"],
                "end": same_bits(end, case["end"]),
                "again": again == case["first"],
            }
        )
        engine.close()
    return results


class Poisonable(MaskedLM):
    """The loss times `factor` plus `offset`, which a micro-batch may carry."""

    def forward(  # type: ignore[override]
        self, *, factor: Tensor | float = 1.0, offset: Tensor | float = 0.0, **batch: Tensor
    ) -> tuple[Tensor, Tensor]:
        loss, correct = super().forward(**batch)
        return loss * factor + offset, correct


def skipping(control: distributed.ControlGroup, cases: list[tuple[Template, Any]]) -> list[dict[str, Any]]:
    """Each template and precision: steps that must be skipped, of three causes, between steps that must not."""
    results = []
    poisons = {"nan": {"factor": torch.tensor(math.nan)}, "inf": {"factor": torch.tensor(math.inf)}}
    poisons["finite gradient"] = {"offset": torch.tensor(math.inf)}
    for template, precision in cases:
        engine = make_engine(template, clip=0.5, precision=precision, module=Poisonable(make_module().model, "auto"))
        reference = make_engine(template, clip=0.5, precision=precision)
        run_steps(engine, control, 0, 2)
        outcome: dict[str, Any] = {"case": (template, precision)}
        for name, poison in poisons.items():
            outcome[name] = skipped_step(engine, control, poison)
        outcome["after"] = run_steps(engine, control, 2, 4, accumulation=0)
        run_steps(reference, control, 0, 2)
        outcome["reference"] = run_steps(reference, control, 2, 4, accumulation=0)
        if precision == "fp16":
            # The loss is finite, its gradient in fp16 is not: the scale's fault, for all that one can tell.
            outcome["overflow"] = skipped_step(engine, control, {"factor": torch.tensor(1e20)})
        results.append(outcome)
        engine.close()
        reference.close()
    return results


def skipped_step(engine: Engine, control: distributed.ControlGroup, poison: MicroBatch) -> dict[str, Any]:
    """What came of a step with `poison` in one micro-batch of the last rank."""
    before, scale = gather_all(engine), engine.loss_scale
    batches = parts(5, control.rank, control.world_size, 2)
    if control.rank == control.world_size - 1:
        batches[0] |= poison
    result = engine.step(batches, selected_total=selected_total(5), lr=0.1, seeds=[1, 2])
    after = gather_all(engine)
    return {
        "skipped": result.skipped,
        "overflow": result.overflow,
        "finite norm": math.isfinite(float(result.grad_norm)),
        "unchanged": same_tensors(before, after) and before["meta"]["step"] == after["meta"]["step"],
        "scale": scale and engine.loss_scale and engine.loss_scale / scale,
    }


def overflowing(control: distributed.ControlGroup, templates: list[Template], scale: float) -> list[dict[str, Any]]:
    """Each template in fp16 from a scale far too large: the scales tried until a step was applied, and the loss then."""
    results = []
    for template in templates:
        engine = make_engine(template, clip=0.5, precision="fp16")
        saved = gather_all(engine)
        saved["meta"]["scaler"] = {"scale": scale, "good_steps": LossScaler.GROWTH_INTERVAL - 1}
        restore_all(engine, saved)
        scales, steps = [], []
        for step in [0] * 40:
            scales.append(engine.loss_scale)
            batches = parts(step, control.rank, control.world_size, 1)
            result = engine.step(batches, selected_total=selected_total(0), lr=learning_rate(0), seeds=[0])
            assert result.skipped == result.overflow
            steps.append(engine.optimizer_meta()["step"])
            if not result.skipped:
                break
        loss, _ = engine.evaluate(make_batch(1, list(range(ROWS))))
        results.append({"template": template, "scales": scales, "steps": steps, "loss": float(loss)})
        engine.close()
    return results


def accumulating(control: distributed.ControlGroup, templates: list[Template]) -> list[tuple[Template, list[float]]]:
    """Each template in bf16_pure: the norm of a micro-batch, and with 32 more of a 1024th of its gradient."""
    results = []
    large = make_batch(0, [control.rank])
    small = large | {"factor": torch.tensor(2.0**-10)}
    for template in templates:
        engine = make_engine(template, precision="bf16_pure", module=Poisonable(make_module().model, "auto"))
        norms = []
        for batches in ([large], [large] + 32 * [small]):
            result = engine.step(batches, selected_total=20, lr=0.0, seeds=[0] * len(batches))
            norms.append(float(result.grad_norm))
        results.append((template, norms))
        engine.close()
    return results


def walk(control: distributed.ControlGroup, combinations: list[Combination], steps: int) -> list[dict[str, Any]]:
    """One training handed from combination to combination (as long as the algorithm is the same), `steps` steps in
    each; in each the state is also restored into a second engine, which must go on as the first."""
    results, at = [], 0
    state: Saved | None = None
    for stage, offload, precision, optimizer in combinations:
        changes = {"stage": stage, **({"stage3_param_persistence_threshold": 40} if stage == 3 else {})}
        name = {0: "zero0", 3: "zero3"}.get(stage, "zero2") + "_offload" * offload
        made = {"clip": 0.5, "precision": precision, "optimizer": optimizer}
        engine = make_engine((name, changes), **made)
        if state is not None and state["meta"]["class"] != engine.optimizer_meta()["class"]:
            state, at = None, 0
        received = True
        if state is not None:
            restore_all(engine, state)
            now = gather_all(engine)
            received = same_tensors(now, state) and now["meta"]["step"] == state["meta"]["step"]
        got = run_steps(engine, control, at, at + steps, accumulation=2)
        state = gather_all(engine)
        rest = run_steps(engine, control, at + steps, at + steps + 1, accumulation=3)
        engine.close()
        twin = make_engine((name, changes), **made, seed=1234)
        restore_all(twin, state)
        same = same_bits(gather_all(twin), state)
        again = run_steps(twin, control, at + steps, at + steps + 1, accumulation=3) == rest
        twin.close()
        case = Combination(stage, offload, precision, optimizer)
        results.append({"case": case, "at": at, "received": received, "got": got, "same": same, "again": again})
        at += steps
    longest = max(result["at"] for result in results) + steps
    for result in results:
        losses = plain(longest, 0.5, result["case"].optimizer)["losses"]
        result["plain"] = losses[result["at"] : result["at"] + steps]
    return results


def evaluating(control: distributed.ControlGroup, templates: list[Template]) -> list[dict[str, Any]]:
    """Each template: evaluation between steps, which must be right and must not change the training; with dropout."""
    results = []
    batch = make_batch(7, [control.rank, 4])
    for template in templates:
        records = []
        for interleaved in (False, True):
            engine = make_engine(template, dropout=0.1)
            record: list[float] = []
            for step in range(3):
                record += run_steps(engine, control, step, step + 1, accumulation=0)["losses"]
                if interleaved:
                    loss, correct = engine.evaluate(batch)
            records.append(record)
            weights = {f"model.{name}": engine.gather_parameter(name) for name in engine.names()}
            engine.close()
        twin = make_module().eval()
        twin.load_state_dict(weights, strict=False)
        with torch.no_grad():
            expected, right = twin(**batch)
        results.append(
            {
                "got": (float(loss), int(correct)),
                "expected": (float(expected), int(right)),
                "graph": loss.requires_grad,
                "interleaved": records[1],
                "alone": records[0],
            }
        )
    return results


def refusing(control: distributed.ControlGroup) -> dict[str, str]:
    """What the engine says to states that are not its own, and to a step without a selected token."""
    engine = make_engine("zero2")
    good = gather_all(engine)
    name = engine.names()[0]
    wrong = {
        "optimizer": good | {"meta": good["meta"] | {"class": "Lion"}},
        "names": good | {"meta": good["meta"] | {"groups": good["meta"]["groups"][:1]}},
        "shape": good | {"tensors": good["tensors"] | {f"param/{name}": torch.zeros(3, 5)}},
    }
    said = {}
    for kind, saved in wrong.items():
        try:
            restore_all(engine, saved)
        except UserError as error:
            said[kind] = str(error)
    try:
        engine.step([make_batch(0, [3])], selected_total=0, lr=0.1, seeds=[1])
    except ValueError as error:
        said["nothing selected"] = str(error)
    engine.close()
    return said
