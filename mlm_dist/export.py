"""``mlm-dist export``: a checkpoint as a stock masked-language model's directory, checked after it is written."""

import argparse
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_dist import export_check, export_onnx, model_card
from mlm_dist.errors import UserError
from mlm_dist.export_hub import Hub
from mlm_dist.model.pretrained import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from mlm_dist.checkpoint import Reader

log = logging.getLogger(__name__)

# Written into each export, so that a later one knows a directory that it may replace.
_MARK = "mlm_dist_export.json"
# Names of all that an export may write: of an earlier one, these are replaced.
WRITES = (
    _MARK, "README.md", model_card.CURVES, export_onnx.NAME, f"{export_onnx.NAME}.data", "config.json", "generation_config.json",
    "model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "chat_template.jinja",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Source:
    """A checkpoint and the run directory that it lies in."""

    run_dir: Path
    checkpoint: Path


def find(path: str | Path, step: int | None = None, *, best: bool = False) -> Source:
    """The checkpoint that a run directory or a checkpoint directory stands for: of a run the one at ``step``, the
    ``best`` by validation loss, or the newest whole one.

    Raises:
        UserError: there is none.
    """
    from mlm_dist import checkpoint

    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give a run directory or one of its checkpoints")
    if (path / "index.json").exists():
        if best:
            raise UserError(f"--best: {path} is one checkpoint already; give the run directory with --best")
        if step is not None:
            raise UserError(f"step {step}: {path} is one checkpoint already; give the run directory to choose a step")
        # Resolved, so that `.` or `step_00000100` in its own directory has parents.
        return Source(path.resolve().parent.parent, path)
    found = checkpoint.committed(path)
    if not found:
        raise UserError(f"{path}: holds no whole checkpoint; give a run directory in which checkpoints/ has one")
    if best:
        lowest = checkpoint.best(path, log.warning)
        if lowest is None:
            raise UserError(
                f"--best: {path} has no whole checkpoint with a validation loss (data.val_manifest, eval.every)"
            )
        return Source(path, lowest)
    if step is None:
        newest = checkpoint.newest(path, log.warning)
        if newest is None:
            raise UserError(f"{path}: all its checkpoints are damaged; give another run")
        return Source(path, newest)
    chosen = path / "checkpoints" / checkpoint.name(step)
    if chosen not in found:
        steps = ", ".join(str(int(p.name.removeprefix("step_"))) for p in found)
        raise UserError(f"step {step}: {path} has no checkpoint of that step; it has {steps}")
    return Source(path, chosen)


def load(source: Source) -> "tuple[PreTrainedModel, PreTrainedTokenizerFast]":
    """The model of a checkpoint, fp32 on the CPU in eval mode with its decoder tied, and the run's tokenizer.

    Raises:
        UserError: the checkpoint is damaged or does not fit the run's model, or the run lacks model/ or tokenizer/.
    """
    from mlm_dist.checkpoint import CheckpointError, Reader

    try:
        reader = Reader(source.checkpoint)
        reader.verify()
        return _model(source, reader), _tokenizer(source.run_dir)
    except CheckpointError as error:
        raise UserError(f"{error}; choose another checkpoint of the run") from error


def _model(source: Source, reader: "Reader") -> "PreTrainedModel":
    import torch
    from transformers import AutoConfig

    from mlm_dist.model import families
    from mlm_dist.model.from_run import fill

    directory = source.run_dir / "model"
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory / 'config.json'}: missing; a checkpoint is exported from within its run directory")
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    config.dtype = torch.float32
    with torch.random.fork_rng(
        devices=[]
    ):  # the weights made here are all replaced; the caller's generator is not used up
        model = families.new(config)
    fill(model, reader)
    return model.eval()


def _tokenizer(run_dir: Path) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer

    directory = run_dir / "tokenizer"
    if not directory.is_dir():
        raise UserError(f"{directory}: missing; a run keeps its tokenizer there")
    return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)


def export(
    path: str | Path,
    output: str | Path | None = None,
    *,
    step: int | None = None,
    best: bool = False,
    dtype: str = "fp32",
    onnx: bool = False,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Write config, weights (safetensors), tokenizer and model card; returns the directory, by default
    ``RUN/export``.

    The directory appears whole or not at all: it is written beside its place, loaded again through
        AutoModelForMaskedLM, compared to the bit with the checkpoint, then renamed. An export that is already there
        is replaced, with its card; one that holds more is not.

    Args:
        dtype: of the weights, one of DTYPES; those of the checkpoint, which are fp32, are rounded to it.
        onnx: write ``model.onnx`` too.
        say: told how far what other programs compute from the export is from what the checkpoint's model does; without it that is not looked at.

    Raises:
        UserError: no checkpoint there, ``output`` exists and is no export or holds other files too, the weights do not fit ``dtype``, or ONNX is not installed.
        RuntimeError: what was written is not the checkpoint's model.
    """
    if onnx:
        export_onnx.check_installed()
        if dtype != "fp32":
            raise UserError(f"--dtype: {dtype} has no ONNX export; leave out --onnx or --dtype")
    source = find(path, step, best=best)
    target = Path(output) if output is not None else source.run_dir / "export"
    _check_target(target)
    model, tokenizer = load(source)
    _round(model, dtype)
    with _replacing(target.resolve()) as directory, quiet():
        _write(directory, source, model, tokenizer)
        _verify(directory, model, tokenizer)
        if onnx:
            export_onnx.write(directory, model, tokenizer)
        if say is not None:
            for line in export_check.report(directory, model.float(), tokenizer):
                say(line)
    return target


def _check_target(target: Path) -> None:
    if not target.exists():
        return
    if target.resolve() == Path.cwd():
        raise UserError(f"--output: {str(target)!r} is the working directory, which cannot be replaced; give another")
    if not (target / _MARK).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--output: {str(target)!r} exists and is no export of mlm-dist; give another directory")
    names = sorted(path.name for path in target.iterdir())
    if others := [name for name in names if not any(fnmatchcase(name, pattern) for pattern in WRITES)]:
        raise UserError(
            f"--output: {str(target)!r} holds {others[0]!r}, which no export writes and replacing it would delete; move it, or give another directory"
        )


def _round(model: "PreTrainedModel", dtype: str) -> None:
    import torch

    for p in (
        model.parameters()
    ):  # not buffers: who loads the export computes those anew, the rotary frequencies say, in fp32
        p.data = p.data.to(getattr(torch, DTYPES[dtype]))
    lost = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if lost:
        raise UserError(
            f"--dtype: {dtype} cannot hold {lost[0]}, which has numbers too large for it, or none; give bf16 or fp32"
        )


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A new directory beside ``target`` that takes its place at the end, or vanishes on an error."""
    new, old = (target.with_name(f".{target.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    try:
        new.mkdir(parents=True)
        yield new
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"--output: {str(target)!r} cannot be written ({error.strerror or error}); give another directory"
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write(directory: Path, source: Source, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast") -> None:
    from mlm_dist.checkpoint import Reader
    from mlm_dist.model import families

    tokenizer.model_max_length = min(tokenizer.model_max_length, families.of(model.config).longest(model.config))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    reader = Reader(source.checkpoint)
    dtype = next(name for name, long in DTYPES.items() if str(model.dtype) == f"torch.{long}")
    of = model_card.Exported(source.run_dir, reader.step, reader.trainer, dtype)
    model_card.write(directory, of, model, tokenizer)
    for weights in directory.glob("*.safetensors"):  # which safetensors writes for their owner alone
        shutil.copymode(directory / "README.md", weights)
    mark = {"format": "mlm_dist.export", "version": 1, "run": source.run_dir.resolve().name, "step": reader.step}
    (directory / _MARK).write_text(json.dumps(mark, indent=1) + "\n")


def _verify(directory: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast") -> None:
    """Load what was written as a user would, and compare."""
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    loaded = AutoModelForMaskedLM.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    written = dict(loaded.named_parameters(remove_duplicate=False))
    for name, value in model.named_parameters(remove_duplicate=False):
        # As integers: bits, so that -0.0 is not 0.0 and a NaN is itself.
        bits = torch.int32 if value.element_size() == 4 else torch.int16
        if written[name].dtype != value.dtype or not torch.equal(written[name].view(bits), value.view(bits)):
            raise RuntimeError(f"{directory}: {name} differs after loading it again")
    if loaded.get_output_embeddings().weight is not loaded.get_input_embeddings().weight:
        raise RuntimeError(f"{directory}: the decoder is not tied after loading it again")
    if (
        AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False).get_vocab()
        != tokenizer.get_vocab()
    ):
        raise RuntimeError(f"{directory}: the tokenizer differs after loading it again")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``mlm-dist export``."""
    parser.description = (
        "Write a checkpoint as a stock masked-language model's directory (safetensors, tokenizer, model card)."
    )
    parser.add_argument(
        "source", metavar="RUN_OR_CHECKPOINT", type=Path, help="run directory, or one of its checkpoints"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: RUN/export)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step (default: the newest)")
    which.add_argument(
        "--best", action="store_true", help="the checkpoint with the lowest validation loss of those kept"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the weights (default: fp32)")
    parser.add_argument(
        "--onnx", action="store_true", help="write model.onnx too, for any number of rows and any length"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare what transformers, sentence-transformers and ONNX Runtime, where installed, compute with it",
    )
    parser.add_argument(
        "--push-to-hub", metavar="REPO", help="upload it to the Hugging Face hub; the token is HF_TOKEN"
    )
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: a new repository is private")


def run(args: argparse.Namespace) -> int:
    """``mlm-dist export``."""
    import torch

    if not torch.cuda.is_available():  # save_pretrained imports DeepSpeed, which else warns that it found no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    hub = None if args.push_to_hub is None else Hub(args.push_to_hub, private=args.private)
    if hub is None and args.private:
        raise UserError("--private: is for --push-to-hub REPO")
    if hub is not None:
        hub.check()
    directory = export(
        args.source,
        args.output,
        step=args.step,
        best=args.best,
        dtype=args.dtype,
        onnx=args.onnx,
        say=print if args.check else None,
    )
    print(directory)
    if hub is not None:
        mark = json.loads((directory / _MARK).read_text())
        print(hub.push(directory, f"Step {mark['step']} of {mark['run']}", replaces=WRITES))
    return 0
