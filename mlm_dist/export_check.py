"""An export held against the model that it was made from: loaded by transformers, sentence-transformers and ONNX Runtime."""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# (rows, length) of the batches that are compared; every row but the first of each is padded, to another length.
SHAPES = ((1, 3), (1, 8), (2, 7), (3, 16), (5, 12), (2, 64))
LOGITS_TOLERANCE, EMBEDDING_TOLERANCE = 1e-4, 1e-5


def batches(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", shapes: Sequence[tuple[int, int]] = SHAPES
) -> Iterator[dict[str, "Tensor"]]:
    """Padded batches of random ordinary tokens between the model's own specials, the same at each call; cut to the longest input."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    for rows, length in shapes:
        length = min(length, tokenizer.model_max_length)
        ids = torch.tensor(ordinary)[torch.randint(len(ordinary), (rows, length), generator=generator)]
        mask = torch.ones_like(ids)
        for row in range(1, rows):
            mask[row, max(2, length - 2 * row) :] = 0
        ids[:, 0] = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else ids[:, 0]
        ids[:, 1] = tokenizer.mask_token_id
        ids[mask == 0] = tokenizer.pad_token_id
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        yield {name: inputs[name] for name in input_names(model, tokenizer)}


def input_names(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """What the model takes of a tokenizer's output, in the order of the model's arguments."""
    import inspect

    taken = [name for name in inspect.signature(model.forward).parameters if name in tokenizer.model_input_names]
    return [name for name in taken if name in ("input_ids", "attention_mask", "token_type_ids")]


def furthest(ours: "Tensor", theirs: "Tensor", mask: "Tensor") -> float:
    """The largest difference at tokens that are no padding."""
    return float((ours.float() - theirs.float())[mask.bool()].abs().max())


def transformers_difference(directory: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> float:
    """The largest difference of a logit between ``model`` and what stock transformers loads, computed in fp32."""
    import torch
    from transformers import AutoModelForMaskedLM

    loaded = AutoModelForMaskedLM.from_pretrained(
        directory, local_files_only=True, trust_remote_code=False, dtype=torch.float32
    ).eval()
    with torch.inference_mode():
        return max(
            furthest(model(**b).logits, loaded(**b).logits, b["attention_mask"]) for b in batches(model, tokenizer)
        )


def onnx_difference(path: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> float:
    """The largest difference of a logit between ``model`` and the graph in ``path`` as ONNX Runtime computes it on the CPU."""
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    with torch.inference_mode():
        for batch in batches(model, tokenizer):
            (logits,) = session.run(["logits"], {name: value.numpy() for name, value in batch.items()})
            worst = max(worst, furthest(model(**batch).logits, torch.from_numpy(logits), batch["attention_mask"]))
    return worst


def sentence_transformers_difference(
    directory: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> float:
    """The largest difference of an embedding's number between sentence-transformers, which averages the tokens of an export, and the same average
    of ``model``'s last layer.
    """
    import torch
    from sentence_transformers import SentenceTransformer

    texts = [
        tokenizer.decode(row, skip_special_tokens=True) for b in batches(model, tokenizer) for row in b["input_ids"]
    ]
    ours = []
    with torch.inference_mode():
        for text in texts:
            batch = tokenizer(text, return_tensors="pt", truncation=True)
            inputs = {name: batch[name] for name in input_names(model, tokenizer)}
            ours.append(model.base_model(**inputs).last_hidden_state.mean(1)[0])
    # In fp32, whatever the weights were written as.
    theirs = SentenceTransformer(
        str(directory), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32}
    ).encode(texts, batch_size=4, convert_to_tensor=True)  # of several lengths, so padded
    return float((torch.stack(ours) - theirs).abs().max())


def report(directory: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    """A line for each program that can load the export.

    Raises:
        RuntimeError: what one of them computes is not what ``model`` does.
    """

    def line(name: str, what: str, difference: float, tolerance: float) -> str:
        if not difference <= tolerance:
            raise RuntimeError(f"{directory}: {what} of {name} differ by {difference:.1e}, more than {tolerance:g}")
        return f"{name}: {what} within {difference:.1e} (at most {tolerance:g})"

    logits: dict[str, Any] = {"what": "logits", "tolerance": LOGITS_TOLERANCE}
    yield line("transformers", difference=transformers_difference(directory, model, tokenizer), **logits)
    if importlib.util.find_spec("sentence_transformers"):
        difference = sentence_transformers_difference(directory, model, tokenizer)
        yield line("sentence-transformers", "mean-pooled embeddings", difference, EMBEDDING_TOLERANCE)
    else:
        yield "sentence-transformers: not installed, not compared"
    if (directory / "model.onnx").is_file():
        yield line("ONNX Runtime", difference=onnx_difference(directory / "model.onnx", model, tokenizer), **logits)
