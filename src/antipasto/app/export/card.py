"""Write the model card of an export from the run, its evaluation and the check.

Text from files is shortened and escaped, so that it cannot become markup. Local paths are left out.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from jinja2 import Environment, StrictUndefined
from yaml import YAMLError

from antipasto.adapter.knobs import knobs
from antipasto.app.export.check import Check
from antipasto.app.export.weights import Written, public_name
from antipasto.app.runs import LoadedRun
from antipasto.evaluation.records import Evaluation, dial_arm
from antipasto.terminal import shorten

TAG = "antipasto"
"""Tag of every card, which identifies a folder as an earlier export."""

METHODS = {
    "route": "the part of each update that points towards the hack went into a quarantine",
    "erase": "the part of each update that points towards the hack was dropped",
    "measure": "the part of each update that points towards the hack was only measured",
    "penalty": "flagged rollouts got reward 0",
    "discount": "the reward of a rollout shrank as its score rose",
    "plain": "plain GRPO",
    "drop": "flagged rollouts were dropped",  # of earlier versions
}

_PACKAGES = ("antipasto", "torch", "transformers", "peft")


@dataclass(frozen=True)
class About:
    """Facts about a run for the model card.

    Attributes:
        run: its folder's name.
        base: the base model's folder or hub name.
        task: its name; None if unknown.
        method: the ``--method``.
        options: steps, seed and the like, by name.
        template: options of the chat template.
        versions: of the packages used in training.
        layers: number of adapted layers.
        numbers: number of trained numbers that ship.
        kept: ‖δS + dial δS_hack‖ over all layers.
        dial: share of the quarantine that ships.
        removed: ‖δS_hack‖; None if the run has no quarantine.
        trained: ‖δS + δS_hack‖.
    """

    run: str
    base: str
    task: str | None
    method: str
    options: dict[str, Any]
    template: dict[str, Any]
    versions: dict[str, str]
    layers: int
    numbers: int
    kept: float
    dial: float
    removed: float | None
    trained: float

    @classmethod
    def of(cls, run: LoadedRun) -> About:
        """Collect the facts of a run."""
        layers = knobs(run.model).values()
        ships = torch.cat([layer.delta_s.detach().flatten() for layer in layers])
        zero = torch.zeros_like
        parts = [zero(x.delta_s) if x.delta_s_hack is None else x.delta_s_hack.detach() for x in layers]
        hack = torch.cat([part.flatten() for part in parts])
        return cls(
            run=run.folder.root.resolve().name,
            base=run.base,
            task=None if run.task is None else _task_name(run.task),
            method=run.method,
            options={name: run.config[name] for name in ("steps", "seed", "learning_rate") if name in run.config},
            template=dict((run.config.get("trainer") or {}).get("chat_template_kwargs") or {}),
            versions=dict(run.facts.get("versions") or run.config.get("versions") or {}),
            layers=len(layers),
            numbers=ships.numel(),
            kept=float((ships + run.dial * hack).norm()),
            dial=run.dial,
            removed=float(hack.norm()) if run.has_quarantine else None,
            trained=float((ships + hack).norm()),
        )

    @property
    def ships(self) -> str:
        """What the export contains, in a few words."""
        if self.removed is None:
            return f"as trained: method {self.method} has no quarantine"
        if self.dial:
            said = f"with {self.dial:g} of the quarantine, ‖δS_hack‖ = {self.removed:.3g}"
            return f"{said}; ‖θ‖ = {self.kept:.3g} of {self.trained:.3g}"
        return f"without the quarantine, ‖δS_hack‖ = {self.removed:.3g}; ‖δS‖ = {self.kept:.3g} is left"


def _task_name(spec: str) -> str:
    """A task's name without the folders of its file."""
    source, colon, name = spec.rpartition(":")
    return f"{Path(source).name}:{name}" if colon else spec


def render(about: About, evaluation: Evaluation | None, written: Written, found: Check) -> str:
    """Render the card, the contents of README.md."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters["md"] = _escaped
    template = environment.from_string(resources.files(__package__).joinpath("card.md.jinja").read_text("utf-8"))
    return template.render(
        front_matter=_front_matter(about, written),
        about=about,
        base=public_name(about.base),
        method=METHODS.get(about.method, about.method),
        written=written,
        rows=(*written.rows(), *found.rows()),
        evaluation=None if evaluation is None else _arms(evaluation, about),
        versions={name: (about.versions.get(name, "-"), version(name)) for name in _PACKAGES},
    )


def _front_matter(about: About, written: Written) -> str:
    """The card's YAML header for the hub."""
    name = public_name(about.base)
    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    licence = _licence(about.base)
    return ModelCardData(
        library_name="transformers" if written.rank is None else "peft",
        pipeline_tag="text-generation",
        base_model=name or None,
        license=licence,
        tags=[TAG, "reinforcement-learning", *([] if written.rank is None else ["lora"])],
    ).to_yaml()


def _licence(base: str) -> str | None:
    """The license in the base model's own card, if that is available locally."""
    card = Path(base, "README.md") if Path(base).is_dir() else try_to_load_from_cache(base, "README.md")
    found = card_metadata(card).get("license") if isinstance(card, (str, Path)) else None
    return found if isinstance(found, str) and re.fullmatch(r"[\w.-]{1,64}", found) else None


def card_metadata(card: str | Path) -> dict[str, Any]:
    """The YAML header of a model card; empty if there is no valid card."""
    try:
        return metadata_load(card) or {}
    except (OSError, ValueError, YAMLError):
        return {}


def _arms(evaluation: Evaluation, about: About) -> dict[str, Any]:
    """Values for the card's table of arms."""
    records = evaluation.arms
    measures, flags = list(records[0].measures), list(records[0].flags)
    this = dial_arm(about.dial)
    return {
        "head": ["prompts", "arm", *measures, *flags],
        "rows": [
            ["all" if r.kind is None else r.kind, f"{r.arm} (this one)" if r.arm == this else r.arm]
            + [str(r.measures[m]) if m in r.measures else "-" for m in measures]
            + [str(r.flags[f]) if f in r.flags else "-" for f in flags]
            for r in records
        ],
        "prompts": records[0].n,
        "task": evaluation.task,
        "verdict": evaluation.verdict.sentence,
    }


def _escaped(text: object, width: int = 120) -> str:
    r"""Escape text for Markdown: one line, shortened, no markup.

    Example:
        >>> print(_escaped("a|b <script> [x](http://y)"))
        a\|b &lt;script&gt; \[x\](http\://y)
    """
    return html.escape(re.sub(r"([\\`*_{}\[\]#|~!@:$])", r"\\\1", shorten(text, width)), quote=False)
