"""What must hold after pruning: a fraction of the dense model's cost, or an absolute limit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from secateur.core.errors import BudgetError

Quantity = Literal["params", "macs", "memory", "seconds", "sparsity"]

_UNITS = {
    "params": "parameters",
    "macs": "MACs",
    "memory": "bytes",
    "seconds": "seconds",
    "sparsity": "weights",
}


@dataclass(frozen=True, repr=False)
class Budget:
    """A limit for one quantity of a model, made by one of the class methods below.

    Of each quantity either a fraction of the dense model's that may remain is given, 0 < f <= 1, or with
    `at_most=` an absolute limit in the quantity's unit:

    | Budget | limits | unit of `at_most` |
    | --- | --- | --- |
    | `Budget.params(f)` | distinct parameters | parameters |
    | `Budget.macs(f)` | multiply-accumulates of one forward pass on the example inputs | MACs |
    | `Budget.memory(f, batch=, context=)` | parameters, and the KV cache at that batch and context | bytes |
    | `Budget.seconds(f)` | one forward pass on the example inputs, measured on this machine | seconds |
    | `Budget.sparsity(s)` | the fraction of the prunable weights that is removed | |

    Raises `BudgetError` if the fraction is outside its range, `at_most` is not positive, or not exactly one
    of the two is given.

    >>> budget = Budget.macs(0.5)
    >>> budget.limit(3_000_000)
    1500000.0
    >>> print(budget.describe())
    at most 50 % of the dense model's MACs
    >>> Budget.params(at_most=1_000_000)
    Budget.params(at_most=1000000)
    """

    quantity: Quantity
    fraction: float | None = None  # that may remain; for "sparsity" the fraction removed
    at_most: float | None = None
    batch: int = 1
    context: int = 0

    @classmethod
    def params(cls, fraction: float | None = None, *, at_most: float | None = None) -> Budget:
        """Fraction of the dense model's parameters that may remain, or `at_most` so many parameters."""
        return cls("params", fraction, at_most)

    @classmethod
    def macs(cls, fraction: float | None = None, *, at_most: float | None = None) -> Budget:
        """Fraction of the dense model's MACs that may remain, or `at_most` so many MACs.

        MACs are multiply-accumulates of one forward pass on the example inputs, a batch as it is given.
        """
        return cls("macs", fraction, at_most)

    @classmethod
    def memory(
        cls, fraction: float | None = None, *, batch: int = 1, context: int = 0, at_most: float | None = None
    ) -> Budget:
        """Fraction of the dense model's memory that may remain, or `at_most` so many bytes.

        Memory is the parameters as they are stored and the KV cache of `batch` sequences of `context`
        tokens; without a context it is the parameters alone.
        """
        return cls("memory", fraction, at_most, batch, context)

    @classmethod
    def seconds(cls, fraction: float | None = None, *, at_most: float | None = None) -> Budget:
        """Fraction of the dense model's time that may remain, or `at_most` so many seconds.

        The time is that of one forward pass on the example inputs, measured on this machine.
        """
        return cls("seconds", fraction, at_most)

    @classmethod
    def sparsity(cls, sparsity: float) -> Budget:
        """Fraction of the prunable weights that is removed, in [0, 1]; there is no absolute form."""
        return cls("sparsity", sparsity)

    def __post_init__(self) -> None:
        who = f"Budget.{self.quantity}"
        if self.quantity not in _UNITS:
            raise BudgetError(f"A budget limits one of {', '.join(_UNITS)}; got {self.quantity!r}.")
        if self.quantity == "sparsity":
            if self.at_most is not None or not _between(self.fraction, 0.0, 1.0):
                raise BudgetError(f"{who} takes the fraction removed, between 0 and 1; got {self._given()}.")
            return
        if (self.fraction is None) == (self.at_most is None):
            raise BudgetError(
                f"{who} takes either the fraction that may remain, {who}(0.5), or a limit in "
                f"{self.unit}, {who}(at_most=...); got {'both' if self.fraction is not None else 'neither'}."
            )
        if self.fraction is not None and (not _between(self.fraction, 0.0, 1.0) or self.fraction == 0):
            raise BudgetError(
                f"{who} takes the fraction of the dense model's {self.unit} that may remain, above 0 and up "
                f"to 1; got {self.fraction}. A limit in {self.unit} is given as {who}(at_most=...)."
            )
        if self.at_most is not None and (not _between(self.at_most, 0.0, math.inf) or self.at_most == 0):
            raise BudgetError(f"{who}(at_most=...) is a positive number of {self.unit}; got {self.at_most}.")
        if self.batch < 1 or self.context < 0:
            raise BudgetError(
                f"{who} counts the KV cache of batch >= 1 sequences of context >= 0 tokens; "
                f"got batch={self.batch}, context={self.context}."
            )

    @property
    def unit(self) -> str:
        """What `limit` counts."""
        return _UNITS[self.quantity]

    def limit(self, dense: float) -> float:
        """What may remain, in the budget's unit, if the dense model has `dense`.

        A product that is a whole number but for rounding is that number: 29 % of 100 is 29, not
        28.999999999999996. Raises `BudgetError` if `dense` is not a positive number.
        """
        if not _between(dense, 0.0, math.inf) or dense == 0:
            raise BudgetError(f"The dense model's {self.unit} must be a positive number; got {dense}.")
        if self.fraction is None:
            return float(self.at_most or 0)
        share = 1 - self.fraction if self.quantity == "sparsity" else self.fraction
        exact = share * dense
        whole = round(exact)
        near = self.quantity != "seconds" and abs(exact - whole) <= 1e-15 * dense
        return float(whole) if near else exact

    def describe(self) -> str:
        """The budget in words."""
        if self.quantity == "sparsity":
            return f"{100 * (self.fraction or 0):g} % of the prunable weights removed"
        at = f" (KV cache at batch {self.batch}, context {self.context})" if self.context else ""
        if self.fraction is not None:
            return f"at most {100 * self.fraction:g} % of the dense model's {self.unit}{at}"
        return f"at most {format_amount(self.at_most or 0)} {self.unit}{at}"

    def __repr__(self) -> str:
        extra = f", batch={self.batch}, context={self.context}" if self.quantity == "memory" else ""
        return f"Budget.{self.quantity}({self._given()}{extra})"

    def _given(self) -> str:
        parts = [] if self.fraction is None else [f"{self.fraction}"]
        return ", ".join(parts + ([] if self.at_most is None else [f"at_most={self.at_most}"]))


def format_amount(amount: float) -> str:
    """A cost for people: whole numbers with thousands separators, others with four digits.

    >>> format_amount(1234567), format_amount(0.0123456)
    ('1,234,567', '0.01235')
    """
    return f"{int(amount):,}" if float(amount).is_integer() else f"{amount:,.4g}"


def targets(limit: float, dense: float, steps: int) -> tuple[float, ...]:
    r"""Limits for pruning in `steps` steps: a geometric sequence from `dense`, which is left out, to `limit`.

    $$ t_k = d \, (l / d)^{k / n}, \qquad k = 1 \dots n $$

    Each step removes the same fraction of what the one before it left. The last is `limit` itself. All are
    `limit` if the dense model is within it. Raises `BudgetError` if a number is not positive.

    >>> targets(125, 1000, 3)
    (500.0, 250.0, 125)
    """
    if steps < 1:
        raise BudgetError(f"Pruning takes at least one step; got steps={steps}.")
    if not (0 < limit < math.inf and 0 < dense < math.inf):
        raise BudgetError(f"Limits in steps need a positive limit and dense cost; got {limit} and {dense}.")
    if limit >= dense:
        return (limit,) * steps
    return (*(dense * (limit / dense) ** (k / steps) for k in range(1, steps)), limit)


def _between(value: float | None, low: float, high: float) -> bool:
    """Whether a number was given, lies in the range, and is finite; not True or False, nor NaN."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and value is not None and low <= value <= high and value != math.inf
