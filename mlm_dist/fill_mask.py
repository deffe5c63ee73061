"""``mlm-dist fill-mask``: ask a model for the words behind [MASK]."""

import argparse
from typing import TYPE_CHECKING

from mlm_dist.errors import UserError
from mlm_dist.model import families

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def fill(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", text: str, top: int = 5
) -> list[list[tuple[str, float]]]:
    """For each mask in ``text``, in order, the ``top`` likeliest tokens with their probabilities (softmax over the
    whole vocabulary), likeliest first.

    Raises:
        UserError: no mask in ``text``, or more tokens than the model has positions; ``top`` below 1 or above the
            vocabulary.
    """
    import torch

    if not 1 <= top <= len(tokenizer):
        raise UserError(f"--top {top}: must be from 1 to the vocabulary's {len(tokenizer):,} tokens")
    inputs = tokenizer(text, return_tensors="pt", truncation=False)
    ids = inputs["input_ids"][0]
    where = (ids == tokenizer.mask_token_id).nonzero()[:, 0]
    if not len(where):
        raise UserError(f"text {text!r}: has no {tokenizer.mask_token}; put one where a word is wanted")
    positions = families.longest(model.config, default=len(ids))
    if len(ids) > positions:
        raise UserError(f"text of {len(ids):,} tokens: the model reads at most {positions:,}; give a shorter one")
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            logits = model(**{k: v.to(model.device) for k, v in inputs.items()}).logits[0, where.to(model.device)]
    finally:
        model.train(was_training)
    # A vocabulary padded to a round size has rows that stand for no token.
    likeliest = logits.float().softmax(-1)[:, : len(tokenizer)].topk(top)
    return [
        [(tokenizer.decode([i]), p) for i, p in zip(row_ids, row, strict=True)]
        for row_ids, row in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    ]


def load(name: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A model and its tokenizer from a run (its newest checkpoint), a checkpoint, a directory in transformers'
    format, or a hub name.

    Raises:
        UserError: nothing there that can be loaded, or one without its masked-LM head.
    """
    from mlm_dist.eval_models import candidates

    (newest,) = candidates(name)
    return newest.load()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``mlm-dist fill-mask``."""
    parser.description = "Show the likeliest words behind each [MASK]."
    parser.add_argument("model", metavar="MODEL_OR_RUN", help="run directory, checkpoint, exported model or hub name")
    parser.add_argument("text", nargs="+", metavar="TEXT", help='such as "The capital of France is [MASK]."')
    parser.add_argument("--top", type=int, default=5, metavar="N", help="answers for each mask (default: 5)")


def run(args: argparse.Namespace) -> int:
    """``mlm-dist fill-mask``."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    model, tokenizer = load(args.model)
    answers = [fill(model, tokenizer, text, args.top) for text in args.text]
    console = Console()
    for text, masks in zip(args.text, answers, strict=True):
        console.print(Text(text, style="bold"))
        table = Table(min_width=min(40, console.width))
        for number in range(1, len(masks) + 1):
            table.add_column("token" if len(masks) == 1 else f"token {number}")
            table.add_column("probability", justify="right")
        for row in zip(*masks, strict=True):
            # Text, since a token such as [unused1] would be taken for markup.
            table.add_row(*(cell for token, p in row for cell in (Text(token), Text(f"{p:.1%}"))))
        console.print(table)
    return 0
