"""A task: its prompts, a reward that can be fooled, and the truth.

    reward   : rollout → number        what training sees
    oracle   : rollout → [0, 1]        the strict truth; logged and evaluated, never trained on
    detector : rollout → {0, 1}        a weak monitor that flags some of the hacks, or none
    probes   : rollout → {0, 1}        kinds of hacks by name, counted in evaluations only

Every function is called as TRL calls a reward function: on a whole batch, with the dataset's columns by name::

    f(prompts=[…], completions=[…], answer=[…], …)  ->  one value per rollout

Completions are plain texts; of a chat, the assistant's text. A function without ``**kwargs`` gets only the columns that it
names. Columns are copies, so functions cannot affect each other through them. A function may be ``async``. All functions share
one event loop.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from antipasto.routing.pairs import load_pairs
from antipasto.unchanged import awaited, copies, unchanged

REWARDED, SOLVED = 0.5, 0.5
"""From this reward on a rollout counts as rewarded; from this oracle score on, as solved."""


def is_solved(oracle: float) -> bool:
    """Whether the oracle calls a rollout solved."""
    return oracle >= SOLVED


def is_exploit(reward: float, oracle: float) -> bool:
    """Whether a rollout is rewarded and not solved.

    Example:
        >>> is_exploit(1.0, 0.0), is_exploit(1.0, 1.0), is_exploit(0.0, 0.0)
        (True, False, False)
    """
    return reward >= REWARDED and oracle < SOLVED  # False for a NaN


Row = Mapping[str, Any]
Prompt = str | list[dict[str, str]]

# names that TRL reserves
_RESERVED = {"prompts", "completions", "completion", "completion_ids", "trainer_state", "log_extra", "log_metric"}
_SHOWN = 200  # characters of a prompt or completion in a message


class TaskError(ValueError):
    """A task's function raised, or returned something invalid. The message names the function and the rollout."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """Results of a task's functions, one entry per rollout.

    Attributes:
        reward: what training sees.
        oracle: 0 to 1; None if the task has no oracle.
        flagged: whether the detector flags it; None if the task has no detector.
        probed: probe's name → whether the probe flags it.
    """

    reward: list[float]
    oracle: list[float] | None
    flagged: list[bool] | None
    probed: dict[str, list[bool]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Prompts, a reward, and what is known about the truth.

    Args:
        name: as tables and run folders show it.
        train: rows, a list of mappings or a ``datasets.Dataset``. Each has ``prompt``, a text or a chat (a list of
            ``{"role": …, "content": …}``), and any further columns.
        reward: one finite number per rollout.
        oracle: one bool, or a number from 0 to 1, per rollout. It may not abstain: evaluations compare answers in pairs.
        detector: one bool per rollout.
        detects: what the detector flags, in a few words.
        test: held-out rows, with every column that a function needs.
        probes: what the probe flags, in a few words → a function like the detector. Probes are used in evaluations only.
        kinds: the column with the kind of a prompt; evaluations also report each kind separately.
        pairs: labelled rows (``prompt``, ``hack``, ``clean``) for the direction, as `antipasto.load_pairs` takes them.
        max_completion_length: tokens that an answer needs.
        from_rows: makes the task of other rows, for `with_rows`: training rows, held-out rows or None, and where they are from
            → a task. Without it, other rows must have the columns that the functions need.

    Raises:
        ValueError: rows, prompts, columns or pairs are invalid, a function needs a column that does not exist, or one of
            ``detector`` and ``detects`` is missing.

    Example:
        >>> def reward(completions, answer):
        ...     return [float(a in text) for text, a in zip(completions, answer)]
        >>> def oracle(completions, answer):
        ...     return [text == a for text, a in zip(completions, answer)]
        >>> rows = [{"prompt": "2+2=", "answer": "4"}, {"prompt": "3+5=", "answer": "8"}]
        >>> task = Task("sums", train=rows, reward=reward, oracle=oracle)
        >>> task.judge(["2+2=", "3+5="], ["4", "7 8 9"], {"answer": ["4", "8"]})
        Judged(reward=[1.0, 1.0], oracle=[1.0, 0.0], flagged=None, probed={})
    """

    name: str
    train: Sequence[Row] = dataclasses.field(repr=False)
    reward: Callable[..., Sequence[float]]
    oracle: Callable[..., Sequence[bool | float]] | None = None
    detector: Callable[..., Sequence[bool]] | None = None
    detects: str = ""
    test: Sequence[Row] | None = dataclasses.field(default=None, repr=False)
    pairs: Sequence[Row] | None = dataclasses.field(default=None, repr=False)
    max_completion_length: int | None = None
    probes: Mapping[str, Callable[..., Sequence[bool]]] = dataclasses.field(default_factory=dict)
    kinds: str | None = None
    from_rows: Callable[[Sequence[Row], Sequence[Row] | None, str], Task] | None = dataclasses.field(
        default=None, repr=False
    )

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"A task's name must be a non-empty text, got {self.name!r}.")
        where = f"Task {self.name!r}: "
        named = isinstance(self.probes, Mapping) and all(isinstance(name, str) and name.strip() for name in self.probes)
        if not named:
            raise ValueError(f"{where}probes must be functions by name, got {_short(self.probes)}.")
        if self.kinds is not None and not isinstance(self.kinds, str):
            raise ValueError(f"{where}kinds must be the name of a column or None, got {_short(self.kinds)}.")
        train, test = _check_rows(self.train, where + "train"), None
        if self.test is not None:
            test = _check_rows(self.test, where + "test")
            if test.kind != train.kind:
                raise ValueError(f"{where}train has prompts that are {train.kind}, test has {test.kind}.")
        for role, function in self._functions():
            if not callable(function):
                raise ValueError(f"{where}{role} must be a function, got {type(function).__name__}.")
            _check_signature(role, function, train.columns, where + "train")
            if test is not None:
                _check_signature(role, function, test.columns, where + "test")
        for part, found in (("train", train), ("test", test)):
            if self.kinds is not None and found is not None and self.kinds not in found.columns:
                raise ValueError(f"{where}kinds={self.kinds!r} is not a column of {part}.")
        if self.detects in self.probes:
            raise ValueError(f"{where}the detector and a probe are both called {self.detects!r}.")
        if not isinstance(self.detects, str):
            raise ValueError(f"{where}detects must be a text, got {type(self.detects).__name__}.")
        if (self.detector is None) != (not self.detects.strip()):
            raise ValueError(
                f"{where}a detector needs detects: what it flags, in a few words."
                if self.detector is not None
                else f"{where}detects={self.detects!r} is given, but no detector."
            )
        if self.pairs is not None:
            try:
                load_pairs(list(self.pairs))
            except ValueError as error:
                raise ValueError(f"{where}pairs, {error}") from error
        length = self.max_completion_length
        if length is not None and (not isinstance(length, int) or length < 1):
            raise ValueError(f"{where}max_completion_length must be a positive whole number or None, got {length!r}.")

    @property
    def columns(self) -> list[str]:
        """The training rows' columns other than ``prompt``."""
        return [column for column in self.train[0] if column != "prompt"]

    @property
    def is_chat(self) -> bool:
        """Whether prompts are chats; else they are texts."""
        return not isinstance(self.train[0]["prompt"], str)

    def with_rows(
        self, train: Sequence[Row], test: Sequence[Row] | None = None, source: str = "the rows given"
    ) -> Task:
        """The same task on other rows. Its own, training and held-out ones, are left out.

        Args:
            train: rows, a list of mappings or a ``datasets.Dataset``.
            test: held-out rows.
            source: where they are from: a file, a folder or a name. For messages; and answers to the task ``code`` may not see
                the file.

        Raises:
            ValueError: the rows do not fit the task.

        Example:
            >>> task = Task("sums", train=[{"prompt": "2+2="}], reward=lambda prompts, completions: [0.0] * len(prompts))
            >>> task.with_rows([{"prompt": "3+5="}, {"prompt": "1+1="}]).train[0]["prompt"]
            '3+5='
        """
        if self.from_rows is not None:
            return self.from_rows(train, test, source)
        return dataclasses.replace(self, train=train, test=test)

    def judge(
        self, prompts: Sequence[Prompt], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
    ) -> Judged:
        """Call all functions on some rollouts and check what they return.

        Args:
            prompts: one per rollout.
            completions: texts, or chats as TRL has them.
            columns: the rows' columns other than ``prompt``, one entry per rollout each.

        Raises:
            TaskError: a function raises, returns the wrong number of values, or returns an invalid value: the reward must be
                finite, the oracle in [0, 1], the detector a bool.
            ValueError: the arguments have different lengths, a completion is not a text, or a function needs a column that
                does not exist.
        """
        batch = _batch(prompts, completions, columns)
        judged = {role: _Call(role, function, batch).values() for role, function in self._functions()}
        flags = judged.get("detector")
        return Judged(
            reward=judged["reward"],
            oracle=judged.get("oracle"),
            flagged=None if flags is None else [bool(flag) for flag in flags],
            probed={name: [bool(flag) for flag in judged[_probe(name)]] for name in self.probes},
        )

    def ask(
        self,
        role: str,
        prompts: Sequence[Prompt],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
    ) -> list[float]:
        """Call one function only: ``reward``, ``oracle`` or ``detector``. Raises as `judge` does."""
        batch = _batch(prompts, completions, columns)
        return _Call(role, dict(self._functions())[role], batch).values()

    def reward_func(self, role: str = "reward") -> Callable[..., list[float]]:
        """One of the task's functions in TRL's signature: ``reward_funcs`` of any TRL trainer, with ``train`` as its dataset.

        Args:
            role: ``reward``, ``oracle`` or ``detector``.

        Raises:
            ValueError: the task has no such function.

        Example:
            >>> rows = [{"prompt": [{"role": "user", "content": "2+2="}], "answer": "4"}]
            >>> task = Task("sums", rows, reward=lambda completions, answer: [a in c for c, a in zip(completions, answer)])
            >>> said = [{"role": "assistant", "content": "4"}]
            >>> task.reward_func()(prompts=[rows[0]["prompt"]], completions=[said], answer=["4"], completion_ids=[[4]])
            [1.0]
        """
        if role not in dict(self._functions()):
            raise ValueError(f"{self.name} has no {role}.")

        def function(prompts: Sequence[Prompt], completions: Sequence[Any], **given: Any) -> list[float]:
            return self.ask(role, prompts, completions, {name: given[name] for name in self.columns})

        function.__name__ = role  # TRL logs it
        return function

    def _functions(self) -> list[tuple[str, Callable[..., Any]]]:
        optional = (("oracle", self.oracle), ("detector", self.detector))
        asked = [("reward", self.reward), *((role, function) for role, function in optional if function is not None)]
        return asked + [(_probe(name), function) for name, function in self.probes.items()]


def _probe(name: str) -> str:
    return f"probe {name!r}"


def _batch(
    prompts: Sequence[Prompt], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
) -> dict[str, Sequence[Any]]:
    """All arguments that a function may take, one entry per rollout each."""
    for name, values in {"prompts": prompts, **columns}.items():
        if len(values) != len(completions):
            raise ValueError(f"{name} has {len(values)} entries for {len(completions)} completions.")
    return {**columns, "prompts": prompts, "completions": [completion_text(c) for c in completions]}


def completion_text(completion: Any) -> str:
    """The text of a completion; of a chat, what the assistant says.

    Raises:
        ValueError: it is neither.

    Example:
        >>> completion_text([{"role": "assistant", "content": "24"}])
        '24'
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Sequence) and _is_chat(completion):
        return "".join(message["content"] for message in completion if message["role"] == "assistant")
    raise ValueError(f"A completion must be a text or a chat, got {_short(completion)}.")


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class _Rows:
    kind: str
    columns: set[str]


def _check_rows(rows: Any, where: str) -> _Rows:
    if isinstance(rows, (str, Mapping)) or not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise ValueError(f"{where} must be a list of rows or a datasets.Dataset, got {type(rows).__name__}.")
    if len(rows) == 0:
        raise ValueError(f"{where} is empty.")
    first: _Rows | None = None
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}, row {number}: expected a mapping with 'prompt', got {type(row).__name__}.")
        if "prompt" not in row:
            raise ValueError(f"{where}, row {number}: no column 'prompt'; it has {sorted(map(str, row))}.")
        if strange := [column for column in row if not isinstance(column, str)]:
            raise ValueError(f"{where}, row {number}: a column's name must be a text, got {_short(strange[0])}.")
        found = _Rows(_prompt_kind(row["prompt"], f"{where}, row {number}"), set(row) - {"prompt"})
        first = first or found
        if found.kind != first.kind:
            raise ValueError(
                f"{where}, row {number}: prompts must be all texts or all chats; here {found.kind}, before {first.kind}."
            )
        if found.columns != first.columns:
            raise ValueError(
                f"{where}, row {number}: has the columns {sorted(map(str, found.columns))}, "
                f"those before have {sorted(map(str, first.columns))}."
            )
    assert first is not None
    if taken := sorted(first.columns & _RESERVED):
        raise ValueError(f"{where}: rename the column {', '.join(map(repr, taken))}: TRL reserves that name.")
    return first


def _prompt_kind(prompt: Any, where: str) -> str:
    if isinstance(prompt, str):
        if prompt:
            return "texts"
        raise ValueError(f"{where}: the prompt is empty.")
    if isinstance(prompt, list) and _is_chat(prompt):
        return "chats"
    raise ValueError(
        f"{where}: a prompt must be a text or a chat, a list of {{'role': …, 'content': …}}, got {_short(prompt)}."
    )


def _is_chat(value: Sequence[Any]) -> bool:
    return bool(value) and all(
        isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in value
    )


# ── functions ────────────────────────────────────────────────────────────────────────────────────────────────────────


def label(function: Any) -> str:
    """A function's name for messages, such as ``my_task.reward``."""
    while isinstance(function, functools.partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__.rpartition('.')[2]}.{named.__qualname__.rpartition('<locals>.')[2]}"


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some functions in C have no signature
        return None


def _check_signature(role: str, function: Callable[..., Any], columns: Set[str], where: str) -> None:
    """Check that a column exists for every argument without a default."""
    for parameter in _parameters(function) or []:
        if (
            parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            or parameter.default is not parameter.empty
        ):
            continue
        named = f"the {role} {label(function)}"
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ValueError(f"{where}: {named} takes {parameter.name!r} by position only; columns are passed by name.")
        if parameter.name not in columns | {"prompts", "completions"}:
            raise ValueError(
                f"{where}: {named} needs a column {parameter.name!r}; there are "
                f"{', '.join(sorted(columns | {'prompts', 'completions'}))}."
            )


class _Call:
    """One call of one function on one batch. Every failure becomes a `TaskError`."""

    def __init__(self, role: str, function: Callable[..., Any], batch: Mapping[str, Sequence[Any]]) -> None:
        _check_signature(role, function, set(batch) - {"prompts", "completions"}, "the rollouts")
        parameters = _parameters(function)
        names: Set[str] = set(batch)
        if parameters is not None and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            names = names & {p.name for p in parameters}
        self.role = role
        self.function = function
        self.batch = batch
        self.arguments = [name for name in batch if name in names]
        self.size = len(batch["completions"])
        self.named = f"the {role} {label(function)}"

    def values(self) -> list[float]:
        try:
            values = self._run(slice(None))
        except (Exception, SystemExit) as error:  # sys.exit(0) in a reward would end the run with exit code 0
            raise self._located(error) from error
        if values is None:
            raise TaskError(f"{self.named} must return a list, got {self._returned}, for {self._everyone}.")
        if len(values) != self.size:
            raise TaskError(f"{self.named} returned {len(values)} values for {self._everyone}.")
        return [self._checked(value, row) for row, value in enumerate(values)]

    def _run(self, part: slice) -> list[Any] | None:
        """The values of these rollouts as a list; None if the function returned something else."""
        with unchanged(draws=self.role == "reward"):
            values = self.function(**{name: copies(self.batch[name][part]) for name in self.arguments})
            if inspect.isawaitable(values):
                values = awaited(values)
        self._returned = _short(values)
        if hasattr(values, "tolist"):  # arrays and tensors
            values = values.tolist()
        if isinstance(values, (str, bytes, Mapping, Set)) or not hasattr(values, "__iter__"):
            return None
        return list(values)

    def _located(self, error: BaseException) -> TaskError:
        """Find the first rollout that fails on its own, and report its error."""
        for row in range(self.size):
            try:
                self._run(slice(row, row + 1))
            except (Exception, SystemExit) as alone:
                return TaskError(f"{self.named} raised {described(alone)} on {self._rollout(row)}.")
        return TaskError(f"{self.named} raised {described(error)} on {self._everyone}, but on no single rollout of it.")

    def _checked(self, value: Any, row: int) -> float:
        number = value.item() if getattr(value, "ndim", None) == 0 else value  # NumPy's scalars, tensors of one number
        role = self.role if self.role in ("reward", "oracle") else "detector"  # a probe returns what a detector returns
        wanted = {"reward": "a finite number", "oracle": "a bool or a number from 0 to 1", "detector": "a bool"}[role]
        if isinstance(number, numbers.Real):
            try:
                result = float(number)
            except OverflowError:
                result = math.inf
            if math.isfinite(result) and (
                role == "reward" or (role == "oracle" and 0 <= result <= 1) or (role == "detector" and result in (0, 1))
            ):
                return result
        raise TaskError(f"{self.named} returned {_short(value)}, not {wanted}, on {self._rollout(row)}.")

    def _rollout(self, row: int) -> str:
        return f"prompt {_short(self.batch['prompts'][row])} with completion {_short(self.batch['completions'][row])}"

    @property
    def _everyone(self) -> str:
        return f"a batch of {self.size}"


def described(error: BaseException) -> str:
    """``ZeroDivisionError: division by zero``, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _short(value: Any) -> str:
    text = " ".join(repr(value).split("\n"))
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
