"""The models of ``mlm-dist eval``, ``probe`` and ``fill-mask``: found by what the user names, loaded, and asked for scores at masked places only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mlm_dist.errors import UserError
from mlm_dist.model.pretrained import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from mlm_dist.data.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Candidate:
    """One model to look at.

    Attributes:
        name: as the user named it.
        run: the run directory that it is of, or None for a model in transformers' format.
        checkpoint: the checkpoint directory, of a run.
        step: that checkpoint's.
    """

    name: str
    run: Path | None = None
    checkpoint: Path | None = None
    step: int | None = None

    @property
    def label(self) -> str:
        """What tables call it."""
        if self.run is None:
            return self.name
        return f"{self.run} step {self.step:,}"

    def look(self) -> None:
        """See that its configuration and tokenizer can be read, which takes no time, before others are measured that do.

        Raises:
            UserError: they cannot.
        """
        import transformers

        from mlm_dist.data.tokenizer import load_pretrained

        model, tokenizer = (self.name, self.name) if self.run is None else (self.run / "model", self.run / "tokenizer")
        with _loading(self.name, "AutoConfig"):
            transformers.AutoConfig.from_pretrained(
                str(model), local_files_only=self.run is not None, trust_remote_code=False
            )
        load_pretrained(str(tokenizer), key=self.name)

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        """Its masked-LM weights, fp32 on the CPU in eval mode, and its tokenizer.

        Raises:
            UserError: it cannot be loaded, or is no masked LM.
        """
        if self.run is None or self.checkpoint is None:
            return load_stock(self.name, "AutoModelForMaskedLM")
        from mlm_dist import export

        return export.load(export.Source(self.run, self.checkpoint))


def is_run(name: str) -> bool:
    """Whether ``name`` is a run directory or one of its checkpoints, not a model in transformers' format."""
    path = Path(name)
    return path.is_dir() and not (path / "config.json").is_file()


def candidates(name: str, *, steps: Sequence[int] = (), every: bool = False, best: bool = False) -> list[Candidate]:
    """What ``name`` stands for: of a run the checkpoints of ``steps``, ``every`` one, the ``best`` by validation loss, or the newest.

    Raises:
        UserError: there are none such, or what one says of itself is damaged.
    """
    if not is_run(name):
        path = Path(name)
        if not path.is_dir() and (path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1):
            raise UserError(
                f"{name}: no such directory; give a run, an exported model or a name on the Hugging Face hub"
            )
        return [Candidate(name)]
    from mlm_dist import checkpoint, export

    if steps:
        sources = [export.find(name, step) for step in steps]
    elif every and not (Path(name) / "index.json").exists():
        run = Path(name)
        sources = [export.Source(run, path) for path in checkpoint.committed(run)] or [export.find(name)]
    else:
        sources = [export.find(name, best=best)]
    try:
        return [Candidate(name, s.run_dir, s.checkpoint, checkpoint.Reader(s.checkpoint).step) for s in sources]
    except checkpoint.CheckpointError as error:
        raise UserError(str(error)) from error


@contextlib.contextmanager
def _loading(name: str, auto: str) -> Iterator[None]:
    """What goes wrong in transformers' class ``auto`` as a UserError."""
    try:
        yield
    except Exception as error:  # safetensors, pickle, JSON and network errors share no base
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{name}: cannot be loaded by {auto} ({first}); "
            "give a run, an exported model or a name on the Hugging Face hub"
        ) from error


def load_stock(name: str, auto: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A model and its tokenizer through transformers' class ``auto``, fp32 on the CPU in eval mode. No code that comes with it is run.

    Raises:
        UserError: it cannot be loaded, or lacks weights: transformers would draw them, and what they say would be noise.
    """
    import transformers

    with _loading(name, auto), quiet():
        model, info = getattr(transformers, auto).from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    # A pooler is not used here; many checkpoints have none.
    missing = sorted(key for key in info["missing_keys"] if "pooler." not in key)
    if missing or info["mismatched_keys"]:
        what = missing or sorted(str(key[0]) for key in info["mismatched_keys"])
        raise UserError(
            f"{name}: lacks {len(what)} weights that {auto} needs, {what[0]} first"
            + ("; it was saved without its masked-LM head" if auto == "AutoModelForMaskedLM" else "")
        )
    from mlm_dist.data.tokenizer import load_pretrained

    return model.eval(), load_pretrained(name, key=name)


class Scorer:
    """A stock masked LM that gives scores over the vocabulary at chosen places.

    The model's own forward runs. Where the head works on each place alone, as all known ones do, it is shown the chosen places only: a hook on the encoder
    leaves out the others. Whether it does is tried at the start, and all scores are computed where it does not.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: TextTokenizer, seq_len: int, name: str) -> None:
        """``model`` is on the CPU in eval mode.

        Raises:
            UserError: the tokenizer has ids that the model has not, or a row of ``seq_len`` tokens is too long for it.
        """
        self.model, self.name = model, name
        size = model.config.vocab_size
        if tokenizer.vocab_size > size:
            raise UserError(
                f"{name}: its tokenizer has {tokenizer.vocab_size:,} tokens, the model {size:,}; the two do not belong together"
            )
        row = [tokenizer.cls_id, *[int(tokenizer.ordinary[0])] * (seq_len - 2), tokenizer.sep_id]
        check_length(model.base_model, row, flag="--seq-len", name=name)
        self._encoder = model.base_model
        self._places: Tensor | None = None
        self.sparse = False
        if self._encoder is not model:
            self._encoder.register_forward_hook(self._keep)
            self.sparse = self._head_is_placewise(tokenizer)

    def to(self, device: torch.device) -> Scorer:
        """Move the model."""
        self.model.to(device)
        return self

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, places: Tensor) -> Tensor:
        """Scores, [M, vocabulary] in fp32, at ``places`` (int64 [M], indices into the flattened [B * S]) of int64 [B, S] inputs."""
        with torch.inference_mode():
            if not self.sparse:
                scores = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
                return scores.flatten(0, 1)[places].float()
            self._places = places
            try:
                scores = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
            finally:
                self._places = None
            return scores[0].float()

    def _keep(self, _module: torch.nn.Module, _args: Any, output: Any) -> Any:
        """The encoder's output with the chosen places alone, as one row."""
        if self._places is None:
            return output
        hidden = output[0].flatten(0, 1)[self._places][None]
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output["last_hidden_state"] = hidden
        return output

    def _head_is_placewise(self, tokenizer: TextTokenizer) -> bool:
        word = int(tokenizer.ordinary[0])
        ids = torch.tensor([[tokenizer.cls_id, word, tokenizer.mask_id, word, tokenizer.sep_id]] * 2)
        places = torch.tensor([2, 6, 8])
        inputs = (ids, torch.ones_like(ids), places)
        self.sparse = False
        full = self(*inputs)
        self.sparse = True
        try:
            few = self(*inputs)
        except Exception:  # a head that wants the encoder's shape
            return False
        return few.shape == full.shape and torch.allclose(few, full, rtol=1e-4, atol=1e-5)


def check_length(encoder: PreTrainedModel, row: list[int], *, flag: str, name: str) -> None:
    """Raises UserError, which names ``flag``, if a row of so many tokens is too long for the encoder, on the CPU."""
    positions = getattr(encoder.config, "max_position_embeddings", None) or len(row)
    try:
        if len(row) > positions:
            raise IndexError
        # Some begin to count positions at 2, so that their number alone does not tell.
        with torch.inference_mode():
            encoder(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.int64))
    except (IndexError, RuntimeError) as error:
        raise UserError(
            f"{flag} {len(row)}: {name} does not read rows of so many tokens (its config says {positions} positions); give a shorter one"
        ) from error
