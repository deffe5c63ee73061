"""How many bytes a rank's training step needs, by arithmetic alone: what `mlm-dist plan` shows and `train.micro_batch: auto` starts from.

A step is followed through its moments (the head's forward pass, its backward pass, that of each layer, of the embeddings, the reduction of the gradients,
the optimizer): at each of them certain tensors are alive, and the peak is the largest of these sums. What is alive was read in transformers' modelling code
(activations) and in DeepSpeed 0.19.8's ZeRO optimizers (everything else), and `python -m benchmarks.memory` holds it against a counting allocator.

Notation: T tokens of a micro-batch, H hidden size, I intermediate size, A heads, S tokens of a row, V vocabulary, P parameters, W ranks; M selected
positions; `c` bytes of what products give, `w` bytes of a weight, `f` bytes of the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mlm_dist.plan_job import Job
from mlm_dist.plan_zero import Zero

TERMS = ("parameters", "gradients", "optimizer", "activations", "head", "buffers")


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
    zero = Zero.of(job)
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


def keeps_gradients(job: Job) -> bool:
    """Whether the run's gradients stay, in fp32, with their parameters until the last one is there."""
    return Zero.of(job).keeps and job.weight == 4


def bare(job: Job) -> int:
    """Peak bytes of the whole model's forward and backward pass alone: no DeepSpeed, no optimizer, gradients only where the run `keeps_gradients`."""
    alone = replace(job, zero={"stage": 0}, accumulate=False)
    zero = Zero({"parameters": job.weight * job.model.parameters}, keeps=keeps_gradients(job))
    return int(
        zero.device["parameters"]
        + max(sum(terms.values()) for moment, terms in _moments(alone, zero) if moment != "start")
    )


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
    if job.model.modern:
        return _modern_layer(job)
    m, c, w = job.model, job.compute, job.weight
    # CPU's autocast leaves a norm in its input's precision, and a product gave this one's.
    narrow = job.autocast and job.device == "cpu" and m.embedding > 0
    f = c if narrow else w
    casts = job.keeps_casts and not narrow
    t, h, i = job.tokens, job.model.hidden, job.model.intermediate
    dropped = job.hidden_dropout > 0
    scores, scores_backward = _scores(job)
    # Autocast casts the layer's input once for each of query, key and value, and the feed-forward's input.
    cast = t * h * c if casts else 0
    attention = 3 * cast + 3 * t * h * c + scores
    # The dense layer's noise, the sum that LayerNorm takes, its two statistics, and its output, of which autocast needs the casts only.
    norm = (_noise(job, t * h, c) if dropped else 0) + t * h * f * (1 if casts else 2) + 8 * t
    rest = norm + cast + 2 * t * i * c + norm
    # Backward: LayerNorm's gradient (it also goes past the block), through dropout or a cast, and that of the activation's output.
    through = t * h * c if dropped or job.autocast else 0
    weights = m.intermediate * h * (w + (c if job.autocast else 0))
    return _Layer(
        attention + norm, rest - norm, scores_backward + t * h * (f + c), t * h * f + through + t * i * c + weights
    )


def _modern_layer(job: Job) -> _Layer:
    """ModernBERT's: norms before the parts, rotated queries and keys beside the product that they came from, a gate."""
    c, w = job.compute, job.weight
    t, h, i = job.tokens, job.model.hidden, job.model.intermediate
    scores, scores_backward = _scores(job)
    # The norm's output for its product (autocast's cast of it), its statistics, and what is added to the residual stream.
    norm = t * h * c + 8 * t + t * h * w
    attention = norm + 5 * t * h * c + scores
    # The product's two halves, the activation of one, and that times the other.
    rest = norm + 4 * t * i * c + (_noise(job, t * i, c) if job.hidden_dropout > 0 else 0)
    weights = 2 * i * h * (w + (c if job.autocast else 0))
    rotation = 2 * t * h * 4  # in fp32
    return _Layer(attention, rest, scores_backward + rotation + t * h * (w + c), t * h * w + 4 * t * i * c + weights)


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


def _moments(job: Job, zero: Zero) -> Iterator[tuple[str, dict[str, int]]]:
    """(moment, bytes by term that are there beside what ZeRO keeps); terms that begin with "host " are the host's."""
    m, c, w = job.model, job.compute, job.weight
    t, h = job.tokens, m.hidden
    layer = _layer(job)
    # Token, position and segment ids of this step and the next (the feed is a batch ahead), the gathered token types.
    inputs = 8 * t * (3 * 2 + 1)
    mask = t * job.seq_len * c * (2 if m.modern else 1) if job.attention != "varlen" else 0
    e = m.width
    embedded = t * e * w * (1 if job.keeps_casts else 2) + 8 * t + (_noise(job, t * e, w) if job.hidden_dropout else 0)
    if m.embedding:  # the product that makes them as wide as the layers
        embedded += t * h * c + (t * e * c if job.keeps_casts else 0)
    if m.modern:  # cosines and sines of the positions, of each kind of layer
        embedded += 4 * t * (h // m.heads) * w
    base = inputs + mask + embedded
    # Autocast keeps the copies of weights that it made until the backward pass has used them.
    copies = c * m.products if job.keeps_casts else 0
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
            # The decoder's part, the embedding's, and autograd's sum of the two.
            "gradients": zero.before + _fresh(job, zero, done) + 3 * words + partition,
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


def _start(job: Job, zero: Zero) -> dict[str, int]:
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


def _fresh(job: Job, zero: Zero, done: int) -> int:
    """Gradients of the first micro-batch, of `done` elements, where they stay; later ones are added to those."""
    return 4 * done if zero.keeps and not job.accumulate else 0


def _head(job: Job) -> tuple[int, int]:
    """Most bytes of the head in its forward pass and in its backward pass."""
    m, c, w = job.model, job.compute, job.weight
    selected = int(job.selected * job.tokens)
    chunk = min(selected, job.head_chunk)
    # Gathered states (and their cast), dense layer, activation, norm (and its cast).
    transform = chunk * (m.hidden * w + m.width * (w + 2 * c)) + 8 * chunk
    transform += chunk * (m.hidden + m.width) * c if job.keeps_casts else 0
    decoder = c * (m.words + m.hidden * m.width) if job.keeps_casts else 0
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
