"""What the ranks of `test_step` run: the engine's cases with flat micro-batches, the head in chunks, compiled layers."""

from __future__ import annotations

from typing import Any

import torch
from torch._dynamo.utils import counters

import tests.varlen_cpu  # noqa: F401
from mlm_dist import distributed, train
from mlm_dist.engine import Engine, MicroBatch
from mlm_dist.model import compiled as compiling
from mlm_dist.model.compiled import compile_layers, layer_class
from mlm_dist.model.head import MaskedLM
from tests.dist import engine_cases as base

# So many positions in a chunk: of a step's micro-batches one rank has 120 selected tokens, the other 10.
CHUNK = 7


def flattened(micro_batch: MicroBatch) -> MicroBatch:
    """The same micro-batch without padding (no row here has any), each row a segment."""
    rows, width = micro_batch["input_ids"].shape
    wide = {name: micro_batch[name].view(1, -1) for name in ("input_ids", "position_ids")}
    bounds = torch.arange(rows + 1, dtype=torch.int32) * width
    where = {name: micro_batch[name] for name in ("selected", "labels")}
    return {**wide, **where, "cu_seqlens": bounds, "max_length": width}


def parity(control: distributed.ControlGroup, cases: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Each case: template, flat, compile (a backend or None), model, why_not.

    Gives what the engine did and measured in evaluation, what the plain loop did and would measure, and what was
    compiled.
    """
    results = []
    for case in cases:
        torch._dynamo.reset()
        counters.clear()
        flat, backend = case["flat"], case.get("compile")
        model = base.make_module(**case.get("model", {})).model
        module = MaskedLM(model, "varlen" if flat else "auto", head_chunk=CHUNK)
        form = flattened if flat else dict
        example = form(base.make_batch(0, [3] * (base.ROWS // control.world_size)))
        leaves = []
        if backend:
            assert compile_layers(module, example, autocast=None, backend=backend) is None
            leaves = [layer_class(module)]
            assert all(p.grad is None for p in module.parameters())
        engine = base.make_engine(case["template"], module=module, leaves=leaves)
        got = run_steps(engine, control, steps, form)
        trained = dict(counters["stats"])
        measured = [float(x) for x in engine.evaluate(form(base.make_batch(1, list(range(6)))))]
        twin = base.make_module().eval()
        twin.load_state_dict({f"model.{n}": engine.gather_parameter(n) for n in engine.names()}, strict=False)
        with torch.no_grad():
            expected = [float(x) for x in twin(**base.make_batch(1, list(range(6))))]
        results.append(
            {
                "case": case,
                "got": got,
                "plain": base.plain(steps, 0.0),
                "evaluation": (measured, expected),
                "graphs": (trained.get("unique_graphs", 0), counters["stats"].get("unique_graphs", 0)),
                "breaks": sum(counters["graph_break"].values()),
            }
        )
        engine.close()
    return results


def run_steps(engine: Engine, control: distributed.ControlGroup, steps: int, form: Any) -> base.Record:
    record: base.Record = {"losses": [], "correct": [], "norms": []}
    for step in range(steps):
        (mine,) = base.parts(step, control.rank, control.world_size, 1)
        total = base.selected_total(step)
        result = engine.step([form(mine)], selected_total=total, lr=base.learning_rate(step), seeds=[step])
        sums = control.gather((float(result.loss_sum), int(result.correct)))
        loss, correct = control.broadcast(tuple(map(sum, zip(*sums, strict=True))) if sums else None)
        record["losses"].append(loss / total)
        record["correct"].append(correct)
        record["norms"].append(float(result.grad_norm))
    return record


def run(cases: list[dict[str, Any]], steps: int) -> list[Any]:
    distributed.init(60)
    results = parity(distributed.ControlGroup(60), cases, steps)
    distributed.shutdown()
    return results


def program(config: str, flags: list[str], breaks_on: list[int]) -> list[str]:
    """The whole program with layers compiled without a compiler; on the ranks `breaks_on` a layer has a graph break.

    Gives the warnings.
    """

    def compile_quickly(module: MaskedLM, micro_batch: MicroBatch, **how: Any) -> str | None:
        if distributed.Topology.from_env().rank in breaks_on:
            layer = module.model.bert.encoder.layer[0]
            layer.output.register_forward_hook(lambda *_: torch._dynamo.graph_break())
        why_not = compile_layers(module, micro_batch, **how, backend="aot_eager")
        assert (why_not is None) == (distributed.Topology.from_env().rank not in breaks_on)
        modules.append(module)
        return why_not

    class Console(train.RunConsole):
        def say(self, message: str) -> None:
            said.extend([message] * (self.enabled and message.startswith("warning")))

    modules: list[MaskedLM] = []
    said: list[str] = []
    train.RunConsole = Console  # type: ignore[misc]
    compiling.compile_layers = compile_quickly  # type: ignore[assignment]
    assert train.main(["--config", config, *flags]) == 0
    assert modules[0].compiled == (not breaks_on)
    assert all(("forward" in vars(m)) == (not breaks_on) for m in modules[0].model.bert.encoder.layer)
    graphs = counters["stats"]["unique_graphs"]
    # Tried, trained at stage 3, evaluated.
    assert graphs == 3 if not breaks_on else graphs <= 1
    return said
