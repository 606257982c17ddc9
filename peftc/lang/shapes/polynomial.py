"""Symbolic sizes: polynomials over names, exact and in normal form, so that equal sizes compare equal.

    >>> d, k = symbol("d_in"), symbol("k")
    >>> str(k * divide(d, k)), divide(d + d, constant(2)) == d
    ('d_in', True)

Negative powers stand for quotients that a size takes as exact (d_in / k). What is no polynomial (`d_in // b`,
`min(d_in, d_out)`) becomes an *atom*, a name that is the text of it; two equal texts are one atom. Results that grow
beyond small bounds are None, "not known", for the expressions come from strangers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from peftc.lang.sites import DIMS

Monomial = tuple[tuple[str, int], ...]
"""Names with their powers, in alphabetical order; () for the constant term."""

_MOST_TERMS, _LARGEST_POWER, _MOST_BITS, _LONGEST_ATOM = 64, 64, 256, 200
_PLAIN = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True)
class Polynomial:
    """A sum of monomials; `terms` holds no zero coefficient."""

    terms: Mapping[Monomial, Fraction] = field(hash=False)

    def __add__(self, other: Polynomial) -> Polynomial:
        found = dict(self.terms)
        for monomial, coefficient in other.terms.items():
            found[monomial] = found.get(monomial, Fraction()) + coefficient
        return Polynomial({monomial: coefficient for monomial, coefficient in found.items() if coefficient})

    def __sub__(self, other: Polynomial) -> Polynomial:
        return self + Polynomial({monomial: -coefficient for monomial, coefficient in other.terms.items()})

    def __mul__(self, other: Polynomial) -> Polynomial:
        found: dict[Monomial, Fraction] = {}
        for one, a in self.terms.items():
            for two, b in other.terms.items():
                product = _times(one, two)
                found[product] = found.get(product, Fraction()) + a * b
        return Polynomial({monomial: coefficient for monomial, coefficient in found.items() if coefficient})

    @property
    def value(self) -> Fraction | None:
        """The number it is, or None when it holds a name."""
        if not self.terms:
            return Fraction()
        return self.terms.get(()) if len(self.terms) == 1 else None

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name for monomial in self.terms for name, _ in monomial)

    @property
    def atoms(self) -> frozenset[str]:
        """Names that stand for a part which is no polynomial."""
        return frozenset(name for name in self.names if not _PLAIN.fullmatch(name))

    def holds_of(self, test: Callable[[Fraction], bool]) -> bool:
        """Whether `test` holds of every coefficient; true of zero."""
        return all(test(coefficient) for coefficient in self.terms.values())

    def __str__(self) -> str:
        if not self.terms:
            return "0"
        ordered = sorted(self.terms.items(), key=lambda item: (item[1] < 0, not item[0], _order(item[0])))
        text = ""
        for monomial, coefficient in ordered:
            sign = (" - " if coefficient < 0 else " + ") if text else ("-" if coefficient < 0 else "")
            text += sign + _shown(monomial, abs(coefficient))
        return text


def constant(value: int | Fraction) -> Polynomial:
    return Polynomial({(): Fraction(value)} if value else {})


def symbol(name: str) -> Polynomial:
    return Polynomial({((name, 1),): Fraction(1)})


ONE = constant(1)


def bounded(found: Polynomial) -> Polynomial | None:
    """`found`, or None when it is too large to reckon with further."""
    if len(found.terms) > _MOST_TERMS:
        return None
    for monomial, coefficient in found.terms.items():
        if max(coefficient.numerator.bit_length(), coefficient.denominator.bit_length()) > _MOST_BITS:
            return None
        if any(abs(power) > _LARGEST_POWER for _, power in monomial):
            return None
    return found


def power(base: Polynomial, exponent: int) -> Polynomial | None:
    """`base` to a whole power; None for what is no polynomial of reasonable size."""
    if exponent < 0:
        return divide(ONE, base) if exponent == -1 else None
    found: Polynomial | None = ONE
    for _ in range(min(exponent, _LARGEST_POWER + 1)):
        found = bounded(found * base)
        if found is None:
            return None
    return found


def divide(a: Polynomial, b: Polynomial) -> Polynomial | None:
    """a / b for a single term b, or where b times a number is a."""
    if not b.terms:
        return None
    if len(b.terms) > 1:
        monomial, coefficient = next(iter(b.terms.items()))
        ratio = a.terms.get(monomial, Fraction()) / coefficient
        return constant(ratio) if a == b * constant(ratio) else None
    ((monomial, coefficient),) = b.terms.items()
    inverse = tuple((name, -exponent) for name, exponent in monomial)
    return bounded(a * Polynomial({inverse: 1 / coefficient}))


def floor_divide(a: Polynomial, b: Polynomial) -> Polynomial | None:
    """a // b: the quotient where b divides a, whatever the names stand for, else an atom."""
    if a.value is not None and b.value:
        return constant(a.value // b.value)
    exact = divide(a, b)
    if exact is not None and exact.holds_of(lambda c: c.denominator == 1) and _no_quotient(exact):
        return exact
    return atom(f"{_operand(a)} // {_operand(b)}")


def remainder(a: Polynomial, b: Polynomial) -> Polynomial | None:
    """a % b, as a number or an atom."""
    if a.value is not None and b.value:
        return constant(a.value % b.value)
    return atom(f"{_operand(a)} % {_operand(b)}")


def extreme(word: str, parts: list[Polynomial]) -> Polynomial | None:
    """min or max of sizes: the one that is so for all values of the names, else an atom."""
    sign = 1 if word == "min" else -1
    for one in parts:
        if all((other - one).holds_of(lambda c: sign * c >= 0) for other in parts):
            return one
    return atom(f"{word}({', '.join(sorted(str(part) for part in parts))})")


def atom(text: str) -> Polynomial | None:
    return symbol(text) if len(text) <= _LONGEST_ATOM else None


def substitute(found: Polynomial, values: Mapping[str, Polynomial]) -> Polynomial | None:
    """`found` with names replaced; None when that leaves the bounds, or divides by what is no single term."""
    if not values.keys() & found.names:
        return found
    total: Polynomial | None = constant(0)
    for monomial, coefficient in found.terms.items():
        term: Polynomial | None = constant(coefficient)
        for name, exponent in monomial:
            factor = power(values.get(name, symbol(name)), abs(exponent))
            if factor is None or term is None:
                return None
            term = bounded(term * factor) if exponent > 0 else divide(term, factor)
        if term is None:
            return None
        total = bounded(total + term)
        if total is None:
            return None
    return total


def names_of_atom(text: str) -> frozenset[str]:
    """The plain names that an atom is made of."""
    return frozenset(_PLAIN.findall(text)) - {"min", "max"}


def _no_quotient(found: Polynomial) -> bool:
    return all(exponent > 0 for monomial in found.terms for _, exponent in monomial)


def _times(one: Monomial, two: Monomial) -> Monomial:
    powers = dict(one)
    for name, exponent in two:
        powers[name] = powers.get(name, 0) + exponent
    return tuple(sorted((name, exponent) for name, exponent in powers.items() if exponent))


_RANK = {name: index for index, name in enumerate(("B", "S", *DIMS))}


def _order(monomial: Monomial) -> list[tuple[int, str]]:
    return sorted((_RANK.get(name, -1), name) for name, _ in monomial)


def _shown(monomial: Monomial, coefficient: Fraction) -> str:
    """A term as one would write it: `2 * kv_heads * head_dim`, `d_in / k`."""
    bare = coefficient.numerator == 1 and any(exponent > 0 for _, exponent in monomial)
    over = [] if bare else [str(coefficient.numerator)]
    under = [] if coefficient.denominator == 1 else [str(coefficient.denominator)]
    for _, name in _order(monomial):
        exponent = dict(monomial)[name]
        text = name if _PLAIN.fullmatch(name) or name.endswith(")") else f"({name})"
        text += f" ** {abs(exponent)}" if abs(exponent) > 1 else ""
        (over if exponent > 0 else under).append(text)
    shown = " * ".join(over)
    if not under:
        return shown
    return f"{shown} / {under[0]}" if len(under) == 1 else f"{shown} / ({' * '.join(under)})"


def _operand(found: Polynomial) -> str:
    text = str(found)
    return text if re.fullmatch(r"\w+", text) else f"({text})"
