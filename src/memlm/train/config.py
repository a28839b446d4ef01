"""Settings of the train stage."""

from typing import Any, Literal

from pydantic import Field

from memlm.memory.config import StartConfig


class TrainConfig(StartConfig):
    """What a memory starts as, and how it is trained."""

    kl_weight: float = Field(default=0.5, ge=0, le=1)
    """Weight of the KL to the targets, β in the paper; the LM loss gets the rest. 0 is plain fine-tuning."""
    epochs: float = Field(default=2.0, gt=0)
    """Passes over the training blocks."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, instead of epochs."""
    learning_rate: float = Field(default=5e-4, gt=0)
    """Peak learning rate of AdamW."""
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Shape of the learning rate after warm-up."""
    warmup: float = Field(default=0.03, ge=0)
    """Warm-up: share of all steps if below 1, else steps."""
    batch_size: int = Field(default=8, ge=1)
    """Blocks per device and forward pass."""
    accumulation: int = Field(default=1, ge=1)
    """Forward passes per optimizer step; the loss is averaged over all positions of the step, so this is exact."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    dtype: str = "auto"
    """Autocast precision: float32, bfloat16, or auto (bfloat16 where computed natively). Weights stay in float32."""
    validations: int = Field(default=1, ge=1)
    """Validations, and checkpoints, per epoch; the checkpoint with the lowest mixture perplexity is kept."""
    batch_tokens: int = Field(default=4096, ge=1)
    """Tokens in one forward pass of validation."""
    seed: int = Field(default=0, ge=0)
    """Order of blocks, random start, dropout."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Further fields of transformers' TrainingArguments, such as activation_checkpointing, fsdp or report_to."""
