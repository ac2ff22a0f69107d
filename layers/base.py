"""The layer contract: hyper-parameters, parameters declared once, and a pure apply.

A layer is a frozen dataclass of hyper-parameters and sub-layers. `spec()` declares its parameters;
everything else (initialisation, abstract shapes, shardings, counts, costs, optimiser masks) is a
map over that declaration.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from bestiary.layers.sharding import pspec

Array = jax.Array
Tree = Any  # a nested dict; the leaves depend on the function
Initializer = Callable[[Array, tuple[int, ...], Any], Array]  # (key, shape, dtype) -> array
DTypeName = Literal["float32", "bfloat16", "float16"]

BATCH_AXES = ("layers", "experts")  # leading axes that hold independent copies of a parameter


def zeros(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    del key
    return jnp.zeros(shape, dtype)


def ones(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    del key
    return jnp.ones(shape, dtype)


def constant(value: float) -> Initializer:
    return lambda key, shape, dtype: jnp.full(shape, value, dtype)


def normal(std: float) -> Initializer:
    return lambda key, shape, dtype: std * jax.random.normal(key, shape, dtype)


def uniform(bound: float) -> Initializer:
    """Between -bound and bound."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


@dataclass(frozen=True)
class Param:
    """One declared parameter, cache entry or state.

    `axes` are logical names (see `sharding.AXES`), one per dimension. `inputs` counts the
    dimensions that a contraction sums over, after any leading `layers`/`experts` axes; None marks
    what is not a matrix (a gain, a bias, an embedding table). `active` is the share of the entries
    that one token uses. `advance` gives a state its next value once per optimiser step, from the
    dict of parameters that holds it, for all copies of a stack at once, on leading axes; what a
    layer returns in `Aux.state` is handed from one micro-batch of the step to the next. A `table`
    has rows [..., rows, slices, width] of which a step uses few: the optimiser has options for
    them.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer = zeros
    dtype: Any = jnp.float32
    trainable: bool = True
    inputs: int | None = None
    active: float = 1.0
    advance: Callable[[Tree], Array] | None = None
    table: bool = False
    decay: bool = True

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"{self.shape=} and {self.axes=} must have equal lengths")

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * jnp.dtype(self.dtype).itemsize

    @property
    def batch_ndim(self) -> int:
        """How many leading axes hold independent copies."""
        return next((i for i, a in enumerate(self.axes) if a not in BATCH_AXES), len(self.axes))

    def stack(self, n: int, axis: str = "layers") -> "Param":
        """`n` independently initialised copies on a new leading axis."""

        def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            return jax.vmap(lambda k: self.init(k, shape[1:], dtype))(jax.random.split(key, n))

        return replace(self, shape=(n, *self.shape), axes=(axis, *self.axes), init=init)

    def abstract(self, mesh: Mesh | AbstractMesh | None = None) -> jax.ShapeDtypeStruct:
        sharding = None
        if mesh is not None:
            sharding = NamedSharding(mesh, pspec(*self.axes, mesh=mesh) or PartitionSpec())
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=sharding)

    def cost(self) -> "Cost":
        flops = 0 if self.inputs is None else 2 * self.size
        return Cost(flops, flops * self.active, self.nbytes, self.nbytes * self.active)


def weight(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    inputs: int = 1,
    gain: float = 1.0,
    active: float = 1.0,
) -> Param:
    """A matrix whose first `inputs` dimensions are contracted: normal with std gain / sqrt(fan-
    in)."""
    std = gain / math.sqrt(math.prod(shape[:inputs]))
    return Param(shape, axes, normal(std), inputs=inputs, active=active)


class Count(NamedTuple):
    """Parameters in all, and those that one token uses."""

    total: int
    active: int


@dataclass(frozen=True)
class Cost:
    """Forward cost per token: matmul FLOPs and parameter bytes, as executed densely and as the
    active part."""

    flops: float = 0
    active_flops: float = 0
    bytes: float = 0
    active_bytes: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Cost(*(a + b for a, b in zip(mine, theirs, strict=True)))

    def __mul__(self, n: float) -> "Cost":
        return Cost(*(n * a for a in dataclasses.astuple(self)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What a layer may know of the call beside its input.

    positions: int32 [batch, seq], restarting in every document (None: 0, 1, 2, ...).
    segment_ids: int32 [batch, seq], equal inside a document, 0 for padding (None: one document).
    tokens: int32 [batch, seq], the ids at these places, where a `Decoder` is around the layer.
    key: PRNG key (None: deterministic).
    layer: the constants of the repeats around it; shared: what all layers inside use, such as
      the parameters of one table, or keys and values.
    """

    positions: Array | None = None
    segment_ids: Array | None = None
    tokens: Array | None = None
    key: Array | None = None
    layer: dict[str, Array] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)

    def mean(self, x: Array) -> Array:
        """Mean over the tokens that are not padding: [batch, seq, ...] -> float32 [...]."""
        if self.segment_ids is None:
            return x.mean((0, 1), dtype=jnp.float32)
        total = self.without_padding(x).sum((0, 1), dtype=jnp.float32)
        return total / jnp.maximum(self.real(x).sum(), 1)

    def real(self, x: Array) -> Array:
        """Which tokens of x [batch, seq, ...] are not padding: bool [batch, seq]."""
        return jnp.ones(x.shape[:2], bool) if self.segment_ids is None else self.segment_ids > 0

    def without_padding(self, x: Array) -> Array:
        """x [batch, seq, ...] with 0 at padding."""
        return jnp.where(jnp.expand_dims(self.real(x), range(2, x.ndim)), x, 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Aux:
    """What a layer says beside its output: named losses (summed over layers), metrics (kept per
    layer), the next values of non-trained state (nested like the parameters), and what the next
    layer is to find in `Context.shared` (by name; see `rows.Table`)."""

    losses: dict[str, Array] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def join(**children: "Aux") -> "Aux":
        """Sum the children's losses; nest their metrics and states under the children's names."""
        losses: dict[str, Array] = {}
        for aux in children.values():
            for name, value in aux.losses.items():
                losses[name] = losses[name] + value if name in losses else value
        metrics = {name: aux.metrics for name, aux in children.items() if aux.metrics}
        state = {name: aux.state for name, aux in children.items() if aux.state}
        shared = {name: x for aux in children.values() for name, x in aux.shared.items()}
        return Aux(losses, metrics, state, shared)

    def __or__(self, other: "Aux") -> "Aux":
        """Of two parts of one layer whose metrics and states have names of their own."""
        both = Aux.join(a=self, b=other)
        metrics, state = self.metrics | other.metrics, self.state | other.state
        return replace(both, metrics=metrics, state=state)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Number formats of stored parameters and of activations; statistics and logits stay
    float32."""

    params: DTypeName = "float32"
    """How parameters are stored and updated."""
    compute: DTypeName = "float32"
    """How activations are stored and multiplied."""


class Layer:
    """Base of all layers: subclasses are decorated with `@layer` and define `spec` and `apply`."""

    unit: ClassVar[str] = "token"
    """What `cost` is stated per."""

    def spec(self) -> Tree:
        """A nested dict of `Param`s and sub-layers, keyed as the parameters are."""
        return {}

    def apply(self, params: Tree, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def cache_spec(self, batch: int, length: int, dtype: Any = jnp.float32) -> Tree:
        """Declares the decoding cache for `length` positions; {} where the layer keeps none."""
        del batch, length, dtype
        return {}

    def declare(self) -> Tree:
        """The parameters: `spec` with every sub-layer expanded to a nested dict of `Param`."""
        return expand(self.spec())

    def init(self, key: Array, mesh: Mesh | None = None) -> Tree:
        """Draws the parameters; on a mesh they are born sharded."""
        return init(self.declare(), key, mesh)

    def abstract(self, mesh: Mesh | AbstractMesh | None = None) -> Tree:
        """Shapes, dtypes and (on a mesh) shardings of the parameters."""
        return abstract(self.declare(), mesh)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> Tree:
        return init(self.cache_spec(batch, length, dtype), jax.random.key(0))

    def count(self) -> Count:
        leaves = params_of(self.declare())
        return Count(sum(p.size for p in leaves), round(sum(p.size * p.active for p in leaves)))

    def cost(self, length: int) -> Cost:
        """Forward cost per token at context `length`: that of the declared matrices and of the sub-
        layers.

        Layers that contract anything but parameters add it.
        """
        return sum_costs(self.spec(), length)

    def training_cost(self, length: int) -> Cost:
        """`cost` in training, for models that then compute more."""
        return self.cost(length)


def positive(**fields: int | None) -> None:
    """Raises ValueError naming a field that is below 1; None stands for no value."""
    for name, value in fields.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: {value}; need at least 1")


T = TypeVar("T", bound=type)
L = TypeVar("L")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def layer(cls: T) -> T:
    """Makes a layer class a frozen, keyword-only, hashable dataclass that is static under `jit`."""
    cls = dataclass(frozen=True, kw_only=True)(cls)  # type: ignore[call-overload]
    return jax.tree_util.register_static(cls)


def map_layers(f: Callable[[Layer], Layer], x: L) -> L:
    """`x`, a layer or a tuple of them, with f of every layer in it in its place, inner ones
    first."""
    if isinstance(x, tuple):
        return tuple(map_layers(f, member) for member in x)  # type: ignore[return-value]
    if not isinstance(x, Layer):
        return x
    old = {field.name: getattr(x, field.name) for field in dataclasses.fields(x)}  # type: ignore
    new = {name: map_layers(f, value) for name, value in old.items()}
    return f(x if new == old else replace(x, **new))  # type: ignore[type-var, return-value]


def is_param(x: Any) -> bool:
    return isinstance(x, Param)


def expand(spec: Tree) -> Tree:
    if isinstance(spec, Layer):
        return spec.declare()
    return spec if is_param(spec) else {name: expand(child) for name, child in spec.items()}


def sum_costs(spec: Tree, length: int) -> Cost:
    if isinstance(spec, Layer):
        return spec.cost(length)
    if isinstance(spec, Param):
        return spec.cost()
    return sum((sum_costs(child, length) for child in spec.values()), Cost())


def map_params(f: Callable[[Param], Any], declared: Tree) -> Tree:
    return jax.tree.map(f, declared, is_leaf=is_param)


def params_of(declared: Tree) -> list[Param]:
    return jax.tree.leaves(declared, is_leaf=is_param)


def update(tree: Tree, new: Tree) -> Tree:
    """`tree` with the leaves of `new`, which may hold only some of them."""
    if not isinstance(new, dict):
        return new
    return tree | {name: update(tree[name], child) for name, child in new.items()}


def advance(declared: Tree, params: Tree) -> Tree:
    """`params` after an optimiser step: every state that declares how it goes on has done so."""

    def one(param: Tree, value: Tree) -> Tree:
        if not is_param(param):
            return advance(param, value)
        return value if param.advance is None else param.advance(params)

    return {name: one(declared[name], value) for name, value in params.items()}


def flatten(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ("a/b/c", leaf) over a nested dict."""
    if isinstance(tree, Mapping):
        for name, child in tree.items():
            yield from flatten(child, f"{prefix}/{name}" if prefix else str(name))
    else:
        yield prefix, tree


def init(declared: Tree, key: Array, mesh: Mesh | None = None) -> Tree:
    """Draws every declared leaf with a key of its own path, so that adding one reseeds no other."""

    def draw(key: Array) -> Tree:
        def one(path: tuple, param: Param) -> Array:
            name = jax.tree_util.keystr(path)
            return param.init(
                jax.random.fold_in(key, zlib.crc32(name.encode())), param.shape, param.dtype
            )

        return jax.tree_util.tree_map_with_path(one, declared, is_leaf=is_param)

    shardings = None if mesh is None else map_params(lambda p: p.abstract(mesh).sharding, declared)
    return jax.jit(draw, out_shardings=shardings)(key)


def abstract(declared: Tree, mesh: Mesh | AbstractMesh | None = None) -> Tree:
    return map_params(lambda p: p.abstract(mesh), declared)
