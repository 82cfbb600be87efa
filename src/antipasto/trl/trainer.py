"""TRL's GRPO trainer with lower rewards for flagged rollouts, routed steps, and a log of all rollouts.

**Score at the reference** (`routing.monitor`). If TRL computes reference log-probabilities for the KL term, at temperature 1,
the same forward gives the monitor's gradients; else the monitor runs its own forward. The rewards of rollouts with a high
score are reduced (`antipasto.trl.rewards`).

**Deployed sampling.** A share of each prompt's rollouts is sampled from the deployed policy. Their log-probabilities and
gradients are also those of the deployed policy, and their advantages are computed within that share
(`antipasto.trl.advantages`). Rollouts of both policies run in the same batches, each with its own θ
(`antipasto.adapter.rows`): all of TRL's forwards of a rollout, for sampling, importance ratios and the loss, use the policy
that sampled it. Both gradients add up to one optimizer step, which the router splits.

**Per-rollout gradients** come from the batch's own backward (`antipasto.adapter.rollouts`). The cosine of each with the
router's direction is logged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import GRPOTrainer

from antipasto.adapter.knobs import knobs, require_finite_gradients
from antipasto.adapter.layer import View
from antipasto.adapter.rollouts import RolloutGrads, TokenIds, backward_by_sequence, completion_nll, rollout_grads
from antipasto.adapter.rows import RowViews
from antipasto.adapter.views import adapted_layers, fixed, mixed, seen_as
from antipasto.evaluation import rollout_log
from antipasto.evaluation.rollout_log import Rollout
from antipasto.names import Flagged
from antipasto.routing.monitor import Monitor, at_origin
from antipasto.routing.router import Router
from antipasto.tasks import completion_text, is_exploit
from antipasto.trl.advantages import deployed_positions, group_advantages
from antipasto.trl.callbacks import RoutingCallback
from antipasto.trl.judges import Judge, ask
from antipasto.trl.rewards import discounted, penalised
from antipasto.unchanged import unchanged

DEPLOY_FRACTION = 0.5


class RoutedGRPOTrainer(GRPOTrainer):
    """`GRPOTrainer` with a router, a monitor or detector, an oracle, and a log of its rollouts. All of them are optional.

    Neither detector nor oracle can affect training: the global random generators are restored after each call. Changes that
    they or the reward functions make to default dtype and device, grad mode or working directory are undone
    (`antipasto.unchanged`).

    Args:
        *args: as for `GRPOTrainer`, like all keyword arguments not listed here.
        router: a `Router` of the trainer's model; or a function from the adapted model to one.
        detector: a function that flags rollouts with one bool, 0 or 1 each. It is called like a reward function, with
            ``prompts``, ``completions``, ``completion_ids``, the dataset's columns, ``trainer_state``, ``log_extra`` and
            ``log_metric``. It may be async. Without ``**kwargs``, it gets only the arguments that it names.
        monitor: flags rollouts by their score at the reference, instead of a detector. A `Monitor` of the trainer's model; or
            a function from the adapted model to one, which is called before ``router`` is.
        flagged: what happens to flagged rollouts; ``"penalty"`` if None. ``"penalty"``: if their reward, the weighted sum of
            all reward functions, is positive, it becomes 0. ``"discount"``: the positive reward of any rollout is multiplied
            by 1 − w, with w the position of its score between clean texts and hacks (`Monitor.depth`), so that advantages
            decrease with the score (as in Wu and Tang 2026, arXiv:2604.01476). ``"watch"``: they are only counted and logged.
        oracle: a function that tells whether rollouts are really solved, called like the detector: one number in [0, 1] each,
            or None or NaN to abstain. Rollouts without an answer count neither as exploits nor as solved. The oracle is
            logged and never used in training.
        deploy_fraction: share of each prompt's rollouts to sample from the deployed policy. If None, .5 if the router has
            ``mode="route"``, else 0.
        rollout_log: file for the log of rollouts (`antipasto.evaluation.rollout_log`).

    Raises:
        ValueError: options exclude each other. During training: a detector's or oracle's answer is invalid, or a gradient has
            a NaN or Inf.
    """

    def __init__(
        self,
        *args: Any,
        router: Router | Callable[[nn.Module], Router] | None = None,
        detector: Judge | None = None,
        monitor: Monitor | Callable[[nn.Module], Monitor] | None = None,
        flagged: Flagged | None = None,
        oracle: Judge | None = None,
        deploy_fraction: float | None = None,
        rollout_log: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.monitor = monitor if monitor is None or isinstance(monitor, Monitor) else monitor(self.model)
        self.router = router if router is None or isinstance(router, Router) else router(self.model)
        self.detector, self.oracle = detector, oracle
        if flagged is not None and not self._flags_rollouts:
            raise ValueError(f"flagged={flagged!r} needs a detector or a monitor.")
        self.flagged: Flagged = "penalty" if flagged is None else flagged
        routes = self.router is not None and self.router.mode == "route"
        self.deploy_fraction = DEPLOY_FRACTION if deploy_fraction is None and routes else deploy_fraction or 0.0
        self._deployed = deployed_positions(self.num_generations, self.deploy_fraction)
        self._check_options()
        self._rollouts: list[Rollout] = []  # of the present generation, on this process
        self._sequences: list[TokenIds] = []  # its prompts and completions
        self._scores: list[float] | None = None  # the monitor's scores of these
        self._all_rewards = torch.empty(0)  # of the present generation, on all processes
        self._grads: RolloutGrads | None = None
        self._shown: list[int] = []  # indices of the present micro-batch's rollouts in the generation
        self._views: RowViews | None = None
        self.sampler: Any = ()  # of the prompts; none for a stream, whose order has the number of its pass
        self.rollout_log = None if rollout_log is None else Path(rollout_log)
        if self.rollout_log is not None:
            self.rollout_log.parent.mkdir(parents=True, exist_ok=True)
            self.add_callback(_LogContinues(self.rollout_log))
        if self.router is not None:
            self._routing = RoutingCallback(self.router)
            self._routing.install(self)
        self.add_callback(_OrderContinues(self))

    def _check_options(self) -> None:
        if self.flagged not in get_args(Flagged):
            raise ValueError(f"flagged must be one of {', '.join(get_args(Flagged))}, got {self.flagged!r}.")
        if self.detector is not None and self.monitor is not None:
            raise ValueError("Rollouts are flagged by a detector or by a monitor: give only one of them.")
        if self.flagged == "discount" and (self.monitor is None or self.monitor.calibration is None):
            raise ValueError("flagged='discount' needs a monitor calibrated on pairs: use Monitor.from_pairs.")
        if self.monitor is not None:
            _ = self.monitor.threshold  # raises an error if there is none
        if self.deploy_fraction and (self.router is None or self.router.mode != "route"):
            raise ValueError(f"deploy_fraction={self.deploy_fraction} needs a router with mode='route'.")
        acts = self._flags_rollouts and self.flagged != "watch"
        if not self.deploy_fraction and not acts:
            return
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "Deployed sampling, penalty and discount use the sum of all rewards: set "
                "multi_objective_aggregation='sum_then_normalize'."
            )
        if self.deploy_fraction and (
            self.tools or self.environment_factories or self.rollout_func or self.use_transformers_continuous_batching
        ):
            raise ValueError(
                "Deployed sampling needs single-turn rollouts by generate or vLLM, without tools, environments, rollout_func "
                "or continuous batching. Set deploy_fraction=0."
            )

    @property
    def _flags_rollouts(self) -> bool:
        return self.detector is not None or self.monitor is not None

    # ── a generation ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:  # evaluation uses the policy as trained
            return super()._generate_and_score_completions(inputs)
        deployed = self._deployed_rows(len(inputs))
        self._scores = None
        if self._views is not None:
            self._views.set(deployed)
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            if self._views is not None:
                self._views.set(None)
        if self.deploy_fraction:
            output["advantages"] = self._advantages()
        output["rollout"] = torch.arange(len(inputs), device=deployed.device)
        output["deployed_rows"] = deployed
        advantages = output["advantages"].tolist()
        for rollout, advantage, row in zip(self._rollouts, advantages, deployed.tolist(), strict=True):
            rollout.advantage = advantage
            rollout.view = "deployed" if row else "trained"
        self._say_how_it_went()
        return output

    def _deployed_rows(self, n: int) -> Tensor:
        """Which of this process's n rows use the deployed policy; TRL's groups may span processes."""
        device = self.accelerator.device
        first = self.accelerator.process_index * n
        position = torch.arange(first, first + n, device=device) % self.num_generations
        return self._deployed.to(device)[position]

    def _generate(self, prompts: list[Any]) -> Any:
        result = super()._generate(prompts)
        prompts, completions, tool_masks, *_ = result
        self._sequences = list(map(TokenIds, prompts, completions, tool_masks or [None] * len(prompts)))
        return result

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> Tensor:
        with unchanged():
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if not self.model.training:
            return rewards
        rollouts = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids_list}
        rollouts |= self._columns(inputs)
        flags = None if self.detector is None else ask("detector", self.detector, rollouts)
        if self.monitor is not None:
            if self._scores is None:
                self._scores = self._score(self.monitor)
            flags = [score > self.monitor.threshold for score in self._scores]
        truth = None if self.oracle is None else ask("oracle", self.oracle, rollouts)
        weights = self.reward_weights.to(rewards.device)
        local = self._local((rewards * weights).nansum(1)).tolist()
        self._rollouts = [
            Rollout(
                step=self.state.global_step,
                prompt=prompts[i],
                completion=completions[i],
                reward=local[i],
                oracle=None if truth is None else truth[i],
                flagged=None if flags is None else flags[i],
                view="",
                advantage=0.0,
                score=None if self._scores is None else self._scores[i],
                **self._tokens_of(completions[i], self._sequences[i]),
            )
            for i in range(len(prompts))
        ]
        if self.flagged == "penalty" and flags is not None:
            here = torch.tensor(flags, device=rewards.device)
            rewards = penalised(rewards, self.accelerator.gather(here), weights)
        if self.flagged == "discount":
            assert self.monitor is not None
            depth = self.monitor.depth(torch.tensor(self._scores, device=rewards.device))
            rewards = discounted(rewards, self.accelerator.gather(depth), weights)
        nobody_scored = rewards.isnan().all(1)
        self._all_rewards = (rewards * weights).nansum(1).masked_fill(nobody_scored, torch.nan)
        return rewards

    def _score(self, monitor: Monitor) -> list[float]:
        """The monitor's scores of this generation, from a separate forward."""
        if self._views is not None:
            self._views.set(None)
        scores = monitor.score_tokens(self._sequences, batch_size=self.args.per_device_train_batch_size)
        if self._views is not None:
            self._views.set(self._deployed_rows(len(self._sequences)))
        return scores.tolist()

    def _tokens_of(self, completion: Any, sequence: TokenIds) -> dict[str, Any]:
        """Whether a completion was truncated, and its token ids and tool mask if its text does not determine them."""
        _, ids, tool_mask = sequence
        truncated = bool(ids) and ids[-1] not in [*self.eos_token_ids, self._tokenizer.pad_token_id]
        told = self._tokenizer(completion_text(completion), add_special_tokens=False)["input_ids"]
        if not truncated:
            told = [*told, self._tokenizer.eos_token_id]
        if tool_mask is None and list(ids) == told:
            return {"truncated": truncated}
        return {"truncated": truncated, "completion_ids": list(ids), "tool_mask": tool_mask and list(tool_mask)}

    def _local(self, of_all: Tensor) -> Tensor:
        """This process's part of a tensor that covers all processes."""
        n = len(of_all) // self.accelerator.num_processes
        return of_all[self.accelerator.process_index * n : (self.accelerator.process_index + 1) * n]

    def _columns(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """What TRL passes to a reward function in addition to the rollouts."""
        own = ("prompt", "completion", "completion_ids")
        columns: dict[str, Any] = {key: [row[key] for row in inputs] for key in inputs[0] if key not in own}
        columns |= {
            "trainer_state": self.state,
            "log_extra": self._log_completion_extra,
            "log_metric": self._log_metric,
        }
        return columns if self.environments is None else columns | {"environments": self.environments}

    def _advantages(self) -> Tensor:
        """Advantages of this process's rollouts, within the two groups of each prompt."""
        rewards = self._all_rewards.view(-1, self.num_generations)
        ours = group_advantages(rewards, self._deployed.to(rewards.device), self.scale_rewards).view(-1)
        for _ in range(len(ours)):
            self._logs["advantages"].pop()
        self._logs["advantages"].extend(ours.tolist())
        return self._local(ours)

    def _say_how_it_went(self) -> None:
        """Add means over all rollouts of the generation, and over those of each policy, to TRL's metrics."""
        metrics: dict[str, list[float]] = defaultdict(list)
        lengths = [sum(one.own) for one in self._sequences]
        scorable = self._local(~self._all_rewards.isnan()).tolist()
        for rollout, length, has_reward in gather_object(list(zip(self._rollouts, lengths, scorable, strict=True))):
            of_one = {"completions/mean_length": length}
            if has_reward:  # as in TRL, a rollout that no reward function has a number for is in no mean
                of_one["reward"] = rollout.reward
            of_all: dict[str, float] = {}
            if rollout.flagged is not None:
                of_all["flagged"] = rollout.flagged
            if rollout.score is not None:
                of_all["score"] = rollout.score
            if rollout.oracle is not None:
                of_all["oracle"] = rollout.oracle
                of_all["exploit"] = is_exploit(rollout.reward, rollout.oracle)
            for name, value in of_all.items():
                metrics[name].append(value)
            if self.deploy_fraction:
                for name, value in (of_one | of_all).items():
                    metrics[f"{name}/{rollout.view}"].append(value)
        for name, values in metrics.items():
            self._metrics["train"][name].append(sum(values) / len(values))

    def _generate_single_turn(
        self, prompt_ids: list[Any], images: Any, multimodal_fields: dict[str, Any], num_generations: int, **kwargs: Any
    ) -> tuple[list[Any], Any]:
        if not (self.use_vllm and self.deploy_fraction and self.model.training):
            with nullcontext() if self.use_vllm else fixed(self.model):  # vLLM has its weights by merging
                return super()._generate_single_turn(prompt_ids, images, multimodal_fields, num_generations, **kwargs)
        assert self._views is not None
        if images or multimodal_fields:
            raise ValueError("Deployed sampling with vLLM supports text only, not images. Set deploy_fraction=0.")
        deployed = self._deployed_rows(len(prompt_ids)).tolist()
        self._views.set(None)
        completion_ids: list[Any] = [None] * len(prompt_ids)
        logprobs: list[Any] = [None] * len(prompt_ids)
        for view, share in ((View.DEPLOYED, True), (View.TRAINED, False)):
            rows = [row for row, is_deployed in enumerate(deployed) if is_deployed is share]
            k = int((self._deployed == share).sum())
            self._last_loaded_step = -1  # makes TRL send this policy's weights to the engine
            with seen_as(self.model, view):
                ids, lps = super()._generate_single_turn([prompt_ids[row] for row in rows], None, {}, k, **kwargs)
            for row, tokens, lp in zip(rows, ids, lps, strict=True):
                completion_ids[row], logprobs[row] = tokens, lp
        self._views.set(self._deployed_rows(len(prompt_ids)))
        return completion_ids, logprobs

    # ── a micro-batch ────────────────────────────────────────────────────────────────────────────────────────────────

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run one micro-batch as in TRL; then check the gradients and log each rollout's alignment with the direction."""
        with rollout_grads(self.model) if self.router is not None else nullcontext() as self._grads:
            try:
                loss = super().training_step(model, inputs, num_items_in_batch)
            finally:
                if self._views is not None:
                    self._views.set(None)
            if not self.args.fp16:  # in fp16, gradients are scaled and steps that overflow are skipped
                layers = knobs(self.model)  # check before clipping, which would spread a NaN to all gradients
                require_finite_gradients({n: layer.delta_s.grad for n, layer in layers.items()}, self.state.global_step)
            if self.router is not None:
                self._log_alignment(self.router)
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0:
            self._flush()
        return loss

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        if self._views is not None:  # until the backward is over, since checkpointing runs the forward again
            self._views.set(inputs["deployed_rows"])
        self._shown = inputs["rollout"].tolist()
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        if self.monitor is not None and self._is_reference_forward(kwargs):
            return self._scored_forward(self.monitor, *args, **kwargs)
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _is_reference_forward(self, options: dict[str, Any]) -> bool:
        """Whether this is TRL's forward of the base model for the KL term of a generation, as a score needs it.

        That is, with text inputs only, whole completions, and log-probabilities at temperature 1: TRL divides the logits by
        the sampling temperature, which changes the gradient.
        """
        off = next(iter(adapted_layers(self.model).values())).disable_adapters
        inputs = {name for name, value in options.items() if value is not None} - {"batch_size"}
        fits = self.temperature == 1 and not self.mask_truncated_completions
        return self.model.training and off and not inputs and fits

    def _scored_forward(
        self,
        monitor: Monitor,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **nothing: None,
    ) -> tuple[Tensor, None, None]:
        """The reference's log-probabilities of the completions' tokens (b, t). The same forward also gives the scores."""
        logprobs, scores = [], []
        for start in range(0, len(input_ids), batch_size or len(input_ids)):
            rows = slice(start, start + (batch_size or len(input_ids)))
            with torch.enable_grad(), at_origin(self.model), rollout_grads(self.model, detach=True) as grads:
                part, *_ = super()._get_per_token_logps_and_entropies(
                    model, input_ids[rows], attention_mask[rows], logits_to_keep
                )
                own = attention_mask[rows, -logits_to_keep:] * self._tool_mask(logits_to_keep)[rows]
                backward_by_sequence(completion_nll(part, own), grads)
            logprobs.append(part.detach())
            scores.append(monitor.cosines(grads))
        self._scores = torch.cat(scores).tolist()
        return torch.cat(logprobs), None, None

    def _tool_mask(self, width: int) -> Tensor:
        """Which completion tokens of this generation the policy wrote (b, width), 0 after a completion's end."""
        masks = [[*one.own, *[0] * (width - len(one.own))] for one in self._sequences]
        return torch.tensor(masks, device=self.accelerator.device)

    def _log_alignment(self, router: Router) -> None:
        assert self._grads is not None
        live = router.alignment(router.flatten(self._grads)).tolist()
        for index, score in zip(self._shown, live, strict=True):
            if self._rollouts[index].hackward is None:  # only in the first iteration; later ones are off-policy
                self._rollouts[index].hackward = score

    def _flush(self) -> None:
        """Write this generation's rollouts to the log."""
        if self.rollout_log is not None:
            rollouts = gather_object(self._rollouts)
            if self.accelerator.is_main_process:
                rollout_log.append(self.rollout_log, rollouts)
        self._rollouts = []

    # ── a run ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self.sampler = super()._get_train_sampler(dataset)
        return self.sampler

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does; a resumed run also loads the router's books from its checkpoint."""
        if self.router is not None and isinstance(resume_from_checkpoint, (str, Path)):
            self._routing.resume_from = resume_from_checkpoint
        with mixed(self.model) if self.deploy_fraction else nullcontext() as self._views:
            try:
                result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            finally:
                self._views = None
                if self.router is not None:  # also after an exception
                    self._routing.detach()
        self._flush()  # the last generation, if the run ended before all of its steps
        return result


class _OrderContinues(TrainerCallback):
    """Lets a run that resumes after its first pass over the prompts continue with their order in that pass.

    TRL's sampler draws an order at the beginning of every pass. One that is new would draw the first pass's again.
    """

    def __init__(self, trainer: RoutedGRPOTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for _ in range(int(state.epoch or 0)):
            next(iter(self.trainer.sampler), None)


class _LogContinues(TrainerCallback):
    """At the start of a run, removes the log's entries from the present step on, which the run will write."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            rollout_log.truncate(self.path, state.global_step)
