"""What is asked of SLURM, without SLURM: variables of a task, the sbatch command, the record of jobs, staging. tests/cluster has the real one."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launcher import batch, cli, jobs, slurm_command, stage
from launcher.cli import make_parser
from launcher.exec import Report, write_report
from launcher.jobs import JobState, crash_loop, most_telling, parse_scontrol
from launcher.run_dir import RunDir
from launcher.runs_command import outcome
from launcher.slurm import Request, sbatch_command, sbatch_variables, time_limit_s
from launcher.topology import SlurmJob, expand_nodes, slurm_job, slurm_rank
from mlm_dist import lifecycle
from mlm_dist.errors import UserError
from tests.e2e.program import save_config

ROOT = Path(__file__).parents[2]
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
HOSTILE = ["--text", "a b;$(touch boom)`touch boom`", "line\nbreak", "quote'\"", "üñ→漢字", "--empty=", "", "*"]


# A task's variables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodelist", "names"),
    [
        ("", []),
        ("login", ["login"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("n[08-11,20],gpu7", ["n08", "n09", "n10", "n11", "n20", "gpu7"]),
        ("r[1-2]c[3,5]-ib", ["r1c3-ib", "r1c5-ib", "r2c3-ib", "r2c5-ib"]),
        ("a,b[1],c-2", ["a", "b1", "c-2"]),
    ],
)
def test_node_lists(nodelist: str, names: list[str]) -> None:
    assert expand_nodes(nodelist) == names


@pytest.mark.parametrize("nodelist", ["node[1-3", "node1]", "n[3-1]", "n[a]", "n[]", "a,,b", ",a"])
def test_node_lists_that_are_none(nodelist: str) -> None:
    with pytest.raises(UserError, match="node list"):
        expand_nodes(nodelist)


def task(rank: int, **more: str) -> dict[str, str]:
    """A task of a step of 2 + 2 + 1 ranks on three nodes of six cores."""
    return {
        "SLURM_JOB_ID": "123456",
        "SLURM_STEP_ID": "2",
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
        "SLURM_NTASKS": "5",
        "SLURM_PROCID": str(rank),
        "SLURM_NODEID": str(rank // 2),
        "SLURM_LOCALID": str(rank % 2),
        "SLURM_CPUS_ON_NODE": "6",
        **more,
    }


def test_ranks_of_a_step_agree_on_where_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.topology.cpu_count", lambda: 6)
    monkeypatch.setattr("launcher.topology.interface_towards", lambda host: f"to-{host}")
    ranks = [slurm_rank(task(r)) for r in range(5)]
    assert [r["RANK"] for r in ranks] == list("01234")
    assert [r["LOCAL_RANK"] for r in ranks] == list("01010")
    assert [r["OMP_NUM_THREADS"] for r in ranks] == list("33336")
    # The first node's own name may stand for its loopback.
    assert [r["GLOO_SOCKET_IFNAME"] for r in ranks] == ["to-node2", "to-node2", *3 * ["to-node1"]]
    meeting = {(r["WORLD_SIZE"], r["MASTER_ADDR"], r["MASTER_PORT"]) for r in ranks}
    assert len(meeting) == 1
    world, address, port = meeting.pop()
    assert (world, address) == ("5", "node1")
    assert 20000 <= int(port) < 30000
    assert slurm_rank(task(0, SLURM_STEP_ID="3"))["MASTER_PORT"] != port
    assert slurm_rank(task(0, SLURM_JOB_ID="123457"))["MASTER_PORT"] != port


def test_what_is_set_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.topology.cpu_count", lambda: 64)
    given = {"MASTER_PORT": "4711", "OMP_NUM_THREADS": "7"}
    found = slurm_rank(task(1, **given))
    assert given.items() <= found.items()
    assert slurm_rank(task(1, SLURM_CPUS_PER_TASK="5"))["OMP_NUM_THREADS"] == "5"
    assert slurm_rank(task(1, RANK="9")) == {}  # started by the deepspeed launcher within a job
    assert slurm_rank({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}) == {}  # the batch script, or a shell in an allocation
    assert slurm_rank(task(3, CUDA_VISIBLE_DEVICES="5"))["LOCAL_RANK"] == "0"  # its own GPU only
    assert slurm_rank(task(3, CUDA_VISIBLE_DEVICES="4,5"))["LOCAL_RANK"] == "1"


def test_jobs_and_array_elements() -> None:
    assert slurm_job({"PATH": "/bin"}) is None
    plain = slurm_job({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"})
    assert plain == SlurmJob("7", "7", 0, is_first=True, is_last=True, nodes=("n1", "n2"))
    again = slurm_job({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"})
    assert again is not None and (again.restarts, again.is_first, again.is_last) == (2, False, True)
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "3"}
    elements = [slurm_job({**array, "SLURM_JOB_ID": str(6 + i), "SLURM_ARRAY_TASK_ID": str(i)}) for i in (1, 2, 3)]
    assert [(e.lineage, e.is_first, e.is_last) for e in elements if e] == [
        ("7", True, False),
        ("7", False, False),
        ("7", False, True),
    ]


def test_only_the_topology_reads_slurms_variables() -> None:
    """And the program itself reads nothing but what every launcher sets."""
    reading = re.compile(r"""["']SLURM_""")
    found = {p for d in ("launcher", "mlm_dist") for p in (ROOT / d).rglob("*.py") if reading.search(p.read_text())}
    assert found == {ROOT / "launcher/topology.py"}


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, launcher.cli as c\ntry: c.main(['slurm', '--help'])\nexcept SystemExit: pass\nprint(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"torch", "deepspeed", "transformers", "numpy", "yaml", "mlm_dist.config", "mlm_dist.train"}
    assert not heavy & set(eval(done.stdout.splitlines()[-1]))


# sbatch ---------------------------------------------------------------------------------------------------------------


@given(st.lists(TEXT), TEXT.filter(lambda name: name not in ("", ".", "..") and not set("/\\\n") & set(name)))
def test_arguments_and_names_pass_untouched_whatever_they_hold(args: list[str], name: str) -> None:
    command = sbatch_command(Request(), Path("/runs") / name, name, Path("/my scripts/train.sbatch"), args)
    at = command.index("/my scripts/train.sbatch")
    assert command[at + 1 :] == args
    assert f"--job-name={name}" in command[:at]
    log = next(word.removeprefix("--output=") for word in command if word.startswith("--output="))
    as_slurm = {"%%": "%", "%j": "5"}
    assert re.sub("%.", lambda m: as_slurm[m[0]], log) == f"/runs/{name}/logs/slurm-5.out"


def test_a_percent_sign_in_a_path_is_no_pattern() -> None:
    command = sbatch_command(Request(), Path("/runs/90%j"), "x", Path("s"), [])
    assert "--output=/runs/90%%j/logs/slurm-%j.out" in command


@pytest.mark.parametrize("name", ["back\\slash", "line\nbreak"])
def test_paths_that_slurm_cannot_write_logs_to(name: str) -> None:
    with pytest.raises(UserError, match="SLURM writes no logs"):
        sbatch_command(Request(), Path("/runs") / name, name, Path("s"), [])


def test_a_chain_is_an_array_that_runs_one_by_one() -> None:
    command = sbatch_command(Request(chain=4), Path("/runs/a"), "a", Path("s"), [])
    assert "--array=1-4%1" in command
    assert "--output=/runs/a/logs/slurm-%A_%a.out" in command


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(nodes=0), "--nodes 0"),
        (Request(tasks_per_node=0), "--ntasks-per-node 0"),
        (Request(gpus_per_node=0), "--gpus-per-node 0"),
        (Request(tasks_per_node=4, gpus_per_node=2), "--ntasks-per-node 4: more ranks than the 2"),
        (Request(chain=0), "--chain 0"),
        (Request(signal_s=0), "--signal-time 0"),
        (Request(signal_s=70000), "--signal-time 70000"),
    ],
)
def test_requests_that_no_allocation_can_meet(request_: Request, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        request_.check()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("2:30", 150),
        ("01:02:03", 3723),
        ("1-2", 93600),
        ("1-2:03", 93780),
        ("1-02:03:04", 93784),
        ("INFINITE", None),
    ],
)
def test_time_limits(text: str, seconds: int | None) -> None:
    assert time_limit_s(text) == seconds


@pytest.mark.parametrize("text", ["soon", "1:2:3:4", "", "-5"])
def test_time_limits_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--time"):
        time_limit_s(text)


def test_a_limit_that_leaves_no_time_to_train_is_refused() -> None:
    with pytest.raises(UserError, match="--time 10: must be more than twice --signal-time"):
        Request(time="10").check()
    Request(time="11").check()
    Request(time="2", signal_s=30).check()


def test_an_empty_option_is_refused_rather_than_swallow_the_next() -> None:
    with pytest.raises(UserError, match="--account: is empty"):
        Request(options={"account": "", "no-requeue": None}).check()


def test_site_file_values_that_are_needed_before_the_job() -> None:
    text = "# SBATCH_QOS=no\nSBATCH_ACCOUNT=abc  # ours\nexport SBATCH_PARTITION='a b'\nMLM_VENV=$HOME/x\nSBATCH_QOS=\n"
    assert sbatch_variables(text, "f") == {"SBATCH_ACCOUNT": "abc", "SBATCH_PARTITION": "a b", "SBATCH_QOS": ""}
    for wrong in ("SBATCH_ACCOUNT=$USER", "SBATCH_ACCOUNT='a", "SBATCH_ACCOUNT=a b", "SBATCH_ACCOUNT=`id`"):
        with pytest.raises(UserError, match=r"f, line 2: SBATCH_ACCOUNT"):
            sbatch_variables("\n" + wrong, "f")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run config `job.yaml` in the current directory, which has no site file."""
    for name in list(os.environ):
        if name.startswith(("MLM_", "SLURM_", "SBATCH_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "job.yaml"
    path.write_text("run: {dir: runs}\n")
    return path


def arguments(*words: str) -> tuple[argparse.Namespace, list[str]]:
    return make_parser().parse_known_args(["slurm", "--config", "job.yaml", *words])


def test_a_flag_wins_over_the_environment_and_that_over_the_site_file(config: Path) -> None:
    site = config.parent / "site.env"
    site.write_text("SBATCH_ACCOUNT=file\nSBATCH_PARTITION=file\nMLM_VENV=/file\n")
    args, rest = arguments("--cluster-env", "site.env", "--account", "flag", "--modules", "cuda/12 gcc", "-N", "3")
    command, changed = slurm_command.plan(args, rest, {"SBATCH_PARTITION": "environment"})
    assert "--account=flag" in command and "--nodes=3" in command
    assert "SBATCH_PARTITION" not in changed  # sbatch finds the environment's
    assert changed["SBATCH_ACCOUNT"] == "file"  # over which sbatch prefers the flag
    assert changed["MLM_CLUSTER_ENV"] == str(site)
    assert changed["MLM_MODULES"] == "cuda/12 gcc"
    assert "MLM_PYTHON" not in changed  # the environment named in the file has one
    assert slurm_command.plan(*arguments(), {})[1]["MLM_PYTHON"] == sys.executable


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--via", "mpirun"], "--via mpirun: must be srun or deepspeed"),
        (["--container-runtime", "docker"], "--container-runtime docker: must be pyxis or apptainer"),
        (["--cluster-env", "nowhere"], "--cluster-env nowhere: no such file"),
        (["--ntasks-per-node", "0"], "--ntasks-per-node 0: must be at least 1"),
    ],
)
def test_flags_that_are_wrong(config: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        slurm_command.plan(*arguments(*words), {})


@pytest.fixture
def fakes(tmp_path: Path) -> Path:
    """A directory for PATH, with a stand-in for each of SLURM's commands, which notes how it was called in `NAME.calls`."""
    place = tmp_path / "bin dir"
    place.mkdir()
    return place


def fake(place: Path, name: str, body: str = "") -> Path:
    """A command that appends its argument vector and environment to NAME.calls, then does `body`."""
    calls = place / f"{name}.calls"
    note = (
        f"import json, os, sys; open({str(calls)!r}, 'a').write(json.dumps([sys.argv[1:], dict(os.environ)]) + '\\n')"
    )
    code = place / f"{name}.py"
    code.write_text(note + "\n" + body)
    (place / name).write_text(f"#!/bin/sh\nexec '{sys.executable}' '{code}' \"$@\"\n")
    (place / name).chmod(0o755)
    return calls


def calls_of(calls: Path) -> list[tuple[list[str], dict[str, str]]]:
    return [(argv, env) for argv, env in map(json.loads, calls.read_text().splitlines())] if calls.exists() else []


def test_what_the_dry_run_prints_is_what_is_executed(config: Path, fakes: Path) -> None:
    calls = fake(fakes, "sbatch", "print('77;cluster')")
    (config.parent / "slurm").mkdir()
    (config.parent / "slurm/cluster.env").write_text("SBATCH_ACCOUNT='my account'\n")
    env = {**os.environ, "PATH": f"{fakes}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launcher.cli", "slurm", "--config", "job.yaml", "--no-check", "-N", "2"]
    command += ["--modules", "a b"]
    command += ["--run.name", 'it\'s "x"; $HOME', *HOSTILE]
    shown = subprocess.run([*command, "--dry-run"], env=env, capture_output=True, text=True, check=True).stdout
    assert not calls.exists() and not Path("runs").exists()
    subprocess.run(["bash", "-c", shown], env=env, check=True, stdout=subprocess.DEVNULL)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    (shown_argv, shown_env), (argv, real_env) = calls_of(calls)
    assert shown_argv == argv
    assert argv[-len(HOSTILE) :] == HOSTILE
    ignored = {"_", "SHLVL", "PWD", "OLDPWD"}
    assert {k: v for k, v in shown_env.items() if k not in ignored} == {
        k: v for k, v in real_env.items() if k not in ignored
    }
    assert real_env["SBATCH_ACCOUNT"] == "my account"
    assert "job 77 submitted" in done
    run = Path("runs") / 'it\'s "x"; $HOME'
    assert jobs.lineages(jobs.records(run)) == ["77"]
    assert (run / "logs").is_dir()
    assert not Path("boom").exists()


def test_a_mistake_is_found_before_the_job_waits(config: Path, fakes: Path) -> None:
    calls = fake(fakes, "sbatch", "print('77')")
    tiny = save_config(config.parent)
    env = {**os.environ, "PATH": f"{fakes}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launcher.cli", "slurm", "--config", str(tiny)]
    refused = subprocess.run([*command, "-N", "13"], env=env, capture_output=True, text=True)
    assert refused.returncode == 2 and "train.global_batch: 12 rows cannot feed 13 ranks" in refused.stderr
    refused = subprocess.run([*command, "--data.tokenizer", "nowhere"], env=env, capture_output=True, text=True)
    assert refused.returncode == 2 and "data.tokenizer" in refused.stderr
    assert not calls.exists() and not (config.parent / "runs").exists()
    assert subprocess.run([*command, "-N", "12"], env=env).returncode == 0
    assert calls.exists()


# The batch script -----------------------------------------------------------------------------------------------------

SRUN = """
words = sys.argv[1:]
while words and words[0].startswith('--'):
    words.pop(0)
more = {'SLURM_PROCID': '0', 'SLURM_LOCALID': '0', 'SLURM_NODEID': '0', 'SLURM_STEP_ID': '0'} if '-m' in words else {}
os.execvpe(words[0], words, {**os.environ, **more})
"""
PROGRAM = """
import json, os, sys, time
from pathlib import Path
Path('seen.json').write_text(json.dumps([sys.argv[1:], dict(os.environ)]))
run = Path('runs/job')
if Path('state').exists():
    state = Path('state').read_text()
    if state == 'wait':
        run.mkdir(parents=True, exist_ok=True)
        Path('waiting').touch()
        while not (run / 'stop_request').exists():
            time.sleep(0.02)
        request = json.loads((run / 'stop_request').read_text())
        state = 'preempted' if request['requeue'] else 'cancelled'
    status = {'state': state, 'requeue': state == 'preempted', 'step': 7, 'reason': 'told to'}
    (run / 'status.json').write_text(json.dumps(status))
sys.exit(int(Path('code').read_text()))
"""


class Script:
    """slurm/train.sbatch in a job of one task, with stand-ins for SLURM and for the program."""

    def __init__(self, here: Path, fakes: Path) -> None:
        self.here, self.fakes = here, fakes
        fake(fakes, "srun", SRUN)
        self.scontrol = fake(fakes, "scontrol")
        self.srun = fakes / "srun.calls"
        (here / "program.py").write_text(PROGRAM)

    def start(self, *args: str, code: int = 0, state: str = "finished", **env: str) -> subprocess.Popen[str]:
        (self.here / "code").write_text(str(code))
        if state:
            (self.here / "state").write_text(state)
        job = {
            "SLURM_JOB_ID": "55",
            "SLURM_JOB_NODELIST": "here",
            "SLURMD_NODENAME": "here",
            "SLURM_NNODES": "1",
            "SLURM_NTASKS": "1",
            "SLURM_CPUS_ON_NODE": "2",
            "MLM_PROGRAM": "program",
            "MLM_PYTHON": sys.executable,
            "MLM_SLURM_DIR": str(ROOT / "slurm"),
            "PATH": f"{self.fakes}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{self.here}",
        }
        return subprocess.Popen(
            ["bash", str(ROOT / "slurm/train.sbatch"), "--config", "job.yaml", *args],
            cwd=self.here,
            env={**os.environ, **job, **env},
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *args: str, **more: str | int) -> tuple[int, str]:
        process = self.start(*args, **more)  # type: ignore[arg-type]
        error = process.communicate(timeout=60)[1]
        return process.returncode, error

    @property
    def requeued(self) -> bool:
        return [argv for argv, _ in calls_of(self.scontrol)] == [["requeue", "55"]]


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def script(config: Path, fakes: Path) -> Script:
    return Script(config.parent, fakes)


def test_script_hands_on_its_arguments_untouched(script: Script) -> None:
    code, error = script.run(*HOSTILE)
    assert code == 0, error
    argv, env = json.loads(Path("seen.json").read_text())
    assert argv == ["--config", "job.yaml", *HOSTILE]
    assert (env["RANK"], env["WORLD_SIZE"], env["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    assert not script.requeued and not Path("boom").exists()
    assert [r["event"] for r in jobs.records(Path("runs/job"))] == ["began", "ended"]
    assert not list(Path("runs/job/logs").iterdir())


def test_script_turns_slurms_signal_into_a_checkpoint_and_a_requeue(script: Script) -> None:
    process = script.start(state="wait", code=75)
    try:
        wait_for(Path("waiting"), process)
        process.send_signal(10)  # USR1, and the script alone gets it
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 0, error
    assert script.requeued
    assert "preempted at step 7 with a checkpoint" in error
    assert jobs.records(Path("runs/job"))[-1]["state"] == "preempted"


def test_signal_before_there_are_ranks_requeues_at_once(script: Script, fakes: Path) -> None:
    fake(fakes, "srun", "import time, pathlib; pathlib.Path('staging').touch(); time.sleep(60)")
    process = script.start(MLM_STAGE_DIR="scratch")
    try:
        wait_for(Path("staging"), process)
        process.send_signal(10)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 0, error
    assert script.requeued and not Path("seen.json").exists()
    assert jobs.records(Path("runs/job"))[-1]["state"] == "preempted"


def test_script_stages_and_tells_the_program(script: Script) -> None:
    corpus = script.here / "my corpus"
    corpus.mkdir()
    (corpus / "0.tar").write_bytes(b"x" * 10)
    (corpus / "manifest.json").write_text(json.dumps({"shards": [{"path": "0.tar", "size": 10}]}))
    stage_dir = script.here / "scratch dir"
    code, error = script.run("--data.manifest", str(corpus / "manifest.json"), MLM_STAGE_DIR=str(stage_dir))
    assert code == 0, error
    argv = json.loads(Path("seen.json").read_text())[0]
    assert argv[:-1] == ["--config", "job.yaml", "--data.manifest", str(corpus / "manifest.json")]
    (copied,) = stage_dir.rglob("manifest.json")
    assert argv[-1] == f"--data.manifest={copied}"
    # A disk that fails is no mistake of the user's: the job goes on elsewhere, or ends as a crash loop.
    (corpus / "0.tar").unlink()
    (copied.parent / "0.tar").unlink()
    assert script.run("--data.manifest", str(corpus / "manifest.json"), MLM_STAGE_DIR=str(stage_dir))[0] == 2


def test_in_a_chain_the_next_job_goes_on_and_nothing_is_requeued(script: Script) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "50", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "3"}
    assert script.run(state="preempted", code=75, SLURM_ARRAY_TASK_ID="1", **array)[0] == 0
    assert not script.requeued
    assert script.run(state="preempted", code=75, SLURM_ARRAY_TASK_ID="3", **array)[0] == 0
    assert script.requeued
    assert script.run(SLURM_ARRAY_TASK_ID="2", **array)[0] == 0  # finishes the run
    Path("seen.json").unlink()
    code, error = script.run(SLURM_ARRAY_TASK_ID="3", **array)
    assert code == 0 and "is finished; nothing to do" in error and not Path("seen.json").exists()


@pytest.mark.parametrize(("code", "state", "expected"), [(2, "", 2), (75, "cancelled", 75)])
def test_what_is_not_requeued(script: Script, code: int, state: str, expected: int) -> None:
    assert script.run(code=code, state=state)[0] == expected
    assert not script.requeued


def test_a_crash_is_requeued_until_it_is_a_loop(script: Script) -> None:
    for restarts in range(jobs.CRASHES):
        Path("bin dir/scontrol.calls").unlink(missing_ok=True)
        code, error = script.run(code=137, state="", SLURM_RESTART_COUNT=str(restarts))
        assert script.requeued == (restarts < jobs.CRASHES - 1)
    assert code == 137
    assert "the run crashed 3 times in a row before its first checkpoint: it is not started again" in error
    # SLURM itself starts a job again whose node was lost.
    Path("seen.json").unlink()
    code, error = script.run(state="", SLURM_RESTART_COUNT="3")
    assert code == 2 and not Path("seen.json").exists()
    # Who submits anew has mended something.
    assert script.run(SLURM_JOB_ID="56")[0] == 0


def test_a_code_of_0_without_the_runs_word_is_a_crash(script: Script) -> None:
    """The deepspeed launcher gives 0 when its child is killed."""
    script.run(code=0, state="")
    assert script.requeued


def test_script_without_a_config_says_so(script: Script) -> None:
    Path("job.yaml").unlink()
    code, error = script.run()
    assert code == 2 and "--config job.yaml: no such file" in error
    assert not script.srun.exists()


def test_script_brings_the_job_to_its_software(script: Script) -> None:
    venv = script.here / "my venv/bin"
    venv.mkdir(parents=True)
    (venv / "activate").write_text("export ACTIVATED=yes\n")
    (script.here / "site.env").write_text(
        f"MLM_VENV='{venv.parent}'\nMLM_MODULES='cuda/12 gcc/13'\nOF_THE_SITE='a b'$NOT_SET\nMLM_PYTHON=/nowhere\nGLOO_SOCKET_IFNAME=x\n"
        'module() { echo "$@" >>modules; }\n'
    )
    code, error = script.run(MLM_CLUSTER_ENV="site.env", GLOO_SOCKET_IFNAME="mine")
    assert code == 0, error
    env = json.loads(Path("seen.json").read_text())[1]
    assert (env["ACTIVATED"], env["OF_THE_SITE"], env["GLOO_SOCKET_IFNAME"]) == ("yes", "a b", "mine")
    assert script.run(MLM_CLUSTER_ENV="typo.env")[0] == 2
    assert Path("modules").read_text() == "load cuda/12 gcc/13\n"
    missing = script.run(MLM_CONDA="x", PATH=f"{script.fakes}:/usr/bin:/bin")
    assert missing[0] == 2


def test_script_starts_everything_in_the_container(script: Script, fakes: Path) -> None:
    apptainer = fake(
        fakes, "apptainer", "words = sys.argv[sys.argv.index('image.sif') + 1:]\nos.execvp(words[0], words)\n"
    )
    container = {"MLM_CONTAINER": "image.sif", "MLM_CONTAINER_MOUNTS": "/data:/data"}
    assert script.run(**container, MLM_CONTAINER_RUNTIME="apptainer")[0] == 0
    modules = [argv[argv.index("-m") + 1] for argv, _ in calls_of(apptainer)]
    assert modules == ["launcher.batch", "launcher.exec", "launcher.batch"]
    assert all("/data:/data" in argv for argv, _ in calls_of(apptainer))
    script.srun.unlink()
    assert script.run(**container)[0] == 0  # pyxis, by srun
    pyxis = calls_of(script.srun)
    assert [argv[argv.index("-m") + 1] for argv, _ in pyxis] == modules
    assert all("--container-image=image.sif" in argv for argv, _ in pyxis)
    assert all("--overlap" in argv for argv, _ in (pyxis[0], pyxis[2]))
    assert script.run(**container, MLM_CONTAINER_RUNTIME="docker")[0] == 2


# The record of jobs ---------------------------------------------------------------------------------------------------


def began(step: int, lineage: str = "1") -> dict[str, object]:
    return {"event": "began", "lineage": lineage, "step": step}


def ended(state: str, lineage: str = "1") -> dict[str, object]:
    return {"event": "ended", "lineage": lineage, "state": state}


@pytest.mark.parametrize(
    ("lines", "loop"),
    [
        ([], None),
        ([began(5), ended("crashed"), began(5), ended("crashed")], None),
        ([began(5), ended("crashed"), began(5), ended("crashed"), began(5), ended("crashed")], (5, 3, 3)),
        (3 * [began(5)], None),  # nodes that were lost
        ([began(5), *2 * [began(5), ended("crashed")], began(5), ended("crashed")], (5, 4, 3)),
        (10 * [began(0)], (0, 10, 0)),
        ([*2 * [began(5), ended("crashed")], began(6), ended("crashed")], None),  # it got on
        ([*2 * [began(5), ended("crashed")], began(5), ended("preempted"), began(5), ended("crashed")], None),
        ([*2 * [began(5), ended("crashed")], began(5, "2"), ended("crashed", "2")], None),
        ([{"event": "submitted", "lineage": "1"}, *3 * [began(0), ended("crashed")]], (0, 3, 3)),
    ],
)
def test_crash_loops(lines: list[dict[str, object]], loop: tuple[int, int, int] | None) -> None:
    assert crash_loop(lines, "1") == (jobs.Loop(*loop) if loop else None)


def test_a_record_that_a_crash_tore_loses_no_other(tmp_path: Path) -> None:
    jobs.record(tmp_path, "began", lineage="1", job="1")
    with (tmp_path / "jobs.jsonl").open("a") as file:
        file.write('{"event": "end')
    jobs.record(tmp_path, "ended", lineage="1", state="crashed")
    with (tmp_path / "jobs.jsonl").open("a") as file:
        file.write('{"some": "thing"}\n7\n')
    assert [line["event"] for line in jobs.records(tmp_path)] == ["began", "ended"]


def test_failed_ranks_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, job = RunDir(tmp_path / "run"), SlurmJob("9", "9", 0, True, True, ())
    assert batch.begin(run, job) == 0
    write_report(run.job_reports(job.job_id), Report(3, 1, 0))
    (run.logs / "rank-00003.log").write_text("Traceback: the thing that went wrong\n")
    assert batch.verdict(run, job, 1) == batch.REQUEUE
    assert "rank 3 ended with code 1\nTraceback: the thing that went wrong" in capsys.readouterr().err


def test_scontrols_words() -> None:
    line = "JobId=12 JobName=a b JobState=RUNNING Reason=None Dependency=(null) NodeList=node[1-2] BatchHost=node1"
    assert parse_scontrol(line) == JobState("12", "RUNNING", "", "node[1-2]")
    ended = parse_scontrol("JobId=13 JobState=COMPLETED EndTime=2026-01-02T03:04:05 NodeList=(null)")
    assert ended is not None and ended.end == datetime(2026, 1, 2, 3, 4, 5).timestamp()
    assert parse_scontrol("slurm_load_jobs error: Invalid job id specified") is None


@pytest.mark.parametrize(
    ("state", "job", "expected"),
    [
        (None, None, "unknown"),
        ("running", None, "running"),
        (None, "PENDING", "waiting"),
        ("preempted", "PENDING", "waiting"),
        ("failed", "PENDING", "waiting"),
        ("cancelled", "PENDING", "waiting"),
        ("failed", "RUNNING", "starting"),
        ("finished", "RUNNING", "finished"),
        (None, "RUNNING", "starting"),
        ("running", "RUNNING", "running"),
        ("finished", "COMPLETED", "finished"),
        ("finished", "CANCELLED", "finished"),
        ("running", "CANCELLED", "cancelled"),
        ("cancelled", "CANCELLED", "cancelled"),
        ("failed", "FAILED", "failed"),
        ("running", "NODE_FAIL", "failed"),
        ("running", "TIMEOUT", "failed"),
        ("preempted", "COMPLETED", "preempted"),
    ],
)
def test_a_runs_state_by_its_own_word_and_slurms(state: str | None, job: str | None, expected: str) -> None:
    assert outcome(state, JobState("12", job) if job else None)[0] == expected


def test_of_several_jobs_the_one_that_runs_tells() -> None:
    running, waiting, over = (
        JobState("11", "RUNNING", nodes="n1"),
        JobState("12", "PENDING"),
        JobState("10", "FAILED", nodes="n1"),
    )
    assert most_telling([over, running, waiting]) == running
    assert most_telling([over, waiting]) == waiting
    assert most_telling([over]) == over
    assert most_telling([]) is None


def test_slurms_word_counts_no_more_when_the_run_went_on_elsewhere() -> None:
    job = JobState("12", "CANCELLED", end=1000.0)
    assert outcome("running", job, said=1010.0)[0] == "cancelled"
    assert outcome("running", job, said=5000.0)[0] == "running"


# Cancel ---------------------------------------------------------------------------------------------------------------

SCONTROL = """
states = json.load(open('states.json'))
mine = [f'JobId={job} JobState={state} NodeList=n1' for job, (lineage, state) in states.items() if lineage == sys.argv[-1]]
if states == {}:
    sys.exit('slurm_load_jobs error: Unable to contact slurm controller')
print('\\n'.join(mine)) if mine else sys.exit('slurm_load_jobs error: Invalid job id specified')
"""


class Cancelled:
    """`mlm-launch cancel` of a run whose jobs stand as SLURM's stand-ins say: {job: (lineage, state)}."""

    def __init__(self, here: Path, fakes: Path) -> None:
        self.here, self.run = here, RunDir(here / "runs/job")
        fake(fakes, "scontrol", SCONTROL)
        self.scancel = fake(fakes, "scancel")
        fake(fakes, "sacct")
        self.env = {**os.environ, "PATH": f"{fakes}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def __call__(self, states: dict[str, tuple[str, str]], *flags: str) -> tuple[int, str]:
        (self.here / "states.json").write_text(json.dumps(states))
        command = [sys.executable, "-m", "launcher.cli", "cancel", str(self.run.path), *flags]
        done = subprocess.run(command, env=self.env, cwd=self.here, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    def at_work(self, job: str, lineage: str | None = None) -> None:
        """The job has begun, and rank 0 holds the run."""
        jobs.record(self.run.path, "began", job=job, lineage=lineage or job, step=0)
        self.run.job_reports(job).mkdir(parents=True, exist_ok=True)
        (self.run.path / "lock").write_text(json.dumps({"host": "n1", "pid": 1}))
        later = time.time() + 1
        os.utime(self.run.path / "lock", (later, later))

    @property
    def request(self) -> dict[str, object] | None:
        return json.loads(self.run.stop_request.read_text()) if self.run.stop_request.exists() else None

    @property
    def cancelled(self) -> list[list[str]]:
        return [argv for argv, _ in calls_of(self.scancel)]


@pytest.fixture
def cancel(config: Path, fakes: Path) -> Cancelled:
    return Cancelled(config.parent, fakes)


def test_cancel_of_a_run_that_another_job_waits_for(cancel: Cancelled) -> None:
    cancel.at_work("11")
    jobs.record(cancel.run.path, "submitted", job="12", lineage="12")
    code, said = cancel({"11": ("11", "RUNNING"), "12": ("12", "PENDING")})
    assert code == 0, said
    assert cancel.cancelled == [["--state=PENDING", "12"]]
    assert cancel.request == {"reason": "mlm-launch cancel", "requeue": False}


def test_cancel_overrides_the_time_limits_request(cancel: Cancelled) -> None:
    cancel.at_work("11")
    cancel.run.request_stop("SLURM", requeue=True)
    assert cancel({"11": ("11", "RUNNING")})[0] == 0
    assert cancel.request == {"reason": "mlm-launch cancel", "requeue": False}


@pytest.mark.parametrize("lock", ["none", "old"])
def test_cancel_of_a_job_that_is_still_starting(cancel: Cancelled, lock: str) -> None:
    cancel.at_work("11")
    if lock == "none":
        (cancel.run.path / "lock").unlink()
    else:  # of a start before, which was killed
        os.utime(cancel.run.path / "lock", (1, 1))
    code, said = cancel({"11": ("11", "RUNNING")})
    assert code == 0 and "still starting" in said
    assert cancel.cancelled == [["11"]]


def test_cancel_takes_the_rest_of_a_chain(cancel: Cancelled) -> None:
    cancel.at_work("21", lineage="20")
    code, said = cancel({"21": ("20", "RUNNING"), "20": ("20", "PENDING")})
    assert code == 0, said
    assert cancel.cancelled == [["--state=PENDING", "20"]] and cancel.request


def test_cancel_when_slurm_does_not_answer_says_so(cancel: Cancelled) -> None:
    cancel.at_work("11")
    code, said = cancel({})
    assert code == 2 and "SLURM cannot be asked" in said
    assert cancel.request is None


def test_cancel_waits_for_an_end_after_its_request(cancel: Cancelled) -> None:
    cancel.at_work("11")
    status = {"state": "preempted", "requeue": True, "step": 5, "reason": "before"}
    (cancel.run.path / "status.json").write_text(json.dumps(status))
    code, said = cancel({"11": ("11", "RUNNING")}, "--wait", "1")
    assert code == 1 and "still running" in said
    assert cancel.request


def test_what_was_cancelled_is_neither_requeued_nor_begun(cancel: Cancelled, script: Script) -> None:
    process = script.start(state="wait", code=76)
    try:
        wait_for(Path("waiting"), process)
        jobs.record(cancel.run.path, "cancel", lineage="55")  # and the run hangs: the watchdog ends it
        (script.here / "state").unlink()
        cancel.run.request_stop("mlm-launch cancel")
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75
    assert not script.requeued
    Path("seen.json").unlink()
    code, said = script.run(SLURM_RESTART_COUNT="1")
    assert code == 75 and "does not begin" in said and not Path("seen.json").exists()


def test_logs_shows_the_end_of_a_jobs_log_and_follows_it_to_the_runs_end(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(config.parent / "runs/job")
    run.logs.mkdir(parents=True)
    status = {"state": "finished", "requeue": False, "step": 5, "reason": ""}
    (run.path / "status.json").write_text(json.dumps(status))
    assert cli.main(["logs", "job"]) == 2
    assert "no such log" in capsys.readouterr().err
    for number, name in enumerate(("slurm-7.out", "slurm-12.out", "rank-00003.log")):
        (run.logs / name).write_text("".join(f"{name} {i}\n" for i in range(9)))
        os.utime(run.logs / name, (number, number))
    assert cli.main(["logs", "job", "-n", "2", "--follow"]) == 0
    assert capsys.readouterr().out == "slurm-12.out 7\nslurm-12.out 8\n"
    assert cli.main(["logs", "job", "-n", "1", "--rank", "3"]) == 0
    assert capsys.readouterr().out == "rank-00003.log 8\n"
    assert cli.main(["logs", "job", "--rank", "4"]) == 2
    assert "there are rank-00003.log, slurm-12.out" in capsys.readouterr().err


# Staging --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(config: Path) -> Path:
    place = config.parent / "my corpus"
    (place / "train").mkdir(parents=True)
    shards = []
    for i in range(3):
        (place / f"train/{i}.tar").write_bytes(os.urandom(100 + i))
        shards.append({"path": f"train/{i}.tar", "size": 100 + i})
    (place / "manifest.json").write_text(json.dumps({"shards": shards}))
    config.write_text(yaml.safe_dump({"data": {"manifest": str(place / "manifest.json")}}))
    return place


def test_staging_copies_what_is_not_there_and_tells_the_program(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["scratch dir", "--", "--config", "job.yaml"]
    assert stage.main(["copy", *words]) == 0
    assert "staged data.manifest: 3 shards" in capsys.readouterr().err
    assert stage.main(["flags", *words]) == 0
    flag = capsys.readouterr().out
    (flag,) = shlex.split(flag)
    copied = Path(flag.removeprefix("--data.manifest="))
    for path in ("manifest.json", "train/0.tar", "train/1.tar", "train/2.tar"):
        assert (copied.parent / path).read_bytes() == (corpus / path).read_bytes()
    (copied.parent / "train/1.tar").write_bytes(b"torn")
    assert stage.main(["copy", *words]) == 0
    assert "staged data.manifest: 1 shards" in capsys.readouterr().err
    assert (copied.parent / "train/1.tar").read_bytes() == (corpus / "train/1.tar").read_bytes()


def test_a_corpus_prepared_anew_is_staged_anew(corpus: Path) -> None:
    words = ["scratch", "--", "--config", "job.yaml"]
    assert stage.main(["copy", *words]) == 0
    (corpus / "train/0.tar").write_bytes(os.urandom(100))  # of the same size
    manifest = json.loads((corpus / "manifest.json").read_text())
    (corpus / "manifest.json").write_text(json.dumps(manifest | {"made": "again"}))
    assert stage.main(["copy", *words]) == 0
    copies = {path.read_bytes() for path in Path("scratch").rglob("0.tar")}
    assert (corpus / "train/0.tar").read_bytes() in copies and len(copies) == 2


@pytest.mark.parametrize("path", ["../outside.tar", "/etc/passwd", "s3://bucket/x.tar"])
def test_staging_writes_nothing_outside_its_directory(
    corpus: Path, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (corpus / "manifest.json").write_text(json.dumps({"shards": [{"path": path, "size": 1}]}))
    assert stage.main(["copy", "scratch", "--", "--config", "job.yaml"]) == 2
    assert "is not within its directory" in capsys.readouterr().err


def test_staging_of_what_is_no_file(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["copy", "scratch", "--", "--config", "job.yaml"]
    assert stage.main([*words, "--data.manifest=https://host/manifest.json"]) == 2
    assert "data.cache_dir" in capsys.readouterr().err
    config.write_text("data: {sources: [{manifest: a}]}")
    assert stage.main(words) == 2
    assert "data.sources" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "lineage", "waits"), [("lost", "55", True), ("near", "55", False), ("near", "7", True)]
)
def test_the_lock_of_an_earlier_start_that_slurm_ended(script: Script, host: str, lineage: str, waits: bool) -> None:
    run = Path("runs/job")
    jobs.record(run, "began", job=lineage, lineage=lineage, step=0)
    (run / "lock").write_text(json.dumps({"attempt": 1, "host": host, "pid": 1}))
    last = time.time() - lifecycle.STALE_AFTER_S + 4
    os.utime(run / "lock", (last, last))
    assert script.run(SLURM_RESTART_COUNT="1", SLURM_JOB_NODELIST="here,near")[0] == 0
    assert (Path("seen.json").stat().st_mtime > last + lifecycle.STALE_AFTER_S) == waits
