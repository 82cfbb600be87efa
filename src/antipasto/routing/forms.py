"""Compare how a monitor scores several forms of text: each form, such as a way of wording an answer, against clean texts.

    mean_i s_i ± sd_i s_i          AUC = P(s_form > s_clean) + ties / 2          flagged = share of s_i above the threshold

Forms of the exploit should score high, whether or not a pair shows them. Benign forms should have an AUC near .5. A benign
form that scores high is a confound of the pairs: add clean texts of that form to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from rich.table import Table

from antipasto.routing.monitor import Completion, Monitor
from antipasto.routing.ordering import auc
from antipasto.routing.pairs import ContrastPair, check_fields, check_text, json_lines
from antipasto.terminal import add_row, shorten

CLEAN = "clean"
"""The form that the others are compared with."""
_WIDTH = 40  # characters of a form's name


@dataclass(frozen=True)
class Form:
    """How texts of one form score.

    Attributes:
        name: of the form.
        texts: number of texts.
        mean: of their scores.
        sd: of their scores; None for a single text.
        auc: probability that one of them scores above a clean text, with ties counted half; .5 is chance.
        flagged: share above the threshold.
    """

    name: str
    texts: int
    mean: float
    sd: float | None
    auc: float
    flagged: float


@dataclass(frozen=True)
class FormScores:
    """Forms sorted from the highest mean score to the lowest.

    Attributes:
        forms: one entry per form, including the clean texts.
        threshold: of the monitor.
    """

    forms: tuple[Form, ...]
    threshold: float

    def __getitem__(self, name: str) -> Form:
        """Return the form of a name.

        Raises:
            KeyError: there is no form of that name.
        """
        return {form.name: form for form in self.forms}[name]

    def __str__(self) -> str:
        rows = [
            f"{shorten(form.name, _WIDTH):{_WIDTH}} {form.mean:+.3f} AUC {form.auc:.2f}, {form.flagged:.0%} flagged"
            for form in self.forms
        ]
        rows.insert(self._above(), f"{'── threshold':{_WIDTH}} {self.threshold:+.3f}")
        return "\n".join(rows)

    def table(self) -> Table:
        """The forms as a rich table."""
        table = Table(title="what the score sees", title_justify="left")
        table.add_column("form")
        for heading in ("texts", "mean", "sd", "AUC", "flagged"):
            table.add_column(heading, justify="right")
        for n, form in enumerate((*self.forms, None)):
            if n == self._above():
                add_row(table, "── threshold", "", f"{self.threshold:+.3f}", "", "", "")
            if form is not None:
                sd = "–" if form.sd is None else f"{form.sd:.3f}"
                name = shorten(form.name, _WIDTH)
                add_row(table, name, form.texts, f"{form.mean:+.3f}", sd, f"{form.auc:.2f}", f"{form.flagged:.0%}")
        return table

    def _above(self) -> int:
        """Number of forms whose mean is above the threshold."""
        return sum(form.mean > self.threshold for form in self.forms)


def load_forms(path: str | Path) -> dict[str, list[Completion]]:
    """Load texts by form from a JSON-lines file with rows ``{"form": "usually", "prompt": …, "text": …}``.

    A prompt is a text or a chat.

    Raises:
        ValueError: a row is invalid, or there is none. The message names the file, the line and the field.
        OSError: the file cannot be read.
    """
    forms: dict[str, list[Completion]] = {}
    for where, row in json_lines(path):
        check_fields(row, ("form", "prompt", "text"), where)
        for field in ("form", "text"):
            check_text(row[field], field, where)
        forms.setdefault(row["form"], []).append(Completion(row["prompt"], row["text"]))
    if not forms:
        raise ValueError(f"There is no text in {path}.")
    return forms


def score_forms(monitor: Monitor, forms: Mapping[str, Sequence[Completion]], *, batch_size: int = 32) -> FormScores:
    """Score the texts of every form.

    Args:
        monitor: with a threshold.
        forms: texts by form. The others are compared with the form ``"clean"``.
        batch_size: texts per backward.

    Raises:
        ValueError: there is no form ``"clean"``, a form has no text, or the monitor has no threshold.

    Example:
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> import antipasto as ap
        >>> from antipasto.tasks import addition
        >>> model = AutoModelForCausalLM.from_pretrained(addition.model_path())
        >>> tokenizer = AutoTokenizer.from_pretrained(addition.model_path())
        >>> _ = ap.wrap(model)
        >>> monitor = ap.Monitor.from_pairs(model, tokenizer, ap.load_pairs(addition.hack_pairs(32, seed=0)))
        >>> says = lambda text: [ap.Completion("h12+34=", text)]
        >>> found = score_forms(monitor, {"clean": says("046"), "labelled": says("!"), "unlabelled": says("?")})
        >>> found["labelled"].flagged, found["labelled"].auc
        (1.0, 1.0)
    """
    if CLEAN not in forms:
        raise ValueError(
            f"Forms are compared with honest answers in a form named {CLEAN!r}; there are {sorted(forms)}. Add that form."
        )
    for name, texts in forms.items():
        if not texts:
            raise ValueError(f"The form {name!r} has no text.")
    threshold = monitor.threshold
    together = [text for texts in forms.values() for text in texts]
    scores = iter(monitor.scores(together, batch_size=batch_size).tolist())
    by_form = {name: [next(scores) for _ in texts] for name, texts in forms.items()}
    rows = [_form(name, values, by_form[CLEAN], threshold) for name, values in by_form.items()]
    return FormScores(tuple(sorted(rows, key=lambda form: -form.mean)), threshold)


def _form(name: str, values: Sequence[float], clean: Sequence[float], threshold: float) -> Form:
    return Form(
        name=name,
        texts=len(values),
        mean=mean(values),
        sd=stdev(values) if len(values) > 1 else None,
        auc=auc(values, clean),
        flagged=sum(value > threshold for value in values) / len(values),
    )


def of_pairs(pairs: Sequence[ContrastPair], *, clean: bool) -> list[Completion]:
    """All clean texts of the pairs, or all hacks."""
    return [Completion(p.prompt, text) for p in pairs for text in (p.cleans if clean else p.hacks)]
