"""The engine against plain PyTorch, on real processes over gloo."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks import run_ranks

CASES = "tests.dist.engine_cases"
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
    "skipping": ("skipping", {"templates": SMALL}),
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
    results = run_ranks(f"{CASES}:run", world=2, args={"jobs": list(JOBS.values())}, timeout=280)
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
        for cause in ("nan", "inf", "finite gradient"):
            expected = {"skipped": True, "finite norm": False, "unchanged": True}
            assert got[cause] == expected, (got["template"], cause)
        assert got["after"] == got["reference"], got["template"]


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
