"""However a knob is written, the next forward sees it.

Execution that holds on to something derived from the knobs is faster, and the field's trap: ``Tensor._version`` does not
change under fused AdamW, nor under writes through ``.data`` or numpy, so a cache keyed on it trains nothing and says
nothing. Every way of writing that is known stands here. (With a W_θ kept under the knobs' versions, the tests of fused
AdamW, ``.data`` and numpy fail, as they must.)
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from families import FAMILIES, tokens
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from processes import process_group
from torch import nn

import antipasto as ap
from antipasto.adapter.functional import spectral_linear_reference

R, I, O = 4, 5, 6  # noqa: E741


def make(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, ap.LayerKnobs, torch.Tensor]:
    """A wrapped layer that was run already, with and without gradient, as a cache would want it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(I, O)).to(dtype)
    (knobs,) = ap.wrap(model, ap.AntiPastoConfig(target_modules=["0"], rank=R)).values()
    with torch.no_grad():
        knobs.delta_s.normal_()
    x = torch.randn(3, I, dtype=dtype)
    model(x).sum().backward()
    knobs.delta_s.grad.normal_()
    with torch.no_grad():
        model(x)
    return model, knobs, x


def assert_fresh(model: nn.Module, knobs: ap.LayerKnobs, x: torch.Tensor) -> None:
    """Output and gradient are those of the knobs as they are now, in both modes."""
    base = knobs.layer.base_layer
    theta = knobs.delta_s if knobs.delta_s_hack is None else knobs.delta_s + knobs.delta_s_hack
    want = spectral_linear_reference(x, base.weight, base.bias, knobs.U, knobs.Vh, theta.to(x.dtype))
    x = x.detach().requires_grad_()
    got = model(x)
    tolerance = {"atol": 2e-5, "rtol": 1e-5} if x.dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
    torch.testing.assert_close(got, want, **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(model(x), want, **tolerance)
    probe = torch.ones_like(got)
    probe[0] = 2
    (grad_x,) = torch.autograd.grad((got * probe).sum(), x)
    W_theta = base.weight + knobs.U @ torch.diag(theta.to(x.dtype)) @ knobs.Vh
    torch.testing.assert_close(grad_x, probe @ W_theta, **tolerance)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    **{
        f"{name} {how}": lambda p, cls=cls, options=options, how=how: cls(
            p, lr=0.5, **options, **({how: True} if how else {})
        )
        for name, cls, options in [
            ("SGD", torch.optim.SGD, {"momentum": 0.9}),
            ("Adam", torch.optim.Adam, {}),
            ("AdamW", torch.optim.AdamW, {}),
            ("Adagrad", torch.optim.Adagrad, {}),
        ]
        for how in ("", "foreach", "fused")
    },
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.5),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.5),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(optimizer: str) -> None:
    model, knobs, x = make()
    step = OPTIMIZERS[optimizer]([knobs.delta_s])
    for _ in range(3):
        before = knobs.delta_s.detach().clone()
        knobs.delta_s.grad = torch.randn(R)
        step.step(lambda: torch.zeros(()))
        assert not torch.equal(before, knobs.delta_s)
        assert_fresh(model, knobs, x)


def _data_assign(k: ap.LayerKnobs) -> None:
    k.delta_s.data = torch.randn(R)


def _data_add(k: ap.LayerKnobs) -> None:
    k.delta_s.data += 1


def _move_between_the_knobs(k: ap.LayerKnobs) -> None:
    k.delta_s_hack.data.add_(0.5)
    k.delta_s.data.sub_(0.25)


def _new_parameter(k: ap.LayerKnobs) -> None:
    k.layer.delta_s["default"].weight = nn.Parameter(torch.randn(R))


def _load_state_dict(k: ap.LayerKnobs) -> None:
    state = {n: torch.randn_like(p) for n, p in k.layer.state_dict().items()}  # the bias as well
    k.layer.load_state_dict(state | {"base_layer.weight": k.layer.base_layer.weight})


def _load_state_dict_assign(k: ap.LayerKnobs) -> None:
    state = {n: torch.randn_like(p) if "delta_s" in n else p for n, p in k.layer.state_dict().items()}
    k.layer.load_state_dict(state, assign=True)


def _drop(k: ap.LayerKnobs) -> None:
    k.delta_s_hack.data.fill_(5.0)
    ap.drop_quarantine(k.layer)


WRITES: dict[str, Callable[[ap.LayerKnobs], object]] = {
    "data.copy_": lambda k: k.delta_s.data.copy_(torch.randn(R)),
    "data =": _data_assign,
    "data +=": _data_add,
    "one number of data": lambda k: k.delta_s.data[1].fill_(9.0),
    "numpy": lambda k: k.delta_s.detach().numpy().fill(3.0),
    "another tensor on its storage": lambda k: torch.tensor([]).set_(k.delta_s.untyped_storage())[2].fill_(7.0),
    "copy_": torch.no_grad()(lambda k: k.delta_s.copy_(torch.randn(R))),
    "in place": torch.no_grad()(lambda k: k.delta_s.mul_(-2).add_(1)),
    "inference mode": torch.inference_mode()(lambda k: k.delta_s.add_(1)),
    "init": lambda k: nn.init.uniform_(k.delta_s),
    "the quarantine": lambda k: k.delta_s_hack.data.copy_(torch.randn(R)),
    "from one knob to the other": _move_between_the_knobs,
    "vector_to_parameters": lambda k: nn.utils.vector_to_parameters(torch.randn(R), [k.delta_s]),
    "a new parameter": _new_parameter,
    "swap_tensors": lambda k: torch.utils.swap_tensors(k.delta_s, nn.Parameter(torch.randn(R))),
    "load_state_dict": _load_state_dict,
    "load_state_dict, assign": _load_state_dict_assign,
    "load_state_dict of the knob": lambda k: k.layer.delta_s["default"].load_state_dict({"weight": torch.randn(R)}),
    "drop_quarantine": _drop,
}


@pytest.mark.parametrize("write", WRITES)
def test_writes(write: str) -> None:
    model, knobs, x = make()
    before = model(x)
    WRITES[write](knobs)
    assert_fresh(model, knobs, x)
    if write != "drop_quarantine":
        assert not torch.equal(model(x), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_change_of_dtype_and_writes_after_it(dtype: torch.dtype) -> None:
    model, knobs, x = make()
    model.to(dtype)
    assert {knobs.U.dtype, knobs.Vh.dtype, knobs.delta_s.dtype, knobs.layer.base_layer.weight.dtype} == {dtype}
    assert_fresh(model, knobs, x.to(dtype))
    knobs.delta_s.data.mul_(2)
    assert_fresh(model, knobs, x.to(dtype))


def test_change_of_device_takes_everything_along() -> None:
    model, knobs, _ = make()
    model.to("meta")  # a device that every machine has
    tensors = [knobs.U, knobs.S, knobs.Vh, knobs.delta_s, knobs.delta_s_hack, knobs.layer.base_layer.weight]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert model(torch.randn(3, I, device="meta")).device.type == "meta"


def test_a_basis_follows_parameters_that_are_moved_by_themselves() -> None:
    """As `fully_shard` moves a model to a GPU."""
    model, knobs, _ = make()
    for parameter in model.parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.to("meta"), parameter.requires_grad))
    assert not knobs.U.is_meta
    assert model(torch.randn(3, I, device="meta")).device.type == "meta"
    assert knobs.U.is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_there_and_back_on_a_gpu() -> None:
    model, knobs, x = make()
    model.cuda()
    assert_fresh(model, knobs, x.cuda())
    knobs.delta_s.data.mul_(2)
    assert_fresh(model, knobs, x.cuda())
    model.cpu()
    assert_fresh(model, knobs, x)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: _saved(m)])
def test_a_copy_has_knobs_of_its_own(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model, knobs, x = make()
    other = duplicate(model)
    (other_knobs,) = ap.knobs(other).values()
    assert torch.equal(other(x), model(x))
    other_knobs.delta_s.data.mul_(2)
    assert_fresh(other, other_knobs, x)
    assert_fresh(model, knobs, x)
    assert not torch.equal(other(x), model(x))


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_adapters_change_places(tmp_path: Path) -> None:
    family, ids = FAMILIES["llama"], tokens()
    model = get_peft_model(family.build(), ap.AntiPastoConfig())
    model.add_adapter("second", ap.AntiPastoConfig(rank=3))
    outputs = {}
    for name, scale in (("default", 0.1), ("second", 0.2)):
        model.set_adapter(name)
        for layer in ap.knobs(model).values():
            layer.delta_s.data.fill_(scale)
        outputs[name] = model(ids).logits
    assert not torch.allclose(outputs["default"], outputs["second"])
    for name in ("default", "second", "default"):
        model.set_adapter(name)
        assert torch.equal(model(ids).logits, outputs[name])

    state = {
        key: torch.full_like(value, 0.2) for key, value in get_peft_model_state_dict(model).items() if "hack" not in key
    }
    set_peft_model_state_dict(model, state)
    changed = model(ids).logits
    assert not torch.allclose(changed, outputs["default"])
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(family.build(), tmp_path)
    torch.testing.assert_close(
        other(ids).logits, changed
    )  # up to rounding: it is loaded for inference, without gradient
    other.load_adapter(tmp_path / "second", "second")
    other.set_adapter("second")
    torch.testing.assert_close(other(ids).logits, outputs["second"])
    for layer in ap.knobs(other).values():
        layer.delta_s.data.zero_()
    other.load_adapter(tmp_path / "second", "second")  # over the one that is there
    torch.testing.assert_close(other(ids).logits, outputs["second"])


def _receive(rank: int, folder: str) -> None:
    with process_group(rank, folder):
        model, knobs, x = make()
        knobs.delta_s.data.fill_(float(rank))
        model(x)
        torch.distributed.broadcast(knobs.delta_s.data, src=1)
        assert knobs.delta_s.tolist() == [1.0] * R
        assert_fresh(model, knobs, x)
        replica = nn.parallel.DistributedDataParallel(model)  # broadcasts from rank 0, and averages gradients
        knobs.delta_s.grad = None
        replica(x * (rank + 1)).sum().backward()
        torch.optim.AdamW([knobs.delta_s], lr=0.1, fused=True).step()
        assert_fresh(model, knobs, x)
        torch.save(knobs.delta_s.detach(), f"{folder}/{rank}.pt")
        del replica


@pytest.mark.slow
def test_broadcast_between_two_processes(tmp_path: Path) -> None:
    mp.spawn(_receive, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.ones(R))
