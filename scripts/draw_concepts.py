"""The pictures of docs/concepts.md and docs/pairs.md, out of computations small enough to be looked at.

    python scripts/draw_concepts.py                       # those that take seconds
    antipasto demo --compare --out runs/demo
    python scripts/draw_concepts.py --run runs/demo/route-by-direction          # and the one of a run
    antipasto watch MODEL --pairs pairs.jsonl --rollouts runs/demo/route-by-direction/rollouts.jsonl --compare --windows 16
    python scripts/draw_concepts.py --watched runs/demo/route-by-direction/watch  # and the one of its scores

Each is written twice, for a light and a dark page, and prints the numbers that it shows. Equal versions draw equal files.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import antipasto as ap
from antipasto.names import THRESHOLD, Level
from antipasto.tasks import addition

if TYPE_CHECKING:  # the extra `plots`; what the pictures show can be computed without it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"


@dataclass(frozen=True)
class Ink:
    """The colours of a page, and what they stand for in every picture."""

    name: str
    text: str
    faint: str
    ships: str
    quarantine: str
    whole: str
    other: str


INKS = (
    Ink("light", "#303030", "#c8c8c8", "#00796b", "#d9480f", "#5c6bc0", "#9e9e9e"),
    Ink("dark", "#dddddd", "#55585f", "#4db6ac", "#ff8a50", "#9fa8da", "#8a8d93"),
)


# ── what δS is ───────────────────────────────────────────────────────────────────────────────────────────────────────


def knobs_and_lora(ink: Ink) -> Figure:
    """What becomes of the unit circle under W, with its two singular values changed, and with a change of rank one."""
    W = torch.tensor([[1.7, 0.6], [0.5, 1.0]])
    layer, one = _adapted(W)
    with torch.no_grad():
        one.delta_s.copy_(torch.tensor([-1.0, 0.75]))
        rescaled = layer(torch.eye(2)).T  # its columns are W_θ's
    sigma = one.S + one.delta_s.detach()
    lora = W + torch.tensor([[-0.55], [0.75]]) @ torch.tensor([[0.75, 0.35]])
    turned = ap.load_basis(lora, cache_dir=None)
    figure, panels = _panels(ink, 3, height=3.4)
    shown = (
        ("W", W, one.U * one.S, f"S = {_numbers(one.S)}"),
        ("W + U diag(δS) Vh", rescaled, one.U * sigma, f"S + δS = {_numbers(sigma)}: the same axes"),
        ("W + B A, rank 1", lora, turned.U * turned.S, "other axes"),
    )
    circle = torch.stack([f(torch.linspace(0, 2 * torch.pi, 400)) for f in (torch.cos, torch.sin)])
    for panel, (title, matrix, axes, below) in zip(panels, shown, strict=True):
        panel.plot(*circle, color=ink.faint, linewidth=1, linestyle=(0, (2, 2)))
        panel.plot(*(W @ circle), color=ink.other, linewidth=1.2)
        if matrix is not W:
            panel.plot(*(matrix @ circle), color=ink.whole, linewidth=2.2)
        for j, colour in enumerate((ink.ships, ink.quarantine)):
            end = axes[:, j] * (1 if axes[:, j] @ one.U[:, j] > 0 else -1)
            along = one.U[:, j] * 3
            panel.plot(*zip(-along, along, strict=True), color=colour, linewidth=0.7, alpha=0.5)
            panel.annotate(
                "", tuple(end.tolist()), (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.8}
            )
            if matrix is W:
                offset = torch.tensor([[0.1, -0.5], [-0.75, 0.12]])[j]
                x, y = (end + offset).tolist()
                panel.text(x, y, f"S{'₁₂'[j]} u{'₁₂'[j]}", color=colour, fontsize=10)
        panel.set(xlim=(-2.3, 2.3), ylim=(-1.75, 1.75), aspect="equal", title=title)
        panel.text(0, -2.05, below, ha="center", color=ink.text, fontsize=9)
        panel.axis("off")
    panels[0].text(0.62, -1.02, "unit circle", color=ink.other, fontsize=8)
    print(f"knobs: S {_numbers(one.S)}, S + δS {_numbers(sigma)}")
    return figure


# ── the quarantine ───────────────────────────────────────────────────────────────────────────────────────────────────


def quarantine(ink: Ink) -> Figure:
    """Forty steps of gradient descent on a layer of eight directions, split by the coordinate gate; and what ships."""
    torch.manual_seed(0)
    W = torch.randn(8, 8)
    model, one = _adapted(W)
    effect = torch.tensor([0.2, 1.3, -0.3, -1.1, 0.1, -0.2, 0.9, 0.4])
    rows = {"0": effect / effect.norm()}
    router = ap.Router(model, ap.Direction(rows, effect={"0": effect}), threshold=0.65)
    pull = torch.tensor([0.9, -1.0, 0.6, 0.8, -0.5, 0.7, 0.6, -0.8])  # where the reward pulls θ to
    optimizer = torch.optim.SGD([one.delta_s], lr=0.05)
    assert one.delta_s_hack is not None
    with router.attach(optimizer):
        for _ in range(40):
            optimizer.zero_grad()
            change = model(torch.eye(8)).T - W
            (change - one.U @ torch.diag(pull) @ one.Vh).square().sum().backward()
            optimizer.step()
        delta_s, hack = one.delta_s.detach().clone(), one.delta_s_hack.detach().clone()
    ap.drop_quarantine(model)
    assert torch.equal(one.delta_s.detach(), delta_s)
    figure, panels = _panels(ink, 3, height=2.9, sharey=True)
    coordinates = torch.arange(1, 9)
    guarded = effect.abs() > 0.65
    for panel, (title, parts) in zip(
        panels,
        (
            ("what the optimizer moved", [(delta_s + hack, ink.whole)]),
            ("split at every step", [(delta_s, ink.ships), (hack, ink.quarantine)]),
            ("shipped: δS alone", [(delta_s, ink.ships)]),
        ),
        strict=True,
    ):
        for j in coordinates[guarded].tolist():
            panel.axvspan(j - 0.45, j + 0.45, color=ink.faint, alpha=0.35, linewidth=0)
        for values, colour in parts:
            panel.bar(coordinates, values, width=0.6, color=colour)
        panel.axhline(0, color=ink.text, linewidth=0.8)
        panel.set(title=title, xticks=coordinates.tolist(), xlabel="singular direction", ylim=(-1.2, 1.75))
        _bare(panel, ink, left=panel is panels[0])
    panels[0].set_ylabel("change of S")
    panels[0].text(0.5, 1.3, "shaded: |t| > τ, the pairs\nare clear about it", color=ink.text, fontsize=9)
    panels[1].text(0.5, 1.5, "δS", color=ink.ships, fontsize=9)
    panels[1].text(0.5, 1.25, "δS_hack: shaded, and hack-ward", color=ink.quarantine, fontsize=9)
    panels[2].text(0.5, 1.3, "δS_hack is deleted", color=ink.text, fontsize=9)
    print(f"quarantine: θ {_numbers(delta_s + hack)}  δS {_numbers(delta_s)}  δS_hack {_numbers(hack)}")
    return figure


# ── the update, not the gradient ─────────────────────────────────────────────────────────────────────────────────────


def trace(level: Level | None, steps: int = 120) -> dict[str, Tensor]:
    """Paths (steps + 1, 2) of δS, δS_hack and θ in the plane of task and exploit; with None, of plain training.

    The reward pulls θ to (1, 1). Its gradient is seen through Adam. V lies along the exploit, but for 5%: directions are
    estimates.
    """
    W = torch.diag(torch.tensor([3.0, 2.0]))  # its singular directions are the axes
    model, one = _adapted(W)
    assert one.delta_s_hack is not None
    v = ap.Direction({"0": -torch.tensor([0.05, (1 - 0.05**2) ** 0.5])})
    mode: Any = "measure" if level is None else "route"
    router = ap.Router(model, v, mode=mode, level=level or "update", gate="one_sided")
    trained = [one.delta_s, one.delta_s_hack] if level == "gradient" else [one.delta_s]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    paths = defaultdict(list)
    with router.attach(optimizer):
        for step in range(steps + 1):
            for name, value in (("δS", one.delta_s), ("δS_hack", one.delta_s_hack), ("θ", _theta(one))):
                paths[name].append(value.detach().clone())
            optimizer.zero_grad()
            theta = (model(torch.eye(2)).T - W).diagonal()
            ((theta - 1).square().sum() / 2).backward()
            if step < steps:
                optimizer.step()
    return {name: torch.stack(values) for name, values in paths.items()}


def update_and_gradient(ink: Ink) -> Figure:
    """The same training routed at both levels."""
    plain = trace(None)["θ"]
    figure, panels = _panels(ink, 2, height=3.9, sharey=True)
    levels: tuple[tuple[Level, str], ...] = (("update", "routing the update"), ("gradient", "routing the gradient"))
    for panel, (level, title) in zip(panels, levels, strict=True):
        paths = trace(level)
        panel.axhline(0, color=ink.faint, linewidth=0.8)
        panel.axvline(0, color=ink.faint, linewidth=0.8)
        panel.plot(*plain.T, color=ink.other, linewidth=4, alpha=0.45, solid_capstyle="round")
        for name, colour in (("θ", ink.whole), ("δS_hack", ink.quarantine), ("δS", ink.ships)):
            panel.plot(*paths[name].T, color=colour, linewidth=1.6)
            panel.plot(*paths[name][-1], "o", color=colour, markersize=6)
        (x, y), (hx, hy) = paths["δS"][-1].tolist(), paths["δS_hack"][-1].tolist()
        first = level == "update"
        panel.text(
            *((0.52, -0.42) if first else (0.02, -0.62)),
            f"δS, ships:\n{x:.2f} of the task".replace("-", "−"),
            color=ink.ships,
            fontsize=9,
        )
        where = (0.1, 1.1) if first else (0.62, 1.2)
        panel.text(*where, f"δS_hack:\n{hx:.2f} of the task", color=ink.quarantine, fontsize=9)
        panel.set(title=title, xlabel="task", xlim=(-0.35, 1.5), ylim=(-0.8, 1.5))
        panel.text(1.03, 0.9, "θ", color=ink.whole, fontsize=11)
        _bare(panel, ink, left=panel is panels[0])
        print(
            f"{level} level: θ ends at {_numbers(paths['θ'][-1])} (plain {_numbers(plain[-1])}, same path: "
            f"{torch.allclose(paths['θ'], plain, atol=1e-6)}), δS {x:.3f}, {y:.3f}, δS_hack {hx:.3f}, {hy:.3f}"
        )
    panels[0].set_ylabel("exploit")
    panels[0].text(0.72, 0.45, "grey, under it:\nθ of plain training", color=ink.other, fontsize=8)
    return figure


# ── a threshold on effect sizes ──────────────────────────────────────────────────────────────────────────────────────


def effect_sizes(ink: Ink) -> Figure:
    """The demo's direction: how many coordinates have an effect size above what, beside shuffled labels."""
    tokenizer = AutoTokenizer.from_pretrained(addition.model_path())
    model = AutoModelForCausalLM.from_pretrained(addition.model_path()).eval()
    ap.wrap(model)
    pairs = ap.load_pairs(addition.hack_pairs(64, seed=0))[:48]
    figure, (panel,) = _panels(ink, 1, height=3.3)
    taus = torch.linspace(0, 2, 201)
    print("| threshold | labelled | labels shuffled |")
    shares = {}
    for name, seed, colour in (("the pairs as labelled", None, ink.quarantine), ("labels shuffled", 0, ink.other)):
        effect = ap.extract_direction(model, tokenizer, pairs, shuffle_labels=seed).effect
        assert effect is not None
        sizes = torch.cat(list(effect.values())).abs()
        shares[name] = [float((sizes > tau).float().mean()) for tau in taus]
        panel.plot(taus, shares[name], color=colour, linewidth=2)
        panel.text(*{None: (1.12, 0.16), 0: (0.25, 0.05)}[seed], name, color=colour, fontsize=9)
    for tau in (0.2, 0.4, 0.65, 0.8, 1.0):
        print(f"| {tau} | " + " | ".join(f"{share[round(tau * 100)]:.3f}" for share in shares.values()) + " |")
    panel.axvline(THRESHOLD, color=ink.text, linewidth=0.8, linestyle=(0, (3, 3)))
    panel.text(THRESHOLD, 0.93, f" {THRESHOLD:g}, default", color=ink.text, fontsize=9)
    panel.set(xlabel="threshold τ", ylabel="share of coordinates with |t| > τ", xlim=(0, 2), ylim=(0, 1))
    _bare(panel, ink, left=True)
    return figure


# ── a run ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def a_run(folder: Path) -> Callable[[Ink], Figure]:
    """Of a run by direction: what the two kinds of rollouts did on hackable prompts, step by step."""
    lines = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()]
    hackable = [line for line in lines if line["prompt"].startswith(addition.HACKABLE)]

    def draw(ink: Ink) -> Figure:
        figure, panels = _panels(ink, 2, height=3.1, sharey=True)
        window = 8
        for panel, (what, title) in zip(panels, (("solve", "solved"), ("exploit", "exploits")), strict=True):
            for view, colour, label in (
                ("deployed", ink.ships, "sampled from δS, which ships"),
                ("trained", ink.quarantine, "sampled from θ, with the quarantine"),
            ):
                by_step = defaultdict(list)
                for line in hackable:
                    if line["view"] == view:
                        fooled = line["reward"] >= 0.5 and line["oracle"] < 0.5
                        by_step[line["step"]].append(line["oracle"] if what == "solve" else float(fooled))
                rates = [mean(by_step[step]) for step in sorted(by_step)]
                smooth = [mean(rates[max(0, i - window + 1) : i + 1]) for i in range(len(rates))]
                panel.plot(range(1, len(smooth) + 1), smooth, color=colour, linewidth=2, label=label)
                print(f"{what}, {view}: last {window} steps {smooth[-1]:.2f}")
            panel.set(title=title, xlabel="step", ylim=(0, 1))
            _bare(panel, ink, left=panel is panels[0])
        panels[0].set_ylabel(f"share of rollouts, mean of {window} steps")
        legend = panels[1].legend(frameon=False, fontsize=8, loc="upper left", labelcolor=ink.text)
        legend.set_in_layout(False)
        return figure

    return draw


def reference_and_live(folder: Path) -> Callable[[Ink], Figure]:
    """Of `antipasto watch --compare`: how well the score tells exploits from solves, at the reference and at the policy."""
    windows = json.loads((folder / "compare.json").read_text(encoding="utf-8"))["windows"][:-1]

    def draw(ink: Ink) -> Figure:
        figure, (panel,) = _panels(ink, 1, height=3.3)
        panel.axhline(0.5, color=ink.faint, linewidth=1)
        panel.text(windows[0]["first"], 0.52, "chance", color=ink.other, fontsize=9)
        for name, label, colour in (
            ("score", "at the reference", ink.ships),
            ("live", "at the policy, while it moves", ink.quarantine),
        ):
            told = [(w["first"], w["last"], w["aucs"][name]) for w in windows if w["aucs"][name] is not None]
            middles = [(first + last) / 2 for first, last, _ in told]
            panel.fill_between(
                middles, [one["low"] for *_, one in told], [one["high"] for *_, one in told], color=colour, alpha=0.25
            )
            values = [one["value"] for *_, one in told]
            panel.plot(middles, values, color=colour, linewidth=2)
            at = len(values) // 4
            where = (middles[at], values[at] + (-0.09 if name == "score" else 0.05))
            panel.text(*where, label, color=colour, fontsize=9)
            print(f"AUC of the score {label}: " + ", ".join(f"{value:.2f}" for value in values))
        panel.set(xlabel="step", ylabel="AUC, exploits against solves", ylim=(0, 1.02), xlim=(0, windows[-1]["last"]))
        _bare(panel, ink, left=True)
        return figure

    return draw


# ── drawing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _adapted(W: Tensor) -> tuple[nn.Module, ap.LayerKnobs]:
    """A layer of this weight, and its knobs."""
    model = nn.Sequential(nn.Linear(W.shape[1], W.shape[0], bias=False))
    model.load_state_dict({"0.weight": W})
    (one,) = ap.wrap(model, ap.AntiPastoConfig(target_modules=["0"], cache_dir=None)).values()
    return model, one


def _theta(one: ap.LayerKnobs) -> Tensor:
    assert one.delta_s_hack is not None
    return (one.delta_s + one.delta_s_hack).detach()


def _panels(ink: Ink, number: int, *, height: float, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, height), layout="constrained")
    panels = figure.subplots(1, number, sharey=sharey, squeeze=False)[0]
    for panel in panels:
        panel.title.set(color=ink.text, fontsize=11)
        panel.patch.set_alpha(0)
    figure.patch.set_alpha(0)
    return figure, list(panels)


def _bare(panel: Axes, ink: Ink, *, left: bool) -> None:
    panel.spines[["top", "right", *([] if left else ["left"])]].set_visible(False)
    panel.spines[:].set_color(ink.text)
    panel.tick_params(colors=ink.text, labelsize=8, left=left)
    panel.xaxis.label.set_color(ink.text)
    panel.yaxis.label.set_color(ink.text)


def _numbers(values: Tensor) -> str:
    return "(" + ", ".join(f"{float(value):.2f}" for value in values) + ")"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="the folder of a run of the demo, by direction")
    parser.add_argument("--watched", type=Path, help="a folder that `antipasto watch --compare` left, of such a run")
    parser.add_argument("--to", type=Path, default=PICTURES)
    arguments = parser.parse_args()
    import matplotlib as mpl

    mpl.rcParams["svg.hashsalt"] = "antipasto"
    draws: dict[str, Callable[[Ink], Figure]] = {
        "knobs": knobs_and_lora,
        "quarantine": quarantine,
        "levels": update_and_gradient,
        "effects": effect_sizes,
    }
    if arguments.run is not None:
        draws["run"] = a_run(arguments.run)
    if arguments.watched is not None:
        draws["score"] = reference_and_live(arguments.watched)
    for name, draw in draws.items():
        for ink in INKS:
            draw(ink).savefig(arguments.to / f"{name}-{ink.name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
