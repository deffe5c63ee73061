"""A model as an ONNX graph for any number of rows and any length, checked by ONNX Runtime."""

import importlib.util
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_dist.errors import UserError
from mlm_dist.export_check import LOGITS_TOLERANCE, batches, input_names, onnx_difference

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAME = "model.onnx"
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def check_installed() -> None:
    """Raises UserError where the export to ONNX lacks a package."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--onnx: {', '.join(missing)} not installed; pip install 'mlm-dist[onnx]'")


def write(directory: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> float:
    """Write ``model.onnx`` (inputs as the tokenizer names them, output ``logits``); returns the largest difference of a logit.

    Raises:
        RuntimeError: ONNX Runtime computes other logits.
    """
    import torch

    names = input_names(model, tokenizer)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: Any) -> Any:
            return self.model(**dict(zip(names, inputs, strict=True))).logits

    (example,) = batches(model, tokenizer, [(2, min(9, tokenizer.model_max_length - 1))])
    rows, length = torch.export.Dim("rows"), torch.export.Dim("length", max=tokenizer.model_max_length)
    # With a warning a layer, and a line a pass.
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")
        noisy = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
        levels = [logger.level for logger in noisy]
        for logger in noisy:
            logger.setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                Logits().eval(),
                tuple(example[name] for name in names),
                dynamo=True,
                input_names=names,
                output_names=["logits"],
                dynamic_shapes=(tuple({0: rows, 1: length} for _ in names),),
                verbose=False,
            )
        finally:
            for logger, level in zip(noisy, levels, strict=True):
                logger.setLevel(level)
    assert program is not None
    program.save(directory / NAME)
    difference = onnx_difference(directory / NAME, model, tokenizer)
    if not difference <= LOGITS_TOLERANCE:
        raise RuntimeError(
            f"{directory / NAME}: logits of ONNX Runtime differ by {difference:.1e}, more than {LOGITS_TOLERANCE:g}"
        )
    return difference
