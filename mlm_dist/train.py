"""``mlm-dist train``: one rank of a training run, from the command line to its exit code. The parts meet here and nowhere else."""

import contextlib
import json
import math
import multiprocessing
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlm_dist import autobatch, checkpoint, choice, distributed, evaluate, rollback
from mlm_dist.clock import COMMUNICATION, Position, StepClock, timed_collectives
from mlm_dist.config import Invocation, load
from mlm_dist.console import RunConsole, outlive_output
from mlm_dist.data.rng import keyed_seed
from mlm_dist.data.stream import Batch, Origin
from mlm_dist.ending import leave, report_user_error
from mlm_dist.engine import Engine, StepResult
from mlm_dist.errors import UserError
from mlm_dist.feed import Feeder
from mlm_dist.hardware import dense_peak
from mlm_dist.inputs import Inputs
from mlm_dist.ledger import DataLoss, leaves_out
from mlm_dist.lifecycle import (
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_HUNG,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    RunDir,
    RunDirGone,
    State,
    StopFlag,
    stop_signals,
    write_json,
)
from mlm_dist.meter import Meter, peak_memory_gib, restart_peak_memory
from mlm_dist.micro_batch import on_device
from mlm_dist.model import bert
from mlm_dist.model.bert import ModelConfig
from mlm_dist.model.compiled import compile_together, layer_class
from mlm_dist.model.head import Head, MaskedLM
from mlm_dist.opening import opening_lines
from mlm_dist.peers import Peers
from mlm_dist.plan_job import Job
from mlm_dist.provenance import machine, provenance
from mlm_dist.redact import redact
from mlm_dist.samples import Sampler
from mlm_dist.schedule import lr_factor
from mlm_dist.spikes import SpikeGuard
from mlm_dist.start import Opened, open_run
from mlm_dist.stragglers import StragglerWatch
from mlm_dist.tracking import Tracker
from mlm_dist.watchdog import PATIENCE_S, Watchdog, collective_timeout

# Seconds that a rank has to record its failure and say it.
FAIL_WITHIN_S = 180
# And W&B to take the news of a hang.
LAST_WORDS_S = 5.0


class Run:
    """One attempt of a run on one rank."""

    def __init__(
        self,
        invocation: Invocation,
        inputs: Inputs,
        topology: distributed.Topology,
        control: distributed.ControlGroup,
        position: Position,
    ):
        self.config, self.inputs, self.topology, self.control = invocation.config, inputs, topology, control
        self.allow_change = invocation.allow_change
        self.dir = RunDir(self.config.run.path())
        self.is_first = topology.rank == 0
        self.console = RunConsole(
            self.dir.path.name, self.config.train.steps, self.config.checkpoint.every, self.is_first
        )
        self.flag = StopFlag()
        self.position = position
        self.clock = StepClock(topology.device, position)
        self.tracker: Tracker | None = None
        spike = self.config.train.spike
        self.spikes = None if spike is None else SpikeGuard(spike, topology.device)
        self.peers = Peers(control)
        self.step = self.tokens = self.bytes = self.skipped = 0
        self.bad_steps: list[int] = []  # batches that went wrong one after the other, up to now
        self.began: dict[str, Any] = {}  # of which other training, if it did not begin by its config
        self.saved_step: int | None = None
        self.saved_before: int | None = None
        self.validated_step: int | None = None
        self.validation: dict[str, Any] | None = None

    # ---- start ----

    def open(self) -> Path | None:
        """Take the run directory, on rank 0, and tell all ranks: sets the attempt; returns the checkpoint to go on from. Raises UserError on every rank."""
        opened: Opened | str = ""
        if self.is_first:
            try:
                devices = machine(self.topology.device, self.topology.world_size)
                opened, self.ledger, self.attempt_facts = open_run(
                    self.config, self.inputs, self.dir, self.flag, devices, self.allow_change, self.console.say
                )
            except (UserError, OSError) as error:  # the others must hear of it, or they would wait
                prefix = "" if isinstance(error, UserError) else f"run.dir: {str(self.dir.path)!r} cannot be used: "
                opened = f"{prefix}{error}"
        opened = self.control.broadcast(opened)
        if isinstance(opened, str):
            raise UserError(opened)
        self.dir.attempt, self.finished_before, self.source = opened.attempt, opened.finished, opened.source
        self.lost, self.skips = opened.lost, list(opened.skips)
        self.watchdog = Watchdog(self.position, self.config.train.timeout, run=self.dir, end=self._end_now)
        return opened.checkpoint

    def build(self, path: Path | None) -> None:
        """Model, engine and stream, as new or as the checkpoint ``path`` left them."""
        config, inputs = self.config, self.inputs
        # Tokenizers that agree give the same ids, but a rank alone with another one is a difference that nobody needs.
        fast = inputs.tokenizer.nano is not None
        flat = inputs.attention == "varlen"
        all_fast, all_flat = (n == self.topology.world_size for n in self.control.sum([int(fast), int(flat)]))
        if fast and not all_fast:
            inputs.use_reference("nanotoken is not installed on every node")
        if flat and not all_flat:
            inputs.attention = "auto"
            inputs.notes.append("attention goes through SDPA with a mask: not every rank has a GPU for varlen")
        reader = None if path is None else checkpoint.Reader(path)
        self._settle_micro_batch(None if reader is None else reader.trainer.get("micro_batch"))
        self.stream = inputs.stream(self.topology.rank, self.topology.world_size)
        self.val_stream = inputs.val_stream(self.topology.rank, self.topology.world_size)
        # A checkpoint holds every weight; those that the model started from need not be read.
        section = config.model if path is None else self._new_weights()
        if section.init == "run":
            section = replace(section, name_or_path=self.source)
        if config.optim.name == "cpu_adam":
            self.console.say("cpu_adam: DeepSpeed compiles it where it was never used, which takes about two minutes")
        module = self._new_module(section).to(self.topology.device)
        self.num_parameters = sum(p.numel() for p in module.parameters())
        self.head = next(part for part in module.modules() if isinstance(part, Head))
        self.compiled = config.model.compile and self._compile(module)
        self.engine = Engine(
            module,
            ds_config=inputs.ds_config,
            optim=config.optim,
            device=self.topology.device,
            clock=self.clock,
            leaves=[layer_class(module)] if self.compiled else [],
            spikes=self.spikes,
        )
        self.cursors = self.stream.start_cursors()
        self.wandb_id = None if reader is None else reader.trainer["wandb_id"]
        if reader is not None:
            self._go_on_from(reader)
        self.writer = checkpoint.Writer(
            self.dir.path, config.checkpoint, self.topology.rank, self.topology.world_size, self.dir.attempt
        )

    def _go_on_from(self, reader: checkpoint.Reader) -> None:
        """Take over weights, moments, counters and the place in the data. Collective."""
        self.engine.restore(reader.parameter, reader.state, reader.optimizer)
        state = reader.trainer
        self.step = self.saved_step = self.saved_before = state["step"]
        self.tokens, self.bytes, self.skipped = state["tokens"], state["bytes"], state["skipped"]
        self.cursors = np.asarray(state["cursors"], np.int64)
        self.validated_step = (state.get("validation") or {}).get("step")
        self.bad_steps = list(state.get("bad_steps", ()))
        self.began = {key: state[key] for key in ("branched_from", "taken_over") if key in state}
        self.source = state.get("source", self.source)
        if self.spikes is not None:
            self.spikes.load(state.get("recent_losses") or ())

    def _begin_again(self) -> None:
        """Take back every step: the weights that the run began with. Collective."""
        section = self.config.model
        if section.init == "run":
            section = replace(section, name_or_path=self.source)
        weights = dict(self._new_module(section).named_parameters())
        shapes = self.engine.shapes()
        self.engine.restore(
            lambda name: weights[f"model.{name}"].detach(),
            lambda _key, name: torch.zeros(shapes[name]),
            {**self.engine.optimizer_meta(), "step": 0, "scaler": None},
        )
        self.step = self.tokens = self.bytes = self.skipped = 0
        self.saved_step = self.saved_before = None
        self.cursors, self.bad_steps = self.stream.start_cursors(), []
        if self.spikes is not None:
            self.spikes.load(())

    def _new_weights(self) -> ModelConfig:
        """The section ``model`` of a model of the run's sizes that reads no weights."""
        sizes = self.inputs.bert_config.to_diff_dict()
        return replace(self.config.model, init="config", name_or_path=None, config=sizes)

    def _new_module(self, section: ModelConfig) -> MaskedLM:
        """The run's module, on the host."""
        inputs, seed = self.inputs, self.config.run.seed
        model = bert.build(section, inputs.bert_config, seed=seed, new_tokens=inputs.new_tokens)
        return MaskedLM(model, inputs.attention, section.head, section.head_chunk)

    def _compile(self, module: MaskedLM) -> bool:
        """Compile the encoder layers on all ranks or, with a warning, on none; whether they are. Collective."""
        micro_batch = on_device(self.stream.empty_micro_batch(), self.topology.device)
        why_not = compile_together(module, micro_batch, self.config.train.precision, self.control)
        if why_not is not None:
            self.console.say(f"warning: model.compile: the encoder layers run uncompiled, on all ranks ({why_not})")
            for stream in filter(None, (self.stream, self.val_stream)):
                stream.one_shape = False
        return why_not is None

    def _settle_micro_batch(self, recorded: dict[str, Any] | None) -> None:
        """With ``train.micro_batch: auto``, find it before anything of the run is on the device."""
        config, inputs, topology = self.config, self.inputs, self.topology
        self.micro_batch_record: dict[str, Any] | None = None
        if config.train.micro_batch != "auto":
            return
        device = topology.device
        probe = inputs.stream(topology.rank, topology.world_size)  # for its rows only, which no micro-batch changes

        def job_of(rows: int) -> Job:
            return choice.job(
                config,
                inputs.bert_config,
                inputs.ds_config["zero_optimization"],
                world_size=topology.world_size,
                micro_batch=rows,
                device=device.type,
                attention=inputs.attention,
            )

        settled = autobatch.settle(
            job_of,
            lambda: self._new_module(self._new_weights()),
            most=probe.most_rows(),
            device=device,
            control=self.control,
            recorded=recorded,
        )
        inputs.set_micro_batch(settled.rows)
        self.micro_batch_record = settled.record
        self.console.say(f"train.micro_batch auto: {settled.rows} ({settled.how})")

    def announce(self) -> None:
        """Rank 0: open the tracking and say what is about to happen. Collective."""
        hosts = self.control.gather(socket.gethostname())
        if hosts is None:
            return
        config, stream, world = self.config, self.stream, self.topology.world_size
        self.writer.clear_leftovers()
        facts = provenance(
            self.topology.device,
            hosts=hosts,
            data=self.inputs.fingerprints(),
            tokenizer=self.inputs.tokenizer.fingerprint,
            parameters=self.num_parameters,
        )
        self.tracker = Tracker(
            self.dir.path,
            config.track,
            json.loads(json.dumps(asdict(config) | facts)),
            attempt=self.dir.attempt,
            wandb_id=self.wandb_id,
            world_size=world,
            shown=self.console,
        )
        write_json(self.dir.path / "ds_config.json", self.inputs.ds_config)
        chosen = {
            "micro_batch": self.inputs.micro_batch,
            "attention": self.inputs.attention,
            "compiled": self.compiled,
        }
        self.tracker.event({"kind": "attempt", "step": self.step, "world_size": world, **self.attempt_facts, **chosen})
        device = self.topology.device.type
        self.console.say(
            f"run {self.dir.path}: attempt {self.dir.attempt}, "
            + (f"goes on after step {self.step}" if self.step else "from the start")
            + f"; {world} rank{'s' * (world > 1)} on {device}, ZeRO stage {self.engine.stage}, {config.train.precision}, W&B {self.tracker.mode}"
        )
        for line in opening_lines(config, self.inputs, stream, self.step, parameters=self.num_parameters):
            self.console.say(line)

    # ---- the loop ----

    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return self.config.train.progress(self.step, self.bytes, self.inputs.num_bytes)

    def train(self) -> str:
        """Steps until the end or a stop; returns "finished" or "stopped". On return the last checkpoint is written."""
        config = self.config
        self.position.step, self.position.phase = self.step, "loop"
        if config.train.steps is not None and self.step >= config.train.steps:
            return self._end("finished")
        if config.eval.every and self.step and self.step % config.eval.every == 0 and self.validated_step != self.step:
            with self.position.within("validation"):
                self.validate()  # which the stop at this step did not wait for
        restart_peak_memory(self.topology.device)
        meter = self._meter()
        self.stragglers = StragglerWatch(self.control, meter.so_far, self._say_straggler)
        outcome = "diverged"
        while outcome == "diverged":
            batches = self.stream.batches(self.step, self.cursors, self.lost)
            with Feeder(batches, self.stream.collate, self.topology.device) as feeder, timed_collectives(self.clock):
                outcome, unlogged = self._steps(feeder, meter)
            if outcome == "diverged":
                with meter.pause(), self.position.within("checkpoint"):
                    self._roll_back()
                self.position.step = self.step
        if unlogged is not None:
            self._log(*unlogged, meter)
        return self._end(outcome)

    def _meter(self) -> Meter:
        config, bert_config, device = self.config, self.inputs.bert_config, self.topology.device

        def flops(tokens: int, attended: int, selected: int) -> float:
            seen, predicted = attended / max(1, tokens), selected / max(1, tokens)
            return tokens * bert.flops_per_token(bert_config, attended=seen, selected=predicted)

        peak = config.track.peak_tflops and config.track.peak_tflops * 1e12
        if peak is None and device.type == "cuda":
            peak = dense_peak(torch.cuda.get_device_name(device), config.train.precision)
        return Meter(self.clock, flops, world_size=self.topology.world_size, peak=peak)

    def _steps(self, feeder: Feeder, meter: Meter) -> tuple[str, tuple[Any, int, float] | None]:
        """Steps until the end, a stop or too many bad ones: (how it ended, what of the last step is not logged yet)."""
        config = self.config
        unlogged: tuple[Any, int, float] | None = None
        while True:
            with meter.waiting():
                batch, micro_batches = next(feeder)
            if self.flag.gone:
                raise RunDirGone
            mine = [
                batch.selected,
                batch.tokens,
                batch.attended,
                batch.bytes,
                int(batch.live.sum()),
                int(self.flag.wanted),
                int(self.flag.requeue),
                len(batch.faults) + len(batch.restarts),
                int(self.writer.failed),
            ]
            with self.clock.phase(COMMUNICATION):  # slower ranks are waited for here
                pending = self.control.start(mine)
                selected, tokens, attended, batch_bytes, live, stop, requeue, faults, unwritten = pending.wait()
            if unwritten:
                with self.position.within("checkpoint"):
                    self._settle()
            if faults:
                self._record_faults(batch)
            if not live:
                if config.train.steps is not None:
                    raise DataLoss(f"no text is left at step {self.step} of train.steps {config.train.steps}")
                return "finished", unlogged
            result = None
            lr = config.optim.lr * lr_factor(self.step, self.progress(), config.optim)
            left_out = leaves_out(self.skips, self.step)
            if selected and not left_out:
                seeds = [
                    keyed_seed(config.run.seed, "dropout", self.step, i, self.topology.rank)
                    for i in range(len(micro_batches))
                ]
                result = self.engine.step(micro_batches, selected_total=selected, lr=lr, seeds=seeds)
            bad = result is not None and result.skipped and not result.overflow
            if bad:
                self.bad_steps = [*self.bad_steps, self.step]
            elif result is not None and not result.overflow:  # by overflows fp16 finds its loss scale
                self.bad_steps = []
            self.step, self.tokens, self.bytes = self.step + 1, self.tokens + tokens, self.bytes + batch_bytes
            self.position.step, self.position.settled = self.step, True
            self.cursors = batch.cursors
            meter.count(*((tokens, attended, selected) if result is not None else (0, 0, 0)))  # what was computed
            with self.clock.phase(COMMUNICATION):
                self.stragglers.step()
            if bad:
                assert result is not None
                self._record_bad(batch, result)
            elif result is None:
                self._record_skip("left out since a roll-back" if left_out else "no token was selected")
            elif result.overflow:
                self._record_skip(f"gradients overflowed in fp16; the loss scale is now {self.engine.loss_scale:.0f}")
            if len(self.bad_steps) >= config.train.max_skipped:
                return "diverged", None
            unlogged = result, selected, lr
            if self.step % config.track.every == 0 or self.step in (1, config.train.steps):
                self._log(*unlogged, meter)
                unlogged = None
            if config.eval.every and self.step % config.eval.every == 0 and not stop:
                with meter.pause(), self.position.within("validation"):
                    self.validate()
            # That of the last step waits for its validation.
            if self.step % config.checkpoint.every == 0 and self.step != config.train.steps:
                with meter.pause(), self.position.within("checkpoint"):
                    self.save()
            if config.train.steps is not None and self.step >= config.train.steps:
                return "finished", unlogged
            if stop:
                self.flag.ask("another rank was asked to stop", bool(requeue))
                return "stopped", unlogged

    def _end(self, outcome: str) -> str:
        if outcome == "finished" and self.validated_step != self.step:
            with self.position.within("validation"):
                self.validate()
            if self.validated_step == self.step:  # a checkpoint that knows nothing of it is not the last word
                self.saved_step = self.saved_before
        with self.position.within("checkpoint"):
            self._settle()
            if self.saved_step != self.step:
                self.save()
                self._settle(last=True)
            self.control.barrier()
        self.position.phase = "closing"
        return outcome

    def _record_faults(self, batch: Batch) -> None:
        """Write what the ranks lost on the way to this batch into the ledger, on disk, before the step, and which loader workers. Raises DataLoss on all
        ranks past the limit."""
        gathered = self.control.gather(([asdict(f) for f in batch.faults], batch.restarts))
        verdict = ""
        if gathered is not None:
            assert self.tracker is not None
            for rank, (_, restarts) in enumerate(gathered):
                for what in restarts:
                    self.tracker.event({"kind": "worker_restarted", "step": self.step, "rank": rank, "what": what})
                    self.console.say(f"rank {rank}: {what}; it was started again where it was, and nothing is lost")
            for fault in self.ledger.add(fault for part, _ in gathered for fault in part):
                self.tracker.event({"kind": "data_loss", "step": self.step, **fault}, required=True)
                self.console.say(
                    f"lost {fault['documents']} document(s) of {fault['shard']} at byte {fault['offset']}: {fault['cause']}"
                )
            verdict = self.ledger.verdict(self.inputs.num_documents, self.config.data.max_bad_fraction)
        verdict = self.control.broadcast(verdict)
        if verdict:
            raise DataLoss(verdict)

    def _record_skip(self, why: str, **facts: Any) -> None:
        self.skipped += 1
        if self.tracker:
            self.tracker.event({"kind": "skipped_step", "step": self.step, "batch": self.step - 1, "why": why, **facts})
            self.console.say(f"step {self.step} skipped: {why}")

    def _record_bad(self, batch: Batch, result: StepResult) -> None:
        """Write down what was wrong with a step that all ranks skipped, on which of them, and what text was in it. Collective."""
        # Of a stream of its own, for the other is being read by the feeder.
        stream = self.inputs.stream(self.topology.rank, self.topology.world_size)
        told = self.control.gather((result.seen, sorted({astuple(o) for o in stream.origins(batch)})))
        why, facts = "", {}
        if told is not None:
            cause, ranks, why = rollback.verdict([seen for seen, _ in told])
            blocks = sorted({Origin(*o) for _, part in told for o in part}, key=astuple)
            facts = {"cause": cause, "ranks": ranks, "blocks": [asdict(o) for o in blocks]}
            why += f" (mlm-dist data show --run {self.dir.path} --step {self.step - 1})"
        self._record_skip(why, **facts)

    def _roll_back(self) -> None:
        """Go back to before the steps that went wrong, and leave their batches out from now on. Collective.

        Raises:
            FloatingPointError: as often as is allowed already, or there is nothing to go back to.
        """
        self._settle()
        decided: rollback.Plan | str = self._plan_roll_back() if self.is_first else ""
        decided = self.control.broadcast(decided)
        if isinstance(decided, str):
            raise FloatingPointError(decided)
        self.lost = self.control.broadcast(self.ledger.lost_blocks() if self.is_first else None)
        self.skips = [*self.skips, decided.skip]
        self.validation = None
        if decided.to is None:
            self._begin_again()
        else:
            self._go_on_from(checkpoint.Reader(decided.to))

    def _plan_roll_back(self) -> rollback.Plan | str:
        """Rank 0: where to go back to, written down and with what it makes void removed; or why not."""
        assert self.tracker is not None
        bad, most = self.bad_steps, self.config.train.max_rollbacks
        what = f"{len(bad)} steps in a row up to step {self.step} went wrong (train.max_skipped)"
        remedies = "A lower optim.lr, a longer optim.warmup or train.clip 1.0 are the usual remedies."
        if self.ledger.rollbacks >= most:
            return f"{what}, after {self.ledger.rollbacks} roll-back(s) (train.max_rollbacks); events.jsonl tells of each. {remedies}"
        plan = rollback.plan(self.dir.path, self.ledger, bad, self.console.say)
        if plan.to is None and self.began:
            return f"{what}, no whole checkpoint from before them is left, and the run began from another training's. {remedies}"
        if plan.to is None and self.config.model.init == "run" and not (self.source and Path(self.source).is_dir()):
            return f"{what}, no whole checkpoint from before them is left, and the weights that the run began with are gone. {remedies}"
        first, last = plan.skip
        # Before anything is done: a start after a crash finds it, and goes back likewise.
        self.tracker.event(
            {"kind": "rollback", "step": self.step, "to": plan.step, "skip": plan.skip, "bad": bad, "why": what},
            required=True,
        )
        self.ledger.rolled_back(plan.skip)
        rollback.discard(rollback.void_checkpoints(self.dir.path, self.ledger))
        self.console.say(
            f"{what}: back to step {plan.step}, and from there without batches {first} to {last} (events.jsonl)"
        )
        return plan

    def _say_straggler(self, line: str, event: dict[str, Any]) -> None:
        assert self.tracker is not None
        self.tracker.event({"step": self.step, **event})
        self.console.say(line)

    def _log(self, result: Any, selected: int, lr: float, meter: Meter) -> None:
        mine = (0.0, 0) if result is None else (float(result.loss_sum), int(result.correct))
        parts = self.control.gather(mine)
        speed = meter.read()
        if parts is None or self.tracker is None:
            return
        seen = selected if result is not None else 0
        loss = math.fsum(p[0] for p in parts) / seen if seen else math.nan
        record: dict[str, Any] = {
            "kind": "train",
            "step": self.step,
            "loss": loss,
            "perplexity": math.exp(min(loss, 80.0)),
            "accuracy": sum(p[1] for p in parts) / seen if seen else math.nan,
            "lr": lr,
            "grad_norm": None if result is None else float(result.grad_norm),
            "tokens": self.tokens,
            **speed,
            **self.stragglers.slowest,
            "epoch": self.bytes / self.inputs.num_bytes,
            "progress": self.progress(),
            "memory_gib": peak_memory_gib(self.topology.device),
            "selected": selected,
            "skipped": self.skipped,
            "lost_documents": sum(fault["documents"] for fault in self.ledger.faults),
        }
        if self.engine.loss_scale is not None:
            record["loss_scale"] = self.engine.loss_scale
        self.tracker.log({k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()})
        self.dir.status("running", self.step)

    def validate(self) -> None:
        """Measure the validation set, if there is one, and log it."""
        if self.val_stream is None:
            return
        self.validated_step = self.step
        sampler, rows = None, self.config.track.predictions
        if self.tracker and rows:
            sampler = Sampler(self.engine.evaluate, self.head, self.inputs.pretrained_tokenizer, rows)
        result = evaluate.validate(self.val_stream, sampler or self.engine.evaluate, self.control)
        if self.tracker and not result["selected"]:
            self.tracker.event({"kind": "empty_validation", "step": self.step})
            self.console.say("the validation set holds no text to predict; nothing is measured")
        elif self.tracker:
            if result["lost_documents"]:
                self.tracker.event({"kind": "val_data_loss", "step": self.step, "documents": result["lost_documents"]})
                self.console.say(
                    f"note: {result['lost_documents']} validation documents cannot be read; the numbers are of the others"
                )
            self.tracker.log({"kind": "val", "step": self.step, **result}, sampler.rows if sampler else ())
            if math.isfinite(result["loss"]):
                self.validation = {"step": self.step, "loss": result["loss"]}
            self.console.say(
                f"validation at step {self.step}: loss {result['loss']:.4f}, perplexity {result['perplexity']:.1f}, accuracy {result['accuracy']:.1%} "
                f"(unigram entropy {result['unigram_entropy']:.4f})"
            )

    def _validation(self) -> dict[str, Any] | None:
        """The last validation, {step, loss}, if it is newer than the last checkpoint and so says something of this one."""
        measured = self.validation
        newer = measured is not None and (self.saved_step or 0) < measured["step"] <= self.step
        return measured if newer else None

    def save(self) -> None:
        """Start a checkpoint of the state after ``step`` steps. Collective."""
        self._settle()
        engine = self.engine
        shapes = engine.shapes()
        keys = {f"param/{n}": s.numel() for n, s in shapes.items()} | {
            f"state/{k}/{n}": s.numel() for k in engine.state_keys() for n, s in shapes.items()
        }
        owners = checkpoint.assign(keys, self.topology.world_size)
        mine = engine.snapshot(owners)
        cursors = self.control.gather(self.cursors)
        trainer: dict[str, Any] = {}
        if cursors is not None:
            merged = self.cursors.copy()
            for rank, part in enumerate(cursors):
                merged[rank :: self.topology.world_size] = part[rank :: self.topology.world_size]
            trainer = {
                "step": self.step,
                "tokens": self.tokens,
                "bytes": self.bytes,
                "skipped": self.skipped,
                "progress": self.progress(),
                "cursors": merged.tolist(),
                # Copies: a thread writes them while the run goes on.
                "ledger": list(self.ledger.faults),
                "skips": list(self.ledger.skips),
                "bad_steps": self.bad_steps,
                "source": self.source,
                **self.began,
                "recent_losses": None if self.spikes is None else self.spikes.state(),
                "wandb_id": self.tracker.wandb_id if self.tracker else None,
                "micro_batch": self.micro_batch_record,
                "validation": self._validation(),
                "attempt": self.dir.attempt,
                "time": time.time(),
            }
        self.writer.save(self.step, mine, owners, engine.optimizer_meta(), trainer)
        self.saved_before, self.saved_step = self.saved_step, self.step

    def _settle(self, *, last: bool = False) -> None:
        """Wait for the checkpoint in progress and tell a failure. Collective. Raises CheckpointError, on all ranks alike, where no other is to be tried."""
        failure = self.writer.settle(self.control, last=last)
        if failure is None:
            if self.tracker:
                self.tracker.checkpoints()
            return
        self.saved_step = self.saved_before
        if self.tracker:
            told = {key: value for key, value in asdict(failure).items() if key != "end"}
            self.tracker.event({"kind": "checkpoint_failed", **told})
            self.console.say(f"{failure}; nothing is left of it, those before are as they were. {failure.remedy}")
        if failure.end:
            raise checkpoint.CheckpointError(failure.end)

    def close(self, outcome: str) -> int:
        """Say how the attempt ended, in status.json first; returns the exit code. Collective."""
        code = EXIT_FINISHED if outcome == "finished" else EXIT_STOPPED
        requeue = bool(self.control.sum([int(self.flag.requeue)])[0]) and code == EXIT_STOPPED
        if self.is_first:
            state: State = "finished" if code == EXIT_FINISHED else ("preempted" if requeue else "cancelled")
            self.dir.status(state, self.step, self.flag.reason if code == EXIT_STOPPED else "", requeue)
        # From here on nothing can turn the outcome into a failure, and no rank waits for rank 0's tracking.
        self.control.barrier()
        self.watchdog.stop()
        if self.tracker is not None:
            reason = self.flag.reason if code == EXIT_STOPPED else ""
            with contextlib.suppress(OSError):
                kind = "finished" if code == EXIT_FINISHED else "stopped"
                self.tracker.event({"kind": kind, "step": self.step, "reason": reason, "requeue": requeue})
                where = f"checkpoint {self.dir.path / 'checkpoints' / checkpoint.name(self.step)}"
                if code == EXIT_FINISHED:
                    self.console.say(f"finished after {self.step} steps and {self.tokens:,} tokens; {where}")
                else:
                    self.console.say(
                        f"stopped at step {self.step} ({reason}); {where}; the same command goes on from there"
                    )
            self.tracker.finish(0)
        self.dir.release()
        return code

    def fail(self, error: BaseException) -> None:
        """Record a failure; the first rank that fails shows its traceback, the others one line. Does what it can on a full disk."""
        rank = self.topology.rank
        reason = redact(f"rank {rank}: {type(error).__name__}: {error}")
        trace = redact("".join(traceback.format_exception(error)))
        gone = self.peers.gone() if isinstance(error, RuntimeError) else ""
        if gone:
            reason = f"{gone}. {reason}"
        told = self.watchdog.failing(reason, EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILED)
        signal.alarm(FAIL_WITHIN_S)  # where even this hangs, on a file system that is gone
        if told is not None and told.rank != rank:  # another rank said why, whatever this one makes of its end
            reason = told.reason
            self.dir.claim_failure(reason)
            is_first = False
        else:
            is_first = self.dir.claim_failure(reason)
        if self.is_first and self.dir.is_gone():
            report_user_error(
                f"run directory {str(self.dir.path)!r} was removed or moved, or another is in its place, so the run ends; what it did after its last "
                "checkpoint is lost. A directory that was moved goes on under its new name: --run.dir, --run.name."
            )
        elif isinstance(error, UserError):
            report_user_error(error)
        elif not is_first:
            print(f"rank {rank} ends after another rank's failure ({type(error).__name__})", file=sys.stderr)
        else:
            print(reason if gone else trace, file=sys.stderr)
        with contextlib.suppress(OSError):
            path = self.dir.path / "logs" / f"attempt_{self.dir.attempt}_rank_{rank}.traceback"
            path.write_text(trace)
        with contextlib.suppress(OSError):
            self.dir.failed(self.step, reason)
        if self.tracker:
            self.tracker.finish(1)
        with contextlib.suppress(OSError):
            self.dir.release()
        self.watchdog.let_others_read()

    def _end_now(self, code: int) -> None:
        """What the watchdog does last, in its own thread."""
        if self.tracker and code == EXIT_HUNG:
            self.tracker.hung(LAST_WORDS_S)
        with contextlib.suppress(OSError):
            self.dir.release()
        leave(code)


def run(invocation: Invocation) -> int:
    """Train as this process's rank; returns the exit code. Raises UserError before anything was changed."""
    config = invocation.config
    inputs = Inputs(config, distributed.Topology.from_env().world_size)
    timeout = collective_timeout(config.train.timeout)
    topology = distributed.init(timeout, deterministic=config.train.deterministic)
    position = Position()
    # A rank may read or write a checkpoint that long while the others wait; what hangs is for the watchdog to find.
    control = distributed.ControlGroup(max(timeout, PATIENCE_S), lambda: position.within(COMMUNICATION))
    attempt = Run(invocation, inputs, topology, control, position)
    path = attempt.open()
    if attempt.finished_before:
        attempt.console.say(
            f"run {attempt.dir.path} is finished; nothing to do. To train on, raise train.steps or train.epochs with --allow_change."
        )
        attempt.dir.release()
        distributed.shutdown()
        return EXIT_FINISHED
    try:
        with stop_signals(attempt.flag):
            attempt.watchdog.start()
            attempt.build(path)
            attempt.announce()
            with attempt.console:
                outcome = attempt.train()
            code = attempt.close(outcome)
    except BaseException as error:
        if autobatch.out_of_memory(error):
            auto, saved = config.train.micro_batch == "auto", attempt.saved_step is not None
            error = autobatch.too_large(inputs.micro_batch, auto=auto, saved=saved)
        try:
            attempt.fail(error)
        finally:
            leave(EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILED)
    attempt.engine.close()
    distributed.shutdown()
    if multiprocessing.active_children():  # a loader worker that a disk holds, for which the interpreter would wait
        leave(code)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Exit codes: 0 finished, 75 stopped with a checkpoint, 76 hung (the watchdog ended it), 2 the user's mistake, 1 a failure."""
    outlive_output()
    words = [w for w in (sys.argv[1:] if argv is None else argv) if not w.startswith(("--local_rank", "--local-rank"))]
    try:
        return run(load(words))
    except KeyboardInterrupt:  # during set-up; later a signal asks the run to stop
        return EXIT_INTERRUPTED
    except UserError as error:
        report_user_error(error)
        distributed.shutdown()
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
