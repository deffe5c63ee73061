"""Which of another program's parameters is which of ours."""

from pathlib import Path

import pytest
import torch

from mlm_dist.convert import deepspeed_state
from mlm_dist.convert.deepspeed_files import Files
from mlm_dist.convert.take_over import match_names
from mlm_dist.errors import UserError
from mlm_dist.model import families
from tests.families import small

OURS = {
    "bert.embeddings.LayerNorm.bias": (4,),
    "bert.encoder.layer.0.output.dense.weight": (4, 6),
    "bert.encoder.layer.0.attention.output.dense.weight": (4, 4),
    "cls.predictions.bias": (9,),
}


@pytest.mark.parametrize("prefix", ["", "module.", "net.inner.model."])
def test_a_wrapped_model_is_matched_by_the_ends_of_its_names(prefix: str) -> None:
    theirs = {prefix + name: shape for name, shape in reversed(OURS.items())}
    assert match_names(theirs, OURS) == {name: prefix + name for name in OURS}


def test_names_that_begin_within_ours_are_matched_too() -> None:
    theirs = {name.removeprefix("bert."): shape for name, shape in OURS.items()}
    assert match_names(theirs, OURS)["bert.embeddings.LayerNorm.bias"] == "embeddings.LayerNorm.bias"


def test_two_models_in_one_are_refused_with_the_names_of_both() -> None:
    theirs = {f"{who}.{name}": shape for who in ("teacher", "student") for name, shape in OURS.items()}
    with pytest.raises(UserError) as refused:
        match_names(theirs, OURS)
    assert all(name in str(refused.value) for name in theirs)


def test_names_without_a_partner_and_other_shapes_are_refused() -> None:
    more = {**OURS, "cls.seq_relationship.weight": (2, 4)}
    with pytest.raises(UserError, match=r"the checkpoint's without a partner[^:]*:\n  cls\.seq_relationship\.weight"):
        match_names(more, OURS)
    with pytest.raises(UserError, match=r"this program's without a partner[^:]*:\n  cls\.predictions\.bias"):
        match_names({n: s for n, s in OURS.items() if n != "cls.predictions.bias"}, OURS)
    with pytest.raises(UserError, match=r"cls\.predictions\.bias is \(9,\) in this config, .* is \(10,\)"):
        match_names({**OURS, "cls.predictions.bias": (10,)}, OURS)


@pytest.mark.parametrize("rule", ["norms", "LayerNorm"])
@pytest.mark.parametrize("model_type", sorted(families.FAMILIES))
def test_stage_0_groups_are_found_by_the_usual_rules(model_type: str, rule: str) -> None:
    """A file of stage 0 holds moments without names: of parameters grouped by their modules, as transformers' Trainer does it, or by the name LayerNorm."""
    model = small(model_type, 50)
    norms = {id(p) for m in model.modules() if isinstance(m, torch.nn.LayerNorm) for p in m.parameters()}
    named = dict(model.named_parameters())
    spared = {n for n, p in named.items() if n.endswith("bias") or (id(p) in norms if rule == "norms" else rule in n)}
    groups = [[n for n in named if n not in spared], [n for n in named if n in spared]]
    decays = zip(groups, (0.1, 0.0), strict=True)
    optimizer = torch.optim.AdamW([{"params": [named[n] for n in g], "weight_decay": decay} for g, decay in decays])
    for parameter in named.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    saved = {"module": model.state_dict(), "optimizer": optimizer.state_dict(), "global_steps": 1}
    state = deepspeed_state.read(Files(Path("checkpoint"), [saved], []))
    # Where the head comes first in the model, the tied weight is named by it.
    owners = [[state.aliases.get(name, name) for name in group] for group in groups]
    assert [(g["names"], g["weight_decay"]) for g in state.groups] == [(owners[0], 0.1), (owners[1], 0.0)]
    for alias, parameter in named.items():
        name = state.aliases.get(alias, alias)
        assert torch.equal(state.tensor("param", name), parameter)
        assert torch.equal(state.tensor("exp_avg", name), optimizer.state[parameter]["exp_avg"])
