"""What the run config names, opened and checked against each other before anything expensive starts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mlm_dist import checkpoint, ds_config
from mlm_dist.config import Config
from mlm_dist.data import tokenizer as tokenizers
from mlm_dist.data.block import BlockMaker
from mlm_dist.data.extend_tokenizer import read_extension
from mlm_dist.data.losses import Losses
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.masking import MaskConfig
from mlm_dist.data.members import TokenIds
from mlm_dist.data.stream import SourceConfig, Stream, open_stream
from mlm_dist.distributed import Topology
from mlm_dist.errors import UserError
from mlm_dist.model import attention, bert, from_run
from mlm_dist.model.bert import ModelConfig
from mlm_dist.model.head import check_head
from mlm_dist.sizes import parse_size
from mlm_dist.storage.cache import Cache
from mlm_dist.storage.store import Store

# Text on which a fast tokenizer must agree with the reference: about half a second of the reference's time.
AGREE_CHARACTERS = 1 << 20
# However short their texts: each may be a wait for a server.
AGREE_BLOCKS = 16


@dataclass(frozen=True)
class Corpus:
    """One manifest of the config and where its shards come from.

    Attributes:
        key: the config key that names it.
    """

    key: str
    config: SourceConfig
    manifest: Manifest
    store: Store


class DataInputs:
    """Manifests and tokenizer of a config, and the streams that they give.

    Attributes:
        micro_batch: rows of a micro-batch.
        notes: what the user should hear of at the start.

    Raises:
        UserError: something is missing, damaged or does not fit.
    """

    def __init__(self, config: Config):
        self.config = config
        # With `auto` it is known when the devices were tried; what is done before does not depend on it.
        self.micro_batch = config.train.micro_batch if isinstance(config.train.micro_batch, int) else 1
        self.notes: list[str] = []
        data = config.data
        self._cache = Cache(data.cache_dir, parse_size(data.cache_size)) if data.cache_dir else None
        self.corpora = [
            self._open(f"data.sources[{i}].manifest" if data.sources else "data.manifest", source)
            for i, source in enumerate(data.corpora())
        ]
        self.val_corpus = (
            self._open("data.val_manifest", SourceConfig(data.val_manifest)) if data.val_manifest else None
        )
        # A batch must hold a row of every lane, or the run would end at the first batch whose lanes have ended.
        blocks = sum(corpus.manifest.num_blocks for corpus in self.corpora)
        key, smallest = config.train.smallest_batch()
        most = min(smallest, blocks)
        if data.lanes is not None and data.lanes > most:
            raise UserError(
                f"data.lanes: {data.lanes} must be at most {most}: {key} is {smallest} rows, and "
                f"{'data.sources has' if data.sources else 'data.manifest has'} {blocks} blocks."
            )
        self.pretrained_tokenizer = tokenizers.load_pretrained(data.tokenizer)
        reference = tokenizers.from_pretrained(self.pretrained_tokenizer)
        for corpus in [*self.corpora, *([self.val_corpus] if self.val_corpus else [])]:
            made_with = corpus.manifest.token_ids
            # Whole, not the fingerprint alone: a manifest from elsewhere must not say which ids are right.
            if made_with not in (None, TokenIds.of(reference)):
                raise UserError(
                    f"data.tokenizer: {data.tokenizer!r} (fingerprint {reference.fingerprint[:12]}) is not the one that {corpus.key} "
                    f"{corpus.config.manifest!r} was tokenized with ({made_with.fingerprint[:12]}); give that one."
                )
        config.mask.check_tokenizer(reference)
        self.tokenizer = self.reference = reference
        texts = [] if data.tokenizer_backend == "hf" else self._first_texts()
        self.tokenizer, why_not = tokenizers.choose_backend(reference, data.tokenizer_backend, texts)
        if why_not:
            self.use_reference(why_not)

    def _open(self, key: str, source: SourceConfig) -> Corpus:
        data = self.config.data
        manifest = Manifest.read(source.manifest)
        store = Store(
            manifest.root,
            retries=data.read_retries,
            timeout=data.read_timeout,
            cache=self._cache,
            allow_pipe=data.allow_pipe,
        )
        field = source.text_field or data.text_field
        if manifest.text_field not in (None, field):
            where = "data.text_field" if source.text_field is None else key.replace(".manifest", ".text_field")
            raise UserError(
                f"{where}: {field!r}, but {key} {source.manifest!r} was indexed with --field {manifest.text_field}; "
                f"set it to {manifest.text_field}."
            )
        corpus = Corpus(key, replace(source, text_field=field), manifest, store)
        if not store.remote:
            self._check(corpus)
        return corpus

    def use_reference(self, why: str) -> None:
        """Tokenize with transformers from here on."""
        self.tokenizer = self.reference
        self.notes.append(f"{why}; tokenizing with transformers, which is many times slower")

    def known_losses(self) -> list[dict[str, Any]]:
        """What of each corpus was unreadable when its manifest was made and is in no batch; corpora without any are left out."""
        return [
            {"manifest": corpus.config.manifest, **corpus.manifest.losses.to_json()}
            for corpus in self.corpora
            if corpus.manifest.losses != Losses()
        ]

    def check_remote(self) -> None:
        """Ask servers and stores whether the shards are there. For one rank, which tells the others: thousands that ask would be an attack."""
        for corpus in [*self.corpora, *([self.val_corpus] if self.val_corpus else [])]:
            if corpus.store.remote:
                self._check(corpus)

    def _check(self, corpus: Corpus) -> None:
        """Hold what is missing of a corpus, now or since its manifest was made, against data.max_bad_fraction."""
        manifest, allowed = corpus.manifest, self.config.data.max_bad_fraction
        for problem in manifest.check_files(allowed, corpus.store):
            self.notes.append(
                f"shard {problem.shard} of {corpus.key}: {problem.cause}; its {problem.documents} documents will be left out"
            )
        losses = manifest.losses
        if losses.documents > allowed * (manifest.num_documents + losses.documents):
            raise UserError(
                f"{corpus.key}: {corpus.config.manifest!r} counts {manifest.num_documents} documents and could not read {losses.documents} more, "
                f"a larger share than data.max_bad_fraction {allowed}:\n" + "\n".join(losses.describe())
            )
        if losses != Losses():
            self.notes.append(f"{corpus.key}: " + "\n".join(losses.describe(3)))

    def _first_texts(self) -> list[str]:
        """The texts that the run begins with, the first block of lane after lane, to AGREE_CHARACTERS."""
        order, makers = (stream := self.stream(0, 1)).order, stream.makers
        texts: list[str] = []
        for lane in range(min(order.lanes, AGREE_BLOCKS)):
            if len(blocks := order.blocks(0, lane)):
                place = order.place(0, int(blocks[0]))
                texts += makers[place.source].texts(place.block)
            if sum(map(len, texts)) > AGREE_CHARACTERS:
                break
        return texts

    def _makers(self, corpora: Sequence[Corpus], mask: MaskConfig, seed: int, shuffle: bool) -> list[BlockMaker]:
        data = self.config.data
        return [
            BlockMaker(
                manifest=corpus.manifest,
                store=corpus.store,
                tokenizer=self.tokenizer,
                seq_len=data.seq_len,
                packing=data.packing,
                long_documents=data.long_documents,
                mask=mask
                if corpus.config.mask_rate is None
                else replace(
                    mask, rate=corpus.config.mask_rate, rate_schedule="constant", rate_end=None, rate_steps=None
                ),
                seed=seed,
                shuffle=shuffle,
                text_field=corpus.config.text_field or data.text_field,
                source=i,
            )
            for i, corpus in enumerate(corpora)
        ]

    def fingerprints(self) -> Any:
        """What the training data is, for the run's identity: the manifest's fingerprint, or for several corpora those with their weights and rates."""
        if self.config.data.sources is None:
            return self.corpora[0].manifest.fingerprint
        return {
            f"{key}[{i}]": value
            for i, corpus in enumerate(self.corpora)
            for key, value in (
                ("manifest", corpus.manifest.fingerprint),
                ("weight", corpus.config.weight),
                ("text_field", corpus.config.text_field),
                ("mask_rate", corpus.config.mask_rate),
            )
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of an epoch: those of all corpora."""
        return sum(corpus.manifest.num_bytes for corpus in self.corpora)

    @property
    def num_documents(self) -> list[int]:
        """Documents of each corpus."""
        return [corpus.manifest.num_documents for corpus in self.corpora]

    @property
    def num_shards(self) -> int:
        """Shards of all corpora."""
        return sum(len(corpus.manifest.shards) for corpus in self.corpora)

    def stream(self, rank: int, world_size: int) -> Stream:
        """This rank's training stream."""
        config = self.config
        return open_stream(
            config.data,
            self._makers(self.corpora, config.mask, config.run.seed, shuffle=True),
            global_batch=config.train.global_batch,
            micro_batch=self.micro_batch,
            rank=rank,
            world_size=world_size,
            epochs=config.train.epochs,
            warmup=config.train.batch_warmup(),
        )

    def val_stream(self, rank: int, world_size: int) -> Stream | None:
        """This rank's part of the validation set, or None without one. Masks are BERT's, whatever the training's."""
        config = self.config
        if self.val_corpus is None:
            return None
        return open_stream(
            config.data,
            self._makers([self.val_corpus], MaskConfig(), config.eval.seed, shuffle=False),
            global_batch=config.eval.batch,
            micro_batch=min(self.micro_batch, -(-config.eval.batch // world_size)),
            rank=rank,
            world_size=world_size,
            epochs=1,
            validation=True,
        )


class Inputs(DataInputs):
    """The data's inputs, and with them the model's configuration and DeepSpeed's.

    Attributes:
        attention: what ``model.attention`` comes to; with ``varlen``, micro-batches are flat.

    Raises:
        UserError: something is missing, damaged or does not fit.
    """

    def __init__(self, config: Config, world_size: int):
        config.train.check_world(world_size)
        self.attention = "auto"
        super().__init__(config)
        template = ds_config.load_template(config.deepspeed.config)
        alone = ds_config.for_world(template, world_size=world_size, precision=config.train.precision)
        if alone is not template:
            self.notes.append(
                f"one rank has nothing to partition, so deepspeed.config {config.deepspeed.config} runs as ZeRO stage 0, which takes less time and memory"
            )
        self.ds_config = ds_config.merge(
            alone,
            precision=config.train.precision,
            clip=config.train.clip,
            micro_batch=self.micro_batch,
            optimizer=config.optim.name,
        )
        model = self._model_section()
        self.bert_config = bert.load_config(
            model, vocab_size=self.tokenizer.vocab_size, pad_token_id=self.tokenizer.pad_id
        )
        self._fit_vocabulary(model)
        self._choose_kernels()

    def _fit_vocabulary(self, model: ModelConfig) -> None:
        """Hold the model's configuration against the tokenizer; with words that the model has not yet, make room for them."""
        seq_len = self.config.data.seq_len
        vocabulary, vocab_size = self.pretrained_tokenizer.get_vocab(), self.tokenizer.vocab_size
        self.new_tokens = None
        if extension := read_extension(self.config.data.tokenizer, self.pretrained_tokenizer):
            self.new_tokens = bert.find_new_tokens(
                model, self.bert_config.vocab_size, extension.base_size, list(extension.words.values())
            )
        if self.new_tokens:
            vocab_size = self.new_tokens.first
            vocabulary = {token: index for token, index in vocabulary.items() if index < vocab_size}
        bert.check_vocabulary(model, vocabulary)
        bert.check_fit(self.bert_config, vocab_size=vocab_size, seq_len=seq_len)
        if self.new_tokens:
            self.bert_config.vocab_size = self.new_tokens.rows(self.bert_config.vocab_size)
            self.notes.append(
                f"data.tokenizer has {len(self.new_tokens.pieces):,} words more than {model.name_or_path}; their embeddings begin as the means "
                "of their pieces'"
            )

    def _choose_kernels(self) -> None:
        config = self.config
        cuda = torch.cuda.is_available()
        check_head(config.model.head, cuda=cuda)
        self.attention, note = attention.choose_for(
            config.model.attention,
            self.bert_config,
            capability=torch.cuda.get_device_capability(Topology.from_env().device) if cuda else None,
            precision=config.train.precision,
            labels=config.mask.labels,
        )
        self.notes += [note] if note else []
        if config.train.precision == "fp16" and not cuda:
            self.notes.append(
                "most CPUs emulate fp16 (measured 15 times slower than fp32); bf16 is what they are good at"
            )
        if config.model.compile and config.data.packing == "none":
            self.notes.append(
                "model.compile fills every micro-batch up to train.micro_batch rows of data.seq_len tokens, and "
                "data.packing none leaves much to fill; split or best_fit do not"
            )

    def _model_section(self) -> ModelConfig:
        """``model``; weights of another run are needed once: then this run, or the one that it branches from, has model and tokenizer itself."""
        model, run = self.config.model, self.config.run
        for place in (run.path(), run.branch_from and from_run.directory(run.branch_from)):
            if model.init == "run" and place and checkpoint.committed(place):
                return replace(model, name_or_path=str(place))
        return model

    def stream(self, rank: int, world_size: int) -> Stream:
        return self._shaped(super().stream(rank, world_size))

    def val_stream(self, rank: int, world_size: int) -> Stream | None:
        stream = super().val_stream(rank, world_size)
        return stream and self._shaped(stream)

    def _shaped(self, stream: Stream) -> Stream:
        """With the micro-batches that attention and compilation want."""
        stream.flat, stream.one_shape = self.attention == "varlen", self.config.model.compile
        return stream

    def set_micro_batch(self, rows: int) -> None:
        """Take the micro-batch that ``auto`` came to."""
        self.micro_batch = self.ds_config["train_micro_batch_size_per_gpu"] = rows
