"""What the run config names, opened and checked against each other before anything expensive starts."""

from mlm_dist import ds_config
from mlm_dist.config import Config
from mlm_dist.data import tokenizer as tokenizers
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.masking import MaskConfig
from mlm_dist.data.stream import Stream, open_stream
from mlm_dist.errors import UserError
from mlm_dist.model import bert


class DataInputs:
    """Manifests and tokenizer of a config, and the streams that they give.

    Raises:
        UserError: something is missing, damaged or does not fit.
    """

    def __init__(self, config: Config):
        self.config = config
        self.manifest = Manifest.read(config.data.manifest)
        self.manifest.check_files()
        self.val_manifest = Manifest.read(config.data.val_manifest) if config.data.val_manifest else None
        if self.val_manifest is not None:
            self.val_manifest.check_files()
        for key, manifest in (("manifest", self.manifest), ("val_manifest", self.val_manifest)):
            if manifest is not None and manifest.text_field not in (None, config.data.text_field):
                raise UserError(
                    f"data.text_field: {config.data.text_field!r}, but data.{key} {getattr(config.data, key)!r} was indexed with --field "
                    f"{manifest.text_field}; set data.text_field: {manifest.text_field}."
                )
        # A batch must hold a row of every lane, or the run would end at the first batch whose lanes have ended.
        most = min(config.train.global_batch, self.manifest.num_blocks)
        if config.data.lanes is not None and config.data.lanes > most:
            raise UserError(
                f"data.lanes: {config.data.lanes} must be at most {most}: train.global_batch is {config.train.global_batch} rows, and "
                f"data.manifest has {self.manifest.num_blocks} blocks."
            )
        self.pretrained_tokenizer = tokenizers.load_pretrained(config.data.tokenizer)
        self.tokenizer = tokenizers.from_pretrained(self.pretrained_tokenizer)

    def stream(self, rank: int, world_size: int) -> Stream:
        """This rank's training stream."""
        config = self.config
        return open_stream(
            config.data,
            config.mask,
            self.manifest,
            self.tokenizer,
            seed=config.run.seed,
            global_batch=config.train.global_batch,
            micro_batch=config.train.micro_batch,
            rank=rank,
            world_size=world_size,
            epochs=config.train.epochs,
        )

    def val_stream(self, rank: int, world_size: int) -> Stream | None:
        """This rank's part of the validation set, or None without one. Masks are BERT's, whatever the training's."""
        config = self.config
        if self.val_manifest is None:
            return None
        return open_stream(
            config.data,
            MaskConfig(),
            self.val_manifest,
            self.tokenizer,
            seed=config.eval.seed,
            global_batch=config.eval.batch,
            micro_batch=config.train.micro_batch,
            rank=rank,
            world_size=world_size,
            epochs=1,
            validation=True,
        )


class Inputs(DataInputs):
    """The data's inputs, and with them the model's configuration and DeepSpeed's.

    Raises:
        UserError: something is missing, damaged or does not fit.
    """

    def __init__(self, config: Config, world_size: int):
        if config.train.global_batch < world_size:
            raise UserError(
                f"train.global_batch: {config.train.global_batch} rows cannot feed {world_size} ranks; use at least {world_size}, or start fewer ranks."
            )
        super().__init__(config)
        self.ds_config = ds_config.merge(
            ds_config.load_template(config.deepspeed.config),
            precision=config.train.precision,
            clip=config.train.clip,
            micro_batch=config.train.micro_batch,
        )
        self.bert_config = bert.load_config(
            config.model, vocab_size=self.tokenizer.vocab_size, pad_token_id=self.tokenizer.pad_id
        )
        bert.check_vocabulary(config.model, self.pretrained_tokenizer.get_vocab())
        bert.check_fit(self.bert_config, vocab_size=self.tokenizer.vocab_size, seq_len=config.data.seq_len)
