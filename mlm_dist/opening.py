"""What rank 0 says before the first step."""

from mlm_dist.config import Config
from mlm_dist.data.stream import Stream
from mlm_dist.inputs import Inputs


def opening_lines(config: Config, inputs: Inputs, stream: Stream, step: int, *, parameters: int) -> list[str]:
    """The run in numbers, then what the user should know of it.

    Args:
        stream: rank 0's.
        step: steps that are taken already.
        parameters: of the model.
    """
    schedule, order = stream.schedule, stream.order
    lines = [
        f"model of {parameters / 1e6:.1f} M parameters; {sum(inputs.num_documents):,} documents, {inputs.num_bytes / 1e6:.1f} MB in "
        f"{inputs.num_shards} shards; {order.lanes} lanes; {schedule.size(step)} rows a step, "
        f"{stream.micro_batches(step)} x {inputs.micro_batch} on each rank"
    ]
    if step < schedule.full_from:
        lines.append(
            f"batches grow from {config.train.batch_start} to {config.train.global_batch} rows until step {schedule.full_from + 1}"
        )
    lines += [f"note: {note}" for note in inputs.notes]
    if note := fill_note(config, inputs, stream):
        lines.append(f"note: {note}")
    if config.train.epochs is not None:
        fill = order.tail_fill(config.train.epochs)
        lines.append(f"lanes are {fill:.0%} full in the last tenth of the run")
        if fill < 0.8:
            lines.append(
                "note: lanes end unevenly; prepare the data with smaller blocks (--block-size), or set fewer data.lanes"
            )
    return lines


def fill_note(config: Config, inputs: Inputs, stream: Stream) -> str | None:
    """How far the micro-batches are from full and which numbers of ranks divide the rows evenly; None when they are full enough."""
    if (fill := stream.fill()) >= 0.95:
        return None
    lanes, smallest = stream.order.lanes, config.train.batch_start or config.train.global_batch
    even = [w for w in range(1, 2 * stream.world_size + 1) if lanes % w == 0 and smallest % w == 0]
    return (
        f"{fill:.0%} of the micro-batch places hold a row; {lanes} lanes and {smallest} rows divide evenly "
        f"over {', '.join(map(str, even))} ranks (micro-batches of {inputs.micro_batch})"
    )
