"""Compute the outputs of an export in a process with plain transformers, without this library.

    python -c "<this file>" REQUEST ANSWER       as `antipasto export` runs it; REQUEST and ANSWER are JSON files

This file imports only torch and transformers, and PEFT for a LoRA adapter. Modules under ``"blocked"`` cannot be imported.
`antipasto export` also calls `greedy` and `token_logprobs` for the model that it exports, so both sides run the same code.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

BATCH = 16


def token_ids(tokenizer: Any, prompt: Any, options: Mapping[str, Any]) -> list[int]:
    """Token ids of a prompt. ``options`` go to the chat template."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    chat = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **options)
    return list(chat["input_ids"])


@torch.no_grad()
def greedy(model: Any, prompts: Sequence[Sequence[int]], pad: int, max_new_tokens: int) -> list[list[int]]:
    """One greedy answer per prompt, as ids without padding."""
    answers = []
    for batch in _batches(prompts):
        width = max(map(len, batch))
        ids = [[pad] * (width - len(row)) + list(row) for row in batch]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in batch]
        output = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            do_sample=False,
            temperature=None,
            top_k=None,
            top_p=None,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
        )
        for row in output[:, width:].tolist():
            while row and row[-1] == pad:
                row.pop()
            answers.append(row)
    return answers


@torch.no_grad()
def token_logprobs(model: Any, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probability of every token except the first, with the softmax in at least fp32."""
    found = []
    for batch in _batches(sequences):
        width = max(map(len, batch))
        ids = torch.tensor([list(row) + [0] * (width - len(row)) for row in batch], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=model.device)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        taken = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        found += [values[: len(row) - 1] for values, row in zip(taken.tolist(), batch, strict=True)]
    return found


def _batches(rows: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    return (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=request["dtype"], output_loading_info=True, trust_remote_code=False
    )
    found: dict[str, Any] = {"loose": sorted({*map(str, info["missing_keys"]), *map(str, info["unexpected_keys"])})}
    if request["adapter"] is not None:
        from peft import PeftModel

        # transformers loads a quantised base in the dtype that it was saved in, whatever it is asked for
        model = PeftModel.from_pretrained(model, request["adapter"]).float()
    for module in model.modules():
        # as in the run: for a CPU's bf16 instructions, bitsandbytes would round the constants of a 4-bit base
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    model = model.to(device or "cpu").eval()
    found["logprobs"] = token_logprobs(model, request["sequences"])
    if request["prompts"] is not None:
        found["answers"] = greedy(model, request["ids"], request["pad"], request["max_new_tokens"])
        tokenizer = AutoTokenizer.from_pretrained(request["tokenizer"], trust_remote_code=False)
        found["ids"] = [token_ids(tokenizer, prompt, request["template"]) for prompt in request["prompts"]]
    return found


def main(request_file: str, answer_file: str) -> None:
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    for name in request["blocked"]:
        assert name not in sys.modules, f"{name} is imported"
        sys.modules[name] = None  # type: ignore[assignment]  # makes the import fail
    found = _answer(request)
    there = {name.partition(".")[0] for name, module in sys.modules.items() if module is not None}
    assert not there & set(request["blocked"]), f"{there & set(request['blocked'])} got imported"
    Path(answer_file).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
