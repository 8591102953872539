"""A vision transformer for inference, with the weights of Hugging Face checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionkernels._devices import find_device
from visionkernels.errors import UserError
from visionkernels.models import positions
from visionkernels.models.changes import Snapshot
from visionkernels.models.config import ViTConfig
from visionkernels.models.files import DTYPES, check_support, normalisation, open_checkpoint, stored_dtype
from visionkernels.models.graphs import GraphPool, operators_are_traced
from visionkernels.models.heads import Heads
from visionkernels.models.kinds import SIZE, check_value, one_or_two, plain
from visionkernels.models.modules import Affine, Layers, Options, relative_position_bias_table
from visionkernels.models.output import ViTOutput
from visionkernels.models.pixels import check_pixels, check_size
from visionkernels.models.positions import Positions
from visionkernels.models.weights import load, match, settle
from visionkernels.ops import _inference
from visionkernels.ops.linear.op import PRECISIONS
from visionkernels.ops.patch_embedding.op import patch_embedding

_SIZES_KEPT = 32  # image sizes whose positions are kept
_BIAS_SHARE = 16  # relative position biases are kept if they take at most a 16th of the weights

_SOURCES = ("class_tokens", "register_tokens", "position", "relative_position_bias_table")  # of positions


class ViT(nn.Module):
    """A vision transformer on this package's operators, for inference.

    `ViT.from_pretrained` loads a checkpoint; the constructor makes one with random weights. On a GPU a CUDA graph is
    captured for each batch and image size, and replayed; results are copies, which no later call overwrites. A batch
    runs in a graph of up to a quarter more images if there is one, and else gets its own. Inside `torch.compile`,
    `torch.export` and a capture of the caller's, the operators run one by one, which makes small batches slower; so
    they do with `cuda_graphs = False` and while a layer, the heads or SigLIP's pooling have hooks. While a graph is
    captured, in the first forward of its size, PyTorch refuses other threads random numbers on that GPU.
    `torch.autocast` changes nothing: the model computes in the dtype of its weights. Weights may be changed in place
    under `torch.no_grad()`, but not through `.data`, which PyTorch does not count. The linear layers' products of
    float32 are exact unless `precision` allows less.

    Args:
        config: The model's shape.
        dtype: Of the weights; float32 by default.
        device: Where the weights are; the CPU by default.
        backend: `"auto"`, `"triton"` or `"pytorch"`, for every operator.
        precision: Of products of float32 on a GPU: `"ieee"`, or `"tf32"`, which is faster and has 10 bits.
        cuda_graphs: Whether forwards on a GPU are captured and replayed.

    Attributes:
        config: The model's shape.
        backend: As given; may be set.
        precision: As given; may be set.
        cuda_graphs: As given; may be set.
        name: Which checkpoint it is from, or None.
        pixel_mean: Mean of the pixels by channel, of 1, that uint8 pictures are normalised by; or None.
        pixel_std: Their standard deviation.

    Example:
        >>> vit = ViT(ViTConfig("vit", hidden_size=32, num_heads=2, num_layers=1, intermediate_size=64))
        >>> vit(torch.zeros(1, 3, 224, 224)).last_hidden_state.shape
        torch.Size([1, 197, 32])
    """

    class_tokens: Tensor | None
    register_tokens: Tensor | None
    position: Tensor | None
    relative_position_bias_table: Tensor | None

    def __init__(
        self,
        config: ViTConfig,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        backend: str = "auto",
        precision: str = "ieee",
        cuda_graphs: bool = True,
    ) -> None:
        super().__init__()
        _inference.check_choice("backend", backend, _inference.BACKENDS)
        _inference.check_choice("precision", precision, PRECISIONS)
        self.config, self.backend, self.precision, self.cuda_graphs = config, backend, precision, cuda_graphs
        self.name: str | None = None
        self.pixel_mean: tuple[float, ...] | None = None
        self.pixel_std: tuple[float, ...] | None = None
        self._positions: dict[tuple[int, int], Positions] = {}
        self._graphs = GraphPool()
        self._snapshot: Snapshot | None = None  # what positions and graphs were made from
        with torch.inference_mode(False), torch.device(device or "cpu"):
            self._make(config)
        if dtype is not None:
            self.to(dtype)
        self.eval()

    def _make(self, config: ViTConfig) -> None:
        channels = config.hidden_size
        self.patch = Affine(channels, 3, config.patch_size, config.patch_size, bias=config.patch_bias)
        classes, registers = config.num_class_tokens, config.num_register_tokens
        has_registers = config.family in ("dinov2_with_registers", "dinov3")
        self.register_buffer("class_tokens", torch.randn(classes, channels) if classes else None)
        self.register_buffer("register_tokens", torch.randn(registers, channels) if has_registers else None)
        patches = config.grid[0] * config.grid[1]
        learned = config.position == "learned"
        self.register_buffer("position", torch.randn(classes + patches, channels) if learned else None)
        self.pre_norm = Affine(channels) if config.pre_norm else None
        self.layers = Layers(config)
        table = relative_position_bias_table(config) if config.relative_position_bias == "shared" else None
        self.register_buffer("relative_position_bias_table", table)
        self.norm = Affine(channels) if config.final_norm else None
        self.heads = Heads(config)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        backend: str = "auto",
        image_size: int | tuple[int, int] | None = None,
        precision: str = "ieee",
        cuda_graphs: bool = True,
    ) -> ViT:
        """Load a checkpoint of ViT, DeiT, DINOv2 (with registers), DINOv3, CLIP, SigLIP or BEiT.

        Args:
            model: A directory with a config.json and safetensors files, or an id on the Hugging Face hub.
            dtype: Of the weights; by default as the checkpoint has them.
            device: `"cpu"`, `"cuda"` or `"cuda:<index>"`; the CPU by default.
            backend: `"auto"`, `"triton"` or `"pytorch"`, for every operator.
            image_size: The side, or (height, width), that pictures will have: `visionkernels.embed` and
                `visionkernels.classify` resize to it, and the positions for it are made at once. By default that of
                the checkpoint. Pictures of any size can be passed to the model in any case.
            precision: Of products of float32 on a GPU: `"ieee"`, or `"tf32"`, which is faster and has 10 bits.
            cuda_graphs: Whether forwards on a GPU are captured and replayed.

        Returns:
            The model, in evaluation mode.

        Raises:
            UserError: In one sentence, if the checkpoint is incomplete, of a family that is not known, or has
                tensors that the model has no place for; or the device does not support the dtype.

        Example:
            >>> vit = ViT.from_pretrained("google/vit-base-patch16-224", device="cuda")  # doctest: +SKIP
        """
        target = find_device("cpu" if device is None else device)
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, but it is {dtype!r}")
        checkpoint = open_checkpoint(model)
        config = settle(ViTConfig.from_dict(checkpoint.config), checkpoint.files)
        dtype = stored_dtype(checkpoint) if dtype is None else dtype
        check_support(dtype, target)
        settings: dict[str, Any] = {"backend": backend, "precision": precision, "cuda_graphs": cuda_graphs}
        vit = cls(config, dtype=dtype, device="meta", **settings)
        targets = match(checkpoint, config, vit)
        with torch.inference_mode(False), torch.no_grad():
            vit.to_empty(device=target)
            load(checkpoint, targets, vit)
        vit.name = checkpoint.name
        vit.pixel_mean, vit.pixel_std = normalisation(checkpoint.preprocessor)
        vit.image_size = image_size
        return vit

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) that pictures are resized to in place of the checkpoint's size; None for that."""
        return self._image_size

    @image_size.setter
    def image_size(self, size: int | tuple[int, int] | None) -> None:
        pair, size = None, plain(size)
        if size is not None:
            check_value("image_size", size, one_or_two(SIZE))
            pair = (size, size) if isinstance(size, int) else (size[0], size[1])
            check_size(*pair, self.config, "image_size")
            patch = self.config.patch_size
            self._positions_of((pair[0] // patch, pair[1] // patch))
        self._image_size = pair

    _image_size: tuple[int, int] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.patch.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.patch.weight.device

    def forward(self, pixel_values: Tensor, *, output_hidden_states: bool = False) -> ViTOutput:
        """Run the model.

        Args:
            pixel_values: `[B, 3, H, W]`, H and W multiples of the patch size, or `config.image_size`, of which what the
                patch does not divide is left out, as upstream does. Floating numbers, normalised as the checkpoint's
                image processor does it; or uint8 from 0 to 255, which are normalised here.
            output_hidden_states: Return what is between the layers too.

        Returns:
            The outputs, in the dtype of the weights.

        Raises:
            TypeError: `pixel_values` is no tensor, or of a dtype that is not supported.
            ValueError: It is of a wrong shape or on another device, or uint8 without a known mean.
            RuntimeError: Gradients are asked for.
        """
        _inference.refuse_gradients("ViT", pixel_values, instead="the model of transformers")
        if not self.cuda_graphs or not GraphPool.applies(pixel_values):
            if not operators_are_traced():
                self._is_unchanged()
            self._check(pixel_values)
            return self._encode(pixel_values, output_hidden_states)
        is_uint8 = pixel_values.dtype == torch.uint8
        mean = (tuple(self.pixel_mean or ()), tuple(self.pixel_std or ())) if is_uint8 else None
        options = (output_hidden_states, self.backend, self.precision, mean)
        # A call like an earlier one is right, and whether the model is still the same is asked while the GPU works.
        output = self._graphs.replay(pixel_values, options, self._is_unchanged)
        if output is not None:
            return output
        self._check(pixel_values)
        if self._snapshot is None or self._snapshot.hooked:
            return self._encode(pixel_values, output_hidden_states)
        place = self._positions_of(self._grid_of(pixel_values))
        encode = partial(self._encode, output_hidden_states=output_hidden_states, place=place)
        dtype = torch.uint8 if is_uint8 else self.dtype  # the copy into the graph's input converts
        return self._graphs.run(encode, pixel_values, dtype, options)

    def _grid_of(self, pixel_values: Tensor) -> tuple[int, int]:
        patch = self.config.patch_size
        return pixel_values.shape[2] // patch, pixel_values.shape[3] // patch

    def _encode(self, pixel_values: Tensor, output_hidden_states: bool, place: Positions | None = None) -> ViTOutput:
        if _inference.autocast_dtype(self.patch.weight) is not None:
            with torch.autocast(self.device.type, enabled=False):
                return self._encode(pixel_values, output_hidden_states, place)
        config = self.config
        options = Options(config.layer_norm_eps, config.activation, self.precision, self.backend)
        grid, patch = self._grid_of(pixel_values), config.patch_size
        place = place or self._positions_of(grid)
        if any(side % patch for side in config.image_size):  # SigLIP has such checkpoints; the rest is not looked at
            pixel_values = pixel_values[:, :, : grid[0] * patch, : grid[1] * patch]
        normalised = pixel_values.dtype != torch.uint8
        x = patch_embedding(
            pixel_values,
            self.patch.weight,
            self.patch.bias,
            position_embedding=place.patches,
            prefix_tokens=place.prefix,
            mean=None if normalised else self.pixel_mean,
            std=None if normalised else self.pixel_std,
            backend=self.backend,
        )
        if self.pre_norm is not None:
            x = self.pre_norm.norm(x, options)
        last, states = self.layers.encode(x, self.norm, place, options, output_hidden_states)
        pooled, logits, image_embeds = self.heads(last, options)
        return ViTOutput(last, pooled, logits, image_embeds, states)

    def _positions_of(self, grid: tuple[int, int]) -> Positions:
        if operators_are_traced():
            return self._make_positions(grid)  # part of the program
        found = self._positions.get(grid)
        if found is not None:
            return found
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return self._make_positions(grid)  # numbers only at the replay
        with torch.inference_mode(False), torch.no_grad():
            found = self._make_positions(grid)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # another stream may find them next
        if len(self._positions) >= _SIZES_KEPT:
            self._positions.pop(next(iter(self._positions)), None)
        self._positions[grid] = found
        return found

    def _make_positions(self, grid: tuple[int, int]) -> Positions:
        tokens = positions.Tokens(self.class_tokens, self.register_tokens, self.position, self.patch.weight)
        tables = [self.relative_position_bias_table, *(layer.relative_position_bias_table for layer in self.layers)]
        limit = sum(buffer.numel() for buffer in self.buffers()) // _BIAS_SHARE
        return positions.build(self.config, tokens, [t for t in tables if isinstance(t, Tensor)], grid, limit)

    def _check(self, pixel_values: Tensor) -> None:
        normalises = self.pixel_mean is not None and self.pixel_std is not None
        check_pixels(pixel_values, self.config, self.device, normalises)

    def _is_unchanged(self) -> bool:
        """Whether graphs may be replayed; what was made from other weights is dropped."""
        snapshot = self._snapshot
        current = snapshot is not None and snapshot.is_current()
        if snapshot is None or not current:
            self._forget()
            self._snapshot = snapshot = Snapshot(self, _SOURCES, [*self.layers, *self.heads.modules()])
        if torch.is_grad_enabled():
            _inference.refuse_gradients("ViT", *snapshot.tensors, instead="the model of transformers")
        if snapshot.hooked:
            self._graphs.clear()
            return False
        return current

    def _forget(self) -> None:
        """Drop what was made from the weights, and what holds them."""
        self._positions.clear()
        self._graphs.clear()
        self._snapshot = None

    def _apply(self, fn: Any, recurse: bool = True) -> ViT:
        self._forget()  # before, so that no weight is held that has a successor
        super()._apply(fn, recurse)
        check_support(self.dtype, self.device)
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `torch.nn.Module.load_state_dict`."""
        result = super().load_state_dict(state_dict, strict, assign)
        self._forget()
        return result

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_positions": {}, "_graphs": None, "_snapshot": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._graphs = GraphPool()
