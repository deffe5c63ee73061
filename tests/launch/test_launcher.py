"""The launcher without starting jobs: command lines, placement, run directories, exit codes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launcher import cli, topology
from launcher.command import deepspeed_command, environment
from launcher.exec import Report
from launcher.run_dir import RunDir, Status, find_run, resolve
from launcher.supervise import Ending, exit_code
from launcher.topology import Gpu, LocalTopology, local_topology, visible_gpus
from mlm_dist.errors import UserError

CPU = LocalTopology(ranks=3, gpus=(), threads=2, master_port=4711)
GPUS = [Gpu(0, "GPU-aa"), Gpu(1, "GPU-bb"), Gpu(2, "GPU-cc")]


# Command line ---------------------------------------------------------------------------------------------------------


def program_arguments(command: list[str]) -> list[str]:
    return command[command.index("launcher.exec") + 1 :]


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))))
def test_arguments_pass_untouched_whatever_they_hold(args: list[str]) -> None:
    command = deepspeed_command(CPU, "some.program", args, python="/opt/my env/bin/python")
    assert command[:3] == ["/opt/my env/bin/python", "-m", "deepspeed.launcher.runner"]
    assert program_arguments(command) == ["some.program", *args]


def test_placement_on_cpu_and_gpus() -> None:
    on_cpu = deepspeed_command(CPU, "p", [], python="python")
    assert on_cpu[on_cpu.index("--num_gpus") + 1] == "3"
    assert "--master_port=4711" in on_cpu
    on_gpu = deepspeed_command(LocalTopology(2, (3, 1), 4, 4711), "p", [], python="python")
    assert on_gpu[on_gpu.index("--include") + 1] == "localhost:3,1"
    assert "--num_gpus" not in on_gpu  # it would override the choice


def test_deepspeed_parses_the_command_as_meant() -> None:
    """The flags are those of the installed deepspeed launcher, and the program's own look-alikes stay the program's."""
    args = ["--config", "a b.yaml", "--module", "--num_gpus", "9", "--", "-x"]
    command = deepspeed_command(CPU, "some.program", args, python=sys.executable)
    code = (
        "import json, sys; from deepspeed.launcher import runner; a = runner.parse_args(sys.argv[1:]);"
        "hosts = runner.fetch_hostfile(a.hostfile);"
        "print(json.dumps([hosts, a.num_gpus, a.module, a.no_local_rank, a.user_script, a.user_args]))"
    )
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    result = subprocess.run([sys.executable, "-c", code, *command[3:]], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    expected = [None, 3, True, True, "launcher.exec", ["some.program", *args]]
    assert json.loads(result.stdout.splitlines()[-1]) == expected


def test_environment_drops_what_another_launcher_left() -> None:
    base = {"PATH": "/bin", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_SIZE": "4", "CUDA_VISIBLE_DEVICES": "7", "MY": "x y"}
    assert environment(CPU, base) == {"PATH": "/bin", "MY": "x y", "OMP_NUM_THREADS": "2", "DS_ACCELERATOR": "cpu"}
    on_gpu = environment(LocalTopology(1, (7,), 4, 1), base)
    assert "DS_ACCELERATOR" not in on_gpu
    assert "CUDA_VISIBLE_DEVICES" not in on_gpu


# Placement ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, 1, 2)),
        ({"CUDA_VISIBLE_DEVICES": "2,0"}, (2, 0)),
        ({"CUDA_VISIBLE_DEVICES": "GPU-b,GPU-aa"}, (1, 0)),
        ({"CUDA_VISIBLE_DEVICES": "1,9,0"}, (1,)),  # as CUDA: all after a wrong one is hidden
        ({"CUDA_VISIBLE_DEVICES": ""}, ()),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ()),
        ({"DS_ACCELERATOR": "cpu"}, ()),
    ],
)
def test_visible_gpus(environ: dict[str, str], expected: tuple[int, ...]) -> None:
    assert visible_gpus(environ, lambda: GPUS) == expected


def test_mig_slice_is_refused() -> None:
    with pytest.raises(UserError, match="MIG"):
        visible_gpus({"CUDA_VISIBLE_DEVICES": "MIG-123"}, lambda: GPUS)


def test_ranks_threads_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "cpu_count", lambda: 8)
    cpu = {"DS_ACCELERATOR": "cpu"}
    assert [local_topology(n, cpu).threads for n in (None, 2, 3, 9)] == [8, 4, 2, 1]
    assert local_topology(None, cpu).ranks == 1
    assert local_topology(4, {**cpu, "OMP_NUM_THREADS": "5"}).threads == 5
    assert local_topology(1, cpu, master_port=99).master_port == 99
    with pytest.raises(UserError, match="at least one"):
        local_topology(0, cpu)
    monkeypatch.setattr(topology, "visible_gpus", lambda environ: (0, 1, 2))
    assert local_topology(None, {}).gpus == (0, 1, 2)
    assert local_topology(2, {}).gpus == (0, 1)
    with pytest.raises(UserError, match=r"only 3 GPU"):
        local_topology(4, {})


# Run directory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "overrides", "environ", "expected"),
    [
        ("", [], {}, "runs/my job"),
        ("train: {steps: 1}", ["--train.steps", "10"], {}, "runs/my job"),
        ("run: {dir: /data/x, name: 17}", [], {}, "/data/x/17"),
        ("run: {dir: null}", [], {}, "runs/my job"),
        ("run: {dir: a, name: b}", ["--run.name=c=d"], {"MLM_RUN__DIR": "e", "MLM_RUN__NAME": "f"}, "e/c=d"),
        ("run: {dir: a, name: b}", ["--run.dir", "x y", "--run.dir", "z"], {}, "z/b"),
    ],
)
def test_run_directory(tmp_path: Path, text: str, overrides: list[str], environ: dict[str, str], expected: str) -> None:
    config = tmp_path / "my job.yaml"
    config.write_text(text)
    assert resolve(config, overrides, environ).path == Path(expected)


@pytest.mark.parametrize("text", ["run: 5", "[1, 2]", "a: b: c", "\0"])
def test_config_that_is_not_one_is_named(tmp_path: Path, text: str) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        resolve(config, [], {})


def write_status(run: Path, state: str, step: int = 3) -> RunDir:
    run.mkdir(parents=True, exist_ok=True)
    (run / "status.json").write_text(json.dumps({"state": state, "requeue": False, "step": step, "reason": "why"}))
    return RunDir(run)


def test_status_and_stop_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_status(tmp_path / "runs" / "x", "running")
    assert run.status() == Status("running", False, 3, "why")
    before = run.status_stamp()
    assert write_status(run.path, "finished", 12).status_stamp() != before
    run.request_stop("ünder\nload", requeue=True)
    assert json.loads(run.stop_request.read_text()) == {"reason": "ünder\nload", "requeue": True}
    assert {p.name for p in run.path.iterdir()} == {"status.json", "stop_request"}
    monkeypatch.chdir(tmp_path)
    assert find_run("x").path == Path("runs/x")
    with pytest.raises(UserError, match="nowhere"):
        find_run("nowhere")
    (run.path / "status.json").write_text('{"state": 1')
    with pytest.raises(UserError, match=r"status\.json"):
        run.status()


# How a run ended ------------------------------------------------------------------------------------------------------


def ending(
    codes: list[int], launcher: int | None = 0, state: str | None = None, killed: int | None = None, ranks: int = 2
) -> Ending:
    return Ending([Report(i, c, i) for i, c in enumerate(codes)], ranks, launcher, state, killed)


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (ending([0, 0]), 0),
        (ending([0, 0], state="finished"), 0),
        (ending([0, 0], state="running"), 1),  # no last word: not a proof of success
        (ending([75, 75], state="preempted"), 75),
        (ending([75, 75]), 75),
        (ending([75, 75], launcher=-9, state="cancelled"), 75),
        (ending([137, 1], launcher=1), 137),  # who failed first
        (
            ending([1, 76, 142], launcher=1, state="failed", ranks=3),
            76,
        ),  # what fails beside a hang does so because of it
        (ending([0, 3], launcher=3, state="failed"), 3),
        (ending([], launcher=0), 1),  # what the deepspeed launcher returns when its child dies of a signal
        (ending([], launcher=247), 137),
        (ending([], launcher=-9), 137),
        (ending([], launcher=1), 1),
        (ending([], launcher=-9, killed=15), 143),
        (ending([], launcher=-9, killed=2, state="cancelled"), 75),  # the checkpoint was there before the kill
    ],
)
def test_exit_code(end: Ending, expected: int) -> None:
    assert exit_code(end) == expected


# The command ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["--help"], ["hosts", "--help"]])
def test_help_is_quick_and_imports_no_torch(args: list[str]) -> None:
    code = (
        "import sys, launcher.cli\n"
        f"try: launcher.cli.main({args})\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'deepspeed', 'numpy', 'transformers', 'rich', 'yaml'} & set(sys.modules)"
    )
    start = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "start" in result.stdout
    assert time.monotonic() - start < 5  # 0.1 s when the machine is idle


def test_dry_run_prints_a_command_for_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "a'b c.yaml"
    config.write_text("{}")
    override = "--x=a\nb;$HOME"
    assert cli.main(["local", "-n", "2", "--config", str(config), "--dry-run", override]) == 0
    shown = capsys.readouterr().out
    script = f"set -- {shown}\nprintf '%s\\0' \"$@\""
    words = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    assert words[0] == "env"
    assert program_arguments(words) == ["mlm_dist.train", "--config", str(config), override]
    assert list(tmp_path.iterdir()) == [config]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["local", "-n", "2", "--config", "none.yaml"], "none.yaml"),
        (["local", "-n", "0", "--config", "c.yaml"], "-n 0"),
        (["local", "--config", "c.yaml", "--grace", "-1"], "--grace"),
        (["local", "--config", "c.yaml", "--run.dir"], "--run.dir"),
        (["status", "none"], "none"),
        (["cancel", "none"], "none"),
    ],
)
def test_bad_input_gives_2_and_names_it(
    args: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"run": {"name": "r"}}))
    assert cli.main(args) == 2
    message = capsys.readouterr().err
    assert named in message
    assert "Traceback" not in message


def test_status_and_cancel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_status(tmp_path / "r", "running")
    assert cli.main(["status", str(run.path)]) == 0
    assert "running at step 3 (why)" in capsys.readouterr().out
    assert cli.main(["status", "--json", str(run.path)]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 3
    assert cli.main(["cancel", "--wait", "0.1", str(run.path)]) == 1  # asked, but it goes on
    assert json.loads(run.stop_request.read_text()) == {"reason": "mlm-launch cancel", "requeue": False}
    run.stop_request.unlink()
    write_status(run.path, "finished")
    assert cli.main(["cancel", str(run.path)]) == 0
    assert not run.stop_request.exists()
