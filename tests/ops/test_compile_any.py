"""torch.compile gives the bits of eager mode around steps, methods and loops with any options.

By the fused backend, each is one graph, but for loops and for results that are written with other strides than a memory
format's, which torch does not trace.
"""

import pytest
import torch
from hypothesis import assume
from support import loop_cases
from support.choices import FUZZ, Choose, for_many
from support.operators import Inputs
from support.step_inputs import LIKE_X, OF_MODEL, PER_SAMPLE, make_table

from ddpm_ext import GaussianDiffusion, ops
from ddpm_ext.tables.samplers import SAMPLERS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_compiler")]
TABLE = make_table(20)


def noise_of(inputs: Inputs):
    kind = inputs.choose.one_of(["default generator", "given", "drawn"], "noise")
    if kind == "given":
        return {"noise": inputs.tensor(inputs.x_dtype)}
    return {"rng": inputs.philox()} if kind == "drawn" else {}


def a_step(choose: Choose, device):
    """A step with any inputs and any results, of tensors in any memory."""
    inputs = Inputs(choose, len(TABLE), device)
    x, table = inputs.tensor(inputs.x_dtype), TABLE.to(device)
    given = {name: inputs.tensor(inputs.x_dtype) for name in LIKE_X}
    given |= {name: inputs.tensor(inputs.y_dtype) for name in ("model_output", *OF_MODEL)}
    given |= {name: torch.rand(inputs.batch, generator=inputs.generator).to(device) for name in PER_SAMPLE}
    pairs = {"known": ["known", "mask"], "mask": []}
    for name in choose.several(lambda: choose.one_of([*LIKE_X, *OF_MODEL, *PER_SAMPLE], "without"), 0, 6, "left out"):
        for each in pairs.get(name, [name]):
            given.pop(each, None)
    how = {"clip": choose.one_of([None, (-0.3, 0.5)], "clip"), "log_variance": choose.one_of([True, False], "log")}
    how |= noise_of(inputs)
    kept = choose.one_of([(), ("x0_out",), ("x0_out", "history_out")], "kept")

    def call(x, t, given):
        results = {name: torch.empty_like(x) for name in kept}
        return [ops.step_with_options(x, table=table, t=t, **given, **results, **how), *results.values()]

    return call, (x, inputs.t(), given), x.is_contiguous()


def a_method(choose: Choose, device, names=("q_sample", "p_sample", "p_mean_variance")):
    """A diffusion's method, with a model that has a weight."""
    options = {"prediction": choose.one_of(["eps", "x0", "v", "x_prev"], "prediction")}
    options["variance"] = choose.one_of(["fixed_small", "fixed_large", "learned_range", "learned"], "variance")
    options["backend"] = choose.one_of(["fused", "fused", "reference"], "backend")
    gd = GaussianDiffusion(20, choose.one_of(["linear", "sigmoid"], "schedule"), **options)
    inputs = Inputs(choose, 20, device)
    inputs.shape = (inputs.batch, 2, *inputs.shape[1:])
    x, noise = inputs.tensor(inputs.x_dtype), noise_of(inputs)
    weight = torch.tensor(0.5, device=device, dtype=inputs.y_dtype, requires_grad=True)
    clip = choose.one_of([True, False, (-0.5, 0.25)], "clip")
    loss = choose.one_of(["mse", "l1", "huber", "vlb"], "loss")
    weightings = ["simple"] if loss == "vlb" else ["simple", "min_snr", torch.linspace(0.5, 1, 20)]
    of_loss = {
        "loss": loss,
        "weighting": choose.one_of(weightings, "weighting"),
        "offset_noise": choose.one_of([0.0, 0.1], "offset"),
        "input_perturbation": choose.one_of([0.0, 0.1], "perturbation"),
        "reduction": choose.one_of(["mean", "sum", "none"], "reduction"),
    }
    method = {
        "q_sample": lambda model, x, t: [gd.q_sample(x, t, **noise)],
        "p_sample": lambda model, x, t: [gd.p_sample(model, x, t, clip, **noise)],
        "p_mean_variance": lambda model, x, t: gd.p_mean_variance(model, x, t, clip),
        "train_losses": lambda model, x, t: [gd.train_losses(model, x, t, **noise, **of_loss)],
    }
    chosen = method[choose.one_of(names, "method")]

    def call(x, t, weight):
        seen = []

        def model(x, t):
            seen.append(x)
            m = x.to(weight.dtype) * weight
            return torch.cat([m, m], 1) if gd.variance.startswith("learned") else m

        return [*chosen(model, x, t), *seen]  # what a model gets, too: a loss hardly shows the last bits of it

    dense = x.is_contiguous() and noise.get("noise", x).is_contiguous()
    return call, (x, inputs.t(), weight), gd.backend == "fused" and dense


def a_loss(choose: Choose, device):
    return a_method(choose, device, ("train_losses",))


def a_loop(choose: Choose, device):
    """A loop, which is no single graph."""
    case, sampler = choose.one_of([*loop_cases.CASES], "case"), choose.one_of([*SAMPLERS], "sampler")
    assume(("jumps" not in case and case != "everything") or sampler in loop_cases.SAMPLERS)
    gd = loop_cases.make_diffusion(prediction=choose.one_of(["eps", "x0", "v"], "prediction"))
    options = loop_cases.ours(gd, case, device=device)
    options |= {"sampler": sampler, "timesteps": None, "steps": 3, "eta": None, "record": "last"}
    model, shape = options.pop("model"), options.pop("shape")
    return lambda x: [gd.p_sample_loop(model, shape, noise=x, **options)], (torch.randn(shape).to(device),), False


@pytest.mark.parametrize("make", [a_step, a_method, a_loss, a_loop])
@for_many(4)
def test_any_call(device, make, choose):
    call, arguments, whole = make(choose, device)
    backend = choose.one_of(["eager", "aot_eager", *["inductor"] * bool(FUZZ and make is a_step)], "backend")

    def results(call):
        torch.manual_seed(1)
        found = [*call(*arguments), *call(*arguments)]  # which draws other noise
        slopes = (torch.autograd.grad(y.sum(), arguments[-1], retain_graph=True) for y in found if y.requires_grad)
        return [*found, *(slope for (slope,) in slopes)]

    try:
        expected = results(call)
    except ValueError:  # options that don't go together, such as an offset beside given noise
        assume(False)
    torch.compiler.reset()
    with torch._functorch.config.patch(donated_buffer=False):  # which a backward pass that keeps its graph demands
        compiled = results(torch.compile(call, backend=backend, fullgraph=whole))
    for found, exact in zip(compiled, expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=0, equal_nan=True)
