"""Which of another program's parameters is which of ours."""

import pytest

from mlm_dist.convert.take_over import match_names
from mlm_dist.errors import UserError

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
