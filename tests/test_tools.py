"""The commands beside the demo, as someone types them: basis, extract, inspect; and loading a model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import MODEL, fails, run, succeeds
from families import FAMILIES
from lines import write_lines
from peft import get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import antipasto as ap
from antipasto.app import commands
from antipasto.app.models import load_model
from antipasto.files import digest
from antipasto.routing.pairs import split_pairs
from antipasto.tasks import addition
from antipasto.terminal import plain, shorten

HOSTILE = "[red]x[/red] \x1b[31mred\x1b[0m <script>alert(1)</script> \u202e :smile: \ud800 \x07[/]\r\nend"


def refused(*arguments: object) -> str:
    """The one line that a mistake costs: nothing else is printed."""
    text = fails(*arguments)
    assert text.startswith("antipasto: "), text
    assert text.count("\n") == 1, text
    return text


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "pairs.jsonl", addition.hack_pairs(16, seed=0))


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    FAMILIES["gpt2"].build().save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a routed run of three steps leaves, with the rollouts of a run that scores them."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    model, tokenizer = load_model(MODEL)
    model = get_peft_model(model, ap.AntiPastoConfig(cache_dir=None))
    layers = ap.knobs(model)
    rows = ap.load_pairs(addition.hack_pairs(12, seed=0))
    direction = ap.extract_direction(model, tokenizer, rows[:8], heldout=rows[8:])
    router = ap.Router(model, direction, controls={"random": direction.random(1), "[red]": direction.permuted(0)})
    optimizer = torch.optim.AdamW([layer.delta_s for layer in layers.values()], lr=1e-2, weight_decay=0.0)
    ids = tokenizer("h12+34=!", return_tensors="pt").input_ids
    metrics = []
    with router.attach(optimizer):
        for step in range(3):
            optimizer.zero_grad()
            (-ap.token_logprobs(model(ids).logits, ids)[:, -1].sum()).backward()
            optimizer.step()
            routing = {f"routing/{name}": value for name, value in router.metrics().items()}
            metrics.append({"step": step + 1, "reward": 0.25 * (step + 1), "kl": 0.125 * step, **routing})
    model.save_pretrained(folder / "adapter")
    direction.save(folder / "direction.safetensors")
    router.save(folder / "books.safetensors")
    (folder / "config.yaml").write_text("seed: 7\nsteps: 3\nmodel: '[red]tiny'\nrouting: {gate: coordinate}\n")
    write_lines(folder / "metrics.jsonl", metrics)
    rollouts = [
        {"step": i // 10, "prompt": f"h{i:02d}+01=", "completion": "!", "reward": i / 29, "hackward": i * 7 % 30 / 100}
        for i in range(30)
    ]
    rollouts[3] |= {"completion": HOSTILE + "x" * 5000, "hackward": 8.5}
    rollouts[4] |= {"prompt": [{"role": "user", "content": "a chat"}], "hackward": 7.5}
    rollouts[5]["hackward"] = None
    rollouts[6]["hackward"] = float("nan")
    del rollouts[7]["hackward"]
    write_lines(folder / "rollouts.jsonl", rollouts)
    (folder / "checkpoint-2").mkdir()
    return folder


# ── basis ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def cells(text: str) -> dict[str, str]:
    """First column → second, of a table without a head."""
    lines = [line.strip("│ ").split("│") for line in text.splitlines() if line.startswith("│")]
    return {line[0].strip(): line[1].strip() for line in lines}


def basis(model: object, cache: Path, *words: str) -> dict[str, str]:
    """What the command says that it did."""
    return cells(succeeds("basis", model, "--cache-dir", cache, *words))


def test_basis_fills_the_cache_that_wrap_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    table = basis(MODEL, cache)
    assert (table["layers"], table["cached before"], table["computed now"]) == ("21", "0", "21")
    assert table["trainable numbers"] == "1,728"
    assert len(list(cache.glob("*.safetensors"))) == 21

    table = basis(MODEL, cache)
    assert (table["cached before"], table["computed now"]) == ("all", "0")

    monkeypatch.setattr("antipasto.adapter.basis.decompose", lambda _: pytest.fail("computed again"))
    model, _ = load_model(MODEL)
    assert len(ap.wrap(model, ap.AntiPastoConfig(cache_dir=str(cache)))) == 21


def test_basis_of_a_rank_is_for_runs_of_that_rank_and_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*words: str) -> tuple[str, str, str]:
        table = basis(MODEL, tmp_path, "--dtype", "bfloat16", *words)
        return tuple(table[name] for name in ("cached before", "trainable numbers", "files"))  # type: ignore[return-value]

    def mib() -> str:
        return f"{sum(file.stat().st_size for file in tmp_path.glob('*.safetensors')) / 2**20:,.1f} MiB"

    assert fill("--rank", "8") == ("0", "168", lower := mib())
    assert {file.stem[64:] for file in tmp_path.iterdir()} == {"-r8-bfloat16"}
    assert fill("--rank", "8") == ("all", "168", lower)
    assert fill("--rank", "5") == ("all", "105", lower)
    with monkeypatch.context() as patch:
        patch.setattr("antipasto.adapter.basis.decompose", lambda _: pytest.fail("computed again"))
        model, _ = load_model(MODEL, dtype="bfloat16")
        assert {k.r for k in ap.wrap(model, ap.AntiPastoConfig(rank=5, cache_dir=str(tmp_path))).values()} == {5}

    before, whole = fill("--rank", "8"), fill()
    assert whole[:2] == ("0", "1,728")
    assert float(whole[2].split()[0]) > float(before[2].split()[0])
    assert fill() == ("all", *whole[1:])
    assert fill("--rank", "8") == before  # still read from the smaller files
    assert {file.stem[64:] for file in tmp_path.iterdir()} == {"-r8-bfloat16", "-bfloat16"}


def test_basis_hashes_every_weight_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(tensors: dict[str, torch.Tensor]) -> str:
        hashed.append(1)
        return digest(tensors)

    hashed: list[int] = []
    monkeypatch.setattr("antipasto.adapter.fingerprints.digest", counted)
    for times in (1, 2):
        basis(MODEL, tmp_path)
        assert len(hashed) == times * 21


def test_basis_of_named_layers_and_another_dtype(tmp_path: Path) -> None:
    chosen = ["--target-modules", "up_proj, q_proj", "--exclude-modules", "model.layers.1.mlp.up_proj"]
    assert basis(MODEL, tmp_path, *chosen)["layers"] == "5"
    assert basis(MODEL, tmp_path, *chosen, "--dtype", "bfloat16")["cached before"] == "0"  # other weights
    table = basis(MODEL, tmp_path, "--target-modules", "all-linear")
    assert (table["layers"], table["cached before"]) == ("21", "5")


def test_a_dry_run_says_what_it_takes_and_computes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held against the files, the adapter and the tensors of a real one."""
    monkeypatch.setattr("antipasto.app.models.load_weights", lambda *_, **__: pytest.fail("read a weight"))
    text = succeeds("basis", MODEL, "--cache-dir", tmp_path / "none", "--dry-run")
    assert not (tmp_path / "none").exists()
    assert "what adapting 21 layers of" in text
    needs, at_64, at_16 = commands.what_it_needs(MODEL, ap.AntiPastoConfig(), Console(quiet=True))
    numbers = [f"{one.numbers:,}" for one in (needs, at_64, at_16)]
    assert re.search(r"trainable numbers\W+" + r"\W+".join(numbers), text)
    assert (numbers, [one.rank for one in (needs, at_64, at_16)]) == (["1,728", "1,248", "336"], [None, 64, 16])
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    assert needs.model == sum(p.numel() * p.element_size() for p in model.parameters())
    layers = ap.wrap(model, ap.AntiPastoConfig(cache_dir=str(tmp_path / "cache")))
    assert needs.basis == sum(t.numel() * t.element_size() for k in layers.values() for t in (k.U, k.S, k.Vh))
    assert needs.adapted == sum(k.layer.base_layer.weight.nbytes for k in layers.values())
    files = sum(file.stat().st_size for file in (tmp_path / "cache").glob("*.safetensors"))
    assert needs.basis < files < needs.basis + 1024 * needs.layers  # with their heads
    model.save_pretrained(tmp_path / "adapter")
    saved = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert needs.adapter < saved < needs.adapter + 300 * needs.layers
    (lower,) = commands.what_it_needs(MODEL, ap.AntiPastoConfig(rank=8), Console(quiet=True), dtype="bfloat16")
    assert (lower.numbers, lower.model) == (21 * 8, needs.model // 2)
    assert lower.basis == sum(2 * 8 * (k.U.shape[0] + k.Vh.shape[1]) + 4 * 8 for k in layers.values())
    basis(MODEL, tmp_path / "lower", "--rank", "8", "--dtype", "bfloat16")
    files = sum(file.stat().st_size for file in (tmp_path / "lower").glob("*.safetensors"))
    assert lower.basis < files < lower.basis + 1024 * lower.layers


@pytest.mark.filterwarnings("ignore:The basis cache file:antipasto.BasisCacheWarning")
def test_basis_replaces_a_damaged_file(tmp_path: Path) -> None:
    basis(MODEL, tmp_path)
    bad = sorted(tmp_path.glob("*.safetensors"))[0]
    good = bad.read_bytes()
    bad.write_bytes(good[:-7])
    assert basis(MODEL, tmp_path)["cached before"] == "20"
    assert len(bad.read_bytes()) == len(good)
    assert basis(MODEL, tmp_path)["cached before"] == "all"


def test_basis_needs_no_tokenizer_but_layers(gpt2: Path, tmp_path: Path) -> None:
    assert basis(gpt2, tmp_path / "default")["layers"] == "2"  # PEFT's own names, where ours match nothing
    assert "'nothing'" in refused("basis", gpt2, "--target-modules", "nothing")
    assert basis(gpt2, tmp_path / "cache", "--target-modules", "c_attn,c_fc")["layers"] == "4"


def test_basis_says_when_the_cache_takes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'} cannot be used as the cache folder" in refused(
        "basis", MODEL, "--cache-dir", tmp_path / "file"
    )


# ── loading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nowhere", "There is no folder './nowhere'"),
        ("", "There is no folder ''"),
        ("nobody/no-such-model", "'nobody/no-such-model' is not a folder, and its model cannot be loaded from the hub"),
        ("no\x1b[31msuch", r"'no\x1b[31msuch'"),
    ],
)
def test_a_model_that_is_not_there(name: str, words: str) -> None:
    assert words in refused("basis", name)


def test_a_folder_that_is_no_model(tmp_path: Path, finished: Path) -> None:
    text = refused("basis", tmp_path)
    assert "holds no model" in text
    assert str(tmp_path) in text
    text = refused("basis", finished / "adapter")
    assert f"is an adapter, not a model: give the model that it was trained on, {MODEL}." in text
    (tmp_path / "adapter_config.json").write_text("[]")
    assert "is damaged, or is not the config of an adapter" in refused("basis", tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    assert "trained on (its config does not name it)." in refused("basis", tmp_path)
    (tmp_path / "file").touch()
    assert "is a file" in refused("basis", tmp_path / "file")


def spoil(folder: Path, what: str) -> None:
    if what == "weights":
        (folder / "model.safetensors").write_bytes(b"no weights")
    elif what == "no weights":
        (folder / "model.safetensors").unlink()
    elif what == "a layer less":
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif what == "tokenizer":
        (folder / "tokenizer.json").write_text("{")
    else:
        config = json.loads((folder / "config.json").read_text())
        changes = {
            "shapes": {"intermediate_size": 100},
            "no kind": {"model_type": "unheard-of"},
            "vision": {"model_type": "vit"},
            "code": {"model_type": "unheard-of", "auto_map": {"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"}},
        }
        (folder / "config.json").write_text(json.dumps(config | changes[what]))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("weights", "header"),
        ("no weights", "no file named model.safetensors"),
        ("a layer less", "lacks 1 of the model's weights, first model.norm.weight"),
        ("shapes", "has the wrong shape for 9 of the model's weights, first model.layers.0.mlp"),
        ("no kind", "unheard-of"),
        ("vision", "ViTConfig"),
        ("code", "it needs custom code, which is never run here"),
        ("tokenizer", "its tokenizer:"),
    ],
)
def test_a_model_that_is_damaged(what: str, words: str, tmp_path: Path, pairs: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    spoil(folder, what)
    text = refused("extract", folder, "--pairs", pairs, "--out", tmp_path / "out")
    assert words in text
    assert str(folder) in text
    assert not (tmp_path / "out").exists()


def test_load_model_gives_what_was_asked_for(tmp_path: Path) -> None:
    model, tokenizer = load_model(MODEL, dtype="float16")
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert not model.training
    assert tokenizer.padding_side == "left"
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    model, tokenizer = load_model(str(tmp_path))
    assert model.dtype == torch.float16
    assert tokenizer.pad_token == tokenizer.eos_token
    with pytest.raises(ValueError, match="dtype must be one of"):
        load_model(MODEL, dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is not a folder") as caught:
        load_model("nobody/no-such-model")
    assert isinstance(caught.value.__cause__, OSError)


# ── extract ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_extract_is_extract_direction_of_the_split(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "direction.safetensors"
    text = succeeds("extract", MODEL, "--pairs", pairs, "--out", out, "--seed", "3")
    saved = ap.Direction.load(out)

    fit, held = split_pairs(ap.load_pairs(pairs), 0.25, seed=3)
    assert (len(fit), len(held)) == (12, 4)
    model, tokenizer = load_model(MODEL)
    ap.wrap(model)
    expected = ap.extract_direction(model, tokenizer, fit, heldout=held)
    assert saved.heldout == expected.heldout
    assert all(torch.equal(saved.effect[name], expected.effect[name]) for name in expected)

    guarded = sum(int((effect.abs() > 0.65).sum()) for effect in expected.effect.values())
    assert f"{guarded} of 1,728" in text
    assert "4 held-out pairs" in text
    assert f"{expected.heldout.overall:.0%}" in text
    assert f"{expected.heldout.random:.0%} (random directions)" in text
    assert "labels shuffled" in text


def test_extract_takes_its_options(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "d.safetensors"
    options = ["--rank", 8, "--target-modules", "up_proj", "--heldout", 0]
    succeeds("extract", MODEL, "--pairs", pairs, "--out", out, *options)
    direction = ap.Direction.load(out)
    assert {V.shape for V in direction.values()} == {(1, 8)}
    assert len(direction) == 3
    assert direction.heldout is None


def test_extract_overwrites_only_when_told(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "d.safetensors"
    out.write_text("mine")
    command = ["extract", MODEL, "--pairs", pairs, "--out", out, "--target-modules", "q_proj"]
    assert "--force" in refused(*command)
    assert out.read_text() == "mine"
    succeeds(*command, "--force")
    assert len(ap.Direction.load(out)) == 3
    assert "is a folder: --out names the file" in refused(
        "extract", MODEL, "--pairs", pairs, "--out", tmp_path, "--force"
    )


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "There is no pair"),
        ([{"prompt": "2+2=", "hack": "!"}], "line 1: no field 'clean'"),
        ([{"prompt": "2+2=", "hack": "!", "clean": "!"}], "are the same text"),
        ([3], "line 1: expected an object"),
        (addition.hack_pairs(2, seed=0), "1 left to fit"),
    ],
)
def test_extract_refuses_bad_pairs(rows: list[Any], words: str, tmp_path: Path) -> None:
    assert words in refused("extract", MODEL, "--pairs", write_lines(tmp_path / "p", rows), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_extract_refuses_options_that_make_no_sense(pairs: Path, tmp_path: Path) -> None:
    command = ["extract", MODEL, "--pairs", pairs, "--out", tmp_path / "out"]
    assert "0 left to fit" in refused(*command, "--heldout", "0.99")
    assert "share in [0, 1), got 1.0" in refused(*command, "--heldout", "1")
    assert "target_modules takes comma-separated names" in refused(*command, "--target-modules", "q_proj,,k_proj")
    assert "There is no file" in refused("extract", MODEL, "--pairs", tmp_path / "none", "--out", tmp_path / "out")
    for wrong in (["--heldout", "-1"], ["--hedlout", "0.5"], ["--dtype", "int8"]):
        assert wrong[0] in fails(*command, *wrong)
    assert run("extract", MODEL, "--out", tmp_path / "out")[0] == 2


def test_what_is_said_twice_stays_on_one_side() -> None:
    rows = ap.load_pairs(addition.hack_pairs(10, seed=0) * 2)
    for seed in range(5):
        fit, held = split_pairs(rows, 0.3, seed)
        assert (len(fit), len(held)) == (14, 6)
        assert not {p.prompt for p in fit} & {p.prompt for p in held}
    assert split_pairs(rows, 0.3, 0) == split_pairs(rows, 0.3, 0)
    assert split_pairs(rows, 0.3, 0) != split_pairs(rows, 0.3, 1)


# ── inspect ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_inspect_an_adapter(finished: Path, tmp_path: Path) -> None:
    text = succeeds("inspect", finished / "adapter")
    assert run("inspect", finished / "adapter" / "adapter_model.safetensors") == (0, text)
    tensors = load_file(finished / "adapter" / "adapter_model.safetensors")
    ships, held = (
        float(torch.cat([t for name, t in tensors.items() if f".{knob}." in f"{name}."]).norm())
        for knob in ("delta_s", "delta_s_hack")
    )
    row = next(line for line in text.splitlines() if line.startswith("│ all"))
    share = f"{held**2 / (ships**2 + held**2):.0%}"
    assert [c.strip() for c in row.strip("│").split("│")] == [
        "all",
        "21",
        "48 to 96",
        f"{ships:.3g}",
        f"{held:.3g}",
        share,
    ]
    assert held > 0
    assert "call drop_quarantine before it ships" in text
    assert MODEL in text.replace("\n", "")

    model, _ = load_model(MODEL)
    model.load_adapter(finished / "adapter")
    ap.drop_quarantine(model)
    model.save_pretrained(tmp_path / "ships")
    assert "It has no quarantine" in succeeds("inspect", tmp_path / "ships")
    config = json.loads((tmp_path / "ships" / "adapter_config.json").read_text())
    (tmp_path / "ships" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert "adapter of an unnamed base model" in run("inspect", tmp_path / "ships")[1]  # as `wrap` leaves it


def test_inspect_a_direction_and_books(finished: Path) -> None:
    text = succeeds("inspect", finished / "direction.safetensors")
    direction = ap.Direction.load(finished / "direction.safetensors")
    for threshold in (0.5, 0.65, 0.8, 1.0):
        number = sum(int((effect.abs() > threshold).sum()) for effect in direction.effect.values())
        assert f" {number:,} │ {number / 1728:>5.1%} │" in text
    assert f"({direction.heldout.overall:.0%})" in text
    assert "21 layers, 21 rows" in text

    text = succeeds("inspect", finished / "books.safetensors")
    assert "books after 3 steps" in text
    assert "[red]" in text
    assert "quarantine │" not in text  # which is in the adapter
    row = next(line for line in text.splitlines() if "│ random" in line)
    assert row.count("1.00") == 1


def test_inspect_a_run_folder(finished: Path) -> None:
    text = succeeds("inspect", finished, columns=80)
    assert max(map(len, text.splitlines())) <= 80
    for words in ("[red]tiny", "routing.gate", "3 of 3 steps done", "30 rollouts", "a chat", "checkpoints at steps 2"):
        assert words in text
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines()]
    assert ["reward", "0.250", "0.750", ""] in rows
    first, last = sum(i / 29 for i in range(3)) / 3, sum(i / 29 for i in range(27, 30)) / 3
    assert f"{first:.3f} │" in text
    assert f"{last:.3f} │" in text
    assert "routing/hackward_in " in text
    assert "routing/hackward_in_random" not in text  # a column
    top = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│") and "h" in line]
    assert [score for score in top if score.startswith("0.2")] == ["0.290", "0.270", "0.260"]
    assert text.index("8.500") < text.index("7.500") < text.index("0.290")
    assert "quarantine" in text
    assert "nan" not in text


def test_inspect_shows_hostile_text_and_does_not_obey_it(finished: Path) -> None:
    _, text = run("inspect", finished)
    flat = " ".join(text.replace("│", " ").split())
    for shown in (
        "[red]x[/red]",
        r"\x1b[31mred",
        "<script>alert(1)</script>",
        r"\u202e",
        ":smile:",
        r"\ud800",
        r"\x07[/]\r\n",
    ):
        assert shown in flat
    assert not set("\x1b\x07\u202e\r\ud800") & set(text)
    assert text.count("x" * 30) < 10  # shortened


def test_inspect_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1")
    assert "missing, or not written yet: metrics.jsonl, rollouts.jsonl, adapter" in succeeds("inspect", tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "rollouts.jsonl").write_text(
        '{"step": 0, "prompt": "p", "completion": "c", "reward": 1.0}\n{"step": 0, "pro'
    )
    text = succeeds("inspect", tmp_path)
    assert "no reward in it yet" in text
    assert "1 rollouts" in text
    assert "its last line is cut off" in text
    assert "No rollout has a hackward score" in text


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("adapter/adapter_model.safetensors", b"rubbish"),
        ("adapter/adapter_config.json", b"{"),
        ("adapter/adapter_config.json", b'{"peft_type": "LORA"}'),
        ("direction.safetensors", b"\x00" * 64),
        ("books.safetensors", b"half"),
        ("metrics.jsonl", b"{}\nnot json\n{}\n"),
        ("metrics.jsonl", b'{"reward": "high"}\n'),
        ("rollouts.jsonl", b"\xff\xfe\n{}\n"),
        ("rollouts.jsonl", b'{"reward": 1.0, "hackward": "\\u001b[31m"}\n'),
        ("rollouts.jsonl", b'{"reward": 1' + b"0" * 400 + b"}\n"),
        ("rollouts.jsonl", b"[1]\n"),
        ("rollouts.jsonl", b"[" * 100_000 + b"\n"),
        ("eval.json", b"{"),
        ("config.yaml", b"a: [1\n"),
        ("config.yaml", b"- 1\n"),
        ("config.yaml", b"a: !!python/object/apply:os.system ['touch owned']\n"),
    ],
)
def test_a_damaged_file_is_named(file: str, content: bytes, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / file).write_bytes(content)
    text = refused("inspect", tmp_path / "run")
    assert file in text
    assert "\x1b" not in text


def test_a_truncated_or_foreign_safetensors_file(finished: Path, tmp_path: Path) -> None:
    for name in ("direction.safetensors", "books.safetensors"):
        (tmp_path / name).write_bytes((finished / name).read_bytes()[:-9])
        assert str(tmp_path / name) in refused("inspect", tmp_path / name)
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    assert "not a direction, monitor or books" in refused("inspect", tmp_path / "foreign.safetensors")
    save_file({}, tmp_path / "empty.safetensors", metadata={"format": "antipasto-books-1"})
    assert str(tmp_path / "empty.safetensors") in refused("inspect", tmp_path / "empty.safetensors")


def test_a_path_that_cannot_be_shown(tmp_path: Path) -> None:
    assert "is not a run folder" in refused("inspect", tmp_path)
    assert "nothere" in refused("inspect", tmp_path / "nothere")
    assert "is a model, not a run" in refused("inspect", MODEL)
    (tmp_path / "seed-3").mkdir()
    (tmp_path / "seed-3" / "config.yaml").write_text("{}")
    assert "holds several runs: give one of seed-3" in refused("inspect", tmp_path)


def test_plain_and_shorten() -> None:
    assert plain("a\tb\u2028c\u200b") == r"a\tb\u2028c\u200b"
    assert plain("θ ü 漢 [b]") == "θ ü 漢 [b]"
    assert shorten("x" * 10**7, 9) == "xxxx…xxxx"
    assert shorten("\x1b" * 50, 20).count("…") == 1
    assert len(shorten("\x1b" * 50, 20)) == 20


def test_help_lists_the_commands_by_what_they_are_for() -> None:
    text = succeeds("--help")
    panels = ("─ Train ", "│ demo ", "─ Prepare ", "│ basis ", "│ extract ", "─ Look ", "│ inspect ")
    places = [text.index(words) for words in panels]
    assert places == sorted(places)
    for command in ("basis", "extract", "inspect"):
        succeeds(command, "--help")
        assert run(command)[0] == 2
