"""Extract the direction in which a layer's knobs move when the model learns to hack, from labelled pairs.

For pair n and one layer, with NLL the completion's negative log-likelihood given the prompt, per token by default:

    d_n    = ∇θ NLL(hack_n) − ∇θ NLL(clean_n)        the mean over texts, if a side has several         (r,)
    effect = mean_n d_n / std_n d_n         per coordinate: the paired effect size, t / √pairs       (r,)
    V      = "tstat"  effect / ‖effect‖                                                            (1, r)
             "mean"   mean_n d_n / ‖·‖                                                             (1, r)
             "svd"    top k right singular vectors of D = [d_n], signs by majority of the pairs    (k, r)

V points along ∇NLL(hack) − ∇NLL(clean), so a move Δ of δS is hack-ward where −V Δ > 0 (`gates`). Rows of V are
orthonormal. `strength` is mean_n (V d_n) divided by its standard deviation over the pairs.

An effect size (d_z in Cohen 1988) does not depend on the number of pairs, so a threshold on it carries over to other sets.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antipasto.adapter.fingerprints import Fingerprint, check_same_base, fingerprints_from_json, fingerprints_to_json
from antipasto.adapter.knobs import current_fingerprints, knobs
from antipasto.adapter.rollouts import TokenIds, nll_gradients, tokenize
from antipasto.files import read_tensors, readable_as, write_tensors
from antipasto.names import Estimator
from antipasto.routing.pairs import ContrastPair

ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
_FORMAT = "antipasto-direction-2"
_RANDOM_DRAWS = 20  # number of random directions that a held-out score is compared with


# ── directions ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Overlap(NamedTuple):
    """Cosines between two directions: 1 if they are the same, 0 if unrelated, -1 if opposite."""

    overall: float
    layers: dict[str, float]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """How well a direction orders held-out pairs.

    Attributes:
        pairs: number of pairs.
        overall: share of pairs with Σ_layers Σ_rows V d > 0.
        layers: the same share for each layer.
        random: mean of the same share over 20 random directions of the same shape.
    """

    pairs: int
    overall: float
    layers: dict[str, float]
    random: float


class Direction(Mapping[str, Tensor]):
    """Layer name → V (k, r): orthonormal rows along ∇NLL(hack) − ∇NLL(clean), fp32 on the CPU.

    Args:
        rows: layer name → (k, r) or (r,), orthonormal rows.
        effect: layer name → (r,) signed effect sizes, which the coordinate gate needs; or None.
        strength: layer name → (k,) effect size along each row; ones if None.
        fingerprints: layer name → `Fingerprint` of the base weight and its basis. Empty if unknown, or to skip the check of
            the base.
        heldout: the score on held-out pairs, if there is one.

    Raises:
        ValueError: there is no layer, shapes do not match, numbers are not finite, or rows are not orthonormal.

    Example:
        >>> v = Direction({"mlp.up_proj": torch.tensor([0.6, 0.8])})
        >>> v["mlp.up_proj"].shape, (-v)["mlp.up_proj"]
        (torch.Size([1, 2]), tensor([[-0.6000, -0.8000]]))
    """

    def __init__(
        self,
        rows: Mapping[str, Tensor],
        *,
        effect: Mapping[str, Tensor] | None = None,
        strength: Mapping[str, Tensor] | None = None,
        fingerprints: Mapping[str, Fingerprint] | None = None,
        heldout: HeldOut | None = None,
    ) -> None:
        for name, V in rows.items():
            if V.ndim not in (1, 2) or V.numel() == 0 or not V.is_floating_point():
                raise ValueError(
                    f"{name}: expected V of shape (k, r) or (r,), floating point, got {tuple(V.shape)} {V.dtype}."
                )
        self._rows = {name: _clean(V).reshape(-1, V.shape[-1]) for name, V in rows.items()}
        if not self._rows:
            raise ValueError("A direction needs at least one layer.")
        self.effect = None if effect is None else {name: _clean(effect[name]) for name in self._rows}
        self.strength = {
            name: torch.ones(len(V), dtype=V.dtype) if strength is None else _clean(strength[name])
            for name, V in self._rows.items()
        }
        self.fingerprints = dict(fingerprints or {})
        self.heldout = heldout
        for name, V in self._rows.items():
            self._check(name, V)

    def _check(self, name: str, V: Tensor) -> None:
        k, r = V.shape
        if self.strength[name].shape != (k,):
            raise ValueError(f"{name}: strength has shape {tuple(self.strength[name].shape)}, expected ({k},).")
        if self.effect is not None and self.effect[name].shape != (r,):
            raise ValueError(f"{name}: effect has shape {tuple(self.effect[name].shape)}, expected ({r},).")
        numbers = [V, self.strength[name]] + ([] if self.effect is None else [self.effect[name]])
        if not all(torch.isfinite(t.norm()) for t in numbers):
            raise ValueError(
                f"{name}: the direction contains a NaN, an Inf or a number too large for its norm to be finite."
            )
        if not torch.allclose(V @ V.T, torch.eye(k, dtype=V.dtype), atol=1e-3):
            raise ValueError(
                f"{name}: the rows of V must have unit length and be orthogonal to each other; V Vᵀ is "
                f"{(V @ V.T).tolist()}. Divide by the norm, or take the rows of torch.linalg.qr(V.T).Q.T."
            )

    def __getitem__(self, name: str) -> Tensor:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"Direction({len(self)} layers, {sum(len(V) for V in self.values())} rows, effect={self.effect is not None})"

    def __neg__(self) -> Direction:
        """The opposite direction, with hack and clean swapped."""
        return self._map(lambda _, t: -t)

    def overlap(self, other: Direction) -> Overlap:
        """Agreement with another direction, over the layers that both have.

        Per layer: the cosine, if both have one row; else the mean cosine of the principal angles, with the sign of the sum
        of row-wise products. Overall: the mean over layers.

        Raises:
            ValueError: the directions have no layer in common, or differ in a layer's r.
        """
        layers = {}
        for name in self:
            if name in other:
                V, W = self[name], other[name]
                if V.shape[1] != W.shape[1]:
                    raise ValueError(f"{name}: one direction has r={V.shape[1]}, the other {W.shape[1]}.")
                products = V @ W.T
                sign = -1.0 if products.diagonal().sum() < 0 else 1.0
                layers[name] = sign * float(torch.linalg.svdvals(products).mean())
        if not layers:
            raise ValueError("The two directions have no layer in common.")
        return Overlap(sum(layers.values()) / len(layers), layers)

    def random(self, seed: int) -> Direction:
        """A control: random orthonormal rows, and normally distributed effect sizes with the same root mean square."""
        generator = torch.Generator().manual_seed(seed)
        rows, effect = {}, {}
        for name, V in self.items():
            rows[name] = torch.linalg.qr(torch.randn(V.T.shape, generator=generator, dtype=V.dtype)).Q.T
            if self.effect is not None:
                spread = self.effect[name].square().mean().sqrt()
                effect[name] = torch.randn(V.shape[1], generator=generator, dtype=V.dtype) * spread
        return self._with(rows, effect or None)

    def permuted(self, seed: int) -> Direction:
        """A control: the same numbers with each layer's coordinates shuffled."""
        generator = torch.Generator().manual_seed(seed)
        order = {name: torch.randperm(V.shape[1], generator=generator) for name, V in self.items()}
        return self._map(lambda name, t: t[..., order[name]])

    def _map(self, function: Callable[[str, Tensor], Tensor]) -> Direction:
        """Apply a function of layer name and tensor to all rows and effect sizes."""
        rows, effect = ({n: function(n, t) for n, t in part.items()} for part in (self, self.effect or {}))
        return self._with(rows, effect or None)

    def _with(self, rows: Mapping[str, Tensor], effect: Mapping[str, Tensor] | None) -> Direction:
        return Direction(rows, effect=effect, strength=self.strength, fingerprints=self.fingerprints)

    def to_tensors(self) -> dict[str, Tensor]:
        """The direction as tensors with flat names, for a safetensors file; `from_tensors` reads them back."""
        tensors = {f"V {name}": V for name, V in self.items()}
        tensors |= {f"strength {name}": s for name, s in self.strength.items()}
        return tensors | {f"effect {name}": t for name, t in (self.effect or {}).items()}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], fingerprints: Mapping[str, Fingerprint], heldout: HeldOut | None = None
    ) -> Direction:
        """Create a direction from the output of `to_tensors`.

        Raises:
            KeyError: a name has another form.
        """
        parts: dict[str, dict[str, Tensor]] = {"V": {}, "strength": {}, "effect": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition(" ")
            parts[part][name] = tensor
        return cls(
            parts["V"],
            effect=parts["effect"] or None,
            strength=parts["strength"],
            fingerprints=fingerprints,
            heldout=heldout,
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, with the fingerprints of the base weights."""
        metadata = {
            "format": _FORMAT,
            "fingerprints": fingerprints_to_json(self.fingerprints),
            "heldout": json.dumps(self.heldout and dataclasses.asdict(self.heldout)),
        }
        write_tensors(path, self.to_tensors(), metadata)

    @classmethod
    def load(cls, path: str | Path) -> Direction:
        """Read a file that `save` wrote.

        Raises:
            ValueError: the file is not a direction, or is damaged. The message names it.
            OSError: the file cannot be read.
        """
        with readable_as("direction", path):
            tensors, metadata = read_tensors(path, _FORMAT)
            heldout = json.loads(metadata["heldout"])
            fingerprints = fingerprints_from_json(metadata["fingerprints"])
            return cls.from_tensors(tensors, fingerprints, None if heldout is None else HeldOut(**heldout))

    def check_base(self, model: nn.Module, found: Mapping[str, Fingerprint] | None = None) -> None:
        """Check that this direction belongs to a model's active adapter and base weights.

        Args:
            model: an adapted model.
            found: `current_fingerprints` of its layers, if already computed; if None, all base weights are hashed.

        Raises:
            ValueError: a layer is missing, or has another r or base weight. The message names the layers.

        Warns:
            BaseWarning: the base is the same up to rounding, or was decomposed elsewhere, and some singular directions are
                unsettled by that (`antipasto.adapter.fingerprints`).
        """
        layers = knobs(model)
        for name, V in self.items():
            if name not in layers:
                raise ValueError(
                    f"The direction has a layer {name}, which is not among the adapted layers of this model."
                )
            if V.shape[1] != layers[name].numbers:
                raise ValueError(f"{name}: the direction has r={V.shape[1]}, the layer {layers[name].numbers}.")
        check_same_base(
            {name: one for name, one in self.fingerprints.items() if name in self},
            found or current_fingerprints({name: layers[name] for name in self}),
            {name: layers[name].S for name in self},
            what="The direction",
            remedy="Extract it again on this base, or clear its `fingerprints` to use it anyway.",
        )


def _clean(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone()


# ── extraction ───────────────────────────────────────────────────────────────────────────────────────────────────────


def extract_direction(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[ContrastPair],
    *,
    estimator: Estimator = "tstat",
    k: int = 1,
    heldout: Sequence[ContrastPair] | None = None,
    shuffle_labels: int | None = None,
    length_normalise: bool = True,
    append_eos: bool = True,
    batch_size: int = 16,
) -> Direction:
    """Extract the direction in which the model's knobs move when it learns the hacks instead of the clean answers.

    One backward per batch of pairs, in `rollout_grads`. Nothing is written to the model or its gradients. The model is used
    in its present view: inside `deployed`, that is the deployed policy. Call ``model.eval()`` first if it has dropout.

    Args:
        model: an adapted causal LM.
        tokenizer: its tokenizer. Its chat template is applied to chats; texts are used as they are.
        pairs: at least two.
        estimator: ``"tstat"``, ``"mean"`` or ``"svd"``. Effect sizes are kept with each of them.
        k: rows per layer; more than one only with ``"svd"``.
        heldout: further pairs, which are scored but not used for the direction.
        shuffle_labels: a control: swap hack and clean in a random half of the pairs, chosen by this seed.
        length_normalise: take the NLL per token of the completion, so that long answers do not outweigh short ones; if
            False, the sum.
        append_eos: whether completions end with the end-of-sequence token, as sampled completions do.
        batch_size: pairs per backward.

    Returns:
        The `Direction` with effect sizes, strengths, the base's fingerprints, and the score of ``heldout`` if given.

    Raises:
        ValueError: the model is not adapted, there are too few pairs, the estimator is unknown or cannot have k rows, or a
            completion has no token.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}.")
    if k < 1 or (k > 1 and estimator != "svd"):
        raise ValueError(f"k={k} rows need estimator='svd'; {estimator!r} has one row.")
    if len(pairs) < 2:
        raise ValueError(f"The standard deviation over pairs needs at least two pairs, got {len(pairs)}.")
    if len(pairs) < k:
        raise ValueError(f"k={k} rows need at least as many pairs, got {len(pairs)}.")
    pairs = _swap(pairs, shuffle_labels)
    differences = functools.partial(
        pair_differences,
        model,
        tokenizer,
        length_normalise=length_normalise,
        append_eos=append_eos,
        batch_size=batch_size,
    )

    rows, effect, strength = {}, {}, {}
    for name, D in differences(pairs).items():
        effect[name] = effect_size(D)
        rows[name] = _estimate(D, effect[name], estimator, k)
        strength[name] = effect_size(D @ rows[name].T)
    layers = knobs(model)
    fingerprints = current_fingerprints({name: layers[name] for name in rows})
    direction = Direction(rows, effect=effect, strength=strength, fingerprints=fingerprints)
    if heldout:
        direction.heldout = score(direction, differences(heldout))
    return direction


def effect_size(D: Tensor) -> Tensor:
    """Mean / standard deviation of each column, (n, r) to (r,); 0 where a column is constant."""
    mean, std = D.mean(0), D.std(0)
    return torch.where(std > 0, mean / std.clamp_min(torch.finfo(D.dtype).tiny), 0)


def cosine(gradients: Tensor, t: Tensor) -> Tensor:
    """cos(g_b, t) of gradients (b, R) with t (R,): (b,); 0 for a zero gradient."""
    norms = gradients.norm(dim=-1) * t.norm().to(gradients.device)
    return (gradients @ t.to(gradients.device)) / norms.clamp_min(torch.finfo(gradients.dtype).tiny)


def pair_differences(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[ContrastPair],
    *,
    length_normalise: bool = True,
    append_eos: bool = True,
    batch_size: int = 16,
) -> dict[str, Tensor]:
    """Compute d_n = ∇θ NLL(hack_n) − ∇θ NLL(clean_n) of every pair: layer name → (pairs, r), fp32 on the CPU."""
    layers = knobs(model)
    collected: dict[str, list[Tensor]] = {}
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        sequences: list[TokenIds] = []
        columns = sum(len(pair.hacks) + len(pair.cleans) for pair in part)
        weights = torch.zeros(len(part), columns, dtype=torch.float32)
        for n, pair in enumerate(part):
            for texts, sign in ((pair.hacks, 1.0), (pair.cleans, -1.0)):
                weights[n, len(sequences) : len(sequences) + len(texts)] = sign / len(texts)
                sequences += [tokenize(tokenizer, pair.prompt, text, append_eos=append_eos) for text in texts]
        grads, _ = nll_gradients(model, sequences, per_token=length_normalise)
        for name, layer in layers.items():
            collected.setdefault(name, []).append(weights @ grads[name][:, : layer.numbers].float().cpu())
    return {name: torch.cat(parts) for name, parts in collected.items()}


def score(direction: Direction, differences: Mapping[str, Tensor]) -> HeldOut:
    """Share of pairs that a direction orders as labelled, and the same for random directions of its shape."""

    def projections(v: Direction) -> Tensor:
        return torch.stack([(differences[name] @ V.T).sum(-1) for name, V in v.items()])  # (layers, pairs)

    def share(values: Tensor) -> float:
        return float((values > 0).float().mean())

    own = projections(direction)
    chance = [share(projections(direction.random(seed)).sum(0)) for seed in range(_RANDOM_DRAWS)]
    return HeldOut(
        pairs=own.shape[1],
        overall=share(own.sum(0)),
        layers={name: share(values) for name, values in zip(direction, own, strict=True)},
        random=sum(chance) / len(chance),
    )


def _estimate(D: Tensor, effect: Tensor, estimator: Estimator, k: int) -> Tensor:
    if estimator == "svd":
        V = torch.linalg.svd(D.double(), full_matrices=False).Vh[:k].float()  # (k, r)
        votes = torch.sign(D @ V.T).sum(0)  # each row gets the sign of most pairs
        return V * torch.where(votes < 0, -1.0, 1.0)[:, None]
    row = effect if estimator == "tstat" else D.mean(0)
    norm = row.norm()
    # a layer that no pair moves has no direction: any unit row will do, with strength 0
    return (row / norm if norm > 0 else F.one_hot(torch.tensor(0), len(row)).float())[None]


def _swap(pairs: Sequence[ContrastPair], seed: int | None) -> Sequence[ContrastPair]:
    if seed is None:
        return pairs
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    swapped = set(order[: len(pairs) // 2])
    return [ContrastPair(pair.prompt, pair.clean, pair.hack) if i in swapped else pair for i, pair in enumerate(pairs)]
