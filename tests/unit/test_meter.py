"""Time by phase, work by step, and the peak it is held against."""

import pytest
import torch

from mlm_dist import clock as clocks
from mlm_dist import meter as meters
from mlm_dist.clock import COMMUNICATION, StepClock
from mlm_dist.hardware import dense_peak
from mlm_dist.meter import Meter

CPU = torch.device("cpu")


class Time:
    """Stands in for the clock of both modules; it goes on only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    stand_in = Time()
    monkeypatch.setattr(clocks, "time", stand_in)
    monkeypatch.setattr(meters, "time", stand_in)
    return stand_in


def test_a_phase_within_another_is_taken_out_of_it(time: Time) -> None:
    clock = StepClock(CPU)
    for _ in range(2):
        with clock.phase("backward"):
            time.now += 1.0
            with clock.phase(COMMUNICATION):
                time.now += 0.25
            time.now += 2.0
        time.now += 50.0  # outside of any phase
        with clock.phase("optimizer"):
            time.now += 0.5
    assert clock.read() == {"backward": 6.0, COMMUNICATION: 0.5, "optimizer": 1.0}
    assert clock.read() == {}


def test_a_phase_ends_with_an_error(time: Time) -> None:
    clock = StepClock(CPU)
    with pytest.raises(ZeroDivisionError), clock.phase("forward"), clock.phase(COMMUNICATION):
        time.now += 1.0
        raise ZeroDivisionError
    with clock.phase("forward"):
        time.now += 2.0
    assert clock.read() == {COMMUNICATION: 1.0, "forward": 2.0}


def test_rates_are_of_useful_work_and_pauses_do_not_count(time: Time) -> None:
    clock = StepClock(CPU)
    meter = Meter(clock, lambda tokens, attended, selected: tokens + attended + selected, world_size=2, peak=1000.0)
    for _ in range(4):
        with meter.waiting():
            time.now += 0.5
        with clock.phase("forward"):
            time.now += 1.5
        meter.count(tokens=100, attended=2000, selected=15)
    with meter.pause():
        time.now += 1000.0
    read = meter.read()
    assert read["tokens_per_s"] == pytest.approx(400 / 8)
    assert (read["step_time"], read["data_wait"], read["time_forward"]) == (2.0, 0.5, 1.5)
    assert read["time_backward"] == read["time_optimizer"] == read["time_communication"] == 0.0
    assert read["tflops"] * 1e12 == pytest.approx(4 * 2115 / 8 / 2)
    assert read["mfu"] == pytest.approx(4 * 2115 / 8 / 2 / 1000)
    time.now += 1.0
    assert meter.read()["tokens_per_s"] == 0.0  # nothing is left from before


def test_mfu_is_left_out_where_the_peak_is_not_known(time: Time) -> None:
    assert "mfu" not in Meter(StepClock(CPU), lambda *_: 1.0, world_size=1, peak=None).read()


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16_pure", 756.0),
        ("NVIDIA H200", "fp16", 989.4),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA L40S", "bf16", 362.0),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA A10G", "bf16", 70.0),
        ("NVIDIA A10", "bf16", 125.0),
        ("Tesla V100-PCIE-16GB", "fp16", 112.0),
        ("Tesla V100-SXM2-16GB", "fp16", 125.0),
        ("Tesla T4", "fp16", 65.0),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("AMD Instinct MI300X", "bf16", 1307.4),
    ],
)
def test_peaks_by_the_names_that_devices_have(name: str, precision: str, tflops: float) -> None:
    assert dense_peak(name, precision) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    ("name", "precision"), [("Tesla T4", "bf16"), ("Tesla V100-PCIE-16GB", "bf16"), ("Some GPU 100", "bf16")]
)
def test_unknown_peaks_are_none(name: str, precision: str) -> None:
    assert dense_peak(name, precision) is None
