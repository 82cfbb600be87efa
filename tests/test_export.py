"""`antipasto export`: what is written is what the run deploys, and needs nothing of this library."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import command_line
import pytest
import torch
import yaml
from families import FAMILIES
from huggingface_hub import ModelCard
from lines import write_lines
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import antipasto as ap
from antipasto.app.export import check as checking
from antipasto.app.export import elsewhere, weights
from antipasto.app.export.card import About, render
from antipasto.app.export.check import Check
from antipasto.app.export.weights import Dtypes, Loss, Written, lora_factors, merged, write_checkpoint, write_lora
from antipasto.app.models import base_fingerprint
from antipasto.app.runs import load_run
from antipasto.evaluation.records import ArmRecord, Estimate, Evaluation, Verdict
from antipasto.tasks import addition

MODEL = addition.model_path()
BY_DIRECTION = ("--method", "route", "--by", "direction")
PROMPTS = [addition.prompt(kind, pair) for pair in addition.split("test")[:16] for kind in "hs"]
SITE = str(Path(torch.__file__).parents[1])

PLAIN = """
import json, sys
sys.path.append(sys.argv[1])
sys.modules["antipasto"] = None  # in case it is installed there
if sys.argv[5] == "plain":
    sys.modules["peft"] = None
try:
    import antipasto
except ImportError:
    pass
else:
    sys.exit("antipasto can be imported")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, prompts = sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(base)
if adapter:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, adapter)
tokenizer = AutoTokenizer.from_pretrained(base)
batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
answers = model.eval().generate(**batch, do_sample=False, max_new_tokens=5)
print(json.dumps(tokenizer.batch_decode(answers)))
"""


run, succeeds, fails = (
    partial(function, columns=200) for function in (command_line.run, command_line.succeeds, command_line.fails)
)


def answers_without_this_library(base: Path, adapter: Path | None = None) -> list[str]:
    """Greedy answers with their prompts, of a process that cannot import antipasto (nor PEFT, of a checkpoint)."""
    kind = "plain" if adapter is None else "peft"
    words = [SITE, str(base), str(adapter or ""), json.dumps(PROMPTS), kind]
    # -I and -S: no PYTHONPATH, no .pth files, so no editable install either
    done = subprocess.run([sys.executable, "-I", "-S", "-c", PLAIN, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(done.stdout.splitlines()[-1]))


def deployed_answers(root: Path) -> list[str]:
    loaded = load_run(root)
    batch = loaded.tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    with ap.deployed(loaded.model):
        answers = loaded.model.generate(**batch, do_sample=False, max_new_tokens=5)
    return list(loaded.tokenizer.batch_decode(answers))


def make_run(
    root: Path,
    family: str = "llama",
    *,
    method: str = "route",
    dtype: torch.dtype = torch.float32,
    scale: float = 0.3,
    nonzero: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Path:
    """A run folder of a tiny random model, with random knobs of both kinds; returns the run, its base beside it."""
    base = root / "base"
    model = FAMILIES[family].build(dtype=dtype)
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(base)
    config = ap.AntiPastoConfig(target_modules=FAMILIES[family].target_modules, **options)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(seed)
    for layer in ap.knobs(adapted).values():
        for knob in (layer.delta_s, layer.delta_s_hack):
            knob.data = scale * torch.randn(layer.r, generator=generator) * layer.S.mean()
            knob.data[nonzero:] = 0 if nonzero is not None else knob.data[nonzero:]
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    folder = root / "a-run"
    ap.save_adapter(adapted, folder / "adapter")
    (folder / "adapter" / "complete.json").write_text("{}")
    settings = {"model": str(base), "task": "addition", "method": method, "dtype": "auto", "steps": 3, "seed": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump({**settings, "trainer": {}}))
    facts = {"base": {"model": str(base), "fingerprint": base_fingerprint(adapted)}, "processes": 1, "versions": {}}
    (folder / "run.json").write_text(json.dumps(facts))
    return folder


def checkpoint(root: Path, out: Path, dtype: torch.dtype = torch.float32, shards: str = "50GB") -> Written:
    out.mkdir()
    loaded = load_run(root)
    return write_checkpoint(loaded, out, dtype, Dtypes(loaded.model), shards)


def lora_of(root: Path, out: Path, rank: int) -> Written:
    out.mkdir()
    return write_lora(load_run(root), out, rank, torch.float32)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.arange(12).remainder(16)[None]
    return model.eval()(input_ids=ids).logits


def logits_of(root: Path, view: Any = ap.deployed) -> Tensor:
    loaded = load_run(root)
    with view(loaded.model):
        return logits(loaded.model)


def as_trained(model: Any) -> Any:
    return nullcontext()


def model_in(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def assert_ships(model: Any, root: Path, view: Any = ap.deployed) -> None:
    """It computes what the run does in this view."""
    torch.testing.assert_close(logits(model), logits_of(root, view), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps."""
    out = tmp_path_factory.mktemp("runs") / "my-run"
    size = ["--prompts", "2", "--generations", "8", "--steps", "3"]
    succeeds("train", MODEL, "--task", "addition", *BY_DIRECTION, "--threshold", "0.3", "--out", out, *size)
    return out


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("exports") / "shipped"
    text = succeeds("export", trained, "--out", out)
    return out, text


# ── the whole way ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_answers_are_those_of_the_deployed_model_in_a_process_without_this_library(
    trained: Path, exported: tuple[Path, str]
) -> None:
    out, text = exported
    assert answers_without_this_library(out) == deployed_answers(trained)
    assert "32 of 32, token by token" in text
    assert "without the quarantine" in text
    assert f"antipasto eval {trained}" in text  # for the card's table
    assert sorted(path.name for path in out.parent.iterdir()) == ["shipped"]


def test_the_quarantine_is_not_in_it(trained: Path, exported: tuple[Path, str]) -> None:
    ours = logits(model_in(exported[0]))
    torch.testing.assert_close(ours, logits_of(trained), rtol=1e-4, atol=1e-4)
    assert (ours - logits_of(trained, as_trained)).abs().max() > 1e-2
    assert (ours - logits_of(trained, ap.reference)).abs().max() > 1e-2


def test_no_file_has_a_trace_of_it_or_of_this_machine(trained: Path, exported: tuple[Path, str]) -> None:
    out, _ = exported
    secrets = [b"delta_s", b"base_layer", b"adapter", b"_hack", str(trained).encode(), str(MODEL).encode()]
    secrets += [trained.name.encode(), str(trained.parent).encode(), b"/root", b"site-packages"]
    for path in out.iterdir():
        data = path.read_bytes()
        assert not [secret for secret in secrets if secret in data], path
        assert path.name == "README.md" or (b"antipasto" not in data and b"quarantine" not in data), path
        assert path.stat().st_mode & 0o777 == (out / "README.md").stat().st_mode & 0o777
    base = {path.name: load_file(path) for path in MODEL.glob("*.safetensors")}
    assert load_file(out / "model.safetensors").keys() == base["model.safetensors"].keys()
    assert json.loads((out / "config.json").read_text()) == json.loads((MODEL / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (MODEL / name).read_bytes()


def test_its_card_says_what_was_done(exported: tuple[Path, str]) -> None:
    card = ModelCard.load(exported[0] / "README.md")
    assert (card.data.base_model, card.data.library_name) == ("addition-rare", "transformers")
    assert "antipasto" in card.data.tags
    for words in ("Not evaluated", "deleted before this export", "32 of 32", "| task | addition |", "| seed | 0 |"):
        assert words in card.text, words


def test_a_run_that_was_evaluated_has_its_arms_in_the_card(tmp_path: Path) -> None:
    text = render(_about(), _evaluation(), *_figures())
    assert "| all | deployed (this one) | .50 \\[.40,.60\\] | .25 \\[.20,.30\\] |" in text
    assert "32 held-out prompts of task sums" in text
    assert "The direction did it." in text
    assert "Not evaluated" not in text


@pytest.mark.thorough
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_the_whole_way(family: str, tmp_path: Path) -> None:
    root = make_run(tmp_path, family)
    for arguments in ((), ("--lora", 64)):
        text = succeeds("export", root, "--out", tmp_path / f"out{len(arguments)}", *arguments)
        assert "of 32, token by token" in text


# ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_computes_what_the_run_deploys(family: str, tmp_path: Path) -> None:
    root = make_run(tmp_path, family)
    written = checkpoint(root, tmp_path / "out")
    model, info = model_in(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_ships(model, root)
    assert (logits(model) - logits_of(root, as_trained)).abs().max() > 1e-3
    before, after = (
        load_file(tmp_path / "base" / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert before.keys() == after.keys()  # tied weights once, biases, norms
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key.rsplit(".", 2)[1] for key in changed} == FAMILIES[family].leaves
    assert model.config.tie_word_embeddings == model_in(tmp_path / "base").config.tie_word_embeddings
    assert written.loss.relative < 1e-5
    assert written.loss.share == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_the_dial_leaves_in_as_much_of_the_quarantine_as_it_says(lora: bool, tmp_path: Path) -> None:
    root = make_run(tmp_path, nonzero=6)
    more = ["--lora", "8"] if lora else []
    text = succeeds("export", root, "--out", tmp_path / "out", "--dial", "0.25", "--tolerance", "1e-3", *more)
    assert "with 0.25 of the quarantine" in text
    assert "**A share of 0.25 of it is in this export**" in (tmp_path / "out" / "README.md").read_text()
    base = model_in(tmp_path / "base")
    ours = logits(PeftModel.from_pretrained(base, tmp_path / "out") if lora else model_in(tmp_path / "out"))
    torch.testing.assert_close(ours, logits_of(root, lambda m: ap.deployed(m, 0.25)), rtol=1e-4, atol=1e-4)
    assert (ours - logits_of(root)).abs().max() > 2e-3


def test_a_dial_is_of_a_quarantine(tmp_path: Path) -> None:
    text = fails("export", make_run(tmp_path, method="plain"), "--out", tmp_path / "out", "--dial", "0.5")
    assert "--dial needs a quarantine, and a run by method plain has none" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["plain", "erase", "measure", "penalty", "discount"])
def test_a_run_without_routing_ships_as_trained(method: str, tmp_path: Path) -> None:
    root = make_run(tmp_path, method=method)
    checkpoint(root, tmp_path / "out")
    assert_ships(model_in(tmp_path / "out"), root, as_trained)
    assert About.of(load_run(root)).ships == f"as trained: method {method} has no quarantine"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_sum_is_rounded_once(family: str, tmp_path: Path) -> None:
    loaded = load_run(make_run(tmp_path, family, dtype=torch.bfloat16))
    for layer in ap.knobs(loaded.model).values():
        W = layer.layer.get_base_layer().weight.double()
        W = W.T if family == "gpt2" else W
        delta = layer.U.double() @ torch.diag(layer.delta_s.double()) @ layer.Vh.double()
        out, loss = merged(layer, weights.shipped(layer, 0.0), torch.bfloat16)
        assert torch.equal(out, (W + delta).bfloat16())
        rounding = out.double() - (W + delta)
        assert loss.relative == pytest.approx(float(rounding.norm() / delta.norm()), rel=1e-6)
        assert loss.share == pytest.approx(float(((out.double() - W) * delta).sum() / delta.square().sum()), rel=1e-6)


def test_losses_of_layers_add_up() -> None:
    g = torch.Generator().manual_seed(0)
    updates, written = (torch.randn(3, 4, 5, generator=g, dtype=torch.float64) for _ in range(2))
    total = sum((Loss.of(u, w) for u, w in zip(updates, written, strict=True)), Loss(0, 0, 0))
    assert total.relative == pytest.approx(float((updates - written).norm() / updates.norm()))
    assert total.share == pytest.approx(float((updates * written).sum() / updates.square().sum()))
    assert (Loss(0, 0, 0).relative, Loss(0, 0, 0).share) == (0, 1)


def test_a_weight_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.\d\..*too large for torch.float16"):
        checkpoint(make_run(tmp_path, scale=1e6), tmp_path / "out", torch.float16)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
def test_modules_trained_as_a_whole_ship_and_are_untied(tmp_path: Path) -> None:
    root = make_run(tmp_path, "gemma", modules_to_save=["lm_head"])
    checkpoint(root, tmp_path / "out")
    model = model_in(tmp_path / "out")
    assert not model.config.tie_word_embeddings
    assert_ships(model, root)
    with pytest.raises(ValueError, match="lm_head in full"):
        lora_of(root, tmp_path / "lora", 8)


@pytest.mark.filterwarnings("ignore:.*a tied layer is part of the adapter")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_a_head_that_was_tied_ships_beside_the_embedding_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = FAMILIES["llama"]
    options = {**llama.options, "tie_word_embeddings": True}
    monkeypatch.setitem(FAMILIES, "tied", replace(llama, options=options, target_modules=["lm_head", "q_proj"]))
    root = make_run(tmp_path, "tied")
    checkpoint(root, tmp_path / "out")
    shipped = model_in(tmp_path / "out")
    torch.testing.assert_close(logits(shipped), logits_of(root), atol=1e-4, rtol=1e-4)
    assert torch.equal(shipped.model.embed_tokens.weight, FAMILIES["tied"].build().model.embed_tokens.weight)


def test_shards(tmp_path: Path) -> None:
    root = make_run(tmp_path)
    checkpoint(root, tmp_path / "out", shards="8KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    model = model_in(tmp_path / "out")
    assert_ships(model, root)


def test_what_was_not_adapted_keeps_its_values_in_a_wider_dtype(tmp_path: Path) -> None:
    root = make_run(tmp_path, dtype=torch.bfloat16)
    loaded = load_run(root)
    before = Dtypes(loaded.model)
    loaded.model.float()
    for dtype in (torch.bfloat16, torch.float32):
        out = tmp_path / str(dtype)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        again = load_run(root)
        again.model.float()
        write_checkpoint(again, out, dtype, before, "50GB")
        base, now = load_file(tmp_path / "base" / "model.safetensors"), load_file(out / "model.safetensors")
        assert {tensor.dtype for tensor in now.values()} == {dtype}
        assert torch.equal(base["model.embed_tokens.weight"].to(dtype), now["model.embed_tokens.weight"])
        assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


# ── LoRA ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_of_few_directions_is_exact(family: str, tmp_path: Path) -> None:
    root = make_run(tmp_path, family, nonzero=3)
    written = lora_of(root, tmp_path / "out", 8)
    assert written.rank == 3  # no more than is needed
    assert written.loss.relative < 1e-6
    base = model_in(tmp_path / "base")
    adapted = PeftModel.from_pretrained(base, tmp_path / "out")
    assert_ships(adapted, root)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"]) == ("LORA", 3, 3, "none")
    assert not config["rank_pattern"]
    assert config["fan_in_fan_out"] == (family == "gpt2")
    assert config["base_model_name_or_path"] == "base"


def test_a_truncated_lora_is_the_best_of_its_rank(tmp_path: Path) -> None:
    """‖ΔW − BA‖² = Σ θ_j² over what is left out, and no matrix of that rank is nearer."""
    loaded = load_run(make_run(tmp_path))
    for layer in ap.knobs(loaded.model).values():
        theta = weights.shipped(layer, 0.0)
        A, B, loss = lora_factors(layer, theta, 5, torch.float32)
        assert (A.shape[0], B.shape[1]) == (5, 5)
        kept = theta.abs().sort(descending=True).values.square()
        assert loss.relative == pytest.approx(math.sqrt(kept[5:].sum() / kept.sum()), rel=1e-4)
        assert loss.share == pytest.approx(float(kept[:5].sum() / kept.sum()), rel=1e-4)
        delta = layer.U.double() @ torch.diag(theta) @ layer.Vh.double()
        best = torch.linalg.svdvals(delta)[5:].norm()
        assert float((delta - B.double() @ A.double()).norm()) == pytest.approx(float(best), rel=1e-4)


def test_a_layer_with_fewer_directions_is_filled_up_with_zeros(tmp_path: Path) -> None:
    root = make_run(tmp_path, rank_pattern={"k_proj": 2})
    written = lora_of(root, tmp_path / "out", 16)
    assert written.rank == 16
    assert {
        t.shape[0] for k, t in load_file(tmp_path / "out" / "adapter_model.safetensors").items() if "lora_A" in k
    } == {16}
    adapted = PeftModel.from_pretrained(model_in(tmp_path / "base"), tmp_path / "out")
    assert_ships(adapted, root)


def test_layers_that_were_left_out_stay_out_of_the_lora(tmp_path: Path) -> None:
    root = make_run(tmp_path, layers_to_transform=[1])
    lora_of(root, tmp_path / "out", 4)
    targets = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    assert len(targets) == 7
    assert all(name.startswith("model.layers.1.") for name in targets)


@pytest.mark.slow
def test_a_lora_adapter_works_in_a_process_without_this_library(tmp_path: Path) -> None:
    root = make_run(tmp_path, nonzero=3)
    text = succeeds("export", root, "--out", tmp_path / "out", "--lora", 8)
    assert "rank 3" in text
    assert "The adapter misses" not in text
    assert answers_without_this_library(tmp_path / "base", tmp_path / "out") == deployed_answers(root)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("peft", "base")
    data = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert b"delta_s" not in data
    assert str(tmp_path).encode() not in data


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_a_checkpoint_that_computes_something_else_is_refused(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arguments: Any) -> tuple[Tensor, Loss]:
        out, loss = merged(*arguments)
        return out * 1.01, loss

    monkeypatch.setattr(weights, "merged", wrong)
    text = fails("export", trained, "--out", tmp_path / "out")
    assert "more than the tolerance of 0.001" in text
    assert "--tolerance inf" in text
    assert not list(tmp_path.iterdir())
    succeeds("export", trained, "--out", tmp_path / "out", "--tolerance", "inf")
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.slow
def test_an_update_that_16_bits_cannot_hold_is_refused(tmp_path: Path) -> None:
    root = make_run(tmp_path, dtype=torch.bfloat16, scale=1e-3)
    text = fails("export", root, "--out", tmp_path / "out")
    assert "of the update is left after rounding W + ΔW to bfloat16" in text
    assert "--dtype float32" in text
    assert "--lora" in text
    assert not (tmp_path / "out").exists()
    assert "32 of 32" in succeeds("export", root, "--out", tmp_path / "out", "--dtype", "float32")


def _check(**changes: Any) -> Check:
    return Check(**{**dict(zip(Check.__dataclass_fields__, _figures()[1].__dict__.values(), strict=True)), **changes})


def test_which_differences_are_refused() -> None:
    half, single = (Written(dtype, {"a": Loss(1.0, 0.0, 0.99)}) for dtype in (torch.bfloat16, torch.float32))
    lost = Written(torch.bfloat16, {"a": Loss(1.0, 0.5, 0.5)})
    checking.refuse(_check(largest=0.5, base_largest=0.4, tolerance=0.8), half, given=False)
    for figures, written in (
        (_check(largest=0.9, base_largest=0.4, tolerance=0.8), half),
        (_check(largest=math.nan, tolerance=math.inf), single),
        (_check(largest=0.1, base_largest=0.4, tolerance=0.8), lost),
    ):
        with pytest.raises(ValueError, match="--tolerance inf"):
            checking.refuse(figures, written, given=False)
    checking.refuse(_check(largest=0.1, base_largest=0.4, tolerance=0.8), lost, given=True)


def test_a_folder_that_cannot_be_loaded_there_is_refused(tmp_path: Path) -> None:
    request = {"model": str(tmp_path), "adapter": None, "dtype": "auto", "blocked": ["antipasto", "peft"]}
    with pytest.raises(ValueError, match="cannot be loaded by a process without this library"):
        checking._elsewhere(request)


def test_that_process_cannot_import_what_it_must_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        elsewhere, "_answer", lambda request: {"found": sorted({"antipasto", "peft"} & set(sys.modules))}
    )
    (tmp_path / "request.json").write_text(json.dumps({"blocked": ["antipasto"]}))
    with pytest.raises(AssertionError, match="antipasto is imported"):
        elsewhere.main(str(tmp_path / "request.json"), str(tmp_path / "answer.json"))


@pytest.mark.parametrize(
    "what", ["no run", "unfinished", "another base", "a file", "not empty", "no parent", "a shard"]
)
def test_what_cannot_be_exported_costs_one_line(what: str, tmp_path: Path) -> None:
    root, out = make_run(tmp_path), tmp_path / "out"
    arguments: list[str] = []
    words = {
        "no run": "is a model, not a run",
        "unfinished": "has not finished",
        "another base": "has changed since|belongs to",
        "a file": "is a file",
        "not empty": "is not empty",
        "no parent": "Not a directory|File exists",
        "a shard": "--max-shard-size is for a checkpoint",
    }[what]
    if what == "no run":
        root = tmp_path / "base"
    elif what == "unfinished":
        (root / "adapter" / "complete.json").unlink()
    elif what == "another base":
        FAMILIES["llama"].build(seed=1).save_pretrained(tmp_path / "base")
    elif what == "a file":
        out.write_text("mine")
    elif what == "not empty":
        out.mkdir()
        (out / "mine").write_text("mine")
    elif what == "no parent":
        (tmp_path / "file").touch()
        out = tmp_path / "file" / "out"
    else:
        arguments = ["--lora", "4", "--max-shard-size", "1GB"]
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    text = fails("export", root, "--out", out, *arguments)
    assert len(text.strip().splitlines()) == 1, text
    assert any(word in text for word in words.split("|")), text
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_force_replaces_an_earlier_export_and_nothing_else(exported: tuple[Path, str], tmp_path: Path) -> None:
    root = make_run(tmp_path)
    for out in (tmp_path, root, root / "adapter", tmp_path / "base"):
        text = fails("export", root, "--out", out, "--force")
        assert "which --force would delete" in text or "is not an earlier export" in text
    assert (root / "run.json").exists()
    shutil.copytree(exported[0], tmp_path / "shipped")
    shutil.copytree(root, tmp_path / "shipped" / "run")
    text = fails("export", tmp_path / "shipped" / "run", "--out", tmp_path / "shipped", "--force")
    assert "which --force would delete" in text
    shutil.rmtree(tmp_path / "shipped" / "run")
    (tmp_path / "shipped" / "old").touch()
    succeeds("export", root, "--out", tmp_path / "shipped", "--force")
    assert not (tmp_path / "shipped" / "old").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-run", "base", "shipped"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_ctrl_c_leaves_what_was_there(
    error: BaseException, exported: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_run(tmp_path)
    shutil.copytree(exported[0], tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def full(model: PreTrainedModel, folder: Path, **options: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    code, text = run("export", root, "--out", tmp_path / "out", "--force")
    assert code == (2 if isinstance(error, OSError) else 130)
    assert "No space left" in text or "interrupted" in text
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-run", "base", "out"]


def test_a_real_limit_of_the_disk_is_one_line_too(tmp_path: Path) -> None:
    """A file may grow to 64 KiB and no further: what safetensors says then is not an OSError."""
    root = make_run(tmp_path)
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384)); "
        "from antipasto.app.cli import app; app()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "export", str(root), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "ANTIPASTO_CACHE": os.environ["ANTIPASTO_CACHE"]},
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-run", "base"]


# ── prompts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_prompts_without_the_tasks_file(tmp_path: Path) -> None:
    root = make_run(tmp_path)
    settings = yaml.safe_load((root / "config.yaml").read_text())
    (root / "config.yaml").write_text(yaml.safe_dump({**settings, "task": "gone.py:task"}))
    assert checking._prompts(load_run(root), 4)[0] == "texts"
    rows = [{"prompt": "h01+02="}, {"prompt": "h01+02="}, {"prompt": "s03+04="}]
    write_lines(root / "rollouts.jsonl", rows)
    source, prompts, _ = checking._prompts(load_run(root), 4)
    assert (source, prompts) == ("prompts of the run's rollouts", ["h01+02=", "s03+04="])


# ── card ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _about(**changes: Any) -> About:
    options = {
        "run": "r",
        "base": "owner/model",
        "task": "sums",
        "method": "route",
        "options": {"steps": 3},
        "template": {},
        "versions": {"torch": "2"},
        "layers": 2,
        "numbers": 8,
        "kept": 1.0,
        "dial": 0.0,
        "removed": 0.5,
        "trained": 1.2,
    }
    return About(**{**options, **changes})


def _figures() -> tuple[Written, Check]:
    written = Written(torch.float32, {"a": Loss(1.0, 0.0, 1.0)})
    return written, Check("held-out prompts of task sums", 32, 100, 1e-5, 1e-6, 32, 0.1, None, None, 1e-3)


def _evaluation(
    task: str = "sums", arm: str = "deployed", flag: str = "says !", says: str = "The direction did it."
) -> Evaluation:
    rate, flagged = Estimate(0.5, 0.4, 0.6), Estimate(0.25, 0.2, 0.3)
    arms = [ArmRecord(name, None, 32, {"solve": rate}, {flag: flagged}) for name in ("reference", arm)]
    return Evaluation(task, {}, 0.05, Verdict(True, says), arms, [], [])


EVIL = "x\n---\n# h1 | <script>alert(1)</script> [a](http://b) `c` \x1b[31m ‮" + "y" * 5000


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    about = _about(task=EVIL, method=EVIL, options={EVIL: EVIL}, template={EVIL: EVIL}, versions={"torch": EVIL})
    evaluation = _evaluation(EVIL, EVIL, EVIL, EVIL)
    text = render(about, evaluation, *_figures())
    for bad in ("\n# h1", "<script", "[a]", "\x1b", "‮", "http://", "y" * 1600):
        assert bad not in text, bad
    assert text.count("\n---\n") == 1
    rows = [line for line in text.splitlines() if line.startswith("| ") and "reference" in line]
    assert rows[0].replace("\\|", "").count("|") == 5
    (tmp_path / "README.md").write_text(text)
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "owner/model"


@pytest.mark.parametrize(
    ("licence", "found"), [("apache-2.0", "apache-2.0"), ("'a b: c'", None), ("[1", None), (None, None)]
)
def test_the_base_folder_is_named_and_its_licence_taken_over(
    licence: str | None, found: str | None, tmp_path: Path
) -> None:
    base = tmp_path / "my base"  # no name that the hub takes
    base.mkdir()
    if licence is not None:
        (base / "README.md").write_text(f"---\nlicense: {licence}\n---\n# Base\n")
    text = render(_about(base=str(base)), None, *_figures())
    (tmp_path / "README.md").write_text(text)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.base_model) == (found, None)
    assert "| base model | my base |" in text
    assert str(tmp_path) not in text
