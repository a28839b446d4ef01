"""Settings of the corpus stage."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from memlm.config import MAX_COUNT, MAX_SEED, StageConfig

SPLITS = ("train", "validation", "test")


class CorpusConfig(StageConfig):
    """How documents become splits of token blocks."""

    block_size: int = Field(default=512, ge=2, le=1 << 24)
    """Tokens a model sees at a time: longest context plus the predicted token."""
    stride: int | None = Field(default=None, ge=1, le=1 << 24)
    """Tokens newly predicted per block once a document is longer than one; default half a block, as in the paper."""
    cross_documents: bool = False
    """Cut blocks across document ends, so that attention crosses them; otherwise each block holds one document."""
    start_token: str = "auto"
    """Token put before each document: bos, none, a token's text, or auto (bos if the tokenizer adds one by itself)."""
    end_token: str = "auto"
    """Token put after each document, predicted like any: eos, none, a token's text, or auto (eos if it exists)."""
    special_tokens: bool = False
    """A special token that a document spells, such as </s>, is that token; otherwise it is text like any."""
    text_column: str = "text"
    """Column, or key, that holds the text in .jsonl, .json, .parquet and datasets."""
    document_separator: str | None = Field(default=None, min_length=1)
    r"""What separates documents in one text file, such as '\n\n'; default: a file is one document."""
    encoding: str = "utf-8"
    """Encoding of text files."""
    max_document_characters: int = Field(default=1 << 28, ge=1, le=MAX_COUNT)
    """Characters of one document, or of a line or file of JSON, at most: more is refused before it fills the memory."""
    validation_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of documents held out for choosing mix_weight and the best checkpoint."""
    test_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of documents held out for reported figures."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Salts the document hash that decides the split."""
    max_tokens: int | None = Field(default=None, ge=2, le=MAX_COUNT)
    """Training tokens kept at most: whole documents in the order of their hashes, the last one cut; default all."""
    max_validation_tokens: int | None = Field(default=None, ge=2, le=MAX_COUNT)
    """Validation tokens kept at most; default a tenth of max_tokens where that is given."""
    max_test_tokens: int | None = Field(default=None, ge=2, le=MAX_COUNT)
    """Test tokens kept at most; default a tenth of max_tokens where that is given."""
    shared_documents: Literal["refuse", "drop", "keep"] = "refuse"
    """Documents given for validation or test that stand in another split's too: an error, left out of the held-out one,
    or kept."""
    near_duplicate_ngram: int = Field(default=0, ge=0, le=256)
    """Length in tokens of the n-grams that betray near-duplicates across splits; 0 leaves them in."""
    near_duplicate_overlap: float = Field(default=0.0, ge=0, lt=1)
    """A held-out document is dropped when more than this share of its n-grams occurs in training documents."""

    @field_validator("document_separator")
    @classmethod
    def _as_lines_end(cls, value: str | None) -> str | None:
        """As texts are read: every end of a line is one character."""
        return value.replace("\r\n", "\n").replace("\r", "\n") if value else value

    @property
    def deciding(self) -> dict[str, Any]:
        """The settings that decide what a corpus holds."""
        dull = {"max_document_characters"} | ({"shared_documents"} if self.shared_documents == "refuse" else set())
        return self.model_dump(exclude=dull)

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if self.stride is not None and self.stride >= self.block_size:
            raise ValueError(
                f"stride {self.stride} must be below block_size {self.block_size}: a token needs a context"
            )
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction + test_fraction must leave room for training")
        return self

    @property
    def step(self) -> int:
        """Stride in force."""
        return self.stride if self.stride is not None else max(1, self.block_size // 2)

    @property
    def for_other_text(self) -> dict[str, Any]:
        """Settings with which documents of elsewhere are enclosed and cut as these are."""
        return self.model_dump(include={"block_size", "start_token", "end_token", "special_tokens"})

    def budget(self, split: str) -> int | None:
        """Tokens kept at most in `split`."""
        tenth = self.max_tokens // 10 if self.max_tokens is not None else None
        return {
            "train": self.max_tokens,
            "validation": self.max_validation_tokens or tenth,
            "test": self.max_test_tokens or tenth,
        }[split]
