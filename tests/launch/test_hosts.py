"""`mlm-launch hosts`: hostfiles, filters and command lines; real jobs without ssh and over a stand-in for pdsh."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import cli, hosts
from launcher.command import LEASE, REPORT_DIR, Call, environment
from launcher.exec import Report, read_reports, write_report
from launcher.lease import Lease
from launcher.topology import LocalTopology
from mlm_dist.errors import UserError
from tests.launch.fake_hosts import FakeHosts
from tests.launch.test_local import HERE, HOSTILE, alive
from tests.ranks import free_port

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
POOL: hosts.Slots = {"node1": (0, 1, 2, 3), "n-2.local": (0,), "worker_3": (0, 1)}


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "my hosts"
    path.write_text(text)
    return path


# Hostfile and filters -------------------------------------------------------------------------------------------------


def test_hostfile(tmp_path: Path) -> None:
    text = "# all of them\n\nnode1 slots=4  \n  n-2.local\tslots=1 max_slots=2\nworker_3   slots=2 # small\n"
    assert hosts.read_hostfile(hostfile(tmp_path, text)) == POOL


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("node1", "line 1: 'node1'"),
        ("a slots=1\nnode1 slots=x", "line 2: 'node1 slots=x'"),
        ("node1 slots=-1", "slots=N"),
        ("node1 slots=2x", "slots=N"),
        ("node1 slots=0", "slots=0"),
        ("a slots=1\n\na slots=2", "line 3: 'a slots=2': a stands"),
        ("me@node1 slots=1", "'me@node1'"),
        ("::1 slots=1", "'::1'"),
        ("-w slots=1", "'-w'"),
        ("$(reboot) slots=1", "is no host name"),
        ("# none\n", "names no host"),
    ],
)
def test_bad_hostfile_names_file_line_and_value(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(UserError, match=re.escape(named)) as raised:
        hosts.read_hostfile(hostfile(tmp_path, text))
    assert "my hosts" in str(raised.value)


ENTRY = st.sampled_from(list(POOL)).flatmap(
    lambda host: st.lists(st.sampled_from(POOL[host]), max_size=3).map(
        lambda slots: host + (":" + ",".join(map(str, slots)) if slots else "")
    )
)


@settings(deadline=None)  # the first call imports deepspeed
@given(st.lists(ENTRY, min_size=1, max_size=5).map("@".join), st.booleans())
def test_filters_choose_what_deepspeed_chooses(spec: str, include: bool) -> None:
    from deepspeed.launcher.runner import parse_inclusion_exclusion

    given_ = {"include": spec} if include else {"exclude": spec}
    theirs = {
        host: tuple(slots)
        for host, slots in parse_inclusion_exclusion(
            {h: len(s) for h, s in POOL.items()}, given_.get("include", ""), given_.get("exclude", "")
        ).items()
    }
    if not theirs:
        with pytest.raises(UserError, match="leaves nothing"):
            hosts.select(POOL, **given_)
    else:
        ours = hosts.select(POOL, **given_)
        assert (ours, list(ours)) == (theirs, list(theirs))


@pytest.mark.parametrize("spec", ["node9", "node1:4", "node1:x", "node1:", "node1:0,,1", "node1@", "", "node1:-1"])
@pytest.mark.parametrize("kind", ["include", "exclude"])
def test_bad_filter_is_named(spec: str, kind: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"--{kind} {spec}")):
        hosts.select(POOL, **{kind: spec})


def test_port_is_the_same_on_every_host_and_each_runs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hosts.default_port(Path("runs/a")) == hosts.default_port(tmp_path / "runs" / "a")
    ports = {hosts.default_port(Path(f"runs/{i}")) for i in range(50)}
    assert len(ports) > 40 and all(20000 <= port < 30000 for port in ports)


# What is passed on ----------------------------------------------------------------------------------------------------

SECRETS = ["WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLM_TRACK__API_KEY"]
SECRETS += ["NCCL_TOKEN", "MLFLOW_TRACKING_PASSWORD", "my_secret_thing", "GITHUB_TOKEN", "PYTHON_KEYRING_PASSWORD"]


def test_programs_elsewhere_get_what_they_need() -> None:
    wanted = {"PATH": "/bin", "LD_LIBRARY_PATH": "/a b", "MLM_RUN__NAME": "$x", "NCCL_SOCKET_IFNAME": "ib0"}
    wanted |= {"TORCH_EXTENSIONS_DIR": "/e", "OMP_NUM_THREADS": "3", "HF_HOME": "/h", "MLM_DATA__TOKENIZER": "t"}
    assert hosts.passed_on({**wanted, "RANK": "3", "HOME": "/root", "MINE": "x"}, []) == wanted
    assert hosts.passed_on({"HOME": "/root", "MINE": "x"}, ["MINE"]) == {"MINE": "x"}
    with pytest.raises(UserError, match="--export MINE"):
        hosts.passed_on({}, ["MINE"])


@pytest.mark.parametrize("name", [*SECRETS, "HTTPS_PROXY"])
def test_secrets_are_refused(name: str) -> None:
    value = "http://me:hush-hush@proxy:1" if name == "HTTPS_PROXY" else "hush-hush"
    with pytest.raises(UserError, match=f"--export {name}.*wandb login") as raised:
        hosts.passed_on({name: value}, [name])
    assert "hush-hush" not in str(raised.value)


def test_secrets_are_on_no_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, "hush-hush")
    (tmp_path / "c.yaml").write_text("{}")
    file = hostfile(tmp_path, "a slots=1\n")
    assert cli.main(["hosts", "--hostfile", str(file), "--config", str(tmp_path / "c.yaml"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "hush-hush" not in shown
    (packed,) = re.findall(r"--packed (\S+)", shown.splitlines()[-1])
    assert not set(SECRETS) & set(Call.unpack(packed).env)
    outer = hosts.ssh_environment(os.environ, "", None)  # of the deepspeed launcher, which exports PYTHON*, NCCL*, ...
    assert not set(SECRETS) & set(outer)


@pytest.mark.parametrize(("slots", "meet"), [("a slots=2\n", "127.0.0.1"), ("a slots=1\nb slots=1\n", "a")])
def test_ranks_of_one_host_meet_on_its_loopback_interface(
    slots: str, meet: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text("{}")
    words = ["hosts", "--hostfile", str(hostfile(tmp_path, slots)), "--config", str(tmp_path / "c.yaml"), "--dry-run"]
    assert cli.main(words) == 0
    assert f" --master_addr={meet} " in capsys.readouterr().out


def test_environment_of_the_deepspeed_launcher() -> None:
    base = {"PATH": "/b", "NCCL_DEBUG": '"$(x)', "PYTHONPATH": "a", "RANK": "1", "PDSH_SSH_ARGS_APPEND": "-v"}
    env = hosts.ssh_environment(base, "/x/a", 222)
    assert env.pop("PDSH_SSH_ARGS_APPEND").startswith("-v -p 222 -o ")
    assert env == {"PATH": "/b", "PYTHONPATH": "/x/a"}


def test_python_path_reaches_other_directories() -> None:
    base = {"PYTHONPATH": "lib:/opt/a b"}
    assert hosts.python_path(base, "/work", "/site-packages") == "/work/lib:/opt/a b"
    assert hosts.python_path({}, "/work", "/work") == "/work"  # this code itself is found by the directory only
    assert hosts.python_path({}, "/work", "/site-packages") == ""
    for bad in ("$x", 'a"b', "`x`", "a\\b", "50%"):
        with pytest.raises(UserError, match="PYTHONPATH"):
            hosts.python_path({"PYTHONPATH": bad}, "/work", "/site-packages")


# Command line ---------------------------------------------------------------------------------------------------------


@given(st.lists(TEXT), st.dictionaries(TEXT, TEXT), TEXT)
def test_packed_call_is_one_plain_word(words: list[str], env: dict[str, str], cwd: str) -> None:
    call = Call(cwd, env, words)
    word = call.pack()
    assert re.fullmatch(r"[A-Za-z0-9_=-]+", word)
    assert Call.unpack(word) == call


def test_words_that_are_no_text_survive_packing() -> None:
    word = os.fsdecode(b"caf\xe9")
    assert Call.unpack(Call("/", {}, [word]).pack()).words == [word]


def test_python_that_needs_quotes_is_refused() -> None:
    with pytest.raises(UserError, match="/my env/bin/python"):
        hosts.ssh_command("/my env/bin/python", [], Call("/", {}, []), verbose=False)


def test_deepspeed_makes_of_the_command_what_is_meant(tmp_path: Path) -> None:
    """Its own parser and pdsh runner; then a shell reads what it would send to a host, as sshd's would."""
    file = hostfile(tmp_path, "node1 slots=2\nnode2 slots=4\n")
    place = hosts.Place(str(file), ("--include=node1@node2:0,2",), "node1", 4711)
    early = {"LD_LIBRARY_PATH": "/a b/$x'\"%h", "DS_ACCELERATOR": "cpu"}
    call = Call(str(tmp_path), {"A": "b c"}, ["some.program", *HOSTILE])
    command = hosts.ssh_command(sys.executable, hosts.ssh_flags(place, early, verbose=False), call, verbose=False)
    code = (
        "import json, sys; from deepspeed.launcher import runner as r; a = r.parse_args(sys.argv[1:]);"
        "pool = r.parse_inclusion_exclusion(r.fetch_hostfile(a.hostfile), a.include, a.exclude);"
        "cmd = r.PDSHRunner(a, r.encode_world_info(pool)).get_cmd({}, pool)[0];"
        "print(json.dumps([pool, a.launcher, a.force_multi, a.master_addr, a.master_port, cmd]))"
    )
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    result = subprocess.run([sys.executable, "-c", code, *command[3:]], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    *parsed, pdsh = json.loads(result.stdout.splitlines()[-1])
    assert parsed == [{"node1": [0, 1], "node2": [0, 2]}, "pdsh", True, "node1", 4711]
    assert "-N" in pdsh
    line = " ".join(w for w in pdsh[pdsh.index("-w") + 2 :] if w != "-N").replace("%n", "1").replace("%%", "%")
    script = line.replace(sys.executable, "printf '%s\\0' \"$LD_LIBRARY_PATH\"", 1)
    words = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    assert words[0] == early["LD_LIBRARY_PATH"]
    assert words[words.index("launcher.exec") + 1 :] == ["--packed", call.pack()]
    assert "--node_rank=1" in words and "--no_local_rank" in words
    assert "--log_level=critical" in words  # of its part on the hosts
    loud = hosts.ssh_flags(place, {}, verbose=True)
    assert not [f for f in loud if f.startswith(("--launcher_args", "--enable_each_rank_log"))]


def test_gpus_of_a_host_are_those_that_it_shows(tmp_path: Path) -> None:
    """DeepSpeed gives the slots in CUDA_VISIBLE_DEVICES; the program gets the devices that they stand for."""
    assert environment(LocalTopology(2, (5, 3), 1, 1), {"CUDA_VISIBLE_DEVICES": "5,3"}).keys() == {
        "OMP_NUM_THREADS",
        "CUDA_DEVICE_ORDER",
    }
    (tmp_path / "show.py").write_text(
        "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], 'LAUNCHER_GPUS' in os.environ)"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{HERE.parents[1]}", "LAUNCHER_GPUS": "7,5,3"}
    env = {**env, "CUDA_VISIBLE_DEVICES": "0,2", "DS_ACCELERATOR": "cuda"}
    done = subprocess.run([sys.executable, "-m", "launcher.exec", "show"], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["7,3", "False"], done.stderr


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--no-ssh"], "--node-rank"),
        (["--node-rank", "0"], "--node-rank 0"),
        (["--no-ssh", "--node-rank", "2"], "--node-rank 2"),
        (["--no-ssh", "--node-rank", "-1"], "--node-rank -1"),
        (["--master-port", "70000"], "--master-port 70000"),
        (["--ssh-port", "0"], "--ssh-port 0"),
        (["--master-addr", "a b"], "--master-addr 'a b'"),
        (["--lease", "nan"], "--lease nan"),
        (["--lease", "1"], "--lease 1"),
        (["--grace", "-1"], "--grace"),
        (["--include", "a", "--exclude", "b"], "--include and --exclude"),
        (["--include", "c"], "--include c"),
        (["--export", "WANDB_API_KEY"], "--export WANDB_API_KEY"),
        (["--hostfile", "none"], "--hostfile none"),
    ],
)
def test_bad_input_gives_2_and_names_it(
    flags: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hush-hush")
    (tmp_path / "c.yaml").write_text("{}")
    file = hostfile(tmp_path, "a slots=1\nb slots=1\n")
    args = ["hosts", "--hostfile", str(file), "--config", str(tmp_path / "c.yaml"), "--dry-run", *flags]
    assert cli.main(args) == 2
    message = capsys.readouterr().err
    assert named in message and "hush-hush" not in message


def test_without_pdsh_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "c.yaml").write_text("{}")
    file = hostfile(tmp_path, "a slots=1\n")
    assert cli.main(["hosts", "--hostfile", str(file), "--config", str(tmp_path / "c.yaml")]) == 2
    assert "no pdsh in PATH" in capsys.readouterr().err


# The lease ------------------------------------------------------------------------------------------------------------


def rank_under_lease(folder: Path, seconds: float) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A rank that would sleep for ten minutes, with a helper outside of its session; it and their process ids."""
    (folder / "sleeper.py").write_text(
        "import json, os, subprocess, sys, time\n"
        "helper = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "print(json.dumps([os.getpid(), helper.pid]), flush=True); time.sleep(600)"
    )
    env = {**os.environ, "PYTHONPATH": f"{folder}:{HERE.parents[1]}", REPORT_DIR: str(folder), LEASE: str(seconds)}
    command = [sys.executable, "-m", "launcher.exec", "sleeper"]
    rank = subprocess.Popen(command, env={**env, "RANK": "0"}, stdout=subprocess.PIPE)
    assert rank.stdout is not None
    return rank, json.loads(rank.stdout.readline())


@pytest.mark.parametrize("said", [True, False])
def test_rank_ends_with_its_lease(tmp_path: Path, said: bool) -> None:
    """It ends when told, or when nobody renews it; and not as long as somebody does."""
    lease = Lease(tmp_path, [0], 2.0)
    lease.renew()
    rank, pids = rank_under_lease(tmp_path, 2.0)
    try:
        until = time.monotonic() + 3
        while time.monotonic() < until:
            lease.renew()
            time.sleep(0.2)
        assert rank.poll() is None
        assert lease.began[0][1] == pids[0]
        if said:
            lease.end()
        assert rank.wait(timeout=30) == 137
        assert not any(map(alive, pids))
        assert [r.code for r in read_reports(tmp_path)] == [137]
    finally:
        rank.kill()
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)


def test_rank_that_prints_goes_on_when_ssh_is_gone(tmp_path: Path) -> None:
    text = "import sys\nfor _ in range(3000): print('x' * 100, flush=True)\nopen('done', 'w').close()\nsys.exit(75)"
    (tmp_path / "talker.py").write_text(text)
    Lease(tmp_path, [0], 60.0).renew()
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{HERE.parents[1]}", REPORT_DIR: str(tmp_path), LEASE: "60"}
    command = [sys.executable, "-m", "launcher.exec", "talker"]
    rank = subprocess.Popen(command, env={**env, "RANK": "0"}, cwd=tmp_path, stdout=subprocess.PIPE)
    assert rank.stdout is not None
    assert rank.stdout.read(1000) == (b"x" * 100 + b"\n") * 9 + b"x" * 91
    rank.stdout.close()
    assert rank.wait(timeout=60) == 0
    assert [r.code for r in read_reports(tmp_path)] == [75]
    assert (tmp_path / "done").exists()


def test_silent_ranks_are_those_that_vanished_or_never_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("launcher.lease.time", SimpleNamespace(monotonic=lambda: clock.now))
    lease = Lease(tmp_path, [0, 1, 2], 10.0)

    def after(seconds: float, *beats: int) -> list[int]:
        clock.now += seconds
        for rank in beats:
            path = tmp_path / f"began-{rank}"
            path.write_text('["host", 1]')
            os.utime(path, ns=(0, int(clock.now * 1e9)))
        lease.renew()
        return lease.silent()

    assert after(100.0) == []  # nobody yet: a cold start may take long
    assert after(1.0, 0, 1) == []
    assert after(9.0, 0) == []
    assert after(2.0, 0) == [1, 2]
    assert after(9.0, 2) == [1]


def test_who_failed_first_by_one_hosts_clock_or_by_the_file_servers(tmp_path: Path) -> None:
    def reports(*found: Report) -> list[int]:
        for stamp, report in enumerate(found):
            write_report(tmp_path, report)
            os.utime(tmp_path / f"rank-{report.rank}.json", ns=(stamp, stamp))
        return [r.rank for r in read_reports(tmp_path)]

    assert reports(Report(0, 1, 50, "a"), Report(1, 1, 40, "a"), Report(2, 1, 60, "a")) == [1, 0, 2]
    assert reports(Report(0, 1, 50, "a"), Report(1, 1, 40, "b"), Report(2, 1, 60, "b")) == [0, 1, 2]
    # The last to report, for its workers were ended first, was the first to end.
    assert reports(Report(0, 1, 50, "a"), Report(1, 137, 40, "b", lag=5), Report(2, 1, 60, "b")) == [1, 0, 2]


# Jobs -----------------------------------------------------------------------------------------------------------------


class Job:
    """`mlm-launch hosts` for the stand-in program on two hosts with a rank each."""

    def __init__(self, here: Path, mode: str, *flags: str, path: str = "", extra: list[str] | None = None) -> None:
        self.here = here
        here.mkdir(parents=True, exist_ok=True)
        (here / "job one.yaml").write_text("run: {dir: runs}\n")
        hostfile(here, "alpha slots=1\nbeta slots=1\n")
        self.env = {
            **os.environ,
            "PATH": os.pathsep.join(filter(None, [path, os.environ["PATH"]])),
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
            "DS_ACCELERATOR": "cpu",
            "WANDB_API_KEY": "hush-hush",
            "MLM_X": "a\n'\"$(touch boom) %h",
        }
        self.args = ["hosts", "--hostfile", "my hosts", "--config", "job one.yaml", "--master-addr", "127.0.0.1"]
        self.args += ["--master-port", str(free_port()), "--program", "standin", *flags]
        self.program = ["--mode", mode, *(extra or [])]
        self.processes: list[subprocess.Popen[str]] = []

    def dry_run(self) -> str:
        command = [sys.executable, "-m", "launcher.cli", *self.args, "--dry-run", *self.program]
        return subprocess.run(command, cwd=self.here, env=self.env, capture_output=True, text=True, check=True).stdout

    def start(self, *flags: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "launcher.cli", *self.args, *flags, *self.program]
        pipe = subprocess.PIPE
        self.processes.append(
            subprocess.Popen(command, cwd=self.here, env=self.env, stdout=pipe, stderr=pipe, text=True)
        )
        return self.processes[-1]

    def wait_for(self, *names: str, timeout: float = 120.0) -> None:
        deadline = time.monotonic() + timeout
        while not all((self.here / name).exists() for name in names):
            if any(p.poll() is not None for p in self.processes) or time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"no {names}: {[p.communicate() for p in self.processes]}")
            time.sleep(0.05)

    def end(self, process: subprocess.Popen[str], timeout: float = 120.0) -> tuple[int, str]:
        out, err = process.communicate(timeout=timeout)
        return process.returncode, out + err

    def pids(self) -> list[int]:
        return [pid for path in self.here.glob("pids-*.json") for pid in json.loads(path.read_text())]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for pid in filter(alive, self.pids()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def seen(self, rank: int) -> tuple[list[str], dict[str, str]]:
        """Arguments and environment of a rank."""
        found = json.loads((self.here / f"args-{rank}.json").read_text())
        return found["argv"][1:], found["environ"]


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    made: list[Job] = []
    yield made
    for job in made:
        job.kill()


@pytest.fixture
def fakes(tmp_path: Path) -> Iterator[FakeHosts]:
    found = FakeHosts(tmp_path / "hosts")
    yield found
    found.close()


@pytest.mark.timeout(240)
def test_by_pdsh_all_arrives_untouched_and_the_dry_run_is_what_is_done(tmp_path: Path, jobs, fakes) -> None:
    here = tmp_path / "a b'c\"d$(touch boom)é;%h"
    job = Job(here, "finish", "--ssh-port", "222", path=str(fakes.bin), extra=HOSTILE)
    jobs.append(job)
    shown = job.dry_run()
    assert not any(here.glob("runs"))
    code, output = job.end(job.start())
    assert (code, output) == (0, "")
    for rank in (0, 1):
        argv, environ = job.seen(rank)
        assert argv == ["--config", "job one.yaml", "--mode", "finish", *HOSTILE]
        assert environ["MLM_X"] == job.env["MLM_X"]
        assert environ["PYTHONPATH"] == job.env["PYTHONPATH"]
        assert environ["CUDA_VISIBLE_DEVICES"] == ""
        assert int(environ["OMP_NUM_THREADS"]) >= 1
        assert not {"WANDB_API_KEY", REPORT_DIR, LEASE} & set(environ)
    assert not list(tmp_path.rglob("boom"))
    assert not any(here.glob("runs/*"))  # silent ranks leave no logs, and what held the lease is gone
    assert "-p 222" in fakes.asked["beta"][1]

    really = dict(fakes.asked)
    fakes.deaf = True
    subprocess.run(["bash", "-c", shown], env=job.env, check=True)
    for host, (argv, ssh, _) in fakes.asked.items():
        assert (argv[:-1], ssh) == (really[host][0][:-1], really[host][1])
        done, shown_call = Call.unpack(really[host][0][-1]), Call.unpack(argv[-1])
        told = {k: v for k, v in done.env.items() if not k.startswith("LAUNCHER_")}  # where to report
        assert (done.cwd, told, done.words) == (shown_call.cwd, shown_call.env, shown_call.words)
    assert fakes.asked.keys() == {"alpha", "beta"}


@pytest.mark.timeout(240)
def test_by_pdsh_a_rank_that_dies_takes_the_other_host_down(tmp_path: Path, jobs, fakes) -> None:
    job = Job(tmp_path / "work", "die", path=str(fakes.bin))
    jobs.append(job)
    code, output = job.end(job.start())
    assert code == 137, output
    assert re.search(r"rank 1 on \S+ failed first \(SIGKILL\)", output)
    assert len(job.pids()) == 4 and not any(map(alive, job.pids()))
    assert all(shell.poll() is not None for shell in fakes.shells)


@pytest.mark.timeout(240)
def test_by_pdsh_the_first_signal_asks_for_a_checkpoint(tmp_path: Path, jobs, fakes) -> None:
    job = Job(tmp_path / "work", "stop", path=str(fakes.bin))
    jobs.append(job)
    process = job.start()
    job.wait_for("pids-0.json", "pids-1.json")
    process.terminate()
    code, output = job.end(process)
    assert code == 75, output
    assert "stopped at step 7 with a checkpoint" in output
    assert not any(map(alive, job.pids()))
    assert {p.name for p in (tmp_path / "work" / "runs" / "job one").iterdir()} == {"status.json"}


@pytest.mark.timeout(240)
def test_by_pdsh_a_second_signal_kills_on_all_hosts(tmp_path: Path, jobs, fakes) -> None:
    job = Job(tmp_path / "work", "deaf", path=str(fakes.bin))
    jobs.append(job)
    process = job.start()
    job.wait_for("ready-0.json", "ready-1.json")
    process.terminate()
    job.wait_for("runs/job one/stop_request")
    process.terminate()
    code, output = job.end(process)
    assert code == 143, output
    assert len(job.pids()) == 4 and not any(map(alive, job.pids()))


@pytest.mark.timeout(240)
def test_without_ssh_each_host_starts_its_ranks_and_one_signal_stops_all(tmp_path: Path, jobs) -> None:
    job = Job(tmp_path, "stop", "--no-ssh", extra=HOSTILE)
    jobs.append(job)
    both = [job.start("--node-rank", str(k)) for k in (0, 1)]
    job.wait_for("pids-0.json", "pids-1.json")
    both[1].terminate()  # not the host of rank 0
    for process in both:
        code, output = job.end(process)
        assert code == 75, output
    assert not any(map(alive, job.pids()))
    for rank in (0, 1):
        argv, environ = job.seen(rank)
        assert argv == ["--config", "job one.yaml", "--mode", "stop", *HOSTILE]
        assert (environ["RANK"], environ["LOCAL_RANK"], environ["WORLD_SIZE"]) == (str(rank), "0", "2")
        assert (environ["MASTER_ADDR"], environ["WANDB_API_KEY"]) == ("127.0.0.1", "hush-hush")
