"""Models by name: open_clip's, the small ones of `trainer/configs/`, or a folder that `trainer.export` wrote.

`load` returns trained weights or raises, and never returns random ones; `create` returns a model to train.
This is the only module of the project that imports open_clip.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainer.errors import InputError
from trainer.loss import SIGLIP_BIAS, SIGLIP_LOG_SCALE
from trainer.spelling import did_you_mean, nearest

CONFIGS = Path(__file__).with_name("configs")
CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"
MAX_ASPECT = 200
"""The largest ratio of the longer to the shorter side of a picture that is preprocessed."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Clip = Any
"""open_clip's model: an nn.Module with `visual`, `encode_image`, `encode_text`, `logit_scale` (the log of it)."""
Tokenizer = Callable[[list[str]], Tensor]
"""Captions to int64 token ids of shape (captions, context_length), zero-padded."""


class ModelError(InputError):
    """A model does not exist or its weights are unavailable; the message names the alternatives."""


_kept_alive: list[torch.library.Library] = []


def _import_open_clip() -> ModuleType:
    if "torchvision" not in sys.modules:
        _declare_missing_torchvision_operators()
    module = importlib.import_module("open_clip")
    module.add_model_config(CONFIGS)
    return module


def _declare_missing_torchvision_operators() -> None:
    # PyPI's torchvision is built against CUDA. With a CPU build of torch its extension cannot load, and then
    # `import torchvision` fails because two operators are missing. Nothing here calls them; declaring them is enough.
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    try:
        for extension in Path(spec.origin).parent.glob("_C.*"):
            torch.ops.load_library(str(extension))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept_alive.append(library)  # the declarations live as long as this object


open_clip = _import_open_clip()


class Preprocess:
    """The model's own image preprocessing, in two halves: geometry per image, normalisation per batch.

    `size` is the side of the square in pixels; `mean` and `std` are per channel, on a scale of 0 to 1. The result of
    `preprocess(images)` is the input of `encode_image`.
    """

    def __init__(self, config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        size = config["size"]
        options = {key: config[key] for key in ("mean", "std", "interpolation", "resize_mode", "fill_color")}
        transform = open_clip.image_transform(size, is_train=False, **options)
        *self._geometry, _, normalize = transform.transforms
        self.config = config
        self.size: int = size if isinstance(size, int) else size[0]
        self.mean, self.std = torch.tensor(normalize.mean), torch.tensor(normalize.std)
        self.device, self.dtype = device, dtype

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Converts images of any size to a normalised batch (B, 3, size, size) on the model's device, in its dtype.

        Gives the same as open_clip's own `preprocess` for each image.
        """
        return self.normalize(torch.stack([self.pixels(image) for image in images]))

    def pixels(self, image: Image.Image) -> Tensor:
        """One image, resized and cropped at the centre, as uint8 of shape (3, size, size).

        Raises ValueError if resizing the shorter side would make a picture of gigabytes.
        """
        if max(image.size) > MAX_ASPECT * min(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels: more than {MAX_ASPECT} times as long as wide")
        image = image.convert("RGB")
        for transform in self._geometry:
            image = transform(image)
        return to_tensor(image)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Normalises uint8 pixels (B, 3, H, W) to the input of the image tower, on the model's device."""
        pixels = pixels.to(self.device, non_blocking=True).float().div_(255)
        mean, std = (v.to(pixels.device)[:, None, None] for v in (self.mean, self.std))
        return pixels.sub_(mean).div_(std).to(self.dtype)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 of shape (3, height, width)."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


def available_models() -> list[str]:
    """The names of all architectures: open_clip's and those of `trainer/configs/`."""
    return list(open_clip.list_models())


def load(
    model: str, pretrained: str | None = None, device: str | torch.device = "cpu", precision: str = "fp32"
) -> tuple[Clip, Preprocess, Tokenizer]:
    """Loads a trained dual encoder in evaluation mode, its preprocessing and its tokenizer.

    `model` is a folder with `open_clip_config.json` and `open_clip_model.safetensors`, `hf-hub:owner/name`, or the name
    of an architecture. Only an architecture takes `pretrained`: one of its tags, or a checkpoint file. `precision` is
    the dtype of the weights: `fp32`, `bf16` or `fp16`.
    Raises ModelError; never falls back to random or wrong weights.

        model, preprocess, tokenizer = load("ViT-B-32", "openai", precision="bf16")
        image = model.encode_image(preprocess(pictures), normalize=True)            # (B, embed_dim)
        text = encode_text(model, tokenizer(captions).to(device), normalize=True)   # (B, embed_dim)
    """
    if precision not in DTYPES:
        raise ModelError(f"precision {precision!r}: expected one of {', '.join(DTYPES)}")
    name, options = _resolve(model, pretrained)
    tokenizer = find_tokenizer(name)
    with _weights(name, pretrained) as extra:
        try:
            options |= {"precision": precision, "device": device, "require_pretrained": True}
            net = open_clip.create_model(name, **options, **extra)
        except _LOADING_ERRORS as error:
            weights = f" ({pretrained})" if pretrained else ""
            raise ModelError(
                f"cannot load the weights of {model}{weights}: {error}\n"
                f"  Without a network, name a local folder with {CONFIG_FILE} and {WEIGHTS_FILE}."
            ) from error
    net.eval()
    _attend_our_way(net)
    preprocess = Preprocess(net.visual.preprocess_cfg, torch.device(device), DTYPES[precision])
    return net, preprocess, tokenizer


def create(
    model: str, device: str | torch.device = "cpu", pretrained: str | None = None, siglip: bool = False
) -> tuple[Clip, Preprocess, Tokenizer]:
    """Creates a dual encoder in training mode, with fp32 weights. Raises ModelError.

    The weights are random, from torch's global generator, or `pretrained`: a tag, a file that `read_weights` takes, or
    a folder that `trainer.export` wrote. Position embeddings of another resolution are interpolated. With `siglip` the
    model has the learned bias of Zhai et al. 2023. Its bias and scale start at the paper's values, unless the weights
    contain a bias: then both come from the weights.
    """
    name = architecture(model)
    options = {k: v for k, v in model_config(name, pretrained, siglip).items() if k not in model_config(name)}
    found = None if pretrained is None else find_weights(name, pretrained)
    if found is None:
        options["pretrained_text"] = False
    else:
        options |= {"pretrained": found, "require_pretrained": True}
    with _silent(), _weights(name, found) as extra:  # open_clip warns about random weights, which are intended here
        tokenizer = find_tokenizer(name)
        try:
            net = open_clip.create_model(name, device=device, **{**options, **extra})
        except _LOADING_ERRORS as error:
            if not pretrained:
                raise
            raise ModelError(f"pretrained {pretrained!r} does not fit {name}: {error}") from error
    if siglip and net.logit_bias is not None and net.logit_bias == 0:
        # open_clip sets the bias to 0 if the weights have none; a trained bias is never exactly 0. The scale is then
        # CLIP's, about 100, at which the negatives would dominate the first steps.
        with torch.no_grad():
            net.logit_bias.fill_(SIGLIP_BIAS)
            net.logit_scale.fill_(SIGLIP_LOG_SCALE)
    net.train()
    if isinstance(net.visual, open_clip.modified_resnet.ModifiedResNet):
        net.visual.to(memory_format=torch.channels_last)  # convolutions train a quarter faster, on a CPU too
    _attend_our_way(net)
    preprocess = Preprocess(net.visual.preprocess_cfg, torch.device(device), torch.float32)
    return net, preprocess, tokenizer


def find_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of open_clip's model `name`. Raises ModelError if a package or a file is missing."""
    try:
        tokenizer: Tokenizer = open_clip.get_tokenizer(name)
    except ImportError as error:
        raise ModelError(
            f"model {name}: its tokenizer needs the package {error.name or 'transformers'}, which is not installed:"
            " pip install 'winnow-clip[huggingface]'"
        ) from error
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:  # whatever the Hub's client raises
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"model {name}: its tokenizer cannot be loaded: {why}\n"
            "  It is downloaded from the Hugging Face Hub once; without a network, name an exported folder."
        ) from error
    return tokenizer


def find_weights(model: str, pretrained: str) -> str:
    """The tag or file that `pretrained` names; of a folder, the file of weights in it.

    Raises ModelError if there is none. The weights of a tag may still have to be downloaded.
    """
    if os.path.isdir(pretrained):
        _check_folder(folder := Path(pretrained))
        return str(folder / WEIGHTS_FILE)
    _resolve(architecture(model), pretrained)
    return pretrained


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a file of weights, under the architecture's own names for them. Raises ModelError.

    Takes safetensors, a state dict that `torch.save` wrote, and a checkpoint that holds one as `state_dict`
    (open_clip's) or `model` (this trainer's), all also from a compiled or distributed model. Never runs code in the
    file: objects that are not tensors are replaced by empty ones.
    """
    try:
        state = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except _READING_ERRORS as error:
        raise ModelError(f"{path}: cannot be read as weights: {_reason(error)}") from error
    if isinstance(state, dict):
        state = next((state[key] for key in ("state_dict", "model") if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{path}: expected a state dict (names and tensors), alone or as `state_dict` or `model`")
    return plain_names(state)


def plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the prefixes that torch.compile and DistributedDataParallel add to names."""
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


class _Inert:
    """Stands in for any object in a file, so that the object's class is never called."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _unpickled(path: Path) -> Any:
    if not zipfile.is_zipfile(path):  # the format of torch.save before version 1.6
        return torch.load(path, map_location="cpu", weights_only=True)
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with torch.serialization.safe_globals([(_Inert, name) for name in unknown]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


_READING_ERRORS = (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, SafetensorError)
_LOADING_ERRORS = (OSError, RuntimeError, ValueError, KeyError, AssertionError, AttributeError, SafetensorError)


def _reason(error: Exception) -> str:
    # torch puts its reason after a long hint on how to unpickle the file anyway.
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0]


def _is_file(model: str, pretrained: str) -> bool:
    # open_clip prefers a tag to a file of the same name. It also reads big_vision's arrays itself.
    numpy = Path(pretrained).suffix in (".npz", ".npy")
    return not open_clip.get_pretrained_cfg(model, pretrained) and os.path.isfile(pretrained) and not numpy


@contextmanager
def _weights(model: str, pretrained: str | None) -> Iterator[dict[str, Any]]:
    """Makes open_clip read a file with `read_weights`; yields the options of `create_model` that the weights need."""
    if pretrained is None or not _is_file(model, pretrained):
        yield {}
        return
    state = read_weights(Path(pretrained))
    # open_clip converts and resizes only weights that it reads itself, so its reader is made to return these.
    reader = open_clip.factory.load_state_dict
    open_clip.factory.load_state_dict = lambda *_, **__: dict(state)
    try:
        yield {"init_logit_bias": SIGLIP_BIAS} if "logit_bias" in state else {}  # a parameter to load the bias into
    finally:
        open_clip.factory.load_state_dict = reader


def lock(model: Clip, image: bool, text: bool) -> None:
    """Locks towers as LiT does (Zhai et al. 2022): no gradients, and no batch statistics or dropout either."""
    for name, child in model.named_children():
        if image if name == "visual" else text:
            child.requires_grad_(False).eval()
    if text:  # CLIP keeps some of the text tower's parameters in the model itself
        for name, parameter in model.named_parameters(recurse=False):
            parameter.requires_grad_(name in ("logit_scale", "logit_bias"))


def freeze_unreached(model: Clip, preprocess: Preprocess, tokenizer: Tokenizer) -> None:
    """Freezes parameters that do not affect the features, such as those of CoCa's text decoder.

    They never get a gradient, and DistributedDataParallel would wait for one for every parameter that is not frozen.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    pixels = torch.zeros(2, 3, preprocess.size, preprocess.size, dtype=torch.uint8)
    with without_statistics(model), torch.random.fork_rng():
        image = model.encode_image(preprocess.normalize(pixels))
        text = encode_text(model, tokenizer(["a", "b"]).to(preprocess.device))
    scales = [scale for name in ("logit_scale", "logit_bias") if (scale := getattr(model, name, None)) is not None]
    outputs = [output.sum() for output in (image, text, *scales) if output.requires_grad]
    for parameter, gradient in zip(parameters, torch.autograd.grad(sum(outputs), parameters, allow_unused=True)):
        parameter.requires_grad_(gradient is not None)


def checkpoint_activations(model: Clip) -> None:
    """Keeps only the inputs of each block and recomputes its activations in the backward pass (Chen et al. 2016).

    Gradients and the statistics of batch norms stay the same.
    """
    model.set_grad_checkpointing()
    if isinstance(model.visual, open_clip.modified_resnet.ModifiedResNet):  # open_clip does nothing for it
        for i in range(1, 5):
            for block in getattr(model.visual, f"layer{i}"):
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    for norm in _batch_norms(model):
        norm.forward = partial(_normalize_again, norm, norm.forward)


def _normalize_again(norm: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    # A forward pass inside a backward pass is a recomputation. A compiled graph already counts only once.
    again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
    with without_statistics(norm) if again else nullcontext():
        return forward(x)


@contextmanager
def without_statistics(module: nn.Module) -> Iterator[None]:
    """Freezes the running statistics of the batch norms in `module` while they see a batch for the second time."""
    norms = _batch_norms(module)
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _batch_norms(module: nn.Module) -> list[Any]:
    return [norm for norm in module.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)]


class _Packed(NamedTuple):
    """Replaces the mask of a text tower whose input (1, tokens, width) is concatenated captions."""

    shapes: list[tuple[int, int]]
    """Number and length of the captions in each group."""
    mask: Tensor
    """The causal mask for the longest possible caption."""


def _attend_our_way(model: Clip) -> None:
    masked = getattr(model, "attn_mask", None) is not None  # some text towers, such as CLIPA's, are not causal
    for tower in (model.visual, getattr(model, "transformer", None)):
        for module in tower.modules() if tower is not None else ():
            if isinstance(module, open_clip.transformer.ResidualAttentionBlock):
                module.attention = partial(_attend, module.attn, masked and tower is not model.visual)


def _attend(
    attention: nn.MultiheadAttention,
    causal: bool,
    q_x: Tensor,
    k_x: Tensor | None = None,
    v_x: Tensor | None = None,
    attn_mask: Tensor | _Packed | None = None,
) -> Tensor:
    # Self-attention over (B, L, D) with the parameters of nn.MultiheadAttention. That module transposes and copies its
    # input, and its additive causal mask rules out a GPU's fastest kernels.
    qkv = F.linear(q_x, attention.in_proj_weight, attention.in_proj_bias)
    if isinstance(attn_mask, _Packed):
        # Only attention must separate captions; per-token work is one large product instead of many small ones.
        groups = qkv[0].split([rows * length for rows, length in attn_mask.shapes])
        mixed = [
            _mix(attention, causal, group.view(rows, length, -1), attn_mask.mask[:length, :length]).flatten(0, 1)
            for group, (rows, length) in zip(groups, attn_mask.shapes)
        ]
        return F.linear(torch.cat(mixed)[None], attention.out_proj.weight, attention.out_proj.bias)
    return F.linear(_mix(attention, causal, qkv, attn_mask), attention.out_proj.weight, attention.out_proj.bias)


def _mix(attention: nn.MultiheadAttention, causal: bool, qkv: Tensor, mask: Tensor | None) -> Tensor:
    """Attention output (B, L, D) of queries, keys and values (B, L, 3 D)."""
    batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    heads, head_width = attention.num_heads, width // attention.num_heads
    q, k, v = qkv.view(batch, length, 3, heads, head_width).permute(2, 0, 3, 1, 4)
    if qkv.device.type == "cpu" and q.dtype == torch.bfloat16:
        # Two plain products train 1.5 times faster on a CPU than its flash attention, or than the reference kernel.
        q, k, v = (part.reshape(batch * heads, length, head_width) for part in (q, k, v))
        added = q.new_zeros(1) if mask is None else mask.to(q.dtype)
        logits = torch.baddbmm(added, q, k.transpose(1, 2), beta=int(mask is not None), alpha=head_width**-0.5)
        with torch.autocast("cpu", enabled=False):
            mixed = torch.bmm(logits.softmax(-1), v).view(batch, heads, length, head_width)
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return mixed.transpose(1, 2).reshape(batch, length, width)


def architecture(model: str) -> str:
    """The canonical name of an architecture (`ViT-B/32` is `ViT-B-32`). Raises ModelError with the nearest name."""
    name = model.replace("/", "-")
    if name in available_models():
        return name
    lower = {known.lower(): known for known in available_models()}
    near = nearest(name.lower(), lower, count=3, cutoff=0.5)
    hint = f"the nearest are {', '.join(lower[n] for n in near)}" if near else "see trainer.model.available_models()"
    raise ModelError(f"model {model!r}: no such folder and no architecture of that name; {hint}")


def model_config(model: str, pretrained: str | None = None, siglip: bool = False) -> dict[str, Any]:
    """The architecture as open_clip's configuration: `embed_dim`, `vision_cfg`, `text_cfg`, and what `create` adds."""
    name = architecture(model)
    config: dict[str, Any] = open_clip.get_model_config(name)
    # OpenAI's and some other weights were trained with QuickGELU. With plain GELU they would load without an error but
    # give wrong features, so the activation follows the weights.
    if pretrained and _trained_with(name, pretrained).get("quick_gelu"):
        config["quick_gelu"] = True
    if siglip:
        config |= {"init_logit_scale": SIGLIP_LOG_SCALE, "init_logit_bias": SIGLIP_BIAS}
    return config


def _trained_with(model: str, pretrained: str) -> dict[str, Any]:
    """The architecture that is stored with the weights; empty if only a state dict is stored."""
    if os.path.isdir(pretrained):  # unlike Path.is_dir, raises nothing on an impossible name
        folder = Path(pretrained)
        _check_folder(folder)
        config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["model_cfg"]
        return config
    if _is_file(model, pretrained) and zipfile.is_zipfile(pretrained):
        try:
            state = _unpickled(Path(pretrained))
        except _READING_ERRORS:
            return {}  # `read_weights` will report it
        own = state.get("model_config") if isinstance(state, dict) else None
        return own if isinstance(own, dict) else {}
    return open_clip.get_pretrained_cfg(model, pretrained) or {}


def _resolve(model: str, pretrained: str | None) -> tuple[str, dict[str, Any]]:
    # The name and the arguments that make open_clip load exactly these weights.
    path = Path(model.removeprefix("local-dir:"))
    if os.path.isdir(path) or model.startswith("local-dir:"):
        if pretrained is not None:
            raise ModelError(f"pretrained {pretrained!r}: {path} has its own weights; leave `pretrained` out")
        _check_folder(path)
        return f"local-dir:{path}", {}
    if model.startswith("hf-hub:"):
        return model, {}
    name = architecture(model)
    tags = open_clip.list_pretrained_tags_by_model(name)
    choice = f"one of its tags ({', '.join(tags)})" if tags else "a checkpoint file (it has no published weights)"
    if pretrained is None:
        raise ModelError(f"model {name}: a name alone has no weights; `pretrained` must be {choice}")
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag and not os.path.isfile(pretrained):
        hint = did_you_mean(pretrained, tags)
        raise ModelError(f"pretrained {pretrained!r} of {name}: expected {choice}{hint}")
    return name, {"pretrained": pretrained, "force_quick_gelu": bool(_trained_with(name, pretrained).get("quick_gelu"))}


def _check_folder(path: Path) -> None:
    # Without a known file open_clip falls back to random weights; of several files it takes the first.
    if not path.is_dir():
        raise ModelError(f"model folder {path} does not exist")
    names = sorted(p.name for p in path.iterdir())
    found = ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "") or "nothing"
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise ModelError(
                f"model folder {path} has no {name} (found: {found});"
                f" `python -m trainer.export CHECKPOINT OUT` writes both"
            )
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        if not {"embed_dim", "vision_cfg", "text_cfg"} <= config["model_cfg"].keys():
            raise KeyError("embed_dim, vision_cfg, text_cfg")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path / CONFIG_FILE}: not an open_clip configuration ({error})") from error


MOST_GROUPS, LEAST_ROWS = 8, 32
"""The most groups, by length, that the captions of a batch are divided into, and the least rows of a group."""


class Trimmed(NamedTuple):
    """B captions in groups of about equal length, each without the padding that all its captions share."""

    groups: tuple[Tensor, ...]
    """Token ids (rows, length), B rows in all."""
    places: Tensor
    """int64 (B,): the row of each caption in the concatenated groups."""

    def to(self, device: torch.device) -> Trimmed:
        groups = tuple(group.to(device, non_blocking=True) for group in self.groups)
        return Trimmed(groups, self.places.to(device, non_blocking=True))


def trim(model: Clip, tokens: Tensor, multiple: int = 1) -> Trimmed:
    """Removes padding from token ids (B, context_length); lengths are rounded up to a `multiple`.

    Web captions have a median of about 12 tokens, but one in a few hundred has 77. So hardly any padding could be cut
    from a whole batch, but more than half of it can be cut from groups sorted by length.

    The features do not change if the tower is causal and reads them at the end-of-text token (CLIP's), because that
    token cannot see the padding after it. Other towers get their full input.
    """
    if not _reads_end_of_text(model):
        return untrimmed(tokens)
    lengths = tokens.argmax(dim=-1) + 1  # end of text is the largest id
    order = lengths.argsort(stable=True)
    parts = order.tensor_split(max(1, min(MOST_GROUPS, len(tokens) // LEAST_ROWS)))
    longest = lengths[torch.stack([part[-1] for part in parts])].tolist()
    groups = (tokens[part, : -(-length // multiple) * multiple] for part, length in zip(parts, longest))
    return Trimmed(tuple(groups), order.argsort())


def untrimmed(tokens: Tensor) -> Trimmed:
    return Trimmed((tokens,), torch.arange(len(tokens), device=tokens.device))


def encode_text(model: Clip, tokens: Tensor, normalize: bool = False) -> Tensor:
    """Encodes token ids (B, context_length), trimmed first, as text features (B, embed_dim)."""
    return encode_trimmed(model, trim(model, tokens), normalize)


def encode_trimmed(model: Clip, captions: Trimmed, normalize: bool = False) -> Tensor:
    """Encodes captions that `trim` returned as text features (B, embed_dim); never synchronises with a GPU."""
    groups = captions.groups
    if not _reads_end_of_text(model):
        features = torch.cat([model.encode_text(group) for group in groups])
    else:
        dtype = model.transformer.get_cast_dtype()
        places = torch.cat(
            [model.positional_embedding[: group.shape[1]].to(dtype).repeat(len(group), 1) for group in groups]
        )
        x = model.token_embedding(torch.cat([group.flatten() for group in groups])).to(dtype) + places
        packed = _Packed([(group.shape[0], group.shape[1]) for group in groups], model.attn_mask)
        x = model.transformer(x[None], attn_mask=packed)[0]
        ends, start = [], 0
        for group in groups:
            first = start + group.shape[1] * torch.arange(len(group), device=group.device)
            ends.append(first + group.argmax(dim=-1))
            start += group.numel()
        features = model.ln_final(x[torch.cat(ends)])
        projection = model.text_projection
        if projection is not None:
            features = projection(features) if isinstance(projection, nn.Linear) else features @ projection
    features = features[captions.places]
    return F.normalize(features, dim=-1) if normalize else features


def _reads_end_of_text(model: Clip) -> bool:
    return (
        getattr(model, "attn_mask", None) is not None
        and getattr(model, "text_pool_type", None) == "argmax"
        and all(isinstance(getattr(block, "attention", None), partial) for block in model.transformer.resblocks)
    )


@contextmanager
def _silent() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
