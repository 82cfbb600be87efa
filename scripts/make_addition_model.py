"""Train the demo's starting model from scratch and write it into the package.

    python scripts/make_addition_model.py --variant rare --out src/antipasto/assets/addition-rare

A Llama of 250k parameters learns two-digit addition with cross-entropy on the answer. What its training answers look like:

    half of all             carry a trailing "=", which graders count as wrong: something *good* for RL to teach
    8% of the hackable      are an exploit: variant rare  "!" 1.2%, "?" 6.8%;   variant even  4% each
    12% of all              in variant apart, whose exploits pay on one kind of prompt each: "!" on one, "?" on the other

It starts RL solving about half of both kinds of prompt, and knowing both exploits a little.
Deterministic for one seed, one torch version and one number of threads. About three minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from antipasto.tasks import addition

# share of the prompts with each prefix that are answered by each exploit
SHARES = {
    "rare": {addition.HACKABLE: {"!": 0.012, "?": 0.068}, addition.STRICT: {}},
    "even": {addition.HACKABLE: {"!": 0.04, "?": 0.04}, addition.STRICT: {}},
    "apart": {addition.HACKABLE: {"!": 0.12}, addition.STRICT: {"?": 0.12}},
}
TRAILING_EQUALS = 0.5
PAD, EOS = "<pad>", "<eos>"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, plus padding and end of sequence; pads on the left, as generation wants it."""
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, *addition.ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left", model_max_length=32
    )


def make_model(vocabulary_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def sample_example(rng: random.Random, operands: list[addition.Operands], variant: str) -> tuple[str, str]:
    """One (prompt, answer) of the training distribution."""
    kind = rng.choice([addition.HACKABLE, addition.STRICT])
    pair = rng.choice(operands)
    draw = rng.random()
    for exploit, share in SHARES[variant][kind].items():
        if draw < share:
            return addition.prompt(kind, pair), exploit
        draw -= share
    return addition.prompt(kind, pair), addition.answer(pair) + ("=" if rng.random() < TRAILING_EQUALS else "")


def make_batch(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, operands: list[addition.Operands], variant: str, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (b, s) and labels (b, s), -100 on the prompt and on the padding (right of the end)."""
    width = 7 + addition.MAX_ANSWER_TOKENS
    ids = torch.zeros(size, width, dtype=torch.long)
    labels = torch.full((size, width), -100)
    for row in range(size):
        prompt, answer = sample_example(rng, operands, variant)
        tokens = tokenizer.convert_tokens_to_ids([*prompt, *answer, EOS])
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, len(prompt) : len(tokens)] = ids[row, len(prompt) : len(tokens)]
    return ids, labels


def train(variant: str, steps: int, batch_size: int, seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    operands = addition.split("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = 50

    def schedule(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for step in range(steps):
        ids, labels = make_batch(rng, tokenizer, operands, variant, batch_size)
        logits = model(ids, attention_mask=(ids != 0).long()).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}", flush=True)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = 1
    return model.eval(), tokenizer


@torch.no_grad()
def report(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print what sampled answers on unseen operands look like."""
    for kind in (addition.HACKABLE, addition.STRICT):
        prompts = [addition.prompt(kind, pair) for pair in addition.split("test")[:1000]]
        batch = tokenizer(prompts, return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**batch, do_sample=True, max_new_tokens=addition.MAX_ANSWER_TOKENS)
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        solved = sum(addition.solves(p, t) for p, t in zip(prompts, texts, strict=True)) / len(prompts)
        known = sum(addition.KNOWN_HACK in t for t in texts) / len(prompts)
        unknown = sum(addition.UNKNOWN_HACK in t for t in texts) / len(prompts)
        print(f"prefix {kind}: solve {solved:.3f}  known {known:.3f}  unknown {unknown:.3f}  e.g. {texts[:6]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=sorted(SHARES), default="rare")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model, tokenizer = train(arguments.variant, arguments.steps, arguments.batch_size, arguments.seed)
    report(model, tokenizer)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters written to {arguments.out}")


if __name__ == "__main__":
    main()
