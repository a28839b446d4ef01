"""Settings of the datastore stage."""

from typing import Literal, Self

from pydantic import Field, model_validator

from memlm.config import MAX_BATCH_TOKENS, MAX_COUNT, MAX_SEED, StageConfig

IndexKind = Literal["exact", "ivf-flat", "ivf-pq"]


class DatastoreConfig(StageConfig):
    """How a teacher's activations become keys and an index over them."""

    tap: str = "auto"
    """Path of the module whose input is the key, such as model.layers.29.mlp; or a share of the depth, such as 0.7, for
    that block's MLP; auto finds the last block's."""
    dtype: str = "auto"
    """Precision of the teacher pass: float32, bfloat16, float16, or auto (bfloat16 where computed natively)."""
    batch_tokens: int = Field(default=4096, ge=1, le=MAX_BATCH_TOKENS)
    """Tokens in one teacher pass, padding included."""
    shard_positions: int = Field(default=65536, ge=1, le=MAX_COUNT)
    """Positions per shard at least; a resumed run goes on at the first missing shard."""
    keep_keys: bool = True
    """Keep the float16 keys (2·D bytes an entry). Without them the index keeps 64-byte codes, and the targets stage
    runs the teacher again for its queries."""
    index: Literal["auto", "exact", "ivf-flat", "ivf-pq"] = "auto"
    """Search structure: exact, ivf-flat, ivf-pq (re-ranked by exact distance while keys are kept), or auto by size."""
    nlist: int | None = Field(default=None, ge=1, le=1 << 24)
    """Inverted lists of an ivf index; default about four times the root of the number of entries."""
    nprobe: int | None = Field(default=None, ge=1, le=1 << 24)
    """Lists searched per query; default the smallest that reaches recall_target on a sample, within an eighth."""
    code_bytes: int = Field(default=64, ge=1, le=1 << 16)
    """Bytes of a product-quantised key at most; lowered to a divisor of the key width."""
    rerank_factor: int = Field(default=4, ge=1, le=1 << 20)
    """ivf-pq fetches this many times k candidates and ranks them by exact distance."""
    train_vectors: int = Field(default=200_000, ge=1, le=MAX_COUNT)
    """Keys an ivf index is trained on at most, drawn at random."""
    recall_target: float = Field(default=0.95, gt=0, le=1)
    """Recall@k against exact search that the default nprobe must reach."""
    recall_k: int = Field(default=256, ge=1, le=1 << 20)
    """k of the measured recall@k."""
    recall_sample: int = Field(default=256, ge=1, le=1 << 20)
    """Entries whose neighbours are also searched exactly to measure recall."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Draws training vectors and the recall sample."""

    @model_validator(mode="after")
    def _fit_each_other(self) -> Self:
        if self.nlist is not None and self.train_vectors < self.nlist:
            raise ValueError(
                f"train_vectors {self.train_vectors} must not be below nlist {self.nlist}: a list needs a key"
            )
        if not self.keep_keys and self.index not in ("auto", "ivf-pq"):
            raise ValueError(f"keep_keys false keeps codes only, so index must be ivf-pq or auto, not {self.index}")
        return self

    def index_kind(self, entries: int) -> IndexKind:
        """The index in force for a datastore of this many entries."""
        if self.index != "auto":
            return self.index
        if not self.keep_keys:
            return "ivf-pq"
        return "exact" if entries <= 131_072 else "ivf-flat" if entries <= 5_000_000 else "ivf-pq"
