"""One cluster of three nodes for all tests here, a tiny run, and what must hold after every test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import SECRETS, CannotRun, Cluster, tails
from tests.e2e.program import Program, save_config

STEPS = 400  # so many that a run is not over before what a test does to it has an effect
SHORT = ["--train.steps", 30]  # where a test does nothing to it


@pytest.fixture(scope="session")
def three_nodes() -> Iterator[Cluster]:
    """The cluster."""
    try:
        cluster = Cluster(3, {"MINICLUSTER_PREEMPT_GRACE": "20"})
    except CannotRun as reason:
        pytest.skip(str(reason))
    yield cluster
    cluster.down()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that all hosts share: corpus, configs and runs of the session."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def config(folder: Path) -> Path:
    """Losses and weights of this run are the same on any number of ranks, but for rounding."""
    return save_config(
        folder,
        model={"hidden_dropout": 0.0, "attention_dropout": 0.0},
        deepspeed={"config": "zero2"},
        train={"steps": STEPS, "micro_batch": 12, "timeout": 15.0},
        eval={"every": 200},
        checkpoint={"every": 20},
    )


@pytest.fixture(scope="session")
def one_process(config: Path) -> Path:
    """The run directory of `config` trained by one process, without any launcher."""
    Program(config, 1, ["--run.name", "one-process"]).start().finish()
    return config.parent / "runs" / "one-process"


@pytest.fixture(scope="session")
def short_one_process(config: Path) -> Path:
    """The same of a short run."""
    Program(config, 1, [*map(str, SHORT), "--run.name", "short-one-process"]).start().finish()
    return config.parent / "runs" / "short-one-process"


@pytest.fixture(scope="session")
def undisturbed(config: Path, three_nodes: Cluster) -> Path:
    """The run directory of `config` on two nodes, a rank on each, when nothing happens to it."""
    job = three_nodes.submit(config, "--nodes", 2, "--run.name", "undisturbed")
    run = config.parent / "runs" / "undisturbed"
    assert three_nodes.wait_for_end(job) == "COMPLETED", tails(sorted(run.glob("logs/*")))
    return run


@pytest.fixture
def cluster(three_nodes: Cluster, folder: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The cluster, idle. Whatever a test does, afterwards nothing of it runs on any node, and no file holds a secret."""
    failed = request.session.testsfailed
    yield three_nodes
    try:
        if request.session.testsfailed == failed:
            three_nodes.wait_until_quiet()
        else:
            print(three_nodes.tails(), tails(sorted(folder.glob("runs/*/logs/*.*")) + sorted(folder.glob("*.log"))))
    finally:
        three_nodes.mend()
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not any(secret.encode() in content for secret in SECRETS.values()), f"{path} holds a secret"
