"""The program on two ranks, at every ZeRO stage, against the plain PyTorch loop that anyone would write, fed by the same stream."""

from pathlib import Path

import torch
from torch.nn import functional as F

from mlm_dist.config import load
from mlm_dist.inputs import DataInputs
from mlm_dist.model import bert
from tests.e2e.program import Program, losses, save_config

STEPS, WARMUP = 20, 5


def plain_loop(config_file: Path) -> dict[int, float]:
    """Loss by step: stock BertForMaskedLM with full logits, torch's AdamW, transformers' linear schedule, clipping; one process, the whole batch at once."""
    from transformers import get_linear_schedule_with_warmup

    config = load(["--config", str(config_file)]).config
    inputs = DataInputs(config)
    tokenizer = inputs.tokenizer
    stream = inputs.stream(rank=0, world_size=1)
    stream.micro_batch = config.train.global_batch
    bert_config = bert.load_config(config.model, vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.pad_id)
    model = bert.build(config.model, bert_config, seed=config.run.seed)
    decay = [p for n, p in model.named_parameters() if not n.endswith("bias") and "LayerNorm" not in n]
    rest = [p for n, p in model.named_parameters() if n.endswith("bias") or "LayerNorm" in n]
    groups = [{"params": decay, "weight_decay": config.optim.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=config.optim.betas, eps=config.optim.eps)
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
    out = {}
    for step, batch in zip(range(1, STEPS + 1), stream.batches(), strict=False):
        (micro,) = stream.collate(batch)
        segments = micro["segment_ids"]
        isolated = (segments[:, None, :, None] == segments[:, None, None, :]).float()
        mask = torch.where(isolated.bool(), 0.0, torch.finfo(torch.float32).min)
        logits = model(micro["input_ids"], attention_mask=mask, position_ids=micro["position_ids"]).logits
        loss = F.cross_entropy(logits.flatten(0, 1)[micro["selected"]], micro["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        out[step] = loss.item()
    return out


def test_every_stage_equals_the_plain_loop(tmp_path: Path) -> None:
    # 16 rows over 2 ranks in micro-batches of 2: accumulation 4.
    config = save_config(
        tmp_path,
        model={"hidden_dropout": 0.0, "attention_dropout": 0.0},
        train={"steps": STEPS, "global_batch": 16, "micro_batch": 2, "clip": 0.5},
        optim={"warmup": WARMUP, "lr": 3e-3},
        checkpoint={"every": 1000},
    )
    expected = plain_loop(config)
    assert expected[STEPS] < expected[1] - 0.1  # it is a loop that learns
    for stage in range(4):
        Program(config, 2, ["--run.name", f"zero{stage}", "--deepspeed.config", f"zero{stage}"]).start().finish()
        got = losses(tmp_path / "runs" / f"zero{stage}")
        assert sorted(got) == sorted(expected)
        difference = max(abs(got[s] - expected[s]) for s in expected)
        assert difference < 1e-5, f"stage {stage}: {difference}"


def test_bf16_autocast_stays_near_fp32(tmp_path: Path) -> None:
    config = save_config(tmp_path, model={"hidden_dropout": 0.0, "attention_dropout": 0.0})
    got = {}
    for stage, precision in ((0, "fp32"), (0, "bf16"), (3, "bf16")):
        name = f"zero{stage}-{precision}"
        flags = ["--run.name", name, "--deepspeed.config", f"zero{stage}", "--train.precision", precision]
        Program(config, 2, flags).start().finish()
        got[name] = losses(tmp_path / "runs" / name)
    single = got.pop("zero0-fp32")
    for half in got.values():
        assert single != half
        assert max(abs(single[s] - half[s]) for s in single) < 0.02
