"""The place where the pages' commands run: small text under the names that pages use, recipes with small sizes, an S3 server, and runs that have ended.

What is small: text (some of the language reference), sizes of models, rows and batches, and the steps of a recipe. All else of a recipe, and
every command, is as a user has it. A run that a command makes longer is stopped, as `mlm-launch cancel` does, when it has logged a few steps.
"""

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
import zstandard

from launcher.cli import make_parser
from launcher.run_dir import resolve
from mlm_dist.data.builtin import texts
from tests.docs.shell import Done, Shell, words
from tests.ranks import ROOT

SMALL_MODEL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
STEPS = 4
# Started as it stands, with its two ranks.
LAUNCHED = "mlm-launch local -n 2 --config recipes/demo.yaml"
RUN = {
    "data": {
        "manifest": "data/corpus/manifest.json",
        "val_manifest": "data/corpus/val.json",
        "tokenizer": "data/corpus/tokenizer",
    },
    "model": {"init": "config", "config": {}},
    "train": {"steps": STEPS, "precision": "fp32"},
    "optim": {"lr": 1e-3},
}


def small(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with few steps and a checkpoint among them, and where it is made for GPUs, with small sizes."""
    data, model, train = recipe.setdefault("data", {}), recipe.setdefault("model", {}), recipe["train"]
    if model.get("init") == "config" and model["config"].get("hidden_size", 768) > 256:
        model["config"] = {**model["config"], **SMALL_MODEL, "max_position_embeddings": 64}
    data.update(seq_len=min(data.get("seq_len", 32), 64), workers=0)
    train.update(global_batch=min(train.get("global_batch", 16), 16), micro_batch=min(train.get("micro_batch", 8), 8))
    if train.get("steps"):
        train["steps"] = STEPS
    if recipe["optim"].get("warmup", 0) > 1:
        recipe["optim"]["warmup"] = 1
    recipe.pop("eval", None)
    recipe.setdefault("checkpoint", {}).update(every=2)
    recipe.setdefault("track", {}).update(every=1, wandb="disabled")
    return recipe


class Lab:
    """A directory with what the pages' commands name. ``run`` remembers what ran: the same words twice are one command."""

    def __init__(self, folder: Path, environ: dict[str, str]):
        self.folder = folder
        self.shell = Shell(folder, environ)
        self.environ = {**os.environ, **environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.done: dict[str, Done] = {}
        self._fill()

    def _fill(self) -> None:
        for name in ("ds_configs", "slurm"):
            (self.folder / name).symlink_to(ROOT / name)
        (self.folder / "recipes").mkdir()
        for path in (ROOT / "recipes").glob("*.yaml"):
            (self.folder / "recipes" / path.name).write_text(yaml.safe_dump(small(yaml.safe_load(path.read_text()))))
        (self.folder / "run.yaml").write_text(yaml.safe_dump(small(RUN)))
        (self.folder / "hosts").write_text("node1 slots=8\nnode2 slots=8\n")
        every = [part for text in texts("python-docs") for part in text.split("\n\n") if len(part) > 200]
        for name in ("corpus", "more", "shards"):
            (self.folder / name).mkdir()
        for i, text in enumerate(every[:240]):
            (self.folder / f"corpus/{i}.txt").write_text(text)
        with tarfile.open(self.folder / "shards/train-00000.tar", "w") as tar:
            for path in sorted((self.folder / "corpus").iterdir()):
                tar.add(path, path.name)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in every[240:300])
        (self.folder / "more/a.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))

    def run(self, command: str) -> Done:
        """Run a command as it stands; what ``mlm-launch`` would start on other hosts or as many ranks is shown by its dry run, and then run as one rank."""
        if command not in self.done:
            self.done[command] = self._run(command)
        return self.done[command]

    def _run(self, command: str) -> Done:
        if not command.startswith(("mlm-dist ", "mlm-launch ")):
            bash = ["bash", "-ec", command]
            done = subprocess.run(bash, cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=120)
            return Done(done.returncode, done.stdout + done.stderr)
        argv = words(command, self.folder)
        if argv[:2] == ["mlm-dist", "train"]:
            return self.train(argv[2:])
        if argv[0] == "mlm-dist":
            return self.shell.run(argv)
        if argv[1] not in ("local", "hosts", "slurm"):
            return self.shell.run(argv)
        if command == LAUNCHED:
            return self.shell.run(argv, timeout=300)
        dry = self.shell.run(argv if "--dry-run" in argv else [*argv, "--dry-run"])
        if dry.code or "--dry-run" in argv or argv[1] != "local":
            return dry
        args, overrides = make_parser().parse_known_args(argv[1:])
        program = ["--config", args.config, *overrides]
        if args.program == "mlm_dist.train":
            return self.train(program)
        return self.shell.run(["mlm-dist", args.program.rpartition(".")[2], *program])

    def train(self, argv: list[str]) -> Done:
        """Train as one rank, to the end or to a stop after a few steps."""
        config = argv[argv.index("--config") + 1]
        overrides = [word for word in argv if word not in ("--config", config)]
        run = resolve(self.folder / config, overrides, self.shell.environ)
        done = self.shell.run(["mlm-dist", "train", *argv], stop=(self.folder / run.path, STEPS))
        state = json.loads((self.folder / run.path / "status.json").read_text())["state"]
        assert (done.code, state) in ((0, "finished"), (75, "cancelled")), done
        return Done(0, done.output)


@contextmanager
def s3() -> Iterator[dict[str, str]]:
    """An S3 server with an empty bucket `bucket`; gives the variables by which the AWS tools find it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    environ = {**keys, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    client(environ).create_bucket(Bucket="bucket")
    try:
        yield environ
    finally:
        server.stop()


def client(environ: dict[str, str]) -> Any:
    """A client of that server."""
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=environ["AWS_ENDPOINT_URL"],
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    )
