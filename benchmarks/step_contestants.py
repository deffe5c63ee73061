"""One contestant of the step benchmark, in a process of its own: ``benchmarks/step.py`` starts it and gives the orders.

    python -m benchmarks.step_contestants '{"contestant": "trainer", ...}'

Each is written as its users write it: a function of the specification that trains for as long as it has the turn and returns a stock BertForMaskedLM. All
begin with the same weights, and their optimizers have the same settings.
"""

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.turns import Counts, Turns, counts_of, pipes

Spec = dict[str, Any]
SEED = 1
WARMUP = 10  # steps of the learning rate's
ENDLESS = 10**9


# ---- what they have in common ----


def run_config(spec: Spec) -> Any:
    """The run config of mlm_dist, which also says for the others what the model and the optimizer are."""
    from mlm_dist.config import load

    values = {
        "run": {"seed": SEED, "dir": spec["scratch"]},
        "data": {
            "manifest": spec["manifest"],
            "val_manifest": spec["val_manifest"],
            "tokenizer": spec["tokenizer"],
            "seq_len": spec["seq_len"],
        },
        "model": {"init": "config", "config": spec["model"], "hidden_dropout": 0.1, "attention_dropout": 0.0},
        "train": {
            "steps": ENDLESS,
            "global_batch": spec["rows"],
            "micro_batch": spec["rows"],
            "precision": spec["precision"],
            "clip": 1.0,
        },
        "optim": {"lr": spec["lr"], "weight_decay": 0.01, "warmup": WARMUP, "schedule": "constant"},
        "deepspeed": {"config": spec.get("zero", "zero0")},
    }
    path = Path(spec["scratch"]) / f"run-{os.getpid()}.yaml"
    path.write_text(yaml.safe_dump(values))
    try:
        return load(["--config", str(path)]).config
    finally:
        path.unlink()


def initial_model(config: Any, vocab_size: int) -> Any:
    """BertForMaskedLM with weights that depend on the seed alone."""
    from mlm_dist.model import bert

    return bert.build(
        config.model, bert.load_config(config.model, vocab_size=vocab_size, pad_token_id=0), seed=config.run.seed
    )


def optimizer_of(module: torch.nn.Module, config: Any) -> torch.optim.Optimizer:
    """AdamW of the config over the module, biases and LayerNorms without decay."""
    from mlm_dist.optim import build_adamw

    return build_adamw(module=module, optim=config.optim)


def lr_at(step: int, config: Any) -> float:
    """The learning rate of a step, from 0."""
    from mlm_dist.schedule import lr_factor

    return config.optim.lr * lr_factor(step, 0.0, config.optim)


def autocast(spec: Spec, device: torch.device) -> Any:
    """The precision, as a context for the forward pass."""
    return torch.autocast(device.type, torch.bfloat16, enabled=spec["precision"] == "bf16")


def the_device() -> torch.device:
    """Where all of them train."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def heldout_loss(spec: Spec, model: Any, device: torch.device) -> float:
    """Mean cross-entropy in nats, in fp32, over the held-out documents: a piece of at most a row each, with fixed masks, the same for all contestants."""
    from dataclasses import replace

    from mlm_dist import evaluate
    from mlm_dist.inputs import DataInputs
    from mlm_dist.model.head import MaskedLM

    config = run_config(spec)
    inputs = DataInputs(
        replace(config, data=replace(config.data, packing="none", long_documents="truncate", workers=0))
    )
    module = MaskedLM(model.to(device)).eval()

    def forward(micro_batch: dict[str, torch.Tensor]) -> Any:
        with torch.no_grad():
            return module(**{name: tensor.to(device) for name, tensor in micro_batch.items()})

    class Alone:
        """The only rank."""

        def sum(self, values: list[int]) -> list[int]:
            return values

        def gather(self, obj: Any) -> list[Any]:
            return [obj]

    stream = inputs.val_stream(0, 1)
    assert stream is not None
    return evaluate.validate(stream, forward, Alone())["loss"]


# ---- transformers, as in its examples/pytorch/language-modeling/run_mlm.py ----


def tokenized(spec: Spec, rows: str) -> tuple[Any, Any]:
    """(dataset, tokenizer): a document a row, cut (``lines``) and padded (``padded``), or documents put end to end and cut into rows (``groups``)."""
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # documents longer than the model are meant
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(spec["tokenizer"])
    length = spec["seq_len"]

    def cut(examples: dict[str, list[str]]) -> Any:
        padding = "max_length" if rows == "padded" else False
        return tokenizer(
            examples["text"], padding=padding, truncation=True, max_length=length, return_special_tokens_mask=True
        )

    def whole(examples: dict[str, list[str]]) -> Any:
        return tokenizer(examples["text"], truncation=False, padding=False, return_special_tokens_mask=True)

    def group(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {key: list(chain(*values)) for key, values in examples.items()}
        total = len(joined["input_ids"]) // length * length
        return {key: [values[i : i + length] for i in range(0, total, length)] for key, values in joined.items()}

    dataset = load_dataset("json", data_files=spec["jsonl"], split="train", cache_dir=str(Path(spec["scratch"]) / "hf"))
    dataset = dataset.map(whole if rows == "groups" else cut, batched=True, remove_columns=["text"])
    return dataset.map(group, batched=True) if rows == "groups" else dataset, tokenizer


class Counted:
    """A collator that keeps the counts of its batches, in their order."""

    def __init__(self, collator: Any):
        self._collator = collator
        self.counts: deque[Counts] = deque()

    def __call__(self, rows: Any) -> Any:
        batch = self._collator(rows)
        self.counts.append(counts_of(batch))
        return batch


def trainer(spec: Spec, turns: Turns) -> Any:
    """transformers' Trainer with what run_mlm.py gives it."""
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

    dataset, tokenizer = tokenized(spec, spec["layout"])
    collator = Counted(DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15))
    config = run_config(spec)
    turns.memory.begin()
    model = initial_model(config, len(tokenizer))
    optim = config.optim

    class InTurns(TrainerCallback):
        """Waits for its turn between steps."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turns.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # The loader may be ahead: the oldest counts are those of this step.
            control.should_training_stop = not turns.trained(collator.counts.popleft())

    arguments = TrainingArguments(
        output_dir=spec["scratch"],
        per_device_train_batch_size=spec["rows"],
        max_steps=ENDLESS,
        learning_rate=optim.lr,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_epsilon=optim.eps,
        weight_decay=optim.weight_decay,
        max_grad_norm=config.train.clip,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=WARMUP,
        bf16=spec["precision"] == "bf16",
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=SEED,
    )
    Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[InTurns()],
    ).train()
    return model


# ---- plain PyTorch ----


def plain(spec: Spec, turns: Turns) -> Any:
    """The loop of many a tutorial: stock BERT, logits of all places, padded rows."""
    from torch.utils.data import DataLoader
    from transformers import DataCollatorForLanguageModeling

    dataset, tokenizer = tokenized(spec, spec["layout"])
    collator = Counted(DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15))
    config, device = run_config(spec), the_device()
    on_cuda = device.type == "cuda"
    loader = DataLoader(dataset, batch_size=spec["rows"], shuffle=True, collate_fn=collator, pin_memory=on_cuda)
    turns.memory.begin()
    model = initial_model(config, len(tokenizer)).to(device).train()
    optimizer = optimizer_of(model, config)
    turns.begin()
    for step, batch in enumerate(chain.from_iterable(loader for _ in range(ENDLESS))):
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, config)
        with autocast(spec, device):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip)
        optimizer.step()
        optimizer.zero_grad()
        if not turns.trained(collator.counts.popleft()):
            break
    return model


# ---- ours ----


def _fed(stream: Any, device: torch.device, turns: Turns) -> Iterator[tuple[Any, Any, Counts]]:
    """(batch, its micro-batches on the device, what they hold)."""
    from mlm_dist.feed import Feeder

    with Feeder(stream.batches(), stream.collate, device) as feeder:
        first = next(feeder)  # starts the loader workers, so that these are set up
        turns.begin()
        while True:
            if first is not None:
                (batch, micro_batches), first = first, None
            else:
                with turns.span("data wait", on_host=True):
                    batch, micro_batches = next(feeder)
            places = sum(micro["input_ids"].numel() for micro in micro_batches)
            attended = int((batch.rows.segment_lengths.astype("int64") ** 2).sum())
            yield batch, micro_batches, Counts(batch.tokens, places, attended, batch.selected)


def bare(spec: Spec, turns: Turns) -> Any:
    """The plain loop with the model and the stream of mlm_dist, without its engine and without DeepSpeed."""
    from mlm_dist.inputs import Inputs
    from mlm_dist.model.head import MaskedLM

    config, device = run_config(spec), the_device()
    inputs = Inputs(config, 1)
    stream = inputs.stream(0, 1)
    turns.memory.begin()
    model = initial_model(config, inputs.tokenizer.vocab_size)
    module = MaskedLM(model, attention=inputs.attention).to(device).train()
    optimizer = optimizer_of(module, config)
    for batch, micro_batches, counts in _fed(stream, device, turns):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(batch.step, config)
        for micro_batch in micro_batches:
            with turns.span("forward"), autocast(spec, device):
                loss, _ = module(**micro_batch)
            with turns.span("backward"):
                (loss / batch.selected).backward()
        with turns.span("optimizer"):
            torch.nn.utils.clip_grad_norm_(module.parameters(), config.train.clip)
            optimizer.step()
            optimizer.zero_grad()
        if not turns.trained(counts):
            break
    return model


def ours(spec: Spec, turns: Turns) -> Any:
    """mlm_dist's engine over DeepSpeed at the stage that is asked for, though the program takes stage 0 on one rank."""
    from mlm_dist import distributed, ds_config
    from mlm_dist.data.rng import keyed_seed
    from mlm_dist.engine import Engine
    from mlm_dist.inputs import Inputs
    from mlm_dist.model.head import MaskedLM

    config = run_config(spec)
    inputs = Inputs(config, 1)
    topology = distributed.init(600.0)
    stream = inputs.stream(topology.rank, topology.world_size)
    turns.memory.begin()
    engine = Engine(
        MaskedLM(initial_model(config, inputs.tokenizer.vocab_size), attention=inputs.attention),
        ds_config=ds_config.merge(
            ds_config.load_template(config.deepspeed.config),
            precision=config.train.precision,
            clip=config.train.clip,
            micro_batch=inputs.micro_batch,
        ),
        optim=config.optim,
        device=topology.device,
    )
    for method, name in (("forward", "forward"), ("backward", "backward"), ("step", "optimizer")):
        turns.timed(engine._engine, method, name)
    for batch, micro_batches, counts in _fed(stream, topology.device, turns):
        seeds = [keyed_seed(SEED, "dropout", batch.step, i, 0) for i in range(len(micro_batches))]
        engine.step(micro_batches, selected_total=batch.selected, lr=lr_at(batch.step, config), seeds=seeds)
        if not turns.trained(counts):
            break
    model = initial_model(config, inputs.tokenizer.vocab_size)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name in engine.names():
            weights[name].copy_(engine.gather_parameter(name))
    engine.close()
    distributed.shutdown()
    return model


CONTESTANTS: dict[str, Callable[[Spec, Turns], Any]] = {f.__name__: f for f in (trainer, plain, bare, ours)}


def main() -> None:
    """See the module. Answers go to what is the standard output at the start; what libraries print goes to the standard error."""
    spec = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    orders, answer = pipes(sys.stdin, answers)
    device = the_device()
    turns = Turns(device, orders, answer)
    torch.manual_seed(SEED)
    model = CONTESTANTS[spec["contestant"]](spec, turns)
    answer({"memory_mb": turns.memory_mb, "loss": heldout_loss(spec, model, device), **turns.total._asdict()})


if __name__ == "__main__":
    main()
