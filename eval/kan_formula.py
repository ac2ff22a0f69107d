"""A KAN of named functions as text that Python can read, and what the rounded text amounts to."""

from dataclasses import dataclass, field

import numpy as np

from bestiary.eval.kan_symbolic import FUNCTIONS, SymbolicNet
from bestiary.layers.base import Tree

_POWERS = {"x**2": 2, "x**3": 3, "x**4": 4, "1/x": -1, "1/x**2": -2}
_NEGLIGIBLE = 5e-4  # of the spread of a sum: terms and constants below are not printed


@dataclass
class Sum:
    """constant + sum of coefficients times terms; a term is a text and its value at the samples."""

    constant: float = 0.0
    terms: dict[str, tuple[float, np.ndarray]] = field(default_factory=dict)

    def add(self, other: "Sum", factor: float = 1.0) -> None:
        self.constant += factor * other.constant
        for text, (coefficient, values) in other.terms.items():
            before = self.terms[text][0] if text in self.terms else 0.0
            self.terms[text] = (before + factor * coefficient, values)

    def scaled(self, factor: float, constant: float = 0.0) -> "Sum":
        result = Sum(constant)
        result.add(self, factor)
        return result

    def spread(self) -> float:
        return float(np.std(sum((k * v for k, v in self.terms.values()), np.zeros(1))))

    def written(self, digits: int) -> tuple[str, np.ndarray]:
        """The text with coefficients of so many digits, and its values."""
        spread, text, total = self.spread(), "", np.zeros(1)
        ordered = sorted(self.terms.items(), key=lambda item: -abs(np.std(item[1][1]) * item[1][0]))
        for name, (coefficient, values) in ordered:
            k = _rounded(coefficient, digits)
            if k and abs(k) * np.std(values) > _NEGLIGIBLE * spread:
                size = "" if abs(k) == 1 else f"{abs(k):.{digits}g}*"
                text += _signed(k, text) + size + name
                total = total + k * values
        constant = _rounded(self.constant, digits)
        if not text or abs(constant) > _NEGLIGIBLE * spread:
            text += _signed(constant, text) + f"{abs(constant):.{digits}g}"
            total = total + constant
        return text, total


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def _signed(value: float, before: str) -> str:
    if before:
        return " - " if value < 0 else " + "
    return "-" if value < 0 else ""


def _atom(text: str) -> str:
    """In brackets, unless it is a name or one call already."""
    depth, bare = 0, True
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        bare &= depth > 0 or letter.isalnum() or letter in "_)"
    return text if bare and not text[0].isdigit() else f"({text})"


def formulas(
    symbolic: SymbolicNet,
    params: list[Tree],
    inputs: list[Sum],
    outputs: tuple[float, float] = (0.0, 1.0),
    digits: int = 4,
) -> list[tuple[str, np.ndarray]]:
    """For each output of the network the formula of constant + factor * output (`outputs`) and the
    values of what is printed, coefficients rounded to `digits` and terms left out that are
    negligible. `inputs` are the network's inputs as sums.

    Raises ValueError for networks with affine maps at their nodes.
    """
    net = symbolic.net
    if net.affine:
        raise ValueError("affine: True; need False to write a formula")
    nodes = inputs
    for i, found in enumerate(symbolic.edges):
        sums = [Sum(float(b)) for b in np.asarray(params[i]["bias"])]
        coefficients = np.asarray(params[i]["edges"], np.float64)
        for (o, j, name), (a, b, c, d) in zip(found, coefficients, strict=True):
            inner = nodes[j].scaled(b, c)
            sums[o].add(_applied(name, inner, digits), a)
            sums[o].constant += d
        adding = net.nodes[i + 1][0]
        products = [sums[k : k + net.arity] for k in range(adding, len(sums), net.arity)]
        nodes = sums[:adding] + [_product(factors, digits) for factors in products]
    constant, factor = outputs
    return [node.scaled(factor, constant).written(digits) for node in nodes]


def _applied(name: str, inner: Sum, digits: int) -> Sum:
    """The function of a sum; factors come out of powers, and constants out of exponents."""
    if name == "x":
        return inner
    if not inner.terms or name == "0":
        return Sum(float(FUNCTIONS[name].of(np, inner.constant)))
    factor = 1.0
    if name in _POWERS or name == "abs":
        largest = max(inner.terms.values(), key=lambda term: abs(term[0] * np.std(term[1])))[0]
        inner = inner.scaled(1 / largest)
        factor = abs(largest) if name == "abs" else largest ** _POWERS[name]
    elif name == "exp":
        factor, inner = float(np.exp(inner.constant)), inner.scaled(1.0, -inner.constant)
    elif name in ("sin", "tanh", "arctan"):
        first = max(inner.terms.values(), key=lambda term: abs(term[0] * np.std(term[1])))[0]
        if first < 0:  # odd functions
            factor, inner = -1.0, inner.scaled(-1.0)
        if name == "sin":  # sin(u + k pi) = (-1)^k sin(u)
            turns = round(inner.constant / np.pi)
            factor *= (-1.0) ** turns
            inner = inner.scaled(1.0, -turns * np.pi)
    text, values = inner.written(digits)
    values = FUNCTIONS[name].of(np, values)
    atom = _atom(text)
    match name:
        case "x**2" | "x**3" | "x**4":
            text = f"{atom}**{_POWERS[name]}"
        case "1/x":
            text = f"{atom}**-1"
        case "1/x**2":
            text = f"{atom}**-2"
        case "exp(-x**2)":
            text = f"exp(-{atom}**2)"
        case _:
            text = f"{name}({text})"
    return Sum(0.0, {text: (factor, values)})


def _product(factors: list[Sum], digits: int) -> Sum:
    """Common factors come out; what is left of each is written in brackets."""
    coefficient, texts, values = 1.0, [], np.ones(1)
    for one in factors:
        if not one.terms:
            coefficient *= one.constant
            continue
        largest = max(one.terms.values(), key=lambda term: abs(term[0] * np.std(term[1])))[0]
        text, value = one.scaled(1 / largest).written(digits)
        coefficient, values = coefficient * largest, values * value
        texts.append(_atom(text))
    if not texts:
        return Sum(coefficient)
    return Sum(0.0, {"*".join(texts): (coefficient, values)})
