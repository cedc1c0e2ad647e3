"""What attention is timed and checked on: gates, queries, keys and values; and the official kernel.

Everything is made on the GPU from a seed. Tensors are bf16 [B, T, H, D] as the model has them; log_f is float32
[B, H, T].
"""

import importlib
import math
import pathlib
import re
import sys
import types

import official
import torch
import torch.nn.functional as F

TRAINED_GATES = official.ROOT / "tests" / "data" / "gates" / "trained_gates_125m.safetensors"


# ---- gates: log f of one shape, from a generator


def _logsigmoid_of(mean, deviation, shape, generator):
    x = torch.randn(shape, generator=generator, device=generator.device)
    return F.logsigmoid(mean + deviation * x)


def spread(shape, generator):
    """The spread of every comparison: logits N(mu_h, 1), mu from -1 to 8.5 over the heads."""
    mu = torch.linspace(-1.0, 8.5, shape[1], device=generator.device)
    return _logsigmoid_of(mu[None, :, None], 1.0, shape, generator)


def half(shape, generator):
    """f near 1/2, as in an untrained model: c reaches -45,000 at T = 65,536."""
    return _logsigmoid_of(0.0, 0.1, shape, generator)


def strong(shape, generator):
    """Hardly any memory: log f about -5."""
    return _logsigmoid_of(-5.0, 1.0, shape, generator)


def weak(shape, generator):
    """Thousands of tokens."""
    return _logsigmoid_of(9.0, 1.0, shape, generator)


def mixed(shape, generator):
    """Strong and weak gates by turns of some hundred tokens."""
    stretch = torch.rand(shape[0], shape[1], (shape[2] + 299) // 300, generator=generator, device=generator.device)
    mean = torch.where(stretch < 0.5, 0.0, 8.0).repeat_interleave(300, dim=2)[:, :, : shape[2]]
    return _logsigmoid_of(mean, 1.0, shape, generator)


def resets(shape, generator):
    """Weak gates, and one token in 200 after which nothing before counts."""
    reset = torch.rand(shape, generator=generator, device=generator.device) < 1 / 200
    return torch.where(reset, -50.0, _logsigmoid_of(8.0, 1.0, shape, generator))


def none(shape, generator):
    """No gate at all: log f = 0."""
    return torch.zeros(shape, device=generator.device)


GATES = dict(spread=spread, half=half, strong=strong, weak=weak, mixed=mixed, resets=resets, none=none)


def trained_gates(path=TRAINED_GATES):
    """log f of a trained model, float32 [layers, 1, heads, T], from its cumulative gates."""
    import safetensors.numpy

    c = torch.from_numpy(safetensors.numpy.load_file(str(path))["c"]).double()
    log_f = torch.diff(c, dim=-1, prepend=torch.zeros_like(c[..., :1]))
    return log_f.clamp(max=0).float()[:, None]


# ---- tensors


def make(B, T, H, D, gates="spread", seed=0, unit=True, packed=False, device="cuda"):
    """A namespace q, k, v, dout, log_f. unit: q and k have norm sqrt(D), as after QK-norm with weights 1. packed: q, k
    and v are columns of one product, whose other columns are NaN."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal():
        return torch.randn(B, T, H, D, generator=generator, device=device)

    def rounded(x, norm):
        return (x * (D**0.5 / x.norm(dim=-1, keepdim=True)) if norm else x).to(torch.bfloat16)

    x = types.SimpleNamespace(B=B, T=T, H=H, D=D)
    x.q, x.k, x.v, x.dout = (rounded(normal(), unit), rounded(normal(), unit), rounded(normal(), False), rounded(normal(), False))
    if packed:
        product = torch.full((B, T, 3 * H * D + 64), float("nan"), dtype=torch.bfloat16, device=device)
        for i, name in enumerate("qkv"):
            columns = product[:, :, i * H * D : (i + 1) * H * D].view(B, T, H, D)
            setattr(x, name, columns.copy_(getattr(x, name)))
    x.log_f = GATES[gates]((B, H, T), generator) if isinstance(gates, str) else gates.to(device)
    x.log_f = x.log_f.contiguous()
    return x


# ---- peers that are read from a folder


def _import_from(directory, package, module):
    """package.module from a clone's folder, or its src/."""
    source = pathlib.Path(directory).resolve()
    source = source / "src" if (source / "src" / package).is_dir() else source
    if not (source / package).is_dir():
        raise SystemExit(f"{directory}: no folder {package} there; expected a clone that has it")
    sys.path.insert(0, str(source))
    return importlib.import_module(f"{package}.{module}")


def official_kernel(directory, any_size=False):
    """The official Triton kernels as a function of q, k, v [B, T, H, D], log_f [B, H, T] and a threshold (None: no
    pruning) or a number per head. They have their block sizes by chip: there is nothing to tune.

    any_size: a compiled kernel is used for all B, T and H, instead of one for each kind of divisibility, which would
    take a second per kernel; what is computed is the same."""
    module = _import_from(directory, "forgetting_transformer", "ops.forgetting_attention")
    if any_size:
        import triton

        size = re.compile(
            r"(Z|H|M|N|P_SEQ|num_groups|stride_d[zhm]|"
            r"stride_(log_lambda|start_index|end_index|threshold|dlog_lambda)_[zh])$"
        )
        for name, kernel in list(vars(module).items()):
            if isinstance(kernel, triton.JITFunction):
                sizes = [a for a in kernel.arg_names if size.match(a)]
                setattr(module, name, triton.jit(kernel.fn, do_not_specialize=sizes))

    def attention(q, k, v, log_f, threshold=None):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = module.forgetting_attention(q, k, v, log_f, head_first=True, sm_scale=q.shape[-1] ** -0.5, adaptive_threshold=threshold)
        return o.transpose(1, 2)

    return attention


def official_threshold(x, norms, log_tolerance):
    """What the official model gives to its kernel: from the QK-norm weights, or else from the norms of q and k."""
    if norms is not None:
        q, k = (w.view(-1, x.D).abs().amax(dim=1).expand(x.H) for w in norms)
        bound = q * k * x.D**0.5
    else:
        q, k = (y.transpose(1, 2).norm(dim=-1).amax(dim=-1) for y in (x.q, x.k))
        bound = q * k / x.D**0.5
    return -(2 * bound + math.log(x.T)) + log_tolerance


def fla_kernel(directory):
    """flash-linear-attention's forgetting attention, as a function of q, k, v [B, T, H, D] and log_f [B, T, H]."""
    return _import_from(directory, "fla", "ops.forgetting_attn.parallel").parallel_forgetting_attn
