"""Options that commands take and files hold, each defined once, as the field of a dataclass. Imports no torch.

    rank: int | None = option(None, "Number of top singular directions per layer.", min=1)

The command line, ``config.yaml``, the checks of types and bounds, and docs/cli.md are all made of such fields.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from antipasto.names import Dtype
from antipasto.options import check_bounds, check_finite, check_types, near

if TYPE_CHECKING:
    from typing_extensions import Self

    from antipasto.adapter import AntiPastoConfig


def option(default: Any, said: str, **typed: Any) -> Any:
    """Define an option as a dataclass field.

    Args:
        default: its default.
        said: its help text.
        typed: ``min`` and ``max``, also checked for values from files; ``type``, if the command line takes another type;
            ``metavar``, ``show_default`` and ``rich_help_panel`` of `typer.Option`.
    """
    return dataclasses.field(default=default, metadata={"help": said, **typed})


def adapter_option(default: Any, said: str, **typed: Any) -> Any:
    """Define an option of the adapter."""
    return option(default, said, rich_help_panel="Adapter", **typed)


@dataclasses.dataclass(kw_only=True)
class AdapterOptions:
    """Which layers of which model are adapted, and how. The base of every command's options that adapts a model.

    Raises:
        ValueError: an option has the wrong type or is out of bounds.

    Example:
        >>> AdapterOptions(rank=0)
        Traceback (most recent call last):
        ...
        ValueError: rank must be at least 1, got 0.
    """

    rank: int | None = adapter_option(None, "Number of top singular directions per layer.", min=1, show_default="all")
    target_modules: list[str] | str | None = adapter_option(
        None,
        "Layers to adapt: comma-separated names, 'all-linear', or a regular expression.",
        type=str,
        metavar="NAMES",
        show_default="known names",
    )
    exclude_modules: list[str] | None = adapter_option(
        None, "Layers of these not to adapt.", type=str, metavar="NAMES", show_default="none"
    )
    cache_dir: str | None = adapter_option(
        "auto", "Cache folder of singular bases.", metavar="DIR", show_default="$ANTIPASTO_CACHE or the user's"
    )
    dtype: Dtype = adapter_option("auto", "Dtype of the weights; 'auto' as saved. Each dtype has its own bases.")

    def __post_init__(self) -> None:
        check_types(self)
        check_finite(self)
        check_bounds(self)

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any], where: str) -> Self:
        """Make the options from values by name. A list may be given as a comma-separated text.

        Args:
            options: values by name.
            where: they come from, for messages.

        Raises:
            ValueError: an option is unknown, invalid or missing.

        Example:
            >>> AdapterOptions.from_mapping({"target_modules": "q_proj, v_proj"}, "here").target_modules
            ['q_proj', 'v_proj']
        """
        fields = options_of(cls)
        for name in options:
            if name not in fields:
                raise ValueError(f"{where}: there is no option {name!r}{near(str(name), fields)}")
        for name, field in fields.items():
            if field.default is field.default_factory is dataclasses.MISSING and options.get(name) is None:
                raise ValueError(f"{where}: {name} is missing.")
        try:
            return cls(**{name: cls.read(name, value) for name, value in options.items()})
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    @classmethod
    def read(cls, name: str, value: Any) -> Any:
        """Parse an option that holds several names; leave others as they are."""
        if name == "target_modules" and isinstance(value, str):
            return targets_of(value)
        return names_of(name, value) if name == "exclude_modules" and isinstance(value, str) else value

    def adapter(self) -> AntiPastoConfig:
        """The adapter's config. The dtype is the model's and not part of it."""
        from antipasto.adapter import AntiPastoConfig  # loads torch

        config = AntiPastoConfig(
            rank=self.rank, target_modules=self.target_modules, exclude_modules=self.exclude_modules
        )
        config.cache_dir = self.cache_dir
        return config


def options_of(kind: type[AdapterOptions]) -> dict[str, dataclasses.Field[Any]]:
    """Name → field: a command's own options, then the adapter's."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    shared = {field.name for field in dataclasses.fields(AdapterOptions)}
    return {name: fields[name] for name in sorted(fields, key=lambda name: name in shared)}  # stable


def names_of(option: str, text: str) -> list[str]:
    """Parse comma-separated names.

    Raises:
        ValueError: a name is empty.
    """
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ValueError(f"{option} takes comma-separated names, got {text!r}.")
    return names


def targets_of(text: str) -> list[str] | str:
    """Parse the layers to adapt: comma-separated names, or as PEFT takes it, ``all-linear`` or a regular expression.

    Example:
        >>> targets_of("q_proj,v_proj"), targets_of("all-linear"), targets_of(".*(q|v)_proj")
        (['q_proj', 'v_proj'], 'all-linear', '.*(q|v)_proj')
    """
    if text == "all-linear" or re.search(r"[^\w., -]", text):
        return text
    return names_of("target_modules", text)
