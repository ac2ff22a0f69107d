"""KANs beside the released programs: values, every gradient, moved grids, weights in and out."""

import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close

from bestiary.layers import BatchNorm, Silu
from bestiary.layers.kan import KAN, edges
from bestiary.layers.kan_bases import RBF, RSWAF, Fourier, Rational, ReLUBasis
from bestiary.layers.kan_conv import KANConv, KANPatches
from bestiary.layers.kan_grid import update_grid
from bestiary.layers.kan_net import KANNet
from bestiary.layers.kan_polynomials import Chebyshev
from bestiary.layers.kan_spline import BSpline
from bestiary.layers.kan_wavelets import Wavelet
from bestiary.zoo import kan_weights

RTOL = 1e-5
BASES = {"silu": Silu()}


def run(layer: Any, params: Any, x: Any, cotangent: Any) -> tuple:
    """(output, gradient of the parameters, gradient of x)."""

    @jax.jit
    def step(params: Any, x: Any, cotangent: Any) -> tuple:
        y, pull = jax.vjp(layer.apply, params, x)
        return y, *pull(cotangent)

    return step(params, jnp.asarray(x), jnp.asarray(cotangent))


def agrees(layer: Any, ours: Any, a: Any) -> None:
    """Output and gradients with those of the file; ours("w") are its parameters as the layer has
    them, and ours("g") their gradients."""
    y, grads, dx = run(layer, ours("w"), a["x"], a["cotangent"])
    close(y, a["y"], RTOL)
    close(dx, a["grad_x"], RTOL)
    jax.tree.map(lambda g, e: close(g, e, RTOL), grads, ours("g"))


def network(a: Any, hp: Any, basis: Any, **options: Any) -> KANNet:
    dims = (hp["in_features"], hp["out_features"])
    return KANNet(dims=dims, basis=basis, base=BASES[hp["base_activation"]], **options)


def spline(hp: Any, **options: Any) -> BSpline:
    low, high = hp["grid_range"]
    sizes = dict(num_intervals=hp["grid_size"], order=hp["spline_order"])
    return BSpline(**sizes, low=low, high=high, **options)


def swap(x: Any) -> Any:
    """[..., inputs, size] of the released programs."""
    return np.swapaxes(x, -1, -2)


@pytest.mark.golden("kan_bspline_pykan")
@pytest.mark.parametrize("adaptive", [False, True])
def test_pykan(golden: SimpleNamespace, adaptive: bool) -> None:
    a, hp = golden.arrays, golden.hp
    net = network(a, hp, spline(hp, adaptive=adaptive), scale="constant", mask=True)
    names = ("grid", "coef", "scale_base", "scale_sp", "mask")
    released = {f"act_fun.0.{name}": a[name] for name in names}
    params = kan_weights.from_pykan(net, released)
    back = kan_weights.to_pykan(net, params)
    for name, tensor in released.items():
        close(back[name], tensor, 1e-6)
    kan, own = net.layers[0], params["0"]
    close(swap(kan.basis.expand(own["basis"], a["x"])), a["basis"], RTOL)
    close(edges(kan, own, a["x"]), a["postacts"], RTOL)
    y, grads, dx = run(net, params, a["x"], a["cotangent"])
    grads = kan_weights.to_pykan(net, grads)
    close(y, a["y"], RTOL)
    close(dx, a["grad_x"], RTOL)
    for name in ("coef", "scale_base", "scale_sp"):
        close(grads[f"act_fun.0.{name}"], a[f"grad_{name}"], RTOL)
    if not adaptive:
        return
    new = update_grid(kan, own, a["upd_x"], eps=hp["grid_eps"])
    close(new["basis"]["knots"].T, a["upd_grid"], RTOL)
    curves = np.einsum("nsi,ios->nio", kan.basis.expand(new["basis"], a["upd_x"]), a["upd_coef"])
    actual = kan.basis.edges(new["basis"], a["upd_x"], new["weight"])
    close(swap(actual), curves, hp["refit_rtol"] / 10)


@pytest.mark.golden("kan_bspline_efficient")
@pytest.mark.parametrize("adaptive", [False, True])
def test_efficient_kan(golden: SimpleNamespace, adaptive: bool) -> None:
    a, hp = golden.arrays, golden.hp
    scale = "uniform" if hp["enable_standalone_scale_spline"] else "none"
    net = network(a, hp, spline(hp, adaptive=adaptive), scale=scale)
    names = ["grid", "base_weight", "spline_weight", *["spline_scaler"] * (scale != "none")]
    released = {f"layers.0.{name}": a[name] for name in names}
    params = kan_weights.from_efficient_kan(net, released)
    back = kan_weights.to_efficient_kan(net, params)
    for name, tensor in released.items():
        close(back[name], tensor, 1e-6)
    kan, own = net.layers[0], params["0"]
    close(swap(kan.basis.expand(own["basis"], a["x"])), a["basis"], RTOL)
    y, grads, dx = run(net, params, a["x"], a["cotangent"])
    grads = kan_weights.to_efficient_kan(net, grads)
    close(y, a["y"], RTOL)
    close(dx, a["grad_x"], RTOL)
    for name in names[1:]:
        close(grads[f"layers.0.{name}"], a[f"grad_{name}"], RTOL)
    close(kan.apply(own, a["upd_x"]), a["upd_y_before"], RTOL)
    if not adaptive:
        return
    options = dict(rule="efficient", eps=hp["grid_eps"], margin=hp["margin"])
    released = update_grid(kan, own, a["upd_x"], **options, scale_twice=True)
    close(released["basis"]["knots"].T, a["upd_grid"], RTOL)
    close(kan.apply(released, a["upd_x"]), a["upd_y_after"], 1e-4)
    moved = np.abs(a["upd_y_after"] - a["upd_y_before"]).max()
    fixed = kan.apply(update_grid(kan, own, a["upd_x"], **options), a["upd_x"])
    assert np.abs(fixed - a["upd_y_before"]).max() < moved / 4


@pytest.mark.golden("kan_fastkan")
def test_fastkan(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    ends = dict(low=hp["grid_min"], high=hp["grid_max"])
    net = network(a, hp, RBF(num_centres=hp["num_grids"], **ends, norm=hp["layer_norm"]), bias=True)
    names = [name.removeprefix("w/") for name in a if name.startswith("w/")]
    released = {f"layers.0.{name}": a[f"w/{name}"] for name in names}
    params = kan_weights.from_fastkan(net, released | {"layers.0.rbf.grid": a["grid"]})
    back = kan_weights.to_fastkan(net, params)
    for name, tensor in released.items():
        np.testing.assert_array_equal(back[name], tensor)
    close(swap(net.basis.expand(params["0"]["basis"], a["x"])), a["basis"], RTOL)
    y, grads, dx = run(net, params, a["x"], a["cotangent"])
    close(y, a["y"], RTOL)
    close(dx, a["grad_x"], RTOL)
    grads = kan_weights.to_fastkan(net, grads)
    for name in names:
        close(grads[f"layers.0.{name}"], a[f"g/{name}"], RTOL)


@pytest.mark.golden("kan_fasterkan_rswaf")
def test_fasterkan(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    inputs, outputs, size = hp["in_features"], hp["out_features"], hp["num_grids"]
    basis = RSWAF(num_centres=size, low=hp["grid_min"], high=hp["grid_max"])
    kan = KAN(inputs=inputs, outputs=outputs, basis=basis, base=None)
    weight = a["spline_weight"].reshape(outputs, inputs, size).T
    norm = {"weight": a["ln_weight"], "bias": a["ln_bias"]}
    params = {"basis": {"norm": norm}, "weight": weight}
    close(swap(basis.expand(params["basis"], a["x"])), a["basis"], RTOL)
    close(kan.apply(params, a["x"]), a["y"], RTOL)


@pytest.mark.golden("kan_chebykan")
def test_chebykan(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    outside = {"tanh": "normalise", "clamp": "clamp"}
    first, second = (
        KAN(
            inputs=hp["in_features"],
            outputs=hp["out_features"],
            basis=Chebyshev(degree=hp["degree"], outside=outside[hp[name]]),
            base=None,
        )
        for name in ("squash", "second_squash")
    )
    params = {"basis": {}, "weight": a["w/cheby_coeffs"].transpose(2, 0, 1)}
    y, grads, dx = run(first, params, a["x"], a["cotangent"])
    close(y, a["y"], RTOL)
    close(dx, a["grad_x"], RTOL)
    close(grads["weight"].transpose(1, 2, 0), a["g/cheby_coeffs"], RTOL)
    close(second.apply(params, a["xc"]), a["yc"], RTOL)


@pytest.mark.golden("kan_fourier")
def test_fourier(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    inputs, outputs = hp["in_features"], hp["out_features"]
    basis = Fourier(frequencies=hp["grid_size"], norm=hp["layer_norm"])
    kan = KAN(inputs=inputs, outputs=outputs, basis=basis, base=None, bias=True)

    def ours(kind: str) -> Any:
        norm = {name: a[f"{kind}/layernorm.{name}"] for name in ("weight", "bias")}
        weight = a[f"{kind}/fouriercoeffs"].transpose(0, 3, 2, 1).reshape(-1, inputs, outputs)
        return {"basis": {"norm": norm}, "weight": weight, "bias": a[f"{kind}/bias"][0]}

    agrees(kan, ours, a)


@pytest.mark.golden("kan_wavkan")
def test_wavkan(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    assert hp["batch_norm_mode"] == "eval"
    norm = BatchNorm(dim=hp["out_features"], eps=hp["batch_norm_eps"])
    stats = {"mean": a["bn_running_mean"], "var": a["bn_running_var"]}

    def ours(kind: str) -> tuple[Any, Any]:
        basis = {name: a[f"{kind}/{name}"].T for name in ("translation", "scale")}
        weight, base = a[f"{kind}/wavelet_weights"].T[None], a[f"{kind}/weight1"].T
        affine = {name: a[f"{kind}/bn.{name}"] for name in ("weight", "bias")}
        return {"basis": basis, "weight": weight, "base": base, "activation": {}}, affine

    for kind in hp["wavelets"]:
        basis = Wavelet(kind=kind, window=kind == "shannon")
        kan = KAN(inputs=hp["in_features"], outputs=hp["out_features"], basis=basis)

        def apply(params: Any, x: Any, kan: KAN = kan) -> Any:
            return norm.apply(params[1] | stats, kan.apply(params[0], x))

        params = ours("w")
        raw = basis.contract(params[0]["basis"], a["x"], params[0]["weight"])
        close(raw, a[f"raw_{kind}"], RTOL)
        close(apply(params, a["x"]), a[f"y_{kind}"], RTOL)
        if kind == hp["gradient_wavelet"]:
            y, grads, dx = run(SimpleNamespace(apply=apply), params, a["x"], a["cotangent"])
            close(y, a["y"], RTOL)
            close(dx, a["grad_x"], RTOL)
            jax.tree.map(lambda g, e: close(g, e, RTOL), grads, ours("g"))


def relu_params(a: Any, kind: str, outputs: int, inputs: int) -> Any:
    size = a[f"{kind}phase_low"].shape[1]
    weight = a[f"{kind}equal_size_conv.weight"].reshape(outputs, inputs, size)
    return {
        "basis": {"start": a[f"{kind}phase_low"].T, "end": a[f"{kind}phase_height"].T},
        "weight": weight.transpose(2, 1, 0),
        "bias": a[f"{kind}equal_size_conv.bias"],
    }


@pytest.mark.golden("kan_relukan")
def test_relukan(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    inputs, outputs = hp["in_features"], hp["out_features"]
    basis = ReLUBasis(num_intervals=hp["grid_size"], order=hp["spline_order"])
    assert 4 / basis.width**2 == pytest.approx(hp["r"])
    kan = KAN(inputs=inputs, outputs=outputs, basis=basis, base=None, bias=True)
    y, grads, dx = run(kan, relu_params(a, "w/", outputs, inputs), a["x"], a["cotangent"])
    close(y, a["y"], RTOL)
    close(dx, a["grad_x"], RTOL)
    expected = relu_params(a, "g/", outputs, inputs)
    jax.tree.map(lambda g, e: close(g, e, RTOL), grads, expected)


@pytest.mark.golden("kan_frkan_rational")
def test_frkan(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    basis = Rational(
        groups=hp["num_groups"],
        numerator=hp["num_numerator_coefs"],
        denominator=hp["num_denominator_coefs"],
        residual=BASES[hp["base_activation"]],
    )
    kan = KAN(inputs=hp["in_features"], outputs=hp["out_features"], basis=basis, base=None)

    def ours(kind: str) -> Any:
        basis = {"numerator": a[f"{kind}/w_a"], "denominator": a[f"{kind}/w_b"], "residual": {}}
        return {"basis": basis, "weight": a[f"{kind}/ln_weight"][None]}

    agrees(kan, ours, a)


@pytest.mark.golden("kan_conv2d")
def test_convolution(golden: SimpleNamespace) -> None:
    """In the released form, and, where the functions of a channel are alike at every place of the
    patch, by functions of the image."""
    a, hp = golden.arrays, golden.hp
    inputs, outputs, kernel = hp["in_channels"], hp["out_channels"], hp["kernel_size"]
    window = {
        name: hp[f"{name}_size" if name == "kernel" else name] for name in ("kernel", "stride")
    }
    sizes = dict(inputs=inputs, outputs=outputs, padding=hp["padding"], **window)
    width = inputs * kernel**2
    x = a["x"].transpose(0, 2, 3, 1)

    def check(layer: Any, params: Any, kind: str) -> None:
        close(layer.apply(params, x).transpose(0, 3, 1, 2), a[f"y_{kind}"], RTOL)

    def image(w: Any) -> Any:
        """[..., channels kernel kernel, outputs] -> [kernel, kernel, ..., channels, outputs]"""
        w = w.reshape(*w.shape[:-2], inputs, kernel, kernel, outputs)
        return np.moveaxis(w, (-3, -2), (0, 1))

    h, w = hp["bspline"], "w/bspline/kanlayer."
    basis = spline(h)
    base, weight = a[f"{w}base_weight"].T, a[f"{w}spline_weight"].T
    params = {"basis": {}, "weight": weight, "base": base, "activation": {}}
    scale = a[f"{w}spline_scaler"].T
    patches = KANPatches(**sizes, basis=basis, scale="uniform")
    check(patches, params | {"scale": scale}, "bspline")
    once = params | {"weight": image(weight * scale), "base": image(base)}
    check(KANConv(**sizes, basis=basis), once, "bspline")

    h, w = hp["fastkan"], "w/fastkan/kanlayer."
    basis = RBF(num_centres=h["num_grids"], low=h["grid_min"], high=h["grid_max"])
    norm = {name: a[f"{w}layernorm.{name}"] for name in ("weight", "bias")}
    params = {
        "basis": {"norm": norm},
        "weight": a[f"{w}spline_linear.weight"].reshape(outputs, width, -1).T,
        "base": a[f"{w}base_linear.weight"].T,
        "bias": a[f"{w}base_linear.bias"],
        "activation": {},
    }
    check(KANPatches(**sizes, basis=basis, bias=True), params, "fastkan")

    basis = Chebyshev(degree=hp["cheby"]["degree"], outside="clamp")
    weight = a["w/cheby/kanlayer.cheby_coeffs"].transpose(2, 0, 1)
    params = {"basis": {}, "weight": weight}
    check(KANPatches(**sizes, basis=basis, base=None), params, "cheby")
    check(KANConv(**sizes, basis=basis, base=None), params | {"weight": image(weight)}, "cheby")

    h = hp["relukan"]
    basis = ReLUBasis(num_intervals=h["grid_size"], order=h["spline_order"])
    params = relu_params(a, "w/relukan/kanlayer.", outputs, width)
    check(KANPatches(**sizes, basis=basis, base=None, bias=True), params, "relukan")
    if np.ptp(params["basis"]["start"], 1).max() == 0 == np.ptp(params["basis"]["end"], 1).max():
        alike = {name: phase[:, :inputs] for name, phase in params["basis"].items()}
        once = params | {"basis": alike, "weight": image(params["weight"])}
        check(KANConv(**sizes, basis=basis, base=None, bias=True), once, "relukan")


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("act_fun.0.coef", None, "act_fun.0.coef: missing; need it for 0/weight (8, 2, 3)"),
        ("act_fun.0.coef", (2, 3, 7), "act_fun.0.coef: shape (2, 3, 7); need (2, 3, 8)"),
        (
            "act_fun.0.mask",
            (2, 3),
            "act_fun.0.mask: not what 0/mask is in a network without it",
        ),
        (
            "symbolic_fun.0.mask",
            (3, 2),
            "symbolic_fun.0.mask: symbolic functions on edges; need spline edges only",
        ),
    ],
)
def test_refuses_weights(name: str, change: Any, message: str) -> None:
    net = KANNet(dims=(2, 3), basis=BSpline(), scale="constant")
    tensors = kan_weights.to_pykan(net, net.init(jax.random.key(0)))
    if change is None:
        del tensors[name]
    else:
        tensors[name] = np.full(change, 0.5, np.float32)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        kan_weights.from_pykan(net, tensors)


def test_other_networks_have_no_place_in_a_format() -> None:
    net = KANNet(dims=(2, 3), basis=BSpline(), bias=True)
    with pytest.raises(ValueError, match="^0/bias: this format has no tensor for it$"):
        kan_weights.to_efficient_kan(net, net.init(jax.random.key(0)))
