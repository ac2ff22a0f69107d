"""The multi-layer perceptron on vectors."""

from collections.abc import Callable

from bestiary.layers.base import Array, Aux, Layer, Tree, layer, positive
from bestiary.layers.batch_norm import run
from bestiary.layers.linear import Linear


@layer
class Perceptron(Layer):
    """Affine maps with an activation between each two: [..., widths[0]] -> [..., widths[-1]]."""

    widths: tuple[int, ...]
    activations: tuple[Layer, ...]
    """One for each width but the first and the last."""
    gain: float = 2**0.5
    """Of the initial matrices before an activation: 2 ** 0.5 for ReLU (He et al. 2015)."""

    def __post_init__(self) -> None:
        positive(**{f"widths[{i}]": width for i, width in enumerate(self.widths)})
        if len(self.widths) < 2 or len(self.activations) != len(self.widths) - 2:
            raise ValueError(
                f"activations: {len(self.activations)} for widths {self.widths}; need at least two "
                "widths, and one activation for each but the first and the last"
            )

    @property
    def linears(self) -> tuple[Linear, ...]:
        last = len(self.widths) - 2
        return tuple(
            Linear(
                inputs=inputs,
                outputs=outputs,
                axes=("embed", "mlp") if i % 2 == 0 else ("mlp", "embed"),
                bias=True,
                gain=1.0 if i == last else self.gain,
            )
            for i, (inputs, outputs) in enumerate(zip(self.widths, self.widths[1:], strict=False))
        )

    def spec(self) -> Tree:
        linears = {f"linear_{i}": linear for i, linear in enumerate(self.linears)}
        return linears | {f"activation_{i}": f for i, f in enumerate(self.activations)}

    def apply(self, params: Tree, x: Array) -> Array:
        return self.run(params, x, training=False)[0]

    def train(self, params: Tree, x: Array, where: Array | None = None) -> tuple[Array, Aux]:
        """With batch statistics in activations that have such; `where` is as theirs."""
        return self.run(params, x, training=True, where=where)

    def run(
        self, params: Tree, x: Array, training: bool, where: Array | None = None
    ) -> tuple[Array, Aux]:
        parts = {}
        for i, linear in enumerate(self.linears):
            x = linear.apply(params[f"linear_{i}"], x)
            if i < len(self.activations):
                name = f"activation_{i}"
                x, parts[name] = run(self.activations[i], params[name], x, training, where)
        return x, Aux.join(**parts)


def perceptron(widths: tuple[int, ...], activation: Callable[[int], Layer]) -> Perceptron:
    """With `activation(width)` behind every affine map but the last."""
    return Perceptron(widths=widths, activations=tuple(map(activation, widths[1:-1])))
