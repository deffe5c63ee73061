"""Every command that README.md and the pages show runs.

Those that need what is not here are in LISTED, with the reason, and are held against what would parse them.
"""

import argparse
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import pytest

from launcher.cli import make_parser
from mlm_dist.cli import COMMANDS, WITH_OVERRIDES
from mlm_dist.config import known_keys
from tests.docs.lab import LAUNCHED, Lab, client, s3
from tests.docs.shell import ASSIGNED, PAGES, commands, words
from tests.ranks import ROOT

pytestmark = pytest.mark.timeout(600)

CLUSTER = "needs a cluster; run on a simulated one by tests/cluster/"
MACHINE = "takes minutes to hours"
INSTALLS = "the packages are installed already, and a test changes no environment"
BRANCH = "goes on from a run of 100,000 steps; the same, shorter, in tests/e2e/test_branch.py::test_a_branch_equals_the_run_that_decays_itself_to_the_bit"
CONVERT = "needs a training of DeepSpeed's; made and converted in tests/dist/test_convert.py::test_weights_moments_and_step_are_the_scripts"
LAUNCH = "another launcher; run by tests/e2e/test_launch.py::test_launchers_give_the_same_run"
HUB = "names of the hub, which is not asked here; a model of each type is trained in tests/e2e/test_families.py::test_a_resumed_run_ends_in_the_same_weights"
SERVER = "needs an account and a network; what is sent is judged offline in "
RANKS = "two ranks of it run in tests/dist/test_eval.py::test_the_same_to_the_bit_on_any_number_of_ranks"
LOG = "needs a SLURM job; tests/launch/test_slurm.py::test_logs_shows_the_end_of_a_jobs_log_and_follows_it_to_the_runs_end"
# Command, as far as its name and first arguments, or to its end ($) -> why it does not run here. The longest that fits counts.
LISTED = {
    "make demo": f"{MACHINE}; its commands are those of the tutorial",
    "make test": "is what runs this",
    "make chaos": MACHINE,
    ".venv/bin/pytest tests/e2e/test_resume.py": "is run beside this",
    ".venv/bin/pytest tests/cluster": "is run beside this",
    ".venv/bin/pytest tests/dist/test_parity.py": "is run beside this",
    "python -m benchmarks.": MACHINE,
    ".venv/bin/python -m benchmarks.": MACHINE,
    "pip install": INSTALLS,
    ".venv/bin/pip install": INSTALLS,
    "sbatch slurm/smoke.sbatch": f"{CLUSTER}test_scripts.py::test_smoke",
    "sbatch --nodes=2": f"{CLUSTER}test_scripts.py::test_train_by_hand",
    "sbatch --array=1-16": f"{CLUSTER}test_scripts.py::test_prepare_by_an_array_gives_the_shards_of_one_process",
    "srun -N": f"{CLUSTER}test_doctor.py::test_doctor_names_the_node_that_lacks_the_data",
    "mlm-launch logs bert_base -f": LOG,
    "torchrun --nproc-per-node 8 -m mlm_dist.doctor": LAUNCH,
    "torchrun --nproc_per_node 2 -m mlm_dist.train": LAUNCH,
    "deepspeed --num_gpus 2 --module mlm_dist.train": LAUNCH,
    "mlm-launch local -n 8 --config recipes/bert_base.yaml --run.name decay-100k": BRANCH,
    "mlm-dist checkpoint convert deepspeed-run": CONVERT,
    "mlm-launch local -n 2 --config run.yaml --run.name taken": CONVERT,
    "mlm-launch local -n 1 --config recipes/adapt.yaml --model.name_or_path ": HUB,
    "mlm-dist export runs/modernbert": "the run above it",
    "mlm-dist plan --config recipes/adapt.yaml --model.name_or_path answerdotai": HUB,
    "torchrun --nproc_per_node 2 -m mlm_dist.eval_command": RANKS,
    "mlm-dist sync runs/demo$": f"{SERVER}tests/unit/test_sync.py::test_the_offline_run_holds_exactly_the_metrics",
    "HF_TOKEN=hf_... mlm-dist export": f"{SERVER}tests/unit/test_export_outside.py::test_an_export_goes_to_the_hub_as_it_was_verified",
    "tensorboard --logdir": "a server, which does not end",
}
TUTORIAL = commands(ROOT / "docs/tutorial.md")
# What pages take to be there, in the pages' own words.
PREPARED = [
    "mlm-dist prepare corpus/ more/*.jsonl.zst --output data/corpus",
    "mlm-dist tokenizer --manifest data/corpus/manifest.json --vocab-size 30522 --output data/corpus/tokenizer",
    "mlm-launch local -n 1 --config run.yaml",
    "mlm-dist export runs/run --output bert-base-uncased",
    *TUTORIAL[:3],
    LAUNCHED,
    "mlm-dist prepare --builtin python-docs --output data/smoke",
    "mlm-dist tokenizer --manifest data/smoke/manifest.json --vocab-size 2048 --output data/smoke/tokenizer",
    "mlm-dist prepare my_texts/ --output data/adapt",
    "mlm-launch local -n 1 --config recipes/adapt.yaml",
    "mlm-launch local -n 8 --config recipes/bert_base.yaml",
]
SHOWN = [(page, command) for page in PAGES for command in commands(page)]


def listed(command: str) -> str | None:
    """The entry of LISTED that a command falls under."""
    return max((start for start in LISTED if f"{command}$".startswith(start)), key=len, default=None)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    with s3() as environ:
        quiet = {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "disabled",
            "COLUMNS": "160",
            "HF_HUB_OFFLINE": "1",
        }
        found = Lab(folder, {**environ, **quiet, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)})
        for path in (folder / "shards").iterdir():
            client(environ).upload_file(str(path), "bucket", f"corpus/{path.name}")
        for command in PREPARED:
            done = found.run(command)
            assert done.code == 0, f"{command}: {done.code}\n{done.output}"
        yield found


@pytest.mark.parametrize(
    ("page", "command"), [pytest.param(p, c, id=f"{p.name}: {c}") for p, c in SHOWN if not listed(c)]
)
def test_a_command_runs(page: Path, command: str, lab: Lab) -> None:
    shown = [c for c in commands(page) if not listed(c)]
    for before in shown[: shown.index(command)]:
        lab.run(before)
    done = lab.run(command)
    assert done.code == 0, f"{done.code}\n{done.output}"


def test_every_entry_of_the_list_is_of_some_command() -> None:
    assert set(LISTED) == {listed(command) for _, command in SHOWN} - {None}


@pytest.mark.parametrize("command", sorted({c for _, c in SHOWN if listed(c)}))
def test_a_command_that_does_not_run_here_is_one_that_could(command: str, lab: Lab) -> None:
    entry = listed(command)
    assert entry is not None
    for file, test in re.findall(r"([\w/]+\.py)::(test_\w+)", LISTED[entry]):
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{test}"
    check(words(command, lab.folder))


def check(argv: list[str]) -> None:
    """That the programs of a command exist and know its flags."""
    program, *rest = [word for word in argv if not ASSIGNED.match(word)]
    program = program.rpartition("/")[2]
    if program == "make":
        done = subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in rest)
    elif program == "pip":
        check_pip([word for word in rest if word != "install"])
    elif program == "sbatch":
        script = next(i for i, word in enumerate(rest) if word.endswith(".sbatch"))
        assert (ROOT / rest[script]).is_file()
        for name in ("prepare", "train"):
            if name in rest[script]:
                check_flags(name, rest[script + 1 :])
    elif program == "mlm-launch":
        args, config = make_parser().parse_known_args(rest)
        check_flags("train", [*config, *(["--config", args.config] if hasattr(args, "config") else [])])
    elif program == "mlm-dist":
        check_flags(rest[0], rest[1:])
    elif any(word.startswith("benchmarks.") for word in rest):
        source = (ROOT / f"{rest[1].replace('.', '/')}.py").read_text()
        assert all(f'"{word}"' in source for word in rest if word.startswith("--")), argv
    else:  # a launcher's own words, then a program's
        here = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        assert program == "srun" or shutil.which(program, path=here), program
        for module in [i for i, word in enumerate(rest) if word.startswith("mlm_dist.")]:
            command = next(name for name, (owner, _) in COMMANDS.items() if owner.startswith(rest[module]))
            check_flags(command, rest[module + 1 :])


def check_flags(command: str, argv: list[str]) -> None:
    """That a command of ours has these flags, of its own or by the run config, and its config is there."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    if command == "train":
        parser.add_argument("--config")
    else:
        importlib.import_module(COMMANDS[command][0]).add_arguments(parser)
    args, rest = parser.parse_known_args(argv)
    keys = known_keys() if command == "train" or command in WITH_OVERRIDES else []
    assert {word.split("=")[0].removeprefix("--") for word in rest if word.startswith("-")} <= set(keys), (
        command,
        rest,
    )
    config = getattr(args, "config", None)
    assert config in (None, "run.yaml") or (ROOT / config).is_file(), config


def check_pip(argv: list[str]) -> None:
    """That what is asked for is an extra of this package, or installed."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    here = {distribution.name for distribution in distributions()}
    for word in argv:
        wanted = re.fullmatch(r"(?:mlm-dist|\.)\[([\w,]+)\]", word)
        assert (
            set(wanted[1].split(",")) <= set(extras)
            if wanted
            else word.startswith("-") or word in here or (ROOT / word).is_file()
        )


def skeleton(line: str) -> str:
    """A printed line without its figures, the words that a model gives, its table's width, and whether W&B is on."""
    for pattern, by in (
        (r"[━─]+", "─"),
        (r"\d[\d.,:e+-]*", "0"),
        (r"W&B \w+", "W&B"),
        (r"│ \S+ +│ +0%", "│ word │ 0%"),
        (r"left 0 .*", "left"),
        (r" +", " "),
    ):
        line = re.sub(pattern, by, line)
    return line.strip()


@pytest.mark.parametrize("command", TUTORIAL)
def test_the_tutorial_shows_what_is_printed(command: str, lab: Lab) -> None:
    printed = {skeleton(line) for line in lab.run(command).output.splitlines()}
    page = (ROOT / "docs/tutorial.md").read_text()
    shown = re.search(rf"^    \$? ?{re.escape(command)}.*\n+((?:    .*\n)*)", page, re.MULTILINE)
    assert shown is not None
    for line in shown[1].splitlines():
        assert line.strip() == "..." or any(other.startswith(skeleton(line)) for other in printed), line
