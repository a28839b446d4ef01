"""MLP Memory: blocks without attention that turn the base's hidden state into a retriever's distribution."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import safetensors.torch
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from memlm.config import StageConfig
from memlm.errors import ArtifactError, ConfigError, ModelError
from memlm.manifest import is_artifact, payload_file, read_manifest
from memlm.memory.config import MAX_LAYERS, MAX_WIDTH, MLPStart
from memlm.memory.protocol import MemorySettings, ParametricMemory
from memlm.memory.reading import GivenActivations
from memlm.models.heads import Head, find_head
from memlm.models.loading import (
    WEIGHTS_FILE,
    block_list,
    default_device,
    find_file,
    parse_dtype,
    tensor_shapes,
    where_from,
)
from memlm.models.taps import find_tap, first_tensor, get_module, probe, resolve_tap, tap_width, watch

SIZES = {"small": (18, 768, 3072), "medium": (36, 1024, 4096), "large": (54, 1280, 5120)}
"""Layers, width and FFN width of the paper's GPT-2 memories."""
DEFAULT_LAYERS = 8
_STD = 0.02  # of random matrices, as in transformers


class FFNStyle(StageConfig):
    """How a family of models builds its feed-forward blocks."""

    gated: bool
    """`down(act(gate(x)) * up(x))` instead of `down(act(up(x)))`."""
    bias: bool
    """Whether the matrices have biases."""
    norm: Literal["layer", "rms"]
    """LayerNorm, or RMSNorm."""
    norm_eps: float = Field(gt=0, le=1)
    """Added to the variance."""
    activation: str
    """A name that transformers knows."""


class MLPSettings(MemorySettings):
    """What the folder of an MLP memory says."""

    input_width: int = Field(ge=1, le=MAX_WIDTH)
    """Width of the activations it reads."""
    base_blocks: int = Field(ge=1, le=MAX_LAYERS)
    """Transformer blocks of the base it was made for."""
    layers: int = Field(ge=1, le=MAX_LAYERS)
    """Blocks."""
    width: int = Field(ge=1, le=MAX_WIDTH)
    """Width of the blocks."""
    ffn_width: int = Field(ge=1, le=MAX_WIDTH)
    """Inner width of a block's FFN."""
    style: FFNStyle
    """How the blocks are built."""


def make_norm(style: FFNStyle, width: int) -> nn.Module:
    """A norm of this style."""
    return (nn.RMSNorm if style.norm == "rms" else nn.LayerNorm)(width, eps=style.norm_eps)


class MLPBlock(nn.Module):
    """`x + FFN(norm(x))`.

    Source: the released code of MLP Memory (its figure draws the norm behind the sum).
    """

    def __init__(self, width: int, ffn_width: int, style: FFNStyle) -> None:
        super().__init__()
        self.norm = make_norm(style, width)
        self.gate = nn.Linear(width, ffn_width, bias=style.bias) if style.gated else None
        self.up = nn.Linear(width, ffn_width, bias=style.bias)
        self.down = nn.Linear(ffn_width, width, bias=style.bias)
        self.act = ACT2FN[style.activation]

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        h = self.norm(x)
        h = self.act(self.up(h)) if self.gate is None else self.act(self.gate(h)) * self.up(h)
        return x + self.down(h)


class MLPMemory(ParametricMemory):
    """Blocks of norm and FFN over one hidden state of the base per token, and a head of their own.

    No attention, no positions, no cache; it belongs to the base that it was trained with.

    Source: MLP Memory (arXiv:2508.01832).
    """

    kind = "mlp"
    reads_base = True
    settings_class = MLPSettings
    settings: MLPSettings

    def __init__(self, settings: MLPSettings) -> None:
        """Random weights; the FFNs start at zero, so the untrained memory is a norm and a head.

        Raises:
            ConfigError: The activation is unknown.
        """
        super().__init__(settings)
        style, width = settings.style, settings.width
        if style.activation not in ACT2FN:
            raise ConfigError(f"style.activation = {style.activation!r}: transformers has no such activation")
        self.input = nn.Linear(settings.input_width, width) if settings.input_width != width else None
        self.blocks = nn.Sequential(*(MLPBlock(width, settings.ffn_width, style) for _ in range(settings.layers)))
        self.norm = make_norm(style, width)
        self.output = nn.Linear(width, settings.vocab_size, bias=False)
        self.head = Head(self.output)
        self.reader = GivenActivations(settings.input_width, "an MLP memory")
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        for block in self.blocks:
            nn.init.zeros_(block.down.weight)  # type: ignore[union-attr]

    # --- loading and saving ---------------------------------------------------------------------------------------

    @classmethod
    def load(cls, source: str, settings: MLPSettings, *, base: str | None = None, **kwargs: Any) -> Self:
        """
        Args:
            kwargs: `dtype` (default: as stored), `revision`, `device_map` (one device).

        Raises:
            ConfigError: The precision is unknown, or there are several devices.
            ArtifactError: Weights are missing, damaged, or of other shapes than the settings say.
        """
        dtype, device = _precision_and_device(kwargs)
        path = find_file(source, WEIGHTS_FILE, **where_from(kwargs))
        if path is None:
            raise ArtifactError(f"{source} has no {WEIGHTS_FILE}")
        if is_artifact(path.parent):
            path = payload_file(path.parent, read_manifest(path.parent, "memory"), WEIGHTS_FILE)
        held = tensor_shapes(path)
        if settings.layers > len(held):
            raise ArtifactError(f"{source}: layers = {settings.layers}, but {path} holds {len(held)} tensors")
        with torch.device("meta"):
            memory = cls(settings)
        check_tensors(shapes(memory), held, str(path))
        memory.load_state_dict(safetensors.torch.load_file(path), assign=True)
        return memory.to(dtype=dtype, device=device).eval()

    def save_weights(self, folder: Path) -> None:
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        state["output.weight"] = state["output.weight"][: self.vocab_size].clone()  # a mixture may have narrowed it
        safetensors.torch.save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})

    def check_base(self, base: PreTrainedModel) -> None:
        assert self.tap is not None
        blocks, width = len(block_list(base)[1]), tap_width(base, self.tap)
        ours = self.settings.base_blocks, self.settings.input_width
        if (blocks, width) != ours:
            raise ModelError(
                f"the MLP memory reads {self.tap} of a base with {ours[0]} blocks, {ours[1]} wide; this"
                f" {type(base).__name__} has {blocks}, {width} wide: train one for it (memlm train --kind mlp)"
            )

    # --- training -------------------------------------------------------------------------------------------------

    @classmethod
    def check_start(cls, config: MLPStart, *, init: str | None, goes_on: bool, block_size: int) -> None:
        if init is not None and not goes_on:
            raise ConfigError(f"init = {init!r}: an mlp memory starts fresh, or from another mlp memory's folder")
        if goes_on and (given := config.given()):
            name, value = next(iter(given.items()))
            raise ConfigError(f"{name} = {value!r}: --init {init} decides it")

    @classmethod
    def start(
        cls, config: MLPStart, settings: MemorySettings, *, init: str | None, base: PreTrainedModel, seed: int
    ) -> Self:
        tap = resolve_tap(base, config.tap or "1.0")
        input_width = tap_width(base, tap)
        style, own_ffn_width = ffn_style(base)
        layers, width, ffn_width = _sizes(config, input_width, own_ffn_width)
        own = MLPSettings(
            **{**settings.model_dump(), "kind": cls.kind, "tap": tap},
            input_width=input_width,
            base_blocks=len(block_list(base)[1]),
            layers=layers,
            width=width,
            ffn_width=ffn_width,
            style=style,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            memory = cls(own)
        fits = width == base.config.get_text_config().hidden_size
        if config.head == "base" and not fits:
            raise ConfigError(f"head = 'base': the memory is {width} wide, the base's head is not")
        if config.head == "base" and not memory.take_head(base):
            raise ConfigError(f"head = 'base': the memory cannot have the final norm of {type(base).__name__}")
        if config.head is None and fits:
            with contextlib.suppress(ModelError):  # a head that does not split off
                memory.take_head(base)
        return memory

    @classmethod
    def size(cls, config: MLPStart, *, init: str | None, base: PreTrainedConfig) -> int:
        text = base.get_text_config()
        own_ffn_width = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
        layers, width, ffn_width = _sizes(config, text.hidden_size, own_ffn_width)
        matrices = 3 if hasattr(text, "rms_norm_eps") else 2  # RMSNorm goes with a gated FFN
        return layers * matrices * width * ffn_width + text.vocab_size * width

    @torch.no_grad()
    def take_head(self, base: PreTrainedModel) -> bool:
        """Copy the base's output layer, and what its final norm multiplies by and adds; whether that is all of them.

        Raises:
            ModelError: The base's head does not split off.
        """
        head = find_head(base)
        if head.weight.shape[1] != self.settings.width or not head.is_plain():
            return False
        self.output.weight.copy_(head.weight[: self.vocab_size].float() * head.scale)
        norm = _final_norm(base)
        if norm is None:
            return False
        weight = next(norm.parameters())
        plain = make_norm(self.settings.style, self.settings.width)  # multiplies by 1, adds 0
        x = torch.ones(2, self.settings.width)
        x[:, ::2] *= -1  # nowhere near 0 once normalised
        x[0] = 0
        added, both = norm(x.to(weight)).float().cpu()
        held = dict(self.norm.named_parameters())
        held["weight"].copy_((both - added) / plain(x)[1])
        if "bias" in held:
            held["bias"].copy_(added)
        x = torch.randn(4, self.settings.width, generator=torch.Generator().manual_seed(0))
        theirs = norm(x.to(weight)).float().cpu()
        return torch.allclose(self.norm.float()(x), theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max()))

    def training_hidden(
        self, input_ids: Int[Tensor, "B T"], activations: Float[Tensor, "P D"] | None, places: Int[Tensor, "P"]
    ) -> Float[Tensor, "P W"]:
        assert activations is not None
        return self.body(activations)

    def body(self, activations: Float[Tensor, "... D"]) -> Float[Tensor, "... W"]:
        """What the head reads."""
        x = activations.to(self.output.weight.dtype)
        return self.norm(self.blocks(x if self.input is None else self.input(x)))

    def hidden(self, state: Float[Tensor, "B T D"], places: Any) -> Float[Tensor, "... W"]:
        return self.body(state.to(self.device)[places])  # no token looks at another, so blocks run where asked only


def _sizes(config: MLPStart, input_width: int, own_ffn_width: int) -> tuple[int, int, int]:
    """Layers, width and FFN width beside a base of these widths."""
    if config.like is not None:
        return SIZES[config.like]
    width = config.width or input_width
    ffn_width = config.ffn_width or (own_ffn_width if width == input_width else 4 * width)
    return config.layers or DEFAULT_LAYERS, width, ffn_width


def _precision_and_device(kwargs: Mapping[str, Any]) -> tuple[torch.dtype | None, Any]:
    """What `load` is to bring the weights to, as transformers takes it; None: as they are stored."""
    dtype, device = kwargs.get("dtype", kwargs.get("torch_dtype")), kwargs.get("device_map")
    if not isinstance(dtype, torch.dtype):
        dtype = None if dtype in (None, "auto") else parse_dtype(dtype)
    if isinstance(device, Mapping):
        if device.keys() != {""}:
            raise ConfigError(f"device_map = {device}: an MLP memory is on one device")
        device = device[""]
    return dtype, default_device() if device == "auto" else device


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name to shape of the tensors that the module's state holds."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def check_tensors(wanted: Mapping[str, tuple[int, ...]], held: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise unless the tensors `held` are exactly those `wanted`, by name and shape.

    Raises:
        ArtifactError: Tensors are missing, too many, or of another shape; the first is named.
    """
    if missing := sorted(wanted.keys() - held.keys()):
        raise ArtifactError(f"{where} lacks {_counted(missing)}, the first is {missing[0]}")
    if extra := sorted(held.keys() - wanted.keys()):
        raise ArtifactError(f"{where} holds {_counted(extra)} that the memory has not, the first is {extra[0]}")
    for name, shape in wanted.items():
        if held[name] != shape:
            raise ArtifactError(f"{where}: {name} has shape {held[name]}, expected {shape}")


def _counted(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


# --- the base's own style ---------------------------------------------------------------------------------------------


def ffn_style(base: PreTrainedModel) -> tuple[FFNStyle, int]:
    """How the base builds its FFNs, and their inner width; read off the modules of its last block.

    Where the block has no plain MLP, as with experts, the norm decides: RMSNorm goes with a gated FFN.
    """
    _, blocks = block_list(base)
    width = base.config.get_text_config().hidden_size
    norm = next((module for module in blocks[-1].modules() if _is_norm(module, width)), None)
    kind = _norm_kind(norm, width)
    eps = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None) or 1e-5
    mlp = get_module(base, find_tap(base))
    matrices = [module for module in mlp.modules() if isinstance(module, nn.Linear | Conv1D)]
    shapes = [_in_out(module) for module in matrices]
    bias = len(matrices) > 0 and matrices[0].bias is not None
    gated, ffn_width = kind == "rms", 4 * width  # what follows holds where there are no matrices beside, as of experts
    if len(matrices) == sum(p.ndim > 1 for p in mlp.parameters()) and shapes and shapes[0][0] == width:
        inner, outer = shapes[-1]
        if len(shapes) == 1 and outer > width:  # the first of two projections that stand in the block itself
            gated, ffn_width = False, outer
        elif len(shapes) in (2, 3) and outer == width and shapes[0][1] in (inner, 2 * inner):
            gated, ffn_width = len(shapes) == 3 or shapes[0][1] == 2 * inner, inner  # gate and up may be one matrix
    activation = _activation_name(base.config.get_text_config())
    return FFNStyle(gated=gated, bias=bias, norm=kind, norm_eps=eps, activation=activation), ffn_width


def _in_out(module: nn.Linear | Conv1D) -> tuple[int, int]:
    return (module.in_features, module.out_features) if isinstance(module, nn.Linear) else (module.nx, module.nf)


def _is_norm(module: nn.Module, width: int) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and all(p.shape == (width,) for p in parameters) and not list(module.children())


@torch.no_grad()
def _final_norm(base: PreTrainedModel) -> nn.Module | None:
    """The norm that gives what the base's head reads."""
    width = base.config.get_text_config(decoder=True).hidden_size
    norms = {name: module for name, module in base.base_model.named_modules() if _is_norm(module, width)}
    given: dict[str, Tensor] = {}
    with watch(norms, lambda name, args, kwargs: given.update({name: first_tensor((*args, *kwargs.values()))})):
        hidden = base.base_model(input_ids=probe(base), use_cache=False)[0]
    for name in reversed(given):
        found = norms[name].forward(given[name])
        if found.shape == hidden.shape and torch.equal(found, hidden):
            return norms[name]
    return None


@torch.no_grad()
def _norm_kind(norm: nn.Module | None, width: int) -> Literal["layer", "rms"]:
    """A LayerNorm does not see a constant added to its input; an RMSNorm does."""
    if norm is None:
        return "rms"
    weight = next(norm.parameters())
    x = torch.linspace(-1, 1, width, device=weight.device, dtype=weight.dtype)[None]
    return "layer" if torch.allclose(norm(x), norm(x + 1), atol=0.05) else "rms"


def _activation_name(config: Any) -> str:
    """What the config calls it; GELU where it does not say, as Bloom's, which approximates GELU in code of its own."""
    given = (
        getattr(config, name, None) for name in ("hidden_activation", "hidden_act", "activation_function", "activation")
    )
    return next((name for name in given if isinstance(name, str) and name in ACT2FN), "gelu")
