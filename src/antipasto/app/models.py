"""Load a model and its tokenizer from a folder or the hub, with errors that say what to do.

Code that comes with a model is never run. A checkpoint with missing weights, or with shapes that differ from its config, is
refused: transformers would initialize those weights at random.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from accelerate import PartialState
from rich.console import Console
from rich.text import Text
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from antipasto.adapter.config import AntiPastoConfig
from antipasto.adapter.knobs import knobs, wrap
from antipasto.app.checks import check_model_name
from antipasto.names import AntiPastoWarning, Dtype
from antipasto.terminal import plain


def load_model(name_or_path: str, *, dtype: Dtype = "auto") -> tuple[PreTrainedModel, Any]:
    """Load a causal LM in eval mode on the CPU, and its tokenizer with left padding.

    Args:
        name_or_path: a model's folder, or its name on the hub.
        dtype: of the weights; ``"auto"``: as they are saved.

    Returns:
        The model and the tokenizer. A missing pad token is replaced by the end-of-sequence token.

    Raises:
        ValueError: there is no such folder or model, the hub cannot be reached, or the model is an adapter, damaged or unknown
            to transformers; names the model and says what to do.
    """
    model = load_weights(name_or_path, dtype=dtype)
    tokenizer = _load(
        AutoTokenizer.from_pretrained, name_or_path, "tokenizer", trust_remote_code=False, padding_side="left"
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def load_adapted(
    name_or_path: str, config: AntiPastoConfig, console: Console, *, dtype: Dtype = "auto"
) -> tuple[PreTrainedModel, Any]:
    """Load as `load_model` does, with a spinner meanwhile, and adapt the model on the best device.

    Args:
        config: which layers, at what rank.
    """
    with console.status(Text(f"loading {plain(name_or_path)}")):
        model, tokenizer = load_model(name_or_path, dtype=dtype)
    wrap(model.to(best_device()), config)
    return model, tokenizer


def load_weights(name_or_path: str, *, dtype: Dtype = "auto") -> PreTrainedModel:
    """Load the model without a tokenizer; otherwise as `load_model`."""
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype must be one of {', '.join(get_args(Dtype))}, got {dtype!r}.")
    check_model_name(name_or_path)
    model, info = _load(
        AutoModelForCausalLM.from_pretrained,
        name_or_path,
        "model",
        dtype=dtype,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # refused below, by name
        output_loading_info=True,
    )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"{name_or_path} is an adapter, not a model: give the model that it was trained on.")
    mismatched = [name for name, *_ in info["mismatched_keys"]]
    for names, what in ((info["missing_keys"], "lacks"), (mismatched, "has the wrong shape for")):
        if names:
            raise ValueError(
                f"The checkpoint of {name_or_path} {what} {len(names)} of the model's weights, first {min(names)}: "
                "it is incomplete, or belongs to another kind of model. Download or save it again."
            )
    return model.eval()


def load_shapes(name_or_path: str, *, dtype: Dtype = "auto") -> PreTrainedModel:
    """Build the model on the meta device from its config alone; no weight is read."""
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype must be one of {', '.join(get_args(Dtype))}, got {dtype!r}.")
    check_model_name(name_or_path)
    config = _load(AutoConfig.from_pretrained, name_or_path, "model", trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model.to((config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype))


def _load(load: Callable[..., Any], name_or_path: str, what: str, **options: Any) -> Any:
    try:
        with quiet():
            return load(name_or_path, **options)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        reason = first_line(error)
        if Path(name_or_path).is_dir():
            if "custom code" in reason:
                reason = "it needs custom code, which is never run here: use a model that transformers supports itself"
            message = (
                f"The folder {name_or_path} holds no causal language model that can be loaded; its {what}: {reason}"
            )
        else:
            message = (
                f"{name_or_path!r} is not a folder, and its {what} cannot be loaded from the hub: {reason.rstrip('.')}."
                f"{hub_advice('the folder of a downloaded model')}"
            )
        raise ValueError(f"{message.rstrip('.')}.") from error


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def hub_advice(instead: str) -> str:
    """What to do if something does not come from the hub."""
    offline = " HF_HUB_OFFLINE is set." if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
    return f"{offline} Check the spelling and the connection, run `hf auth login` if it is gated, or give {instead}."


def process_state() -> PartialState:
    """Accelerate's state of this process; on the CPU if there is no accelerator."""
    return PartialState(cpu=not torch.accelerator.is_available())


def best_device() -> torch.device:
    """The device that accelerate chooses: a GPU if there is one."""
    return torch.device(process_state().device)


def with_template_options(tokenizer: Any, options: Mapping[str, Any] | None) -> Any:
    """Bind options such as ``{"enable_thinking": False}`` to the tokenizer's chat template, in place."""
    if options:
        tokenizer.apply_chat_template = functools.partial(tokenizer.apply_chat_template, **options)
    return tokenizer


def base_fingerprint(model: nn.Module) -> str:
    """sha256 over the base weights of all adapted layers."""
    digest = hashlib.sha256()
    for name, layer in sorted(knobs(model).items()):
        digest.update(f"{name} {layer.layer.weight_digest()}\n".encode())
    return digest.hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """Context manager that hides other libraries' notices. Errors and this library's warnings still appear."""
    names = ("trl", "accelerate", "httpx")
    levels = {name: logging.getLogger(name).level for name in names}
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", AntiPastoWarning)
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
