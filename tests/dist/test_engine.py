"""The engine against plain PyTorch, on real processes over gloo."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks import run_ranks

CASES = "tests.dist.engine_cases"
pytestmark = pytest.mark.timeout(600)
TEMPLATES = ["zero0", "zero1", "zero2", "zero3"]

# Buckets far smaller than the model, and at stage 3 nearly nothing that stays whole: what a large model meets.
SMALL_FLAT = {"reduce_bucket_size": 3000, "allgather_bucket_size": 2000}
SMALL_PARTS = {
    "reduce_bucket_size": 3000,
    "sub_group_size": 4000,
    "stage3_prefetch_bucket_size": 1000,
    "stage3_param_persistence_threshold": 40,
    "stage3_max_live_parameters": 8000,
    "stage3_max_reuse_distance": 4000,
}
SMALL: list[Any] = [
    "zero0",
    ("zero1", SMALL_FLAT),
    ("zero2", SMALL_FLAT),
    ("zero3", SMALL_PARTS),
    ("zero2_offload", SMALL_FLAT),
    ("zero3_offload", SMALL_PARTS),
]
# What else a template may ask for.
VARIANTS: list[Any] = [
    ("zero1", SMALL_FLAT | {"overlap_comm": True}),
    ("zero1", SMALL_FLAT | {"contiguous_gradients": False}),
    ("zero2", SMALL_FLAT | {"contiguous_gradients": False, "overlap_comm": False}),
    ("zero2", SMALL_FLAT | {"reduce_scatter": False}),
    ("zero2", SMALL_FLAT | {"use_multi_rank_bucket_allreduce": False}),
    ("zero2", SMALL_FLAT | {"allgather_partitions": False}),
    ("zero2_offload", SMALL_FLAT | {"stage": 1}),
    ("zero3", SMALL_PARTS | {"contiguous_gradients": False}),
    ("zero3", SMALL_PARTS | {"reduce_scatter": False, "overlap_comm": False}),
    ("zero3", SMALL_PARTS | {"stage3_model_persistence_threshold": 100}),
]


def assert_near(got: dict[str, Any], expected: dict[str, Any], what: object, *, loss: float, norm: float) -> None:
    assert got["losses"] == pytest.approx(expected["losses"], abs=loss, rel=0), what
    # AdamW hides a gradient that is off by a factor; its norm and the clipping do not.
    assert got["norms"] == pytest.approx(expected["norms"], rel=norm), what


# What is run, by name, in one launch of 2 ranks. Accumulation 0 is 1, 3 and 2 micro-batches in turn.
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "parity": (
        "parity",
        {
            "cases": [
                *({"template": template, "accumulation": 1, "clip": 0.0} for template in TEMPLATES),
                *({"template": template, "accumulation": 4, "clip": 0.5} for template in SMALL),
            ],
            "steps": 20,
        },
    ),
    "variants": (
        "parity",
        {"cases": [{"template": t, "accumulation": 0, "clip": 0.5} for t in [*SMALL, *VARIANTS]], "steps": 4},
    ),
    "checkpointing": (
        "parity",
        {
            "cases": [
                {"template": t, "accumulation": 2, "model": {"dropout": 0.1, "checkpoint_activations": c}}
                for t in SMALL[2:4]
                for c in (False, True)
            ],
            "steps": 3,
        },
    ),
    "skipping": (
        "skipping",
        {
            "cases": [
                *((template, "fp32") for template in SMALL),
                *((template, "bf16_pure") for template in SMALL[1:4]),
                *((template, "fp16") for template in [SMALL[0], *SMALL[2:4]]),
            ]
        },
    ),
    "overflowing": ("overflowing", {"templates": [SMALL[0], *SMALL[2:4]], "scale": 2.0**40}),
    "accumulating": ("accumulating", {"templates": SMALL[1:]}),
    "evaluating": ("evaluating", {"templates": [SMALL[0], *SMALL[2:4]]}),
    "refusing": ("refusing", {}),
    "bf16": (
        "parity",
        {"cases": [{"template": t, "accumulation": 2, "precision": "bf16"} for t in SMALL], "steps": 6},
    ),
}


@pytest.fixture(scope="module")
def by_rank() -> list[dict[str, Any]]:
    """Results of JOBS by name, for each rank."""
    results = run_ranks(f"{CASES}:run", world=2, args={"jobs": list(JOBS.values())}, timeout=580)
    return [dict(zip(JOBS, rank, strict=True)) for rank in results]


def test_two_ranks_give_the_losses_and_norms_of_one_plain_loop(by_rank: list[dict[str, Any]]) -> None:
    # Rank 0 has 120 selected tokens, rank 1 has 10; with accumulation 4 some micro-batches have none.
    assert by_rank[0]["parity"] == by_rank[1]["parity"]
    for result in by_rank[0]["parity"]:
        got, plain = result["got"], result["plain"]
        assert plain["losses"][-1] < plain["losses"][0] - 0.5
        assert_near(got, plain, result["case"], loss=1e-5, norm=1e-4)
        assert got["correct"] == plain["correct"], result["case"]


def test_buckets_accumulation_and_other_mechanics_leave_the_result(by_rank: list[dict[str, Any]]) -> None:
    for result in by_rank[0]["variants"]:
        assert_near(result["got"], result["plain"], result["case"], loss=1e-5, norm=1e-4)


def test_activation_checkpointing_changes_nothing(by_rank: list[dict[str, Any]]) -> None:
    results = by_rank[0]["checkpointing"]
    for whole, recomputed in zip(results[::2], results[1::2], strict=True):
        assert_near(recomputed["got"], whole["got"], recomputed["case"], loss=2e-6, norm=1e-5)


def test_bf16_is_near_fp32_and_alike_at_every_stage(by_rank: list[dict[str, Any]]) -> None:
    results = by_rank[0]["bf16"]
    for result in results:
        assert_near(result["got"], result["plain"], result["case"], loss=2e-2, norm=2e-2)
        assert result["got"] != result["plain"]
        # The same roundings everywhere: gradients are reduced and weights gathered in fp32.
        assert_near(result["got"], results[0]["got"], result["case"], loss=1e-4, norm=1e-3)


def test_a_step_that_is_not_finite_is_skipped_by_all_and_leaves_no_trace(by_rank: list[dict[str, Any]]) -> None:
    for got in (got for results in by_rank for got in results["skipping"]):
        fp16 = got["case"][1] == "fp16"
        expected = {"skipped": True, "overflow": False, "finite norm": False, "unchanged": True}
        for cause in ("nan", "inf", "finite gradient"):
            # The loss scale is not to blame for a loss that is not finite.
            assert got[cause] == expected | {"scale": 1.0 if fp16 else None}, (got["case"], cause)
        assert got["after"] == got["reference"], got["case"]
        if fp16:
            assert got["overflow"] == expected | {"overflow": True, "scale": 0.5}, got["case"]


def test_a_loss_scale_that_is_too_large_is_halved_until_it_fits(by_rank: list[dict[str, Any]]) -> None:
    clipped = next(r["plain"] for r in by_rank[0]["parity"] if r["case"]["clip"] == 0.5)
    assert by_rank[0]["overflowing"] == by_rank[1]["overflowing"]
    for got in by_rank[0]["overflowing"]:
        tries = len(got["scales"])
        assert tries > 5
        assert got["scales"] == [2.0**40 / 2**n for n in range(tries)], got["template"]
        # The skipped steps are none to the optimizer, and the one that fitted did what it does without a scale.
        assert got["steps"] == [0] * (tries - 1) + [1], got["template"]
        assert got["loss"] / 130 == pytest.approx(clipped["losses"][1], abs=2e-3), got["template"]


def test_pure_bf16_sums_the_gradients_of_micro_batches_in_fp32(by_rank: list[dict[str, Any]]) -> None:
    for template, norms in by_rank[0]["accumulating"]:
        # In bf16 each of the 32 small gradients would be lost beside the large one, and the ratio would be 1.
        assert norms[1] / norms[0] == pytest.approx(1 + 32 / 1024, rel=1e-3), template


def test_evaluation_is_right_and_does_not_disturb_the_training(by_rank: list[dict[str, Any]]) -> None:
    for got in (got for results in by_rank for got in results["evaluating"]):
        assert not got["graph"]
        assert got["got"] == pytest.approx(got["expected"], rel=1e-6)
        assert got["interleaved"] == got["alone"]


def test_a_state_of_another_model_or_optimizer_is_refused(by_rank: list[dict[str, Any]]) -> None:
    for said in (results["refusing"] for results in by_rank):
        assert "'Lion'" in said["optimizer"]
        assert "differ in" in said["names"]
        assert "(3, 5)" in said["shape"]
        assert "skip the batch" in said["nothing selected"]
