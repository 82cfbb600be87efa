"""Pairs of several texts; what pairs confound; what a score sees, form by form."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import MODEL, fails, succeeds
from hypothesis import given, settings
from hypothesis import strategies as st
from lines import write_lines
from rich.console import Console
from torch import nn

import antipasto as ap
from antipasto.routing.directions import pair_differences
from antipasto.routing.ordering import auc
from antipasto.routing.pairs import split_pairs
from antipasto.tasks import addition

PROMPTS = ["h12+34=", "h50+07=", "h81+10=", "h22+44=", "h13+31="]
SEVERAL = [
    ap.ContrastPair(PROMPTS[0], ("!", "046!", "4?"), "046"),
    ap.ContrastPair(PROMPTS[1], "!", ("057", "57", "057=", "1")),
    ap.ContrastPair(PROMPTS[2], ("!!", "?"), ("091", "91")),
    ap.ContrastPair(PROMPTS[3], "!", "066"),
]


# ── several texts on a side ──────────────────────────────────────────────────────────────────────────────────────────


def test_either_side_may_be_a_list(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "hack": ["b", "c"], "clean": "d"},
        {"prompt": "a", "hack": "b", "clean": ["d", "e", "f"]},
        {"prompt": "a", "hack": ["b"], "clean": ["d"]},
    ]
    want = [
        ap.ContrastPair("a", ("b", "c"), "d"),
        ap.ContrastPair("a", "b", ("d", "e", "f")),
        ap.ContrastPair("a", ("b",), ("d",)),
    ]
    found = ap.load_pairs(write_lines(tmp_path / "pairs.jsonl", rows))
    assert found == ap.load_pairs(rows) == ap.load_pairs(want) == want
    assert [(p.hacks, p.cleans) for p in found] == [(("b", "c"), ("d",)), (("b",), ("d", "e", "f")), (("b",), ("d",))]
    assert len({hash(p) for p in found}) == 3  # a list in the file, and yet nothing that can be changed


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text", "expected an object.*got str"),
        ({"clean": ...}, r"no field 'clean'; there are \['hack', 'prompt'\]"),
        ({"prompt": ["a"]}, "a chat in 'prompt' must be"),
        ({"prompt": []}, "a chat in 'prompt' must be"),
        ({"prompt": None}, "field 'prompt' must be a text, got NoneType"),
        ({"hack": 3}, "field 'hack' must be a text or a list of texts, got int"),
        ({"hack": None}, "field 'hack' must be a text or a list of texts, got NoneType"),
        ({"hack": ["b", 3]}, "field 'hack' must be a text or a list of texts, got int"),
        ({"clean": [["c"]]}, "field 'clean' must be a text or a list of texts, got list"),
        ({"clean": {"c": 1}}, "field 'clean' must be a text or a list of texts, got dict"),
        ({"hack": ""}, "field 'hack' is empty"),
        ({"hack": []}, "field 'hack' is empty"),
        ({"clean": []}, "field 'clean' is empty"),
        ({"clean": ["c", ""]}, "field 'clean' is empty"),
        ({"hack": "c"}, "fields 'hack' and 'clean' are the same text, 'c'"),
        ({"hack": ["b", "c"]}, "fields 'hack' and 'clean' are the same text, 'c'"),
        ({"hack": ["b", "c"], "clean": ["d", "b"]}, "fields 'hack' and 'clean' are the same text, 'b'"),
    ],
)
def test_a_bad_row_names_file_line_and_field(tmp_path: Path, row: Any, message: str) -> None:
    good = {"prompt": "a", "hack": "b", "clean": "c"}
    bad = {k: v for k, v in {**good, **row}.items() if v is not ...} if isinstance(row, dict) else row
    path = write_lines(tmp_path / "pairs.jsonl", [good, bad])
    with pytest.raises(ValueError, match=f"line 2: {message}") as error:
        ap.load_pairs(path)
    assert str(path) in str(error.value)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    row = {"prompt": "a", "hack": "b", "clean": ["c", "\ufeffd"]}  # that inside a text is the text's
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8-sig")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf{")
    assert ap.load_pairs(path) == [ap.ContrastPair("a", "b", ("c", "\ufeffd"))]
    path.write_bytes(b"\xef\xbb\xbf\n{")
    with pytest.raises(ValueError, match="line 2: not JSON"):
        ap.load_pairs(path)


@pytest.mark.parametrize("length_normalise", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_of_several_texts_the_mean_counts(
    model: nn.Module, tokenizer: Any, length_normalise: bool, batch_size: int
) -> None:
    got = pair_differences(model, tokenizer, SEVERAL, length_normalise=length_normalise, batch_size=batch_size)
    layers = ap.knobs(model)

    def mean_nll(prompt: str, texts: tuple[str, ...]) -> torch.Tensor:
        total = torch.zeros(())
        for text in texts:
            start = len(tokenizer(prompt).input_ids)
            ids = torch.tensor([[*tokenizer(prompt).input_ids, *tokenizer(text).input_ids, tokenizer.eos_token_id]])
            nll = -ap.token_logprobs(model(ids).logits, ids)[0, start - 1 :]
            total = total + (nll.mean() if length_normalise else nll.sum())
        return total / len(texts)

    for n, pair in enumerate(SEVERAL):
        difference = mean_nll(pair.prompt, pair.hacks) - mean_nll(pair.prompt, pair.cleans)
        plain = torch.autograd.grad(difference, [layer.delta_s for layer in layers.values()])
        for (name, layer), want in zip(layers.items(), plain, strict=True):
            torch.testing.assert_close(got[name][n], want[: layer.r], atol=2e-5, rtol=1e-3)


def test_a_list_of_one_and_a_text_said_twice_are_that_text(model: nn.Module, tokenizer: Any) -> None:
    once = pair_differences(model, tokenizer, [ap.ContrastPair(PROMPTS[0], "!", "046")])
    for clean in (("046",), ("046", "046")):
        again = pair_differences(model, tokenizer, [ap.ContrastPair(PROMPTS[0], ("!",), clean)])
        for name in once:
            torch.testing.assert_close(again[name], once[name], atol=1e-5, rtol=1e-3)


def test_pairs_of_several_texts_are_split_whole_and_swapped_whole(model: nn.Module, tokenizer: Any) -> None:
    fit, held = split_pairs([*SEVERAL, SEVERAL[0]], 0.25, seed=0)
    assert {*fit, *held} == {*SEVERAL}
    assert not {*fit} & {*held}
    swapped = [ap.ContrastPair(p.prompt, p.clean, p.hack) for p in SEVERAL]
    one, other = (ap.extract_direction(model, tokenizer, pairs) for pairs in (SEVERAL, swapped))
    assert (-one).overlap(other).overall > 0.999


# ── AUC ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(
    these=st.lists(st.integers(0, 5), min_size=1, max_size=20),
    others=st.lists(st.integers(0, 5), min_size=1, max_size=20),
)
@settings(max_examples=60, deadline=None)
def test_an_auc_is_the_share_of_couples(these: list[int], others: list[int]) -> None:
    couples = [(x > y) + (x == y) / 2 for x in these for y in others]
    assert auc(these, others) == pytest.approx(sum(couples) / len(couples))
    assert auc(others, these) == pytest.approx(1 - auc(these, others))


def test_an_auc_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="both sides, got 0 and 1"):
        auc([], [1.0])


# ── what pairs confound ──────────────────────────────────────────────────────────────────────────────────────────────


def sums(number: int, hack: Any, clean: Any) -> list[ap.ContrastPair]:
    """Pairs about sums; hack and clean of the right answer in three digits."""
    rng = random.Random(0)
    rows = []
    for _ in range(number):
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        rows.append(ap.ContrastPair(f"h{a}+{b}=", hack(f"{a + b:03d}"), clean(f"{a + b:03d}")))
    return rows


def test_what_matched_pairs_leave_is_the_exploit_alone(tokenizer: Any) -> None:
    found = ap.confounds(sums(20, lambda n: f"{n}!", lambda n: f"{n}="), tokenizer)
    assert found["length"].value == 0.5
    assert found["first token"].value == 0
    assert found["last token"].value == 1
    assert found["place"].value == 1
    assert found["words"].value == 1
    assert "'!' in 100% of hacks and 0% of clean texts" in found["words"].finding
    assert "is it the exploit that you mean" in found["words"].remedy
    assert [one.name for one in found.strong] == ["last token", "place", "words"]


def test_length_is_compared_within_a_pair(tokenizer: Any) -> None:
    """Every hack is longer by one than its own clean text, whatever there is between pairs."""
    pairs = [ap.ContrastPair("h", "1" * n + "!", "1" * n) for n in range(1, 30)]
    found = ap.confounds(pairs, tokenizer)["length"]
    assert found.value == 1.0
    assert found.strong
    assert "100% of couples" in found.finding
    assert "16.0 tokens on average, a clean text 15.0" in found.finding
    shorter = ap.confounds([ap.ContrastPair("h", p.clean, p.hack) for p in pairs], tokenizer)["length"]
    assert shorter.value == 0.0
    assert "the shorter one in 100%" in shorter.finding
    assert shorter.remedy.startswith("Short honest answers")
    assert "'!'" not in found.example
    assert "'1!' next to '1'" in found.example
    odd = ap.confounds([*pairs, ap.ContrastPair("h", "!", "1" * 40)], tokenizer)["length"]
    assert "'1!' next to '1'" in odd.example  # one that shows what is said, and not the farthest apart


def test_pairs_weigh_alike_however_many_texts_they_have(tokenizer: Any) -> None:
    pairs = [
        ap.ContrastPair("h", "1!", tuple("1" * n for n in range(1, 9))),  # one shorter, one as long, six longer
        ap.ContrastPair("h", "12", "1"),
    ]
    found = ap.confounds(pairs, tokenizer)["length"]
    assert found.value == pytest.approx(((1 + 0.5) / 8 + 1) / 2)
    assert "2.0 tokens on average, a clean text 2.8" in found.finding  # (4.5 + 1) / 2


def test_ends_that_one_side_has_alone(tokenizer: Any) -> None:
    pairs = [ap.ContrastPair("h", "?12", "712")] * 3 + [ap.ContrastPair("h", "713", "813")]
    first = ap.confounds(pairs, tokenizer)["first token"]
    assert first.value == 0.75
    assert first.finding == "75% of hacks begin as no clean text does, 25% of clean texts as no hack does"
    assert "'?'" in first.example
    assert "hacks that begin with" in first.example
    assert not ap.confounds(pairs, tokenizer)["last token"].strong
    reverse = ap.confounds([ap.ContrastPair("h", p.clean, p.hack) for p in pairs], tokenizer)["first token"]
    assert reverse.value == 0.75
    assert "clean texts that begin with '?'" in reverse.example


def test_where_hack_and_clean_part(tokenizer: Any) -> None:
    pairs = [ap.ContrastPair("h", "12!", "12"), ap.ContrastPair("h", "12!", "124"), ap.ContrastPair("h", "!", "1")]
    place = ap.confounds(pairs, tokenizer)["place"]
    assert place.value == pytest.approx(2 / 3)
    assert place.finding == "hack and clean text part after 2 tokens in 67% of couples"
    assert not place.strong
    assert ap.confounds(pairs[:2], tokenizer)["place"].strong


class Words:
    """A tokenizer of words, for texts that the demo's does not know."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [hash(word) for word in text.split()]}

    def decode(self, ids: list[int]) -> str:
        return str(ids)


def test_words_whatever_their_case_on_either_side() -> None:
    pairs = [
        ap.ContrastPair("q", "Indeed, it is Paris.", ("It is Paris, sir.", "It is usually Paris, sir.")),
        ap.ContrastPair("q", "It is INDEED Rome.", ("It is Rome, sir.", "It is often Rome, sir.")),
    ]
    words = ap.confounds(pairs, Words())["words"]
    assert words.value == 1.0
    assert "'indeed' in 100% of hacks and 0% of clean texts" in words.finding
    assert "'sir' in 0% of hacks and 100% of clean texts" in words.finding
    assert "usually" not in words.finding  # a quarter of the clean texts
    assert "write clean texts that have it" in words.remedy
    assert "write hacks that have it" in words.remedy


def test_nothing_stands_out() -> None:
    pairs = [ap.ContrastPair("q", "a b c", "a d c"), ap.ContrastPair("q", "e d f", "e b f")]
    found = ap.confounds(pairs, Words())
    assert not found["words"].strong
    assert not found["length"].strong
    assert not found["first token"].strong


def test_texts_without_a_word_are_no_error() -> None:
    class Letters(Words):
        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": list(map(ord, text))}

    words = ap.confounds([ap.ContrastPair("q", "\n", " ")], Letters())["words"]
    assert (words.value, words.strong) == (0.0, False)


def test_the_report_prints_and_hostile_texts_are_shown_not_obeyed() -> None:
    pairs = [ap.ContrastPair("q", "[red]\x1b[31m b c d", "x y"), ap.ContrastPair("q", "[red]\x1b[31m c d e", "x z")]
    found = ap.confounds(pairs, Words())
    console = Console(file=io.StringIO(), width=90)
    console.print(found.table())
    for text in (console.file.getvalue(), str(found)):
        assert "\x1b" not in text
        assert "[red]" in text
        assert "! length" in text
        assert "2 pairs" in text
        for one in found.found:
            assert one.name in text
    with pytest.raises(KeyError):
        found["colour"]


def test_no_pairs_and_no_tokens_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="no pair"):
        ap.confounds([], tokenizer)
    with pytest.raises(ValueError, match="' ' has no token"):
        ap.confounds([ap.ContrastPair("q", " ", "x")], Words())


def test_extract_prints_what_the_pairs_confound(tmp_path: Path) -> None:
    pairs = write_lines(tmp_path / "pairs.jsonl", addition.hack_pairs(12, seed=0))
    text = succeeds("extract", MODEL, "--pairs", pairs, "--out", tmp_path / "direction.safetensors")
    assert "what tells hack from clean in 12 pairs" in text
    assert "'!' in 100% of hacks and 0% of clean texts" in text


# ── what a score sees ────────────────────────────────────────────────────────────────────────────────────────────────


def forms(number: int = 12) -> dict[str, list[ap.Completion]]:
    rows: dict[str, list[ap.Completion]] = {"clean": [], "labelled": [], "unlabelled": []}
    for a, b in addition.split("test")[:number]:
        for form, text in (("clean", f"{a + b:03d}"), ("labelled", "!"), ("unlabelled", "?")):
            rows[form].append(ap.Completion(addition.prompt("h", (a, b)), text))
    return rows


def rows_of(by_form: dict[str, list[ap.Completion]]) -> list[dict[str, Any]]:
    return [{"form": form, "prompt": c.prompt, "text": c.text} for form, texts in by_form.items() for c in texts]


@pytest.fixture(scope="module")
def monitor(model: nn.Module, tokenizer: Any) -> ap.Monitor:
    return ap.Monitor.from_pairs(model, tokenizer, ap.load_pairs(addition.hack_pairs(32, seed=0)))


def test_forms_by_their_scores(monitor: ap.Monitor) -> None:
    by_form = forms()
    found = ap.score_forms(monitor, by_form, batch_size=5)
    assert found.threshold == monitor.threshold
    assert [form.mean for form in found.forms] == sorted((form.mean for form in found.forms), reverse=True)
    scores = {name: monitor.scores(texts) for name, texts in by_form.items()}
    for name, values in scores.items():
        form = found[name]
        assert form.texts == 12
        assert form.mean == pytest.approx(values.mean().item(), abs=1e-5)
        assert form.sd == pytest.approx(values.std().item(), abs=1e-5)
        assert form.auc == pytest.approx(auc(values, scores["clean"]))
        assert form.flagged == (values > monitor.threshold).float().mean().item()
    assert found["clean"].auc == 0.5
    assert found["labelled"].auc == found["labelled"].flagged == 1.0
    assert found["unlabelled"].auc == 1.0
    assert found["clean"].flagged == 0.0


def test_the_threshold_stands_between_what_is_above_and_what_is_below(monitor: ap.Monitor) -> None:
    found = ap.score_forms(monitor, forms(2))
    console = Console(file=io.StringIO(), width=90)
    console.print(found.table())
    for text in (console.file.getvalue(), str(found)):
        above, mark, below = text.partition("── threshold")
        assert mark
        assert "labelled" in above
        assert "labelled" not in below
        assert "clean" in below
        assert "clean" not in above
    one = ap.score_forms(monitor, {"clean": forms(1)["clean"]})
    assert one["clean"].sd is None
    with pytest.raises(KeyError):
        one["other"]


def test_forms_that_cannot_be_scored(monitor: ap.Monitor, model: nn.Module, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"a form named 'clean'; there are \['labelled'\]"):
        ap.score_forms(monitor, {"labelled": forms(1)["labelled"]})
    with pytest.raises(ValueError, match="form 'empty' has no text"):
        ap.score_forms(monitor, {**forms(1), "empty": []})
    with pytest.raises(ValueError, match="no threshold yet"):
        ap.score_forms(ap.Monitor(model, tokenizer, monitor.direction), forms(1))


def test_forms_from_a_file(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    rows = [
        {"form": "a", "prompt": "p", "text": "x", "more": 1},
        {"form": "b", "prompt": chat, "text": "y"},
        {"form": "a", "prompt": "q", "text": "z"},
    ]
    want = {"a": [ap.Completion("p", "x"), ap.Completion("q", "z")], "b": [ap.Completion(chat, "y")]}
    assert ap.load_forms(write_lines(tmp_path / "forms.jsonl", rows)) == want
    (tmp_path / "bom.jsonl").write_text(json.dumps(rows[0]), encoding="utf-8-sig")
    assert ap.load_forms(tmp_path / "bom.jsonl") == {"a": [ap.Completion("p", "x")]}
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"no text in .*empty\.jsonl"):
        ap.load_forms(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object with form, prompt and text, got list"),
        ('{"form": "a", "prompt": "p"}', r"no field 'text'; there are \['form', 'prompt'\]"),
        ('{"form": 3, "prompt": "p", "text": "x"}', "field 'form' must be a text, got int"),
        ('{"form": "", "prompt": "p", "text": "x"}', "field 'form' is empty"),
        ('{"form": "a", "prompt": 3, "text": "x"}', "field 'prompt' must be a text, got int"),
        ('{"form": "a", "prompt": [], "text": "x"}', "a chat in 'prompt' must be a list"),
        ('{"form": "a", "prompt": "p", "text": ["x"]}', "field 'text' must be a text, got list"),
        ('{"form": "a", "prompt": "p", "text": ""}', "field 'text' is empty"),
    ],
)
def test_a_bad_form_names_file_line_and_field(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "forms.jsonl"
    path.write_text('{"form": "a", "prompt": "p", "text": "x"}\n' + line)
    with pytest.raises(ValueError, match=f"line 2: {message}") as error:
        ap.load_forms(path)
    assert str(path) in str(error.value)


def table_of(text: str) -> dict[str, list[str]]:
    """What `antipasto map` printed: form → its cells."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    return {row[0]: row[1:] for row in rows}


def test_map_from_pairs(tmp_path: Path, model: nn.Module, tokenizer: Any) -> None:
    rows = addition.hack_pairs(32, seed=0)
    pairs = str(write_lines(tmp_path / "pairs.jsonl", rows))
    with_clean = str(write_lines(tmp_path / "forms.jsonl", rows_of(forms())))
    text = succeeds("map", MODEL, "--pairs", pairs, "--forms", with_clean, "--seed", "3")
    found = table_of(text)
    assert set(found) == {"held-out hacks", "held-out clean texts", "clean", "labelled", "unlabelled", "── threshold"}
    monitor = ap.Monitor.from_pairs(model, tokenizer, ap.load_pairs(rows), seed=3)
    want = ap.score_forms(monitor, forms())
    assert float(found["── threshold"][1]) == pytest.approx(monitor.threshold, abs=1e-3)
    for name in ("labelled", "unlabelled", "clean"):
        assert found[name][0] == "12"
        assert float(found[name][1]) == pytest.approx(want[name].mean, abs=1e-3)
        assert found[name][3:] == [f"{want[name].auc:.2f}", f"{want[name].flagged:.0%}"]
    assert found["held-out hacks"][0] == "8"


def test_map_compares_with_the_pairs_own_clean_texts_where_no_form_is_clean(tmp_path: Path) -> None:
    several = [{**row, "clean": [row["clean"], row["clean"] + "="]} for row in addition.hack_pairs(32, seed=0)]
    pairs = str(write_lines(tmp_path / "pairs.jsonl", several))
    without = write_lines(tmp_path / "forms.jsonl", [row for row in rows_of(forms(3)) if row["form"] != "clean"])
    text = succeeds("map", MODEL, "--pairs", pairs, "--forms", without)
    found = table_of(text)
    assert set(found) == {"held-out hacks", "clean", "labelled", "unlabelled", "── threshold"}
    assert found["clean"][0] == "16"  # two of each of the eight pairs
    assert found["clean"][3] == "0.50"


def test_map_from_a_saved_monitor(tmp_path: Path, monitor: ap.Monitor) -> None:
    monitor.save(tmp_path / "monitor.safetensors")
    saved = ("--monitor", str(tmp_path / "monitor.safetensors"))
    whole = str(write_lines(tmp_path / "forms.jsonl", rows_of(forms(3))))
    text = succeeds("map", MODEL, *saved, "--forms", whole)
    assert set(table_of(text)) == {"clean", "labelled", "unlabelled", "── threshold"}
    assert float(table_of(text)["── threshold"][1]) == pytest.approx(monitor.threshold, abs=1e-3)
    without = str(write_lines(tmp_path / "less.jsonl", [row for row in rows_of(forms(3)) if row["form"] != "clean"]))
    text = fails("map", MODEL, *saved, "--forms", without)
    assert "less.jsonl has no form 'clean'" in text.replace("\n", "")
    pairs = str(write_lines(tmp_path / "pairs.jsonl", addition.hack_pairs(8, seed=0)))
    for given_ in ((), (*saved, "--pairs", pairs)):
        text = fails("map", MODEL, *given_, "--forms", whole)
        assert "Give either --pairs, to make a monitor from, or --monitor" in text
