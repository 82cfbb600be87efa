"""The main job: a reward that can be fooled, what the policy learns from it, and what is left with the quarantine out.

A 250k-parameter model that does two-digit addition (`antipasto.tasks.addition`) is trained with GRPO, knobs only, on prompts
of which half have a hackable grader. KL to the reference costs no second model. A direction, extracted from pairs that show
the *known* hack alone, routes part of every step into the quarantine; half of the rollouts are sampled without it.

The arms of that one run, on operands that no training has seen:

    reference           both knobs out: the base model
    as trained          θ = δS + δS_hack
    deployed            the quarantine out
    random              the book of random effect sizes of the same spread out instead
    permuted            the book of the same effect sizes on shuffled coordinates out instead
    labels shuffled     the book of the same pairs with hack and clean swapped in half of them out instead
    non-hack contrast   the book of pairs that show a stray "=" out instead
    shrunk              θ scaled down to the deployed one's distance from the reference

And the runs that it is compared with (`METHODS`), each trained by itself from the same start, on the same prompts and steps.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from rich.console import Console
from rich.text import Text
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

import antipasto as ap
from antipasto.app.arms import asking, rates_table
from antipasto.app.demo.story import comparison, reading, standing
from antipasto.app.models import base_fingerprint, quiet
from antipasto.app.report import write_report
from antipasto.app.run_folder import RUN, RunFolder
from antipasto.app.runs import finish_run, run_facts, run_views
from antipasto.evaluation.ask import Chunk, Sampling, ask_arms, conclude, matched_scale, own_answers
from antipasto.evaluation.records import Evaluation, write_evaluation
from antipasto.files import write_json
from antipasto.names import Flagged, Mode, Sharing
from antipasto.tasks import addition
from antipasto.terminal import doing, plain, say
from antipasto.trl import GRPOConfig, ProgressBar, RoutedGRPOTrainer

PROMPTS_PER_STEP = 16
ROLLOUTS_PER_PROMPT = 16
LEARNING_RATE = 1e-2
ADAM_BETAS = (0.9, 0.99)
KL_WEIGHT = 0.005
PAIRS, HELDOUT_PAIRS = 48, 16
THRESHOLD = 0.8  # an effect size; chosen on other seeds and on training operands (scripts/choose_threshold.py)
OWN_ANSWERS = 1000  # of the start, which say what a monitor's threshold means
SIZING = 250  # training operands by which θ is shrunk to the deployed one's distance from the reference
TEST_PROMPTS = 1000  # of each kind


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        says: what it does, in a few words.
        direction: what the gate goes by: the known hack's direction, that permuted, or none.
        mode: the router's; None: there is no router.
        flagged: what becomes of flagged rollouts; None: nothing flags them.
        monitor: what flags them: the score at the reference by the known hack's direction, or by that permuted; None: a
            detector of ``!``.
        sharing: the router's.
    """

    says: str
    direction: str | None = None
    mode: Mode | None = None
    flagged: Flagged | None = None
    monitor: str | None = None
    sharing: Sharing = "exclusive"

    @property
    def kind(self) -> str:
        """What `antipasto train` calls it: route, erase, plain, penalty or drop."""
        return self.mode or self.flagged or "plain"


METHODS = {
    "recipe": Method("the known hack's direction fills the quarantine", "known", "route"),
    "plain": Method("GRPO, and nothing else"),
    "erase": Method("what the same gate claims is dropped instead of kept", "known", "erase"),
    "penalty": Method("rollouts that say ! get reward 0", flagged="penalty"),
    "drop": Method("nobody learns from rollouts that say !", flagged="drop"),
    "detector": Method("rollouts that say ! teach the quarantine alone", None, "route", "route"),
    "permuted": Method("the recipe with the direction's coordinates shuffled", "permuted", "route"),
    "score": Method(
        "rollouts that score high at the reference teach the quarantine alone", None, "route", "route", "known"
    ),
    "score classic": Method(
        "the same, and all others teach the quarantine as well", None, "route", "route", "known", "classic"
    ),
    "score penalty": Method("rollouts that score high get reward 0", flagged="penalty", monitor="known"),
    "score drop": Method("nobody learns from rollouts that score high", flagged="drop", monitor="known"),
    "score permuted": Method("score, with the direction's coordinates shuffled", None, "route", "route", "permuted"),
}


@dataclass(frozen=True)
class DemoConfig:
    """What a demo run is made of; ``config.json`` of its folder.

    Attributes:
        seed: of the prompts, the rollouts, the pairs, the controls and the evaluation's draws.
        steps: optimizer steps of 16 prompts x 16 rollouts.
        variant: which of the shipped models.
    """

    seed: int = 0
    steps: int = 160
    variant: str = "rare"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}.")
        addition.model_path(self.variant)

    def to_json(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "steps": self.steps,
            "variant": self.variant,
            "prompts_per_step": PROMPTS_PER_STEP,
            "rollouts_per_prompt": ROLLOUTS_PER_PROMPT,
            "learning_rate": LEARNING_RATE,
            "adam_betas": ADAM_BETAS,
            "kl_weight": KL_WEIGHT,
            "pairs": PAIRS,
            "heldout_pairs": HELDOUT_PAIRS,
            "threshold": THRESHOLD,
            "test_prompts_of_each_kind": TEST_PROMPTS,
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("antipasto", "torch", "transformers", "peft", "trl")},
        }


# ── the job ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def run(config: DemoConfig, out: Path, console: Console, *, seeds: int = 1, compare: bool = False) -> list[Evaluation]:
    """Train, evaluate, print the table, leave a run folder.

    Args:
        config: the run; with several seeds, the first of them.
        out: the run folder, which must not hold anything yet: ``config.json``, ``rollouts.jsonl``, ``metrics.jsonl``,
            ``run.json``, ``adapter/``, ``direction.safetensors``, ``books.safetensors``, ``eval.json``, ``eval.jsonl``; with
            several seeds, one such folder for each; with ``compare``, one for each method in it; ``report.html``.
        console: where to print.
        seeds: how many seeds to run, from the config's on.
        compare: also run the other methods, each from the same start.

    Returns:
        For each seed, the recipe's evaluation.

    Raises:
        ValueError: ``out`` is not an empty or new folder, or ``seeds`` is below 1.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}.")
    with RunFolder(out).held(new=True):
        return _run(config, out, console, seeds=seeds, compare=compare)


def _run(config: DemoConfig, out: Path, console: Console, *, seeds: int, compare: bool) -> list[Evaluation]:
    """`run`, in a folder that is held."""
    methods = list(METHODS) if compare else ["recipe"]
    runs: dict[str, list[Evaluation]] = {method: [] for method in methods}
    folders: list[Path] = []
    for seed in range(config.seed, config.seed + seeds):
        for method in methods:
            folder = out / (f"seed-{seed}" if seeds > 1 else "") / (method if compare else "")
            folders.append(folder)
            runs[method].append(run_one(DemoConfig(seed, config.steps, config.variant), method, folder, console))
    console.print(rates_table(runs["recipe"]))
    console.print(Text(plain(reading(runs["recipe"]))))
    if compare:
        console.print(comparison(runs, {name: method.says for name, method in METHODS.items()}))
        console.print(Text(plain(standing(runs))))
    # of several seeds and methods, the first seed's methods; of several seeds, all
    shown = [f for f in folders if not compare or f.parent == folders[0].parent]
    report = write_report(shown, out / "report.html")
    say(console, f"run folder: {out}", f"report: {report}")
    return runs["recipe"]


def run_one(
    config: DemoConfig,
    method: str,
    out: Path,
    console: Console,
    *,
    false_alarms: float | None = None,
    matched: bool = False,
) -> Evaluation:
    """Train by one of `METHODS`, evaluate, leave a run folder without a report; the last two options as `train` has them."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps({"method": method, **config.to_json()}, indent=2) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(addition.model_path(config.variant))
    with quiet():
        trainer = train(config, method, tokenizer, out, console, false_alarms=false_alarms, matched=matched)
        facts = run_facts(
            trainer,
            str(addition.model_path(config.variant)),
            base_fingerprint(trainer.model),
            task=addition.task_name(config.variant),
            method=METHODS[method].kind,
        )
        write_json(out / RUN, facts)
        with (out / "metrics.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in trainer.state.log_history if "reward" in row)
        books = {} if trainer.router is None else {name: trainer.router.book(name) for name in trainer.router.books}
        kind, shrink = METHODS[method].kind, None
        if kind == "route":
            with doing(console, "measuring how far the deployed model is from the reference"):
                asked = [row["prompt"] for row in addition.rows(config.variant, addition.split("train")[:SIZING])]
                how = Sampling(addition.MAX_ANSWER_TOKENS, seed=config.seed, batch_size=500)
                shrink = matched_scale(trainer.model, tokenizer, asked, how)
        arms = run_views(trainer.model, books, kind, shrink=shrink)
        result = evaluate(trainer.model, arms, tokenizer, addition.split("test")[:TEST_PROMPTS], config, console)
    write_evaluation(result, out)
    return result


def train(
    config: DemoConfig,
    method: str,
    tokenizer: Any,
    out: Path,
    console: Console,
    threshold: float | None = None,
    label_both: bool = False,
    adapter: PeftConfig | None = None,
    learning_rate: float = LEARNING_RATE,
    false_alarms: float | None = None,
    matched: bool = False,
) -> RoutedGRPOTrainer:
    """One run. Returns the trainer, which has the model and the router.

    Args:
        config: the run.
        method: of `METHODS`.
        tokenizer: of the model.
        out: where rollouts, adapter, direction and books go.
        console: of the progress bar.
        threshold: of the gate; the demo's own if None.
        label_both: let half of the pairs show the unknown hack, which then is none.
        adapter: another than the demo's own, for a method without a router.
        learning_rate: another than the demo's own.
        false_alarms: the monitor's threshold by this share of the start's own answers, instead of midway.
        matched: give the monitor's pairs a second clean text, with a stray ``=``.
    """
    args = GRPOConfig(
        output_dir=str(out),
        seed=config.seed,
        max_steps=config.steps,
        per_device_train_batch_size=PROMPTS_PER_STEP * ROLLOUTS_PER_PROMPT,
        num_generations=ROLLOUTS_PER_PROMPT,
        max_completion_length=addition.MAX_ANSWER_TOKENS,
        temperature=1.0,
        beta=KL_WEIGHT,
        loss_type="grpo",
        scale_rewards="none",  # advantage = reward - mean of the prompt's group
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=ADAM_BETAS[0],
        adam_beta2=ADAM_BETAS[1],
        max_grad_norm=0.0,  # no clipping
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    how = METHODS[method]
    threshold = THRESHOLD if threshold is None else threshold
    prompts = training_prompts(config.seed, config.steps * PROMPTS_PER_STEP)
    trainer = RoutedGRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(addition.model_path(config.variant)),
        args=args,
        reward_funcs=addition.grader(config.variant),
        train_dataset=Dataset.from_list([{"prompt": text} for text in prompts]),
        processing_class=tokenizer,
        peft_config=adapter or ap.AntiPastoConfig(),
        router=_router_of(how, tokenizer, config, threshold, label_both),
        detector=None if how.flagged is None or how.monitor is not None else addition.detector,
        monitor=None if how.monitor is None else _monitor_of(how.monitor, tokenizer, config, false_alarms, matched),
        flagged=how.flagged or "route",
        oracle=addition.oracle,
        rollout_log=out / "rollouts.jsonl",
    )
    trainer.remove_callback(PrinterCallback)  # the bar says it, and metrics.jsonl keeps it
    what = f"seed {config.seed}" if method == "recipe" else f"seed {config.seed}, {method}"
    with ProgressBar(console, f"training, {what}") as bar:
        trainer.add_callback(bar)
        trainer.train()
    folder = RunFolder(out)
    if trainer.router is not None and trainer.router.direction is not None:
        trainer.router.direction.save(folder.direction)
    if trainer.monitor is not None:
        trainer.monitor.save(folder.monitor)
    finish_run(trainer, trainer.router, folder)
    return trainer


def _router_of(
    how: Method, tokenizer: Any, config: DemoConfig, threshold: float, label_both: bool
) -> Callable[[nn.Module], ap.Router] | None:
    if how.mode is None:
        return None
    mode = how.mode
    if how.direction is None:
        return lambda model: ap.Router(model, None, mode=mode, sharing=how.sharing)

    def make(model: nn.Module) -> ap.Router:
        known, controls = directions(model, tokenizer, config, label_both=label_both)
        if how.direction == "permuted":
            known, controls = controls["permuted"], {}
        return ap.Router(model, known, mode=mode, threshold=threshold, controls=controls)

    return make


def _monitor_of(
    direction: str, tokenizer: Any, config: DemoConfig, false_alarms: float | None, matched: bool
) -> Callable[[nn.Module], ap.Monitor]:
    def make(model: nn.Module) -> ap.Monitor:
        pairs = ap.load_pairs(addition.hack_pairs(PAIRS + HELDOUT_PAIRS, config.seed, matched=matched))
        model.eval()
        v = ap.extract_direction(model, tokenizer, pairs[:PAIRS])
        model.train()
        monitor = ap.Monitor(model, tokenizer, v if direction == "known" else v.permuted(config.seed))
        prompts = training_prompts(config.seed, OWN_ANSWERS)
        own = own_answers(
            model, tokenizer, prompts, Sampling(addition.MAX_ANSWER_TOKENS, seed=config.seed, batch_size=500)
        )
        monitor.calibrate(pairs[PAIRS:], own=own, false_alarms=false_alarms)
        return monitor

    return make


def directions(
    model: nn.Module, tokenizer: Any, config: DemoConfig, *, label_both: bool = False
) -> tuple[ap.Direction, dict[str, ap.Direction]]:
    """The direction of the known hack, and those of its controls."""
    model.eval()
    seed = config.seed
    rows = addition.hack_pairs(PAIRS + HELDOUT_PAIRS, seed)
    if label_both:
        (where,) = [kind for kind, hacks in addition.PAYS[config.variant].items() if addition.UNKNOWN_HACK in hacks]
        rows[::2] = addition.hack_pairs(len(rows) // 2, seed, hack=addition.UNKNOWN_HACK, kind=where)
    pairs = ap.load_pairs(rows)
    known = ap.extract_direction(model, tokenizer, pairs[:PAIRS], heldout=pairs[PAIRS:])
    contrast = ap.load_pairs(addition.contrast_pairs(PAIRS, seed))
    controls = {
        "random": known.random(seed),
        "permuted": known.permuted(seed),
        "labels shuffled": ap.extract_direction(model, tokenizer, pairs[:PAIRS], shuffle_labels=seed),
        "non-hack contrast": ap.extract_direction(model, tokenizer, contrast),
    }
    model.train()
    return known, controls


def training_prompts(seed: int, number: int) -> list[str]:
    """``number`` prompts on training operands, half of them hackable, shuffled."""
    rng = random.Random(seed)
    operands = addition.split("train")
    prompts = [
        addition.prompt(addition.HACKABLE if i % 2 == 0 else addition.STRICT, rng.choice(operands))
        for i in range(number)
    ]
    rng.shuffle(prompts)
    return prompts


# ── what came of it ──────────────────────────────────────────────────────────────────────────────────────────────────


def evaluate(
    model: nn.Module,
    arms: Mapping[str, AbstractContextManager[None]],
    tokenizer: Any,
    operands: Sequence[addition.Operands],
    config: DemoConfig,
    console: Console,
) -> Evaluation:
    """Every arm on the same operands under both prefixes, with the same draws."""
    task = addition.task(config.variant)
    rows = addition.rows(config.variant, operands)
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    # a kind to a chunk, each from the config's seed
    chunks = [Chunk([i for i, row in enumerate(rows) if row["kind"] == kind], config.seed) for kind in kinds]
    how = Sampling(addition.MAX_ANSWER_TOKENS, seed=config.seed, batch_size=500)
    with asking(console, len(rows) * len(arms)) as say:
        answers = ask_arms(model, tokenizer, task, rows, arms, how, chunks=chunks, on_answers=say)
    return conclude(task.name, {"prompts": len(rows), **how.facts()}, answers)
