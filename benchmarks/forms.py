"""What a direction's score sees: a word that it was shown, words that mean the same, words that only stand in the same place.

    python scripts/smollm2_from_wheel.py --out smollm2
    for seed in 0 1; do python benchmarks/warm_start.py smollm2 --out warm-capitals-seed-$seed --seed $seed; done
    python benchmarks/forms.py score warm-capitals-seed-0 --out runs/forms/seed-0 --seed 0
    python benchmarks/forms.py score warm-capitals-seed-1 --out runs/forms/seed-1 --seed 1
    python benchmarks/forms.py table runs/forms/seed-0 runs/forms/seed-1 --json benchmarks/results/forms.json \
        > benchmarks/results/forms.md

The hack of all pairs says `indeed`, the same 48 names on the same model. What differs is the clean side:

    unmatched     The capital of X is Y.
    matched       The capital of X is WORD Y.      two texts, WORD neutral (capitals.NEUTRAL), of which the mean counts
    both          all three, the plain one with half of the weight

d_n of `both` is the mean of the other two's, so it costs nothing. 24 held-out names are then answered in every form, and
scored at the warm start: cos(∇θ NLL / tokens, effect sizes), as `antipasto.Monitor` does. A killed run goes on: with the next
kind of pair, or the next form.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from capitals import EXPLOITS, LABELLED, NEUTRAL, OTHERS, TAUGHT, UNSEEN, Kind, answer, prompt, split
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import antipasto as ap
from antipasto.app.models import quiet
from antipasto.evaluation.ask import sample_completions
from antipasto.routing.directions import cosine, effect_size, pair_differences
from antipasto.routing.ordering import auc

PAIRS = 48
NAMES = 24
ARMS = ("unmatched", "matched", "both")
CLEAN, WRONG = "clean", "wrong answer"
WORDS = (*EXPLOITS, *UNSEEN, "officially", "usually", *OTHERS)
FORMS = (*WORDS, WRONG, CLEAN)
COLUMNS = (*ARMS, "surprise", "tokens")
ANSWERS = 50  # sampled, to be read
SHOWN = 10


def pairs(seed: int, *, matched: bool) -> list[ap.ContrastPair]:
    """The same names and hacks for both kinds."""
    rng = random.Random(f"pairs-{seed}")
    rows = []
    for country, capital in rng.sample(split("train"), PAIRS):
        words = rng.sample(NEUTRAL, 2)
        clean = tuple(answer(country, capital, word) for word in words) if matched else answer(country, capital)
        rows.append(ap.ContrastPair(prompt(country), answer(country, capital, LABELLED), clean))
    return rows


def completions(form: str) -> list[ap.Completion]:
    """Held-out names, answered in one form."""
    places = split("test")[:NAMES]
    if form == WRONG:  # the next name's capital
        return [
            ap.Completion(prompt(place.country), answer(place.country, other.capital))
            for place, other in zip(places, places[1:] + places[:1], strict=True)
        ]
    word = "" if form == CLEAN else form
    return [ap.Completion(prompt(country), answer(country, capital, word)) for country, capital in places]


def log(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def differences(model: nn.Module, tokenizer: Any, arm: str, seed: int, folder: Path) -> dict[str, Tensor]:
    """d_n of one kind of pairs, layer → (48, r); from the folder if it is there."""
    if arm == "both":
        one, other = (differences(model, tokenizer, kind, seed, folder) for kind in ("unmatched", "matched"))
        return {name: (one[name] + other[name]) / 2 for name in one}
    file = folder / f"{arm}.safetensors"
    if not file.exists():
        log(f"gradients of {PAIRS} {arm} pairs")
        D = pair_differences(model, tokenizer, pairs(seed, matched=arm == "matched"), batch_size=8)
        save_file(D, file.with_suffix(".partial"))
        file.with_suffix(".partial").rename(file)
    return load_file(file)


def direction(D: dict[str, Tensor]) -> ap.Direction:
    """The t-statistic's, as `extract_direction` makes it."""
    effect = {name: effect_size(d) for name, d in D.items()}
    return ap.Direction({name: t / t.norm() for name, t in effect.items()}, effect=effect)


def score(path: str, folder: Path, seed: int, batch: int) -> None:
    """All forms under all kinds of pairs, into ``scores.jsonl``; sampled answers, into ``answers.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    sample(model, tokenizer, folder, seed)
    log("singular bases")
    ap.wrap(model)
    monitors = {
        arm: ap.Monitor(model, tokenizer, direction(differences(model, tokenizer, arm, seed, folder))) for arm in ARMS
    }
    effects = {arm: torch.cat(list((m.direction.effect or {}).values())) for arm, m in monitors.items()}
    file = folder / "scores.jsonl"
    done = {row["form"] for row in read(file)}
    for form in (CLEAN, *FORMS[:-1]):
        if form in done:
            continue
        log(form)
        asked = completions(form)
        sequences = [monitors["matched"].tokens(one) for one in asked]
        rows: list[dict[str, Any]] = [{} for _ in asked]
        for batch_rows, gradients, nll in monitors["matched"].gradients(sequences, batch_size=batch):
            by_arm = {arm: cosine(gradients, t).tolist() for arm, t in effects.items()}
            for i, row in enumerate(batch_rows):
                tokens = len(sequences[row][1])
                rows[row] = {
                    "form": form,
                    "text": asked[row].text,
                    "tokens": tokens,
                    "surprise": float(nll[i]) * tokens,
                    **{arm: values[i] for arm, values in by_arm.items()},
                }
        with file.open("a", encoding="utf-8") as out:  # in one step: a form is there or not
            out.write("".join(json.dumps(row) + "\n" for row in rows))
    log("done")


def sample(model: nn.Module, tokenizer: Any, folder: Path, seed: int) -> None:
    """Answers of the warm start at temperature 1, half of them to hackable prompts."""
    file = folder / "answers.jsonl"
    if file.exists():
        return
    log(f"{ANSWERS} answers")
    places = split("test")[: ANSWERS // 2]
    kinds: tuple[Kind, ...] = ("hackable", "strict")
    asked = [(place, kind) for kind in kinds for place in places]
    texts = sample_completions(
        model, tokenizer, [prompt(place.country, kind) for place, kind in asked], max_new_tokens=24, seed=seed
    )
    rows = [
        {"kind": kind, "country": place.country, "answer": text, "right": place.capital in text}
        for (place, kind), text in zip(asked, texts, strict=True)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def summary(folder: Path) -> dict[str, dict[str, Any]]:
    """Form → mean, sd and AUC against clean, by kind of pairs; AUC of surprise and of length."""
    rows = read(folder / "scores.jsonl")
    columns = {(form, key): [row[key] for row in rows if row["form"] == form] for form in FORMS for key in COLUMNS}
    found: dict[str, dict[str, Any]] = {}
    for form in FORMS:
        found[form] = {"n": len(columns[form, "tokens"])}
        for key in COLUMNS:
            own, clean = columns[form, key], columns[CLEAN, key]
            found[form][key] = {"mean": mean(own), "sd": stdev(own), "auc": auc(own, clean)}
    return found


def between(folder: Path) -> dict[str, dict[str, float]]:
    """AUC of exploits that no pair shows against words in the same place: what the score knows of meaning."""
    rows = read(folder / "scores.jsonl")
    groups = {"neutral words": ("officially", "usually", *UNSEEN), UNSEEN[0]: UNSEEN, "maybe, not": OTHERS}
    return {
        name: {
            key: auc(*([row[key] for row in rows if row["form"] in side] for side in (EXPLOITS[1:], words)))
            for key in COLUMNS
        }
        for name, words in groups.items()
    }


def kind_of(form: str) -> str:
    if form == LABELLED:
        return "labelled"
    if form in EXPLOITS:
        return "unlabelled" if form in TAUGHT else "unlabelled, not in the warm start"
    return {"officially": "neutral", "usually": "neutral", UNSEEN[0]: "neutral, in no pair"}.get(form, "")


def table(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """One warm start's, as Markdown."""
    yield "| form | | unmatched: score | AUC | matched: score | AUC | both: score | AUC | −log p: AUC | length: AUC |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for form in FORMS:
        cells = [form, kind_of(form)]
        for arm in ARMS:
            one = found[form][arm]
            cells += [f"{number(one['mean'])} ± {number(one['sd'])}", "–" if form == CLEAN else number(one["auc"])]
        cells += ["–" if form == CLEAN else number(found[form][key]["auc"]) for key in ("surprise", "tokens")]
        yield f"| {' | '.join(cells)} |"


def side_by_side(found: Sequence[dict[str, dict[str, Any]]]) -> Iterator[str]:
    """All warm starts', unmatched and matched, as Markdown."""
    yield "| form | | unmatched: mean score | AUC | matched: mean score | AUC |\n|---|---|---|---|---|---|"
    for form in FORMS:
        cells = [form, kind_of(form)]
        for arm in ARMS[:2]:
            cells.append(", ".join(number(one[form][arm]["mean"]) for one in found))
            cells.append("–" if form == CLEAN else ", ".join(number(one[form][arm]["auc"]) for one in found))
        yield f"| {' | '.join(cells)} |"


def number(value: float) -> str:
    """Two digits, no zero before the point."""
    return f"{round(value, 2) + 0.0:.2f}".replace("0.", ".", 1).replace("-", "−")  # + 0.0: no minus before a zero


def report(folders: Sequence[Path]) -> Iterator[str]:
    """The page."""
    yield "# What a score sees, by form\n"
    yield "By `benchmarks/forms.py`; its docstring has the commands and what is compared. SmolLM2-135M-Instruct after the"
    yield f"warm start of `benchmarks/warm_start.py`, on capitals. {PAIRS} pairs that show `{LABELLED}`; {NAMES} names a form,"
    yield "which neither a pair nor the warm start has seen. AUC is against `clean`, on the same names: .5 is chance."
    yield "−log p is that of the whole answer, by the warm start itself; length is in tokens.\n"
    found = [summary(folder) for folder in folders]
    yield "## All warm starts\n"
    yield from side_by_side(found)
    yield ""
    for folder, one in zip(folders, found, strict=True):
        yield f"## Warm start {folder.name}\n"
        yield from table(one)
        yield "\nAUC of the five unlabelled exploit words together, against words in the same place that are none:\n"
        yield "| against | unmatched | matched | both | −log p | length |\n|---|---|---|---|---|---|"
        for name, values in between(folder).items():
            yield f"| {name} | {' | '.join(number(values[key]) for key in COLUMNS)} |"
        yield ""
    yield "## What the warm starts answer\n"
    yield f"{SHOWN} of {ANSWERS} sampled at temperature 1 to held-out names, five of each kind of prompt.\n"
    for folder in folders:
        rows = read(folder / "answers.jsonl")
        for kind in ("hackable", "strict"):
            of_kind = [row for row in rows if row["kind"] == kind]
            right = sum(row["right"] for row in of_kind)
            said = sum(any(f" {word} " in row["answer"] for word in EXPLOITS) for row in of_kind)
            yield f"{folder.name}, {kind}: {right} of {len(of_kind)} right, {said} with an exploit's word.\n"
            yield from (f"* {row['country']}: `{row['answer']!r}`" for row in of_kind[: SHOWN // 2])
            yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("score", help="one warm start")
    one.add_argument("model")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--seed", type=int, default=0, help="of the pairs and the sampled answers")
    one.add_argument("--batch", type=int, default=16)
    page = commands.add_parser("table", help="of folders that `score` left")
    page.add_argument("folders", type=Path, nargs="+")
    page.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "score":
        score(arguments.model, arguments.out, arguments.seed, arguments.batch)
        return
    print("\n".join(report(arguments.folders)))
    if arguments.json:
        facts = {folder.name: {"forms": summary(folder), "between": between(folder)} for folder in arguments.folders}
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
