"""The report: one file, read by a real browser; what comes from files stays text."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lines import write_lines
from markupsafe import Markup
from playwright.sync_api import Browser, Page, expect, sync_playwright
from safetensors.torch import save_file
from typer.testing import CliRunner

import antipasto as ap
from antipasto.adapter.fingerprints import fingerprints_to_json
from antipasto.app.cli import app
from antipasto.app.report import write_report
from antipasto.app.report.answers import side_by_side
from antipasto.app.report.figures import dial, overlaid, overview
from antipasto.app.report.html import ON_PAPER, marked, readable, turns
from antipasto.app.report.layers import grid, spectrum
from antipasto.app.report.plots import Line, curves, heat_map, level
from antipasto.app.report.rollouts import EACH, LONGEST, read_rollouts
from antipasto.app.report.run import read_runs, short_names
from antipasto.app.report.tables import arm_blocks, difference_blocks, number, signed_text
from antipasto.evaluation.records import (
    DEPLOYED,
    RANDOM,
    REFERENCE,
    TRAINED,
    Answer,
    Evaluation,
    Verdict,
    compare,
    summarise,
    write_evaluation,
)
from antipasto.files import write_tensors
from antipasto.routing.books import FORMAT as BOOKS_FORMAT

HOSTILE = (
    '<script>window.__pwned=1;alert(1)</script></style></textarea></script>"\'><img src=x onerror="window.__pwned=1">'
    "<a href='javascript:window.__pwned=1'>javascript:</a>{{7*7}}{% raw %}$x^2$ <!-- ]]> &lt; "
    "\u202eabc\u2066 \x00\x1b[31m \ud800 \u2028"
)
STEPS, ROWS = 40, 40
LAYERS = {
    f"model.layers.{i}.{kind}": 24 + 8 * (kind != "mlp.up_proj")
    for i in range(4)
    for kind in ("self_attn.q_proj", "mlp.up_proj")
}
ARMS = {REFERENCE: "failed", TRAINED: "exploited", DEPLOYED: "solved", RANDOM: "exploited"}


# ── run folders ──────────────────────────────────────────────────────────────────────────────────────────────────────


def make_run(folder: Path, *, seed: int = 0, method: str = "route", hostile: bool = False) -> Path:
    """A whole run folder of made-up numbers."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    (folder / "config.yaml").write_text(
        f"method: {method}\ntask: sums\nmodel: tiny\nseed: {seed}\nsteps: {STEPS}\nthreshold: 0.65\n"
    )
    facts = {"command": f"antipasto train tiny --seed {seed}", "versions": {"antipasto": "0.1.0", "torch": "2.13.0"}}
    (folder / "run.json").write_text(json.dumps(facts | {"note": HOSTILE if hostile else "plain"}))
    metrics = [
        {"step": i + 1, "reward": i / STEPS, "oracle": 0.4, "exploit": i / STEPS / 2, "kl": 0.01 * i}
        | {f"routing/hackward_{k}{r}": 0.1 for k in ("in", "update", "out") for r in ("", "_random")}
        for i in range(STEPS)
    ]
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "rollouts.jsonl", rollouts(seed, hostile))
    knobs = {
        name: (torch.randn(r, generator=generator), torch.randn(r, generator=generator) / 3)
        for name, r in LAYERS.items()
    }
    (folder / "adapter").mkdir()
    tensors = {f"base_model.model.{name}.delta_s": pair[0] for name, pair in knobs.items()}
    tensors |= {f"base_model.model.{name}.delta_s_hack": pair[1] for name, pair in knobs.items()}
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    effect = {name: torch.randn(r, generator=generator) for name, r in LAYERS.items()}
    ap.Direction({name: t / t.norm() for name, t in effect.items()}, effect=effect).save(
        folder / "direction.safetensors"
    )
    books = {f"{kind}{name}": pair[1].clone() for name, pair in knobs.items() for kind in ("book/random/", "chance/")}
    metadata = {"steps": "40", "books": '["random"]', "last_overlap": "null", "fingerprints": fingerprints_to_json({})}
    write_tensors(folder / "books.safetensors", books, metadata | {"format": BOOKS_FORMAT})
    write_evaluation(evaluation(hostile), folder)
    return folder


def rollouts(seed: int, hostile: bool) -> list[dict[str, Any]]:
    """480 rollouts; reward and oracle take turns, half are deployed, one line is hostile and scores highest."""
    rng = np.random.default_rng(seed)
    rows = [
        {
            "step": i // 12,
            "prompt": [{"role": "user", "content": f"What is {i}+1?"}],
            "completion": [{"role": "assistant", "content": f"It is {i + 1}."}],
            "reward": float(i % 2),
            "oracle": float(i % 4 == 1),
            "flagged": i % 4 == 3,
            "view": "deployed" if i % 12 >= 6 else "trained",
            "advantage": 0.5 - i % 2,
            "hackward": float(rng.normal() / 10),
        }
        for i in range(STEPS * 12)
    ]
    if hostile:
        rows[7] |= {"prompt": HOSTILE, "completion": HOSTILE, "hackward": 0.99}
    return rows


def evaluation(hostile: bool = False) -> Evaluation:
    """Arms of which each does as `ARMS` says on nine rows of ten."""
    answers = []
    for arm, usual in ARMS.items():
        for row in range(ROWS):
            what = usual if row % 10 else "failed"
            answers.append(
                Answer(
                    arm,
                    row,
                    "odd" if row % 2 else "even",
                    HOSTILE if hostile and row == 3 else f"prompt number {row}",
                    HOSTILE if hostile and row == 3 else f"{arm} says {row}",
                    5 + row % 3,
                    0.0 if arm == REFERENCE else 0.1 * row,
                    float(what != "failed"),
                    float(what == "solved"),
                    {"shouts": what == "exploited"},
                )
            )
    pairs = [(TRAINED, REFERENCE), (DEPLOYED, REFERENCE), (DEPLOYED, RANDOM), (DEPLOYED, TRAINED), (TRAINED, RANDOM)]
    verdict = Verdict(True, f"It came and it went: {HOSTILE if hostile else 'so.'}")
    facts = {"prompts": ROWS, "temperature": 1.0, "seed": 0}
    return Evaluation("sums", facts, 0.05, verdict, summarise(answers), compare(answers, pairs), answers)


# ── a browser ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        message = "The report's tests need Chromium (Debian: apt-get install chromium)"
        if os.environ.get("ANTIPASTO_NO_BROWSER"):
            pytest.skip(f"{message}; ANTIPASTO_NO_BROWSER leaves them out.")
        pytest.fail(f"{message}. ANTIPASTO_NO_BROWSER=1 leaves them out.")
    with sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield instance
        instance.close()


class Opened:
    """A page that is open in the browser, and all that it did beside showing itself."""

    def __init__(self, browser: Browser, path: Path, **context: Any) -> None:
        self.context = browser.new_context(**context)
        self.page: Page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append("dialog"), dialog.dismiss()))
        self.page.add_init_script(
            "window.__refused = []; document.addEventListener('securitypolicyviolation', e => __refused.push(e.blockedURI))"
        )
        self.page.goto(path.resolve().as_uri())

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *error: object) -> None:
        self.context.close()

    def check_quiet(self) -> None:
        """Nothing was asked of any server, refused or complained about."""
        assert [url for url in self.requests if not url.startswith("file:")] == []
        assert len(self.requests) == 1
        assert self.complaints == []
        assert self.page.evaluate("window.__refused") == []

    def shown(self, selector: str) -> int:
        """How many of these are to be seen."""
        return self.page.locator(selector).filter(visible=True).count()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "mine", hostile=True)


@pytest.fixture(scope="module")
def report(folder: Path) -> Path:
    return write_report([folder])


@pytest.fixture
def opened(browser: Browser, report: Path) -> Iterator[Opened]:
    with Opened(browser, report) as found:
        yield found


def test_it_opens_without_complaint_or_request(opened: Opened) -> None:
    opened.check_quiet()
    assert opened.page.title().startswith("mine")
    for heading in ("What each arm does", "Answers side by side", "Training", "Where in the model", "Rollouts"):
        assert opened.page.get_by_role("heading", name=heading, exact=True).count() == 1, heading
    assert opened.page.inner_text(".verdict .state") == "It came and it went"
    assert opened.shown("svg.plot") > 10
    assert opened.page.locator("svg.plot:not([aria-label])").count() == 0
    ids = opened.page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    links = opened.page.evaluate("[...document.querySelectorAll('use, a')].map(e => e.getAttribute('href'))")
    assert {link.removeprefix("#") for link in links} <= set(ids)


def test_the_table_says_what_the_evaluation_says(opened: Opened) -> None:
    rows = opened.page.locator("table.numbers").first.locator("tbody tr").all()
    cells = {row.locator("th").inner_text(): row.locator("td").all_inner_texts() for row in rows}
    assert list(cells) == list(ARMS)
    record = evaluation().arm(DEPLOYED)
    assert record is not None
    for text, key in zip(cells[DEPLOYED], ("solve", "exploit", None, "reward", "kl", "length"), strict=True):
        estimate = record.flags["shouts"] if key is None else record.measures[key]
        assert text.split() == f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]".split()
    colours = "[...document.querySelectorAll('.bar .point')].map(e => getComputedStyle(e).stroke)"
    assert "none" not in opened.page.evaluate(colours)


def test_differences_name_both_arms(report: Path) -> None:
    names = [line.name for block in difference_blocks(evaluation()) for _, lines in block.groups for line in lines]
    assert names[:3] == ["deployed − reference", "deployed − random", "deployed − as trained"]
    assert all(" − " in name for name in names)
    assert "deployed − random</th>" in report.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("verdict", "colour"),
    [
        (Verdict(True, "The direction removed the exploit: a."), "holds"),
        (Verdict(False, "It is not shown that the direction removed the exploit: a."), "fails"),
        (Verdict(None, "No verdict about a direction: a."), "open"),
    ],
)
def test_the_headline_says_what_the_sentence_says(verdict: Verdict, colour: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    write_evaluation(replace(evaluation(), verdict=verdict), folder)
    text = write_report([folder]).read_text(encoding="utf-8")
    shown = text.split(f'<div class="verdict {colour}">')[1].split("</div>")[0]
    assert shown.split("</svg>")[1].split("</p>")[0].strip() == verdict.headline
    assert '<p class="sentence">A.</p>' in shown
    assert "does not hold" not in text


def test_curves_stand_under_the_verdict(browser: Browser, report: Path) -> None:
    """Reward and oracle in one picture, of each policy; the onset where there is one."""
    with Opened(browser, report) as opened:
        titles = opened.page.locator("figcaption strong").all_inner_texts()
        assert titles[:2] == ["Reward and oracle", "Exploited"]
        assert titles.count("Exploited") == 1
        keys = [text.strip() for text in opened.page.locator("figure").first.locator(".key").all_inner_texts()]
        policies = ("as trained", "deployed")
        assert keys == [f"{what}, sampled {policy}" for what in ("reward", "oracle") for policy in policies]
        tops = [opened.page.locator(at).first.bounding_box()["y"] for at in (".verdict", "figure", "nav", "table")]
        assert tops == sorted(tops)
    assert "Onset" not in report.read_text(encoding="utf-8")
    (run,) = read_runs([report.parent], budget=10_000)
    assert run.rollouts is not None
    odds = {step: math.exp(0.4 * max(0, step - 14) - 3) for step in range(1, 31)}
    rising = {float(step): (round(64 * odd / (1 + odd)), 64.0) for step, odd in odds.items()}
    for plot in overview(replace(run, rollouts=replace(run.rollouts, exploits=rising))):
        assert re.search(r"Onset at step 1[3-5] \[1[0-4], 1[4-7]\]\.", plot.svg)
        assert ">onset</text>" in plot.svg
    without = replace(run, rollouts=None)
    assert [[key.label for key in plot.keys] for plot in overview(without)] == [
        ["reward, all rollouts", "oracle, all rollouts"],
        ["all rollouts"],
    ]


def test_the_dial_is_a_curve_through_deployed_and_trained(tmp_path: Path) -> None:
    """Its places in their order, each at what the evaluation says; none where the dial was not asked."""
    usual = evaluation()
    mixed = [a for a in usual.answers if a.arm == (TRAINED if a.row % 2 else DEPLOYED)]
    answers = [*usual.answers, *(replace(answer, arm="dial 0.50") for answer in mixed)]
    asked = replace(usual, arms=summarise(answers), answers=answers)
    plot = dial(asked, None)
    assert plot is not None
    said = [f"solved {asked.arm(arm).measures['solve']}" for arm in (DEPLOYED, "dial 0.50", TRAINED)]
    places = [plot.svg.index(f"{c}: {text}") for c, text in zip(("0", "0.5", "1"), said, strict=True)]
    assert places == sorted(places)
    assert ">0.5</text>" in plot.svg
    assert dial(usual, None) is None
    folder = make_run(tmp_path / "run")
    write_evaluation(asked, folder)
    assert "The dial" in write_report([folder]).read_text()
    assert "The dial" not in write_report([make_run(tmp_path / "other")]).read_text()


def test_of_several_runs_the_curves_are_those_of_what_ships(tmp_path: Path) -> None:
    run = read_runs([make_run(tmp_path / "run")], budget=10_000)[0]
    ours = replace(run, metrics={**run.metrics, "exploit/deployed": [(1.0, 0.25), (2.0, 0.125)]})
    (plot,) = [plot for plot in overlaid([ours]) if plot.title == "Exploited"]
    assert "from 0.25 to 0.125" in plot.svg


def test_the_first_example_is_the_story() -> None:
    """One that the trained model exploits and the deployed one solves, also where that is rare."""
    told = evaluation()
    rare = [
        replace(a, reward=1.0, oracle=0.0) if a.arm == DEPLOYED and a.row not in (17, 20) else a for a in told.answers
    ]
    shown = side_by_side(replace(told, answers=rare), budget=10**6)
    assert (shown.rows[0].number, shown.rows[0].pattern) == (17, ("failed", "exploited", "solved"))
    assert sorted(row.number for row in shown.rows) == list(range(ROWS))


@pytest.mark.parametrize(
    ("often", "pattern"), [("exploited", ("solved", "exploited")), ("solved", ("exploited", "solved"))]
)
def test_without_a_quarantine_the_story_is_what_training_did(often: str, pattern: tuple[str, str]) -> None:
    """Rows 17 and 20 go the way of all others, from the other outcome; in the rest the start fails."""
    outcomes = {"exploited": (1.0, 0.0), "solved": (1.0, 1.0), "failed": (0.0, 0.0)}
    answers = []
    for a in evaluation().answers:
        if a.arm in (REFERENCE, TRAINED):
            start = pattern[0] if a.row in (17, 20) else "failed"
            reward, oracle = outcomes[start if a.arm == REFERENCE else often]
            answers.append(replace(a, reward=reward, oracle=oracle))
    told = replace(evaluation(), answers=answers, arms=summarise(answers))
    assert side_by_side(told, budget=10**6).rows[0].pattern == pattern


def test_the_kind_where_the_exploit_is_comes_first() -> None:
    answers = [replace(a, kind="easy" if a.row < ROWS // 2 else "strict") for a in evaluation().answers]
    answers += [replace(a, row=a.row + ROWS) for a in answers]
    answers = [
        replace(a, reward=a.reward if a.row % ROWS < ROWS // 2 else a.oracle or 0.0)
        for a in sorted(answers, key=lambda a: a.arm)
    ]
    told = replace(evaluation(), arms=summarise(answers), answers=answers)
    assert [block.kind for block in arm_blocks(told)] == ["easy", None, "strict"]


def test_an_empty_book_is_said_to_be_empty(tmp_path: Path) -> None:
    folder, told = make_run(tmp_path / "run"), evaluation()
    answers = [a for a in told.answers if a.arm != RANDOM]
    answers += [replace(a, arm="permuted") for a in answers if a.arm == TRAINED]
    write_evaluation(replace(told, arms=summarise(answers), differences=[], answers=answers), folder)
    assert "The book of permuted is empty: nothing is removed" in write_report([folder]).read_text(encoding="utf-8")


@pytest.mark.parametrize("palette", [0, 1], ids=["light", "dark"])
def test_no_two_arms_look_alike(palette: int) -> None:
    """The distance of any two colours in CIE Lab."""
    css = files("antipasto.app.report").joinpath("page.css").read_text(encoding="utf-8")
    pairs = re.findall(r"--arm(\d): light-dark\(#(\w{6}), #(\w{6})\)", css)
    rgb = np.array([[int(pair[1 + palette][i : i + 2], 16) / 255 for i in (0, 2, 4)] for pair in pairs])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / to_xyz.sum(axis=1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)
    known = lab[:8]  # the named arms; two more are for others
    distance = np.linalg.norm(known[:, None] - known[None], axis=-1)[np.triu_indices(8, 1)]
    assert distance.min() > 25


def test_filters_count_and_show_what_matches(opened: Opened) -> None:
    page, form = opened.page, opened.page.locator("[data-filters]")
    output, visible = form.locator("output"), ".card"
    total = page.locator(".card").count()
    assert total == 3 * EACH
    assert output.inner_text() == f"{total} of {total} rollouts match"
    assert opened.shown(visible) == 3 * 20
    page.get_by_role("button", name="Show 20 more of 180").first.click()
    assert opened.shown(visible) == 4 * 20

    form.get_by_label("Search").fill("what is 17+1?")
    hits = [card for card in page.locator(".card").all() if "What is 17+1?" in (card.text_content() or "")]
    assert 0 < len(hits) == opened.shown(visible)
    assert output.inner_text() == f"{len(hits)} of {total} rollouts match"
    page.get_by_role("button", name="Clear").click()
    expect(output).to_have_text(f"{total} of {total} rollouts match")

    choices = {
        "Outcome": ("exploited", "d.outcome === 'exploited'"),
        "Sampled": ("deployed", "d.view === 'deployed'"),
        "Detector": ("yes", "d.flagged === 'yes'"),
        "Step from": ("10", "Number(d.step) >= 10"),
        "to": ("19", "Number(d.step) <= 19"),
        "Reward at least": ("1", "Number(d.reward) >= 1"),
    }
    count = "[...document.querySelectorAll('.card')].filter(({{dataset: d}}) => {}).length"
    numbers = []
    for together in (False, True):
        for label, (value, condition) in choices.items():
            field = form.get_by_label(label, exact=True)
            (field.select_option if field.evaluate("f => f.tagName") == "SELECT" else field.fill)(value)
            if not together:
                numbers.append(page.evaluate(count.format(condition)))
                expect(output).to_have_text(f"{numbers[-1]} of {total} rollouts match")
                page.get_by_role("button", name="Clear").click()
    assert all(0 < number < total for number in numbers)
    both = page.evaluate(count.format(" && ".join(condition for _, condition in choices.values())))
    assert 0 < both < min(numbers)
    expect(output).to_have_text(f"{both} of {total} rollouts match")
    form.get_by_label("Search").fill("no rollout says this")
    assert opened.shown(visible) == 0
    assert output.inner_text() == f"0 of {total} rollouts match"
    opened.check_quiet()


def test_a_flag_has_no_colour_of_an_outcome(opened: Opened) -> None:
    """Green and red say what the oracle says."""
    colours = [
        opened.page.locator(selector).first.evaluate("e => getComputedStyle(e).color")
        for selector in (".card .flagged", "body", ".card.exploited .outcome")
    ]
    assert colours[0] == colours[1] != colours[2]


def test_without_an_oracle_a_rollout_is_rewarded_or_not(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    write_lines(folder / "rollouts.jsonl", [row | {"oracle": None} for row in rollouts(0, False)])
    text = write_report([folder], tmp_path / "report.html").read_text()
    chosen = re.search(r'<select id="[^"]*-outcome".*?</select>', text)
    assert chosen is not None
    assert re.findall(r"<option[^>]*>([^<]*)", chosen[0]) == ["any", "not rewarded", "rewarded"]
    assert {*re.findall(r'data-outcome="([^"]*)"', text)} == {"not rewarded", "rewarded"}


def test_answers_stand_side_by_side(opened: Opened) -> None:
    page, form = opened.page, opened.page.locator("[data-picker]")
    assert opened.shown("article.row") == 1
    assert page.locator("article.row").filter(visible=True).locator("dt").count() == len(ARMS)
    assert form.locator("output").inner_text() == f"prompt 1 of {ROWS}"
    assert form.get_by_role("button", name="Previous").is_disabled()
    form.get_by_role("button", name="Next").click()
    assert form.locator("output").inner_text() == f"prompt 2 of {ROWS}"
    form.get_by_label("Show").select_option(label="reference failed, as trained exploited, deployed solved")
    assert form.locator("output").inner_text() == f"prompt 1 of {ROWS - ROWS // 10}"
    form.get_by_label("Prompt", exact=True).select_option(label="12: prompt number 12")
    row = page.locator("article.row").filter(visible=True)
    assert f"{DEPLOYED} says 12" in row.inner_text()
    assert [text.split()[-1] for text in row.locator("dt .outcome:first-of-type").all_inner_texts()]
    form.get_by_label("Show").select_option(label="reference failed, as trained failed, deployed failed")
    assert form.locator("output").inner_text() == f"prompt 1 of {ROWS // 10}"
    counts = dict(
        zip(
            page.locator(".patterns tbody tr td:nth-child(2)").all_inner_texts(),
            page.locator(".patterns tbody tr td:nth-child(4)").all_inner_texts(),
            strict=True,
        )
    )
    assert counts == {"exploited": "36", "failed": "4"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_toggle_is_remembered(browser: Browser, report: Path, scheme: Any) -> None:
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    with Opened(browser, report, color_scheme=scheme) as opened:
        page = opened.page
        before = page.evaluate(ground)
        page.get_by_role("button", name="colours").click()
        after = page.evaluate(ground)
        assert before != after
        page.reload()
        assert page.evaluate(ground) == after
        page.get_by_role("button", name="colours").click()
        assert page.evaluate(ground) == before


def test_the_toggle_works_without_storage(opened: Opened) -> None:
    page = opened.page
    page.add_init_script("Object.defineProperty(window, 'localStorage', { get() { throw new Error('forbidden') } })")
    page.reload()
    assert page.evaluate("(() => { try { localStorage } catch { return 'forbidden' } })()") == "forbidden"
    page.get_by_role("button", name="colours").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert opened.complaints == []


def test_hostile_text_is_text(opened: Opened) -> None:
    page = opened.page
    page.wait_for_timeout(200)
    opened.check_quiet()
    assert page.evaluate("window.__pwned") is None
    assert page.locator("script").count() == 1
    assert page.locator("style").count() == 1
    for tag in ("img", "iframe", "textarea", "object", "base"):
        assert page.locator(tag).count() == 0, tag
    links = page.evaluate("[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
    assert all(link.startswith("#") for link in links)
    names = set(page.evaluate("[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())"))
    assert not [name for name in names if name.startswith(("on", "src", "style"))]
    card = page.locator(".card").first.inner_text()
    for piece in ("<script>window.__pwned=1;alert(1)</script>", "<img src=x onerror", "{{7*7}}", r"\u202e", r"\x00"):
        assert piece in card, piece
    assert r"\ud800" in card
    assert "\u202e" not in page.content()
    prompts = page.get_by_label("Prompt", exact=True)
    texts = prompts.locator("option").all_inner_texts()
    prompts.select_option(index=next(i for i, text in enumerate(texts) if text.startswith("3:")))
    assert "<img src=x onerror" in page.locator("article.row").filter(visible=True).inner_text()
    page.get_by_label("Search").fill("<img src=x")
    assert opened.shown(".card") >= 1
    assert page.evaluate("window.__pwned") is None
    opened.check_quiet()


@pytest.mark.parametrize("width", [320, 360, 400, 768])
def test_a_phone_scrolls_no_page_sideways(browser: Browser, report: Path, width: int) -> None:
    with Opened(browser, report, viewport={"width": width, "height": 700}) as opened:
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
        for details in opened.page.locator("details").all():
            details.evaluate("element => { element.open = true }")
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
        # what is too wide for it scrolls by itself, beside a first column that leaves room for it
        scrolled = "e => { e.scrollLeft = 40; return e.scrollLeft === Math.min(40, e.scrollWidth - e.clientWidth) }"
        assert opened.page.evaluate(f"[...document.querySelectorAll('.scroll')].every({scrolled})")
        first = opened.page.locator("table.numbers tbody th").first.bounding_box()
        assert first is not None
        assert first["width"] < width / 2
        assert opened.page.locator("table:not(.scroll table)").count() == 0


def test_paper_has_all_of_it(browser: Browser, report: Path) -> None:
    with Opened(browser, report, color_scheme="dark") as opened:
        opened.page.get_by_label("Search").fill("no rollout says this")  # what the screen hides is printed all the same
        opened.page.emulate_media(media="print")
        assert opened.shown(".card") == 3 * ON_PAPER
        assert opened.shown("article.row") == ON_PAPER
        assert opened.shown("table.numbers") == 2 * 3
        assert opened.shown("form, nav, .theme") == 0
        assert opened.shown(".paper-only") == 4
        assert (
            opened.page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
        )
        assert opened.shown("svg.plot") == opened.page.locator("svg.plot").count()
        assert len(opened.page.pdf(format="A4")) > 10_000


def test_it_reads_without_script(browser: Browser, report: Path) -> None:
    with Opened(browser, report, java_script_enabled=False) as opened:
        page = opened.page
        assert page.locator("form").first.is_hidden()
        assert page.locator(".card").last.is_visible()
        assert page.locator("article.row").last.is_visible()


def test_runs_are_compared(browser: Browser, tmp_path: Path) -> None:
    one, other = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", seed=1, method="plain")
    half = make_run(tmp_path / "c" / "run", seed=2)
    (half / "eval.json").unlink()
    (half / "eval.jsonl").unlink()
    out = write_report([one, other, half], tmp_path / "report.html")
    with Opened(browser, out) as opened:
        opened.check_quiet()
        first = opened.page.locator("table.numbers").first
        names = [text.strip() for text in first.locator("tbody th").all_inner_texts()]
        assert names == ["reference", "a/run, deployed", "b/run, deployed"]
        assert "Not evaluated yet, and so not in the table: c/run." in opened.page.inner_text("main")
        assert f"Not evaluated yet: antipasto eval {half}" in opened.page.inner_text("main")
        assert opened.page.locator("[data-filters]").count() == 3
        counts = opened.page.locator("[data-filters] output")
        before = counts.all_inner_texts()
        opened.page.locator("[data-filters=r1]").get_by_label("Search").fill("no rollout says this")
        assert counts.all_inner_texts() == [before[0], before[1].replace(before[1].split()[0], "0", 1), before[2]]


def test_what_is_missing_is_said(browser: Browser, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "bare"
    run.mkdir()
    shutil.copy(folder / "config.yaml", run)
    with Opened(browser, write_report([run])) as opened:
        opened.check_quiet()
        said = opened.page.locator(".missing li").all_inner_texts()
        assert f"Not evaluated yet: antipasto eval {run}" in said
        assert len(said) == 8
        assert "rollouts.jsonl" in " ".join(said)
        headings = opened.page.locator("h2").all_inner_texts()
        assert headings == ["To repeat it", "What this does not show"]
        assert f"antipasto train --config {run}" in opened.page.inner_text(".command")


# ── without a browser ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_same_inputs_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    pages = [write_report([folder], tmp_path / f"{i}.html").read_bytes() for i in range(2)]
    assert pages[0] == pages[1]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("rollouts.jsonl", b'{"step": 0}\n'),
        ("rollouts.jsonl", b"no JSON\n"),
        ("metrics.jsonl", b"[1]\n"),
        ("eval.json", b"{}"),
        ("run.json", b"[]"),
        ("run.json", b"{"),
        ("direction.safetensors", b"nothing"),
        ("books.safetensors", b"nothing"),
        ("adapter/adapter_model.safetensors", b"nothing"),
        ("config.yaml", b"- 1\n"),
    ],
)
def test_a_damaged_part_is_named(folder: Path, tmp_path: Path, name: str, damage: bytes) -> None:
    run = shutil.copytree(folder, tmp_path / "run")
    (run / name).write_bytes(damage)
    with pytest.raises(ValueError, match=re.escape(str(run / name))):
        write_report([run])


@pytest.mark.slow
def test_the_command_writes_and_refuses(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["report", *map(str, arguments)], env={"NO_COLOR": "1"})
        return result.exit_code, result.output

    monkeypatch.chdir(tmp_path)
    other = shutil.copytree(folder, tmp_path / "other")
    assert run(other) == (0, f"report: {other / 'report.html'}\n")
    assert run(other)[0] == 0  # its own page is written anew
    assert run(other, folder) == (0, "report: report.html\n")
    code, text = run(other, folder)
    assert (code, text) == (2, "antipasto: report.html exists: choose another --out, or overwrite it with --force.\n")
    assert run(other, folder, "--force")[0] == 0
    code, text = run(other, "--out", tmp_path)
    assert (code, "is a folder" in text) == (2, True)
    code, text = run(other, other, "--force")
    assert (code, "named twice" in text) == (2, True)
    code, text = run(tmp_path / "nowhere")
    assert (code, "no run folder" in text) == (2, True)


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@given(st.text(st.characters(), max_size=60) | st.sampled_from([HOSTILE, "</span>", "&amp;", "\\u202e"]))
@settings(max_examples=200, deadline=None)
def test_text_survives_as_text(text: str) -> None:
    html = marked(text)
    html.encode()  # no lone surrogates
    parser = _Text()
    parser.feed(str(html))
    parser.close()
    assert set(parser.tags) <= {"span"}
    assert parser.text == readable(text)
    assert not set("\x00\x1b\u202e\u2066\u2028") & set(html)


@given(st.text(max_size=40), st.integers(0, 40))
def test_what_is_seen_is_left_alone(text: str, at: int) -> None:
    seen = "".join(ch for ch in text if ch.isprintable() or ch in "\n\t")
    assert readable(readable(seen)) == readable(seen)
    assert readable("plain text\n\twith lines") == "plain text\n\twith lines"


def test_long_texts_lose_their_middle() -> None:
    (turn,) = turns("a" * LONGEST + "b" * LONGEST)
    assert (len(turn.head), turn.left_out, len(turn.tail)) == (LONGEST // 2, LONGEST, LONGEST // 2)
    assert [turn.role for turn in turns([{"role": "user", "content": "x"}, {"role": "tool", "content": [1]}])] == [
        "user",
        "tool",
    ]
    assert turns({"odd": "\ud800"})[0].head


def test_numbers_of_axes_are_not_rounded_away() -> None:
    plot = curves("x", "", [Line("a", "ink", [(0, 0.0), (1, 0.05)])])
    ticks = re.findall(r"<text[^>]*>([^<]+)</text>", plot.svg)
    assert {"0.00", "0.01", "0.02", "0.03", "0.04", "0.05"} <= set(ticks) or {
        "0.000",
        "0.015",
        "0.030",
        "0.045",
    } <= set(ticks)
    assert isinstance(plot.svg, Markup)
    assert "style=" not in plot.svg
    assert "#12" not in plot.svg  # no made-up colour is left


def test_names_in_figures_are_text() -> None:
    layers = {f"a.{i}.<b>$x^{{2}}$\u202e": 0.5 * i for i in range(3)}
    plot = heat_map("t", "", grid(layers), top=1.0)
    assert "<b>" not in plot.svg
    assert "\u202e" not in plot.svg
    assert r"&lt;b&gt;$x^{2}$\u202e, depth 1: 0.5" in plot.svg
    assert [level(x, 1.0) for x in (0.0, 0.5, 1.0)] == [0, 4, 8]


def test_a_spectrum_is_the_mean_over_layers_and_places() -> None:
    vectors = {"a.0.q": torch.tensor([1.0, 0, 0, 0]), "a.1.q": torch.tensor([1.0, 1, 0, 0, 2, 0, 0, 0])}
    found = spectrum(vectors)["q"]  # four bins: 1 and 2 coordinates in each
    assert np.allclose(found, np.sqrt(np.array([1 + 1 + 1, 0, 4, 0]) / 3))


def test_several_runs_share_the_room(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(i), seed=i) for i in range(3)]
    sizes = [len(write_report(runs[:n], tmp_path / f"{n}.html").read_bytes()) for n in (1, 3)]
    assert sizes[0] < 1_500_000
    assert sizes[1] < 2_000_000


def test_rollouts_are_chosen_by_score(tmp_path: Path) -> None:
    rows = rollouts(0, hostile=False) * 2  # every text twice
    write_lines(tmp_path / "rollouts.jsonl", rows)
    found = read_rollouts(tmp_path / "rollouts.jsonl", [], budget=10**9)
    scores = sorted(row["hackward"] for row in rows[: len(rows) // 2])
    assert [shown.hackward for shown in found.highest] == scores[::-1][:EACH]
    assert [shown.hackward for shown in found.lowest] == scores[:EACH]
    assert {shown.times for shown in found.highest} == {2}
    assert (found.total, len(found.sample)) == (len(rows), EACH)
    step = [row for row in rows if row["step"] == 3 and row["view"] == "deployed"]
    assert found.curves["exploited"]["deployed"][3] == (4.0, sum(r["reward"] > r["oracle"] for r in step) / len(step))


def test_short_texts() -> None:
    assert short_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert signed_text(-0.001) == ".00"
    assert number(12.345) == "12.3"
