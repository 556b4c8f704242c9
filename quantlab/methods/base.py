"""What a quantization method is, and the register of all of them.

A method is one file in this folder with one `@register`ed class. Lists on the page, the help of the
command line, the README's table and the contract tests all come from here and from the frozen
`Config` of each entry, whose fields carry label, range and help in their metadata (`option`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from quantlab.calibration import ActStats, StatKind
from quantlab.errors import ConfigError
from quantlab.models import Block, LoadedModel
from quantlab.packing import PackedWeight, Storage
from quantlab.peers.environments import Peer
from quantlab.training.workshop import Workshop
from quantlab.types import OptionValue, VariantSpec

Default = TypeVar("Default")
Step = Callable[[int, int], None]
"""Called with (steps done, steps)."""


def option(
    default: Default,
    label: str,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    step: float | None = None,
    choices: tuple[OptionValue, ...] | None = None,
    paper: str = "",
) -> Default:
    """A `Config` field: its default, its label and help for page and command line, its range.

    `choices` makes a drop-down, a bool a checkbox, `minimum`/`maximum` a bounded number.
    `paper` says what the paper uses, where that differs from the default.
    """
    metadata = {
        "label": label,
        "help": help,
        "minimum": minimum,
        "maximum": maximum,
        "step": step,
        "choices": choices,
        "paper": paper,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """Options of a method. Subclasses add fields with `option`; `bits` and `group_size` are
    filled from the variant and the run where a method has them."""

    def validate(self) -> None:
        """Refuse combinations that cannot work.

        Raises: ConfigError that names the option and what would be right.
        """
        for field in dataclasses.fields(self):
            check_option(field, getattr(self, field.name))

    def to_json(self) -> dict[str, OptionValue]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


OUTER_BITS = (16, 8, 6, 5, 4, 3, 2)
"""Widths of embedding and head; 16 leaves them alone."""


@dataclass(frozen=True, kw_only=True)
class WeightConfig(Config):
    """Options of every method that packs weights: the embedding and the output head as well.

    `quantlab.outer` rounds them: they have no block, so no method's own arithmetic applies.
    """

    embedding_bits: int = option(
        16,
        "Embedding bits",
        "Bits of the token embedding; 16 leaves it alone. Where it serves as head too (tied), set "
        "the head's alike.",
        choices=OUTER_BITS,
        paper="16",
    )
    head_bits: int = option(
        16,
        "Head bits",
        "Bits of the output head; 16 leaves it alone.",
        choices=OUTER_BITS,
        paper="16",
    )

    def outer_bits(self) -> tuple[int, int]:
        """(embedding, head) bits."""
        return self.embedding_bits, self.head_bits


SHARED_OPTIONS = tuple(field.name for field in dataclasses.fields(WeightConfig))
"""Options that stand after a method's own in lists."""


def check_option(field: dataclasses.Field[Any], value: object) -> None:
    """Raise ConfigError when `value` has the wrong type or lies outside the field's range."""
    meta = field.metadata
    kind = type(field.default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{field.name}={value!r}: needs a {kind.__name__}")
    choices = meta.get("choices")
    if choices is not None and value not in choices:
        raise ConfigError(f"{field.name}={value}: choose one of {', '.join(map(str, choices))}")
    low, high = meta.get("minimum"), meta.get("maximum")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"{field.name}={value}: needs a finite number")
        if low is not None and value < low:
            raise ConfigError(f"{field.name}={value}: needs at least {low}")
        if high is not None and value > high:
            raise ConfigError(f"{field.name}={value}: needs at most {high}")


def missing_packages(*names: str) -> tuple[str, ...]:
    """Which of these optional packages are not installed; imports none of them."""
    return tuple(name for name in names if importlib.util.find_spec(name) is None)


class Quantizer(ABC):
    """A method: names, what it needs, and the arithmetic on one block.

    `bits` lists the bit widths a person can ask for (empty: the method has none to choose).
    `needs` lists the activation statistics `quantize_block` reads; none means no calibration. A
    method whose options change that overrides `needs_for`, which is what everyone else asks.
    `sees_error` false: they are those of the unquantized model, at one forward pass instead of two.
    `sequential`: `quantize_block` may be called with the linears of one input at a time (a block
    with only those, and no folds), and then sees the error of the linears before them as well.
    `reads_files`: the weights lie quantized in files that an option names; `quantize_block` is
    never called.
    `peer`: the program that quantizes the whole model in its own environment (`quantlab.peers`) and
    leaves a checkpoint; `needs` is then what it collects by itself, `peer_seconds` about what it
    takes for a model of the bundled one's size, and `quantize_block` is never called.
    `trains` says that the weights come from `train`, which takes long and can be gone on with after
    it was stopped; `quantize_block` is then what such a method gives without any training.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    bits: ClassVar[tuple[int, ...]] = ()
    needs: ClassVar[tuple[StatKind, ...]] = ()
    quantizes: ClassVar[bool] = True
    trains: ClassVar[bool] = False
    reads_files: ClassVar[bool] = False
    peer: ClassVar[Peer | None] = None
    peer_seconds: ClassVar[float] = 0.0
    sees_error: ClassVar[bool] = True
    sequential: ClassVar[bool] = False
    Config: ClassVar[type[Config]]

    @property
    def packs(self) -> bool:
        """Whether `quantize_block` is asked: not for originals, files and peers."""
        return self.quantizes and not self.reads_files and self.peer is None

    @abstractmethod
    def quantize_block(
        self, block: Block, stats: Mapping[str, ActStats], config: Any
    ) -> dict[str, PackedWeight]:
        """Quantize every linear of `block`.

        `stats` maps each linear's name to the statistics of its input. Norms (and, for folds, other
        linears) of the block may be rewritten in place, such that the float function stays equal.
        Returns the packed weight of each linear by name. Raises MethodError.
        """

    def train(
        self, model: LoadedModel, ids: Tensor, config: Any, workshop: Workshop
    ) -> dict[str, PackedWeight]:
        """Learn the weights of every block on the tokens `ids` (int64 [pieces, length]).

        Only called where `trains`. Returns the packed weight of each linear by its full path; other
        weights of the blocks (norms) may be rewritten in place, and the linears are replaced by the
        caller. Reports to `workshop`, keeps checkpoints there, and given the same workshop again
        goes on from the last one with the same result. Raises: MethodError.
        """
        raise NotImplementedError

    def train_passes(self, config: Any) -> float:
        """Forward passes over the calibration tokens that `train` costs, for the estimate."""
        return 0.0

    def plan(self, model: LoadedModel, ids: Tensor | None, config: Any, step: Step) -> Any:
        """What `quantize_block` receives as its config, decided on the whole original model.

        Called once, before anything is changed; must leave `model` as it is. ids: int64 [pieces,
        length], None without calibration; `step` takes (done, total). Raises: MethodError,
        ConfigError for a config that does not fit this model.
        """
        return config

    def report(
        self, model: LoadedModel, plan: Any, packed: Mapping[str, PackedWeight]
    ) -> dict[str, Any]:
        """What the record keeps of the plan (plain JSON); `model` is quantized by now."""
        return {}

    def quantize_outer(
        self, weight: Tensor, kind: str, tied_head: bool, config: Any
    ) -> PackedWeight | None:
        """Quantize the embedding ('token_embd') or head ('output'); None leaves it in 16 bits.

        weight: float [rows, columns]; `tied_head` says that the embedding serves as head too.
        """
        return None

    def whole_model(self, config: Any) -> bool:
        """Whether all blocks have to be in memory at once: for training from end to end, or for a
        plan that is measured on the whole model. The others are read and put away one by one."""
        return self.trains

    def needs_for(self, config: Any) -> tuple[StatKind, ...]:
        """The statistics `quantize_block` reads with this `config`."""
        return self.needs

    def storage(self, config: Any) -> Storage:
        """What the packed weights will be, so that a file format can refuse before any work.

        This serves methods on uniform grids, one for each row and group.
        """
        return Storage(
            "affine",
            (self.weight_bits(config),),
            getattr(config, "group_size", None),
            bool(getattr(config, "symmetric", False)),
            outer=config.outer_bits() if isinstance(config, WeightConfig) else (16, 16),
        )

    def content(self, config: Any) -> str | None:
        """What decides the weights beside the options: the fingerprint of files that they name."""
        return None

    def check(self, config: Any) -> None:
        """Refuse what can be seen to fail before a run starts, by looking at files for instance;
        a `Config` refuses only what its own values say. Raises: ConfigError, ModelError."""
        config.validate()

    def weight_bits(self, config: Any) -> int:
        """Nominal bits a weight, without scales."""
        return int(config.bits)

    def activation_bits(self, config: Any) -> int:
        """Bits of the activations that enter the matrix products."""
        return 16


_REGISTRY: dict[str, Quantizer] = {}
Method = TypeVar("Method", bound=type[Quantizer])


def register(cls: Method) -> Method:
    """Class decorator: one instance of the method becomes part of QuantLab."""
    _REGISTRY[cls.name] = cls()
    return cls


def registry() -> Mapping[str, Quantizer]:
    return _REGISTRY


def build_config(method: Quantizer, variant: VariantSpec, group_size: int | None = None) -> Any:
    """The frozen `Config` of a variant: its options over the run's group size over the defaults.

    Raises: ConfigError for an unknown option, a value out of range or bits the method lacks.
    """
    fields = {f.name: f for f in dataclasses.fields(method.Config)}
    values: dict[str, OptionValue] = {}
    if "group_size" in fields and group_size is not None:
        values["group_size"] = group_size
    if method.bits:
        bits = method.bits[0] if variant.bits is None else variant.bits
        if bits not in method.bits:
            allowed = ", ".join(map(str, method.bits))
            raise ConfigError(
                f"{variant.label}: {method.name} has no {bits} bits; choose {allowed}"
            )
        values["bits"] = bits
    elif variant.bits is not None:
        raise ConfigError(f"{variant.label}: {method.name} has no bits to choose")
    for key, value in variant.options:
        if key not in fields or key == "bits":
            known = ", ".join(sorted(set(fields) - {"bits"})) or "none"
            raise ConfigError(f"{variant.label}: unknown option {key}; {method.name} has {known}")
        values[key] = value
    try:
        config = method.Config(**{k: parse_option(fields[k], v) for k, v in values.items()})
        config.validate()
    except ConfigError as error:
        raise ConfigError(f"{variant.label}: {error}", error.hint) from None
    return config


_PARSERS: dict[type, Callable[[str], OptionValue]] = {int: int, float: float, str: str}


def parse_option(field: dataclasses.Field[Any], value: OptionValue) -> OptionValue:
    """Text from the command line to the type of the field's default; other values pass."""
    kind = type(field.default if field.default is not MISSING else "")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, str) or kind is str:
        return value
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise ConfigError(f"{field.name}={value}: needs true or false")
        return value.lower() == "true"
    try:
        return _PARSERS[kind](value)
    except ValueError:
        raise ConfigError(f"{field.name}={value}: needs a {kind.__name__}") from None
