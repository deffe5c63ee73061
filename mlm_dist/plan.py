"""How many bytes a rank's training step needs, by arithmetic alone: what `mlm-dist plan` shows and `train.micro_batch: auto` starts from.

A step is followed through its moments (the head's forward pass, its backward pass, that of each layer, of the embeddings, the reduction of the gradients,
the optimizer): at each of them certain tensors are alive, and the peak is the largest of these sums. What is alive was read in transformers' modelling code
(activations) and in DeepSpeed 0.19.8's ZeRO optimizers (everything else), and `python -m benchmarks.memory` holds it against a counting allocator.

Notation: T tokens of a micro-batch, H hidden size, I intermediate size, A heads, S tokens of a row, V vocabulary, P parameters, W ranks; M selected
positions; `c` bytes of what products give, `w` bytes of a weight, `f` bytes of the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import BertConfig

TERMS = ("parameters", "gradients", "optimizer", "activations", "head", "buffers")
# DeepSpeed's where a template is silent, in elements; stage 0 reduces by `reduce_bucket_size` too.
_DEFAULT_BUCKET = 500_000_000
_PREFETCH = 50_000_000
_MAX_LIVE = 1_000_000_000
_SUB_GROUP = 1_000_000_000


@dataclass(frozen=True)
class Model:
    """The sizes of a BertForMaskedLM without pooler, its decoder tied to its word embedding."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    positions: int
    types: int

    @classmethod
    def of(cls, config: BertConfig) -> Model:
        """The sizes that `config` holds."""
        return cls(
            vocab=config.vocab_size,
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            intermediate=config.intermediate_size,
            positions=config.max_position_embeddings,
            types=config.type_vocab_size,
        )

    @cached_property
    def decayed(self) -> list[int]:
        """Elements of each parameter that decays, in the module's order: ZeRO 1 and 2 cut the ranks' partitions out of these."""
        h, i = self.hidden, self.intermediate
        layer = [h * h] * 4 + [i * h, h * i]
        return [self.words, self.positions * h, self.types * h] + layer * self.layers + [h * h]

    @property
    def words(self) -> int:
        """Elements of the word embedding, the largest parameter of any usual BERT."""
        return self.vocab * self.hidden

    @property
    def layer(self) -> int:
        """Elements of one layer: four H x H products, two H x I ones, their biases, two norms."""
        h, i = self.hidden, self.intermediate
        return 4 * (h * h + h) + 2 * h * i + i + h + 4 * h

    @property
    def embeddings(self) -> int:
        """Elements of the embeddings and their norm."""
        return self.words + (self.positions + self.types + 2) * self.hidden

    @property
    def head(self) -> int:
        """Elements of the head that are its own: dense layer, norm, the decoder's bias."""
        return self.hidden * self.hidden + 3 * self.hidden + self.vocab

    @property
    def parameters(self) -> int:
        """Elements of all parameters, tied ones once."""
        return self.embeddings + self.layers * self.layer + self.head

    @property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(self.decayed)

    def in_partition(self, world_size: int) -> int:
        """Elements of the parameters of which a rank's partition has a part, each counted whole: the most of any rank."""
        size, most = -(-sum(self.decayed) // world_size), 0
        bounds = [0]
        for numel in self.decayed:
            bounds.append(bounds[-1] + numel)
        first = last = 0
        for rank in range(world_size):
            while bounds[first + 1] <= rank * size and first + 2 < len(bounds):
                first += 1
            while last + 1 < len(bounds) and bounds[last] < (rank + 1) * size:
                last += 1
            most = max(most, bounds[last] - bounds[first])
        return most + -(-(self.parameters - sum(self.decayed)) // world_size)


@dataclass(frozen=True)
class Job:
    """What decides a rank's memory.

    Attributes:
        model: the sizes.
        zero: the section `zero_optimization` of the DeepSpeed template.
        world_size: ranks.
        micro_batch: rows of one forward and backward.
        seq_len: tokens of a row; rows are taken to be full.
        selected: share of the tokens that carry a label.
        precision: `train.precision`.
        attention: `eager`, `sdpa` or `varlen`, as the device will run it (see `attention.resolve_attention`).
        attention_dropout, hidden_dropout: probabilities.
        checkpoint_activations: each layer is computed again in the backward pass.
        head_chunk: most positions whose logits are there at a time.
        accumulate: a step has more than one micro-batch.
        device: `cuda` or `cpu`.
    """

    model: Model
    zero: Mapping[str, Any] = field(hash=False)
    world_size: int
    micro_batch: int
    seq_len: int
    selected: float
    precision: str = "bf16"
    attention: str = "sdpa"
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    checkpoint_activations: bool = False
    head_chunk: int = 2048
    accumulate: bool = True
    device: str = "cuda"

    @property
    def tokens(self) -> int:
        """T."""
        return self.micro_batch * self.seq_len

    @property
    def weight(self) -> int:
        """w: bytes of a weight on the device."""
        return 2 if self.precision == "bf16_pure" else 4

    @property
    def compute(self) -> int:
        """c: bytes of what products give."""
        return 4 if self.precision == "fp32" else 2

    @property
    def autocast(self) -> bool:
        """Products get copies of weights and inputs in the lower precision."""
        return self.compute < self.weight

    @property
    def keeps_casts(self) -> bool:
        """The backward pass uses those copies; DeepSpeed's own linear function of stage 3 keeps what they were made from, and makes them again."""
        return self.autocast and self.zero["stage"] < 3

    @property
    def offload(self) -> bool:
        """The optimizer lives on the host."""
        return "offload_optimizer" in self.zero


@dataclass(frozen=True)
class Prediction:
    """The peak of a rank.

    Attributes:
        moment: when it is reached.
        device: bytes by term (see TERMS) on the device at that moment.
        host: bytes by term that offload keeps on the host.
    """

    moment: str
    device: dict[str, int]
    host: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.device.values())

    @property
    def total_host(self) -> int:
        """Bytes on the host."""
        return sum(self.host.values())


def predict(job: Job) -> Prediction:
    """The peak of a step that is not the first, when the optimizer has its state. On a CPU device and host are one memory, so the sum decides."""
    zero = _Zero.of(job)
    best: Prediction | None = None
    for moment, terms in _moments(job, zero):
        device = {term: int(zero.device.get(term, 0) + terms.get(term, 0)) for term in TERMS}
        host = {term: int(zero.host.get(term, 0) + terms.get(f"host {term}", 0)) for term in TERMS}
        seen = Prediction(moment, device, host)
        weight = seen.total + (seen.total_host if job.device == "cpu" else 0)
        if best is None or weight > best.total + (best.total_host if job.device == "cpu" else 0):
            best = seen
    assert best is not None
    return best


def bare(job: Job) -> int:
    """Peak bytes of the model's forward and backward pass alone: no DeepSpeed, no optimizer, every gradient kept."""
    alone = replace(job, zero={"stage": 0}, accumulate=False)
    zero = _Zero({"parameters": job.weight * job.model.parameters}, keeps=True)
    return int(
        zero.device["parameters"]
        + max(sum(terms.values()) for moment, terms in _moments(alone, zero) if moment != "start")
    )


# ---- what ZeRO keeps ----


@dataclass(frozen=True)
class _Zero:
    """What a stage keeps, and when, in bytes.

    Attributes:
        device, host: there all the time, by term.
        keeps: gradients stay with their parameters until the last one is there; else they are given away one by one.
        before: gradients of a step's micro-batches before the last.
        bucket: buffers that gradients are reduced in, from the first gradient on.
        bucket_stays: they are there in the forward pass of a later micro-batch.
        reduce: taken while a bucket is reduced.
        partition: where reduced gradients go, from the first full bucket on.
        bucket_elements: gradients that fill a bucket.
        gathered: parameters gathered from all ranks for the forward and backward pass.
        gathering: buffer that they arrive in.
        at_step: gradients that the optimizer finds.
        step, host_step: taken by the optimizer's step.
    """

    device: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)
    keeps: bool = False
    before: int = 0
    bucket: int = 0
    bucket_stays: bool = False
    reduce: int = 0
    partition: int = 0
    bucket_elements: int = _DEFAULT_BUCKET
    gathered: int = 0
    gathering: int = 0
    at_step: int = 0
    step: int = 0
    host_step: int = 0

    @classmethod
    def of(cls, job: Job) -> _Zero:
        """By stage."""
        return {0: _stage_0, 1: _stage_1_2, 2: _stage_1_2, 3: _stage_3}[job.zero["stage"]](job)


def _stage_0(job: Job) -> _Zero:
    p = job.model.parameters
    # DeepSpeedEngine.allreduce_bucket() flattens the gradients, by buckets, into a copy.
    flat = 4 * min(p, job.zero.get("reduce_bucket_size", _DEFAULT_BUCKET))
    return _Zero(
        {"parameters": job.weight * p, "optimizer": 8 * p},
        keeps=True,
        before=4 * p if job.accumulate else 0,
        reduce=flat,
        at_step=4 * p,
    )


def _stage_1_2(job: Job) -> _Zero:
    """DeepSpeedZeroOptimizer (stage_1_and_2.py)."""
    model, zero, w, second = job.model, job.zero, job.weight, job.zero["stage"] == 2
    p, part = model.parameters, -(-model.parameters // job.world_size)
    # grads_in_partition holds the parameters of this rank whole, the one that is cut too.
    owned = model.in_partition(job.world_size)
    # Weights in bf16 have their gradients summed in fp32: stage 1 beside each parameter, stage 2 in one buffer of the partition, which all micro-batches share.
    pure = job.precision == "bf16_pure"
    sums = 4 * (part if pure else owned)
    elements = zero.get("reduce_bucket_size", _DEFAULT_BUCKET)
    # setup_buckets(): whole buckets, however small the model, in the gradients' precision; two when they take turns.
    buckets = 2 if zero.get("overlap_comm", False) else 1
    bucket = (w if second else 4) * elements * buckets if _contiguous(job) else 0
    filled = min(elements, p)
    # allreduce_bucket() flattens what it reduces; stage 1 reduces in place. The norm of a parameter is taken in fp64, for offload when it is reduced.
    largest = max(filled, model.words) if model.words > elements else filled
    reduce = (4 + (w if pure else 0)) * largest if second else 0
    if job.offload:
        return _Zero(
            # temp_grad_buffer_for_gpu_offload is as large as the largest parameter.
            {"parameters": w * p, "buffers": w * model.largest},
            # The weights in fp32, a buffer that they come back through, the gradient's partition, moments; temp_grad_buffer_for_cpu_offload.
            {
                "optimizer": (4 + w + 8) * part,
                "gradients": 4 * part + (w * owned if job.accumulate and not pure else 0),
                "buffers": w * model.largest,
            },
            bucket=bucket,
            reduce=max(reduce, 8 * min(model.largest, owned)),
            bucket_elements=elements,
        )
    return _Zero(
        {"parameters": w * p, "optimizer": (4 + 8) * part},
        keeps=not second,
        before=(sums if second else 4 * p) if job.accumulate else 0,
        bucket=bucket,
        bucket_stays=not second and job.accumulate,
        reduce=reduce,
        partition=0 if pure and job.accumulate and second else sums,
        bucket_elements=elements,
        at_step=sums,
        # First the norms, in fp64, parameter by parameter; then each group's gradients are flattened.
        step=max(8 * min(model.largest, owned), 4 * part),
    )


def _contiguous(job: Job) -> bool:
    return bool(job.zero.get("contiguous_gradients", True)) or job.offload


def _stage_3(job: Job) -> _Zero:
    """DeepSpeedZeroOptimizer_Stage3 (stage3.py) and the gathering of partition_parameters.py."""
    model, zero, w, ranks = job.model, job.zero, job.weight, job.world_size
    p, part = model.parameters, -(-model.parameters // job.world_size)
    elements = zero.get("reduce_bucket_size", _DEFAULT_BUCKET)
    several = ranks > 1
    # A parameter is let go when its next use lies further away than max_reuse_distance: BERTs are smaller.
    live = min(p, zero.get("stage3_max_live_parameters", _MAX_LIVE)) if several else 0
    prefetch = min(p, zero.get("stage3_prefetch_bucket_size", _PREFETCH)) if several else 0
    filled = min(elements, p)
    norm = 8 * min(-(-model.largest // ranks), 250_000_000)
    flattened = 4 * min(part, zero.get("sub_group_size", _SUB_GROUP))
    common: dict[str, Any] = {
        # The full gradients of a bucket are laid out by rank, and each rank's part comes back into a buffer of its own.
        "reduce": 4 * (filled + -(-filled // ranks)) if several else 0,
        "bucket_elements": elements,
        "gathered": w * live,
        "gathering": w * prefetch,
    }
    # In the precision that gradients are reduced in, fp32 whatever the weights are.
    bucket = 4 * elements if zero.get("contiguous_gradients", True) else 0
    if job.offload:
        host = {"optimizer": (4 + 8) * part, "gradients": 2 * 4 * part}
        return _Zero({"parameters": w * part, "buffers": bucket}, host, step=norm, host_step=flattened, **common)
    device = {"parameters": w * part, "optimizer": (4 + 8) * part, "gradients": 4 * part, "buffers": bucket}
    return _Zero(device, step=max(norm, flattened), **common)


# ---- what the model keeps ----


@dataclass(frozen=True)
class _Layer:
    """Bytes of one layer for a micro-batch: kept for the backward pass, its input and output included once; most taken beside them in the backward pass."""

    attention: int
    rest: int
    attention_backward: int
    rest_backward: int

    @property
    def kept(self) -> int:
        return self.attention + self.rest


def _noise(job: Job, elements: int, width: int) -> int:
    """What dropout keeps of `elements` of `width` bytes: CUDA's fused kernel a byte each, CPU the noise that it multiplied by."""
    return elements * (1 if job.device == "cuda" else width)


def _layer(job: Job) -> _Layer:
    m, c, w = job.model, job.compute, job.weight
    f = w
    t, h, i = job.tokens, job.model.hidden, job.model.intermediate
    dropped = job.hidden_dropout > 0
    scores, scores_backward = _scores(job)
    # Autocast casts the layer's input once for each of query, key and value, and the feed-forward's input.
    cast = t * h * c if job.keeps_casts else 0
    attention = 3 * cast + 3 * t * h * c + scores
    # The dense layer's noise, the sum that LayerNorm takes, its two statistics, and its output, of which autocast needs the casts only.
    norm = (_noise(job, t * h, c) if dropped else 0) + t * h * f * (1 if job.keeps_casts else 2) + 8 * t
    rest = norm + cast + 2 * t * i * c + norm
    # Backward: LayerNorm's gradient (it also goes past the block), through dropout or a cast, and that of the activation's output.
    through = t * h * c if dropped or job.autocast else 0
    weights = m.intermediate * h * (w + (c if job.autocast else 0))
    return _Layer(
        attention + norm, rest - norm, scores_backward + t * h * (f + c), t * h * f + through + t * i * c + weights
    )


def _scores(job: Job) -> tuple[int, int]:
    """Bytes between the projections and the dense layer of attention: kept, and most taken in the backward pass."""
    m, c, t = job.model, job.compute, job.tokens
    context = t * m.hidden * c
    if job.attention != "eager":
        # The context and the logarithm of each query's sum of exponentials; the gradients of query, key and value.
        return context + 4 * t * m.heads, 4 * context
    pairs = t * job.seq_len * m.heads
    wide = 4 if job.device == "cuda" and job.autocast else c  # CUDA's autocast computes softmax in fp32
    kept = pairs * wide
    if job.attention_dropout > 0:
        kept += _noise(job, pairs, wide) + pairs * wide
    if wide > c:
        kept += pairs * c  # the weights, cast for their product with the values
    return kept + context, 2 * pairs * wide + context


def _moments(job: Job, zero: _Zero) -> Iterator[tuple[str, dict[str, int]]]:
    """(moment, bytes by term that are there beside what ZeRO keeps); terms that begin with "host " are the host's."""
    m, c, w = job.model, job.compute, job.weight
    t, h = job.tokens, m.hidden
    layer = _layer(job)
    # Token, position and segment ids of this step and the next (the feed is a batch ahead), the gathered token types.
    inputs = 8 * t * (3 * 2 + 1)
    mask = t * job.seq_len * c if job.attention != "varlen" else 0
    embedded = t * h * w * (1 if job.keeps_casts else 2) + 8 * t + (_noise(job, t * h, w) if job.hidden_dropout else 0)
    base = inputs + mask + embedded
    # Autocast keeps the copies of weights that it made until the backward pass has used them.
    copies = c * (m.layer - 9 * h - m.intermediate) if job.keeps_casts else 0
    kept, again = layer.kept, 0
    if job.checkpoint_activations:
        # Only a layer's input is kept, and one layer is computed again at a time.
        kept, again = t * h * w, layer.kept + copies
    in_forward, in_backward = _head(job)
    stack = base + m.layers * (kept + (0 if job.checkpoint_activations else copies))
    early = zero.bucket if zero.bucket_stays else 0

    yield "start", _start(job, zero)
    forward_copies = m.layers * copies if job.checkpoint_activations else 0
    common = {"gradients": zero.before, "parameters": zero.gathered}
    yield (
        "forward, last layer",
        common | {"activations": stack + again + forward_copies, "buffers": early + zero.gathering},
    )
    yield (
        "forward, head",
        common | {"activations": stack + forward_copies, "head": in_forward, "buffers": early + zero.gathering},
    )
    yield "backward, head", common | {"activations": stack, "head": in_backward, "buffers": early}
    # The tied weight's gradient waits for the embeddings' part before it is given to anyone.
    words = w * m.words
    done = m.head
    for index in reversed(range(m.layers)):
        below = base + index * (kept + (0 if job.checkpoint_activations else copies)) + again
        here = below + (t * h * w if job.checkpoint_activations else layer.kept + copies)
        full = done + m.layer > zero.bucket_elements and not zero.keeps
        terms = {
            "gradients": zero.before + _fresh(job, zero, done) + words + (zero.partition if full else 0),
            "buffers": zero.bucket + (zero.reduce if full and zero.gathered else 0),
            "parameters": max(0, zero.gathered - w * done),
        }
        yield (
            f"backward, feed-forward of layer {index + 1}",
            terms | {"activations": here + layer.rest_backward},
        )
        yield (
            f"backward, attention of layer {index + 1}",
            terms | {"activations": here - layer.rest + layer.attention_backward},
        )
        done += m.layer
    partition = 0 if zero.keeps else zero.partition
    end = {"buffers": zero.bucket, "parameters": max(0, zero.gathered - w * done)}
    yield (
        "backward, embeddings",
        end
        | {
            "gradients": zero.before + _fresh(job, zero, done) + 2 * words + partition,
            "activations": base + 2 * t * h * w,
        },
    )
    if zero.keeps:
        overflow = zero.partition if m.parameters > zero.bucket_elements else 0
        gradients = 4 * m.parameters + overflow
    else:
        gradients = zero.before + partition + 2 * words
    yield "reduction", end | {"gradients": gradients, "activations": inputs, "buffers": zero.bucket + zero.reduce}
    yield (
        "optimizer",
        {"gradients": zero.at_step, "buffers": zero.step, "activations": inputs, "host buffers": zero.host_step},
    )


def _start(job: Job, zero: _Zero) -> dict[str, int]:
    """Building the engine, before there is optimizer state or a bucket: the weights whole, and beside them what DeepSpeed copies them into."""
    whole = 4 * job.model.parameters
    # Stages 1 and 2 flatten the weights and clone their part; one rank's part is all of them.
    flat = 3 if job.world_size == 1 else 2
    copies = {0: 0, 1: flat, 2: flat, 3: 1}[job.zero["stage"]] * job.weight * job.model.parameters
    return {
        "parameters": max(whole, copies if job.zero["stage"] < 3 else whole + copies // job.world_size)
        - zero.device["parameters"],
        "optimizer": -zero.device.get("optimizer", 0),
        "gradients": -zero.device.get("gradients", 0),
        "buffers": -zero.device.get("buffers", 0),
        "host optimizer": -zero.host.get("optimizer", 0),
        "host gradients": -zero.host.get("gradients", 0),
        "host buffers": -zero.host.get("buffers", 0),
    }


def _fresh(job: Job, zero: _Zero, done: int) -> int:
    """Gradients of the first micro-batch, of `done` elements, where they stay; later ones are added to those."""
    return 4 * done if zero.keeps and not job.accumulate else 0


def _head(job: Job) -> tuple[int, int]:
    """Most bytes of the head in its forward pass and in its backward pass."""
    m, c, w = job.model, job.compute, job.weight
    selected = int(job.selected * job.tokens)
    chunk = min(selected, job.head_chunk)
    # Gathered states (and their cast), dense layer, activation, norm (and its cast).
    transform = chunk * m.hidden * (2 * w + 2 * c + (2 * c if job.keeps_casts else 0)) + 8 * chunk
    decoder = c * (m.words + m.hidden * m.hidden) if job.keeps_casts else 0
    logits = chunk * m.vocab
    wide = 0 if c == 4 else 4
    forward = transform + decoder + logits * (c + wide + 4)
    # nll_loss's gradient and log_softmax's, beside what it kept; then the products, with the decoder's gradient.
    softmax = transform + decoder + logits * 12
    product = transform + logits * c + m.words * (2 * c if job.autocast else w)
    if job.autocast:  # the gradient in the lower precision, cast
        product = max(product, transform + m.words * (c + w))
    dense = selected * m.hidden * w  # the gradient of what was gathered
    if selected > job.head_chunk:
        # A chunk at a time is computed again; the decoder's gradient is summed over them.
        return forward, max(softmax, product) + m.words * w + job.tokens * m.hidden * w
    return forward, max(softmax, product) + dense
