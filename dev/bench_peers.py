#!/usr/bin/env python3
"""Attention beside its peers, forward and backward, on the same tensors in one process.

    python3 dev/bench_peers.py --official DIR [--fla DIR] --out peers.json
    python3 dev/bench_peers.py --official DIR --only 16k trained --peers ours official cudnn

H*D = 1536 (trained: 768), q and k of norm sqrt(D), log tolerance -10. Gates: log f = logsigmoid(x), x ~ N(mu_h, 1), mu
from -1 to 8.5 over the heads; `trained`: those of a trained model, the sum over its layers. Peers:

    ours           acp_attention.cuh for this chip: off, paper and tight, the search for the ranges included
    portable       its kernels for every chip
    official       the Triton kernels of github.com/zhixuan-lin/forgetting-transformer without and with ACP; their
                   threshold is given to them
    fla            forgetting attention of github.com/fla-org/flash-linear-attention; left out without --fla, and
                   at T = 64k
    flex           FlexAttention, compiled; the ranges of `paper` are given to it as its block mask, the decay is its
                   score_mod; no gradient for the gate. T = 16k only
    cudnn, flash   dense causal attention without a gate, PyTorch's scaled_dot_product_attention on that backend

Milliseconds between GPU events, the median over rounds; in a round every peer runs once, forward and backward, in an
order drawn anew (how fast the chip runs depends on what it did just before), and nothing waits for the CPU. Gradients:
of q, k, v and, where there is a gate, log f. A peer that fails is left out with its reason. Lines are printed and --out
(JSON) is written after each shape; the last table has the ratios.
"""

import argparse
import gc
import json
import pathlib
import random
import statistics
import sys
import time

import attention_inputs
import machine
import torch
import torch.nn.functional as F
import triton
from attention_library import BLOCK, MODES, AttentionLibrary

LOG_TOLERANCE = -10.0
# name: B, T, H, D, gates; in the order in which they run
SHAPES = {
    "16k": (1, 16384, 24, 64, "spread"),
    "trained": (1, 16384, 12, 64, "trained"),
    "16k-d128": (1, 16384, 12, 128, "spread"),
    "4k": (4, 4096, 24, 64, "spread"),
    "8k": (2, 8192, 24, 64, "spread"),
    "32k": (1, 32768, 24, 64, "spread"),
    "64k": (1, 65536, 24, 64, "spread"),
}
PEERS = ("ours", "portable", "official", "fla", "flex", "cudnn", "flash")
LONGEST_ROUNDS_S = 3.0  # of one shape
# name of a ratio: the two peers whose times are divided, and which times
RATIOS = {
    "official / ours off": ("official", "ours off", "both"),
    "official acp / ours paper": ("official acp", "ours paper", "both"),
    "official acp / ours tight": ("official acp", "ours tight", "both"),
    "fla / ours off": ("fla", "ours off", "both"),
    "flex / ours paper": ("flex", "ours paper", "both"),
    "portable paper / ours paper": ("portable paper", "ours paper", "both"),
    "cudnn / ours off, forward": ("cudnn", "ours off", "forward"),
    "cudnn / ours off, backward": ("cudnn", "ours off", "backward"),
    "flash / ours off, forward": ("flash", "ours off", "forward"),
    "flash / ours off, backward": ("flash", "ours off", "backward"),
    "ours tight / ours paper": ("ours tight", "ours paper", "both"),
}


# ---- peers: {name: (forward, backward)}; backward takes what forward gave


def ours_peers(library, x, norms, portable):
    peers, kept, first = {}, {}, None
    for mode in MODES:
        attention = library.attention(x.B, x.T, x.H, x.D, mode, LOG_TOLERANCE, norms, portable)
        attention.forward(x.q, x.k, x.v, x.log_f, count=True)
        kept[mode] = attention.kept()
        first = attention.ranges()[0] if mode == "paper" else first
        peers[f"{'portable' if portable else 'ours'} {mode}"] = (
            lambda a=attention: a.forward(x.q, x.k, x.v, x.log_f),
            lambda o, a=attention: a.backward(x.dout),
        )
    return peers, kept, first


def autograd_peer(function, inputs, dout):
    leaves = [y.detach().requires_grad_() for y in inputs]
    return lambda: function(*leaves), lambda o: torch.autograd.grad(o, leaves, dout)


def official_peers(kernel, x, norms):
    threshold = attention_inputs.official_threshold(x, norms, LOG_TOLERANCE)
    inputs = (x.q, x.k, x.v, x.log_f)
    return {
        "official": autograd_peer(kernel, inputs, x.dout),
        "official acp": autograd_peer(lambda *leaves: kernel(*leaves, threshold), inputs, x.dout),
    }


def fla_peer(kernel, x):
    log_f = x.log_f.transpose(1, 2).contiguous()  # the layout that its model gives it
    return autograd_peer(lambda q, k, v, g: kernel(q, k, v, g, x.D**-0.5), (x.q, x.k, x.v, log_f), x.dout)


def heads_first(x):
    return [y.transpose(1, 2) for y in (x.q, x.k, x.v)], x.dout.transpose(1, 2)


def dense_peer(backend, x):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    inputs, dout = heads_first(x)

    def attention(q, k, v):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return autograd_peer(attention, inputs, dout)


def block_mask(first):
    """FlexAttention's mask from the first key block of each query block [B, H, blocks]: the blocks from there to the
    diagonal are full, the one on the diagonal is causal."""
    from torch.nn.attention.flex_attention import BlockMask

    blocks = first.shape[2]
    m = torch.arange(blocks, dtype=torch.int32, device=first.device)
    full = (first[..., None] + m).clamp(max=blocks - 1)
    diagonal = m[:, None].expand(full.shape).contiguous()
    return BlockMask.from_kv_blocks(torch.ones_like(first), diagonal, m - first, full, BLOCK_SIZE=BLOCK, mask_mod=lambda b, h, i, j: i >= j)


def flex_peer(attention, x, first):
    """attention: flex_attention, compiled."""
    c, mask = x.log_f.double().cumsum(-1).float(), block_mask(first)

    def decay(score, b, h, i, j):
        return score + c[b, h, i] - c[b, h, j]

    inputs, dout = heads_first(x)
    return autograd_peer(lambda q, k, v: attention(q, k, v, score_mod=decay, block_mask=mask), inputs, dout)


class Bench:
    """What is loaded once: the library, the kernels of the peers."""

    def __init__(self, args):
        self.wanted = [p for p in PEERS if p in args.peers]
        self.rounds = args.rounds
        self.library = AttentionLibrary()
        self.official = self._load("official", args.official, attention_inputs.official_kernel)
        self.fla = self._load("fla", args.fla, attention_inputs.fla_kernel)
        self.flex = None
        if "flex" in self.wanted:
            from torch.nn.attention.flex_attention import flex_attention

            self.flex = torch.compile(flex_attention, dynamic=False)

    def _load(self, name, directory, loader):
        if name in self.wanted and directory:
            try:
                return loader(directory)
            except Exception as error:  # its own packages, or versions of them
                print(f"{name} is left out: {type(error).__name__}: {error}", flush=True)
        elif name in self.wanted:
            print(f"{name} is left out: no --{name}", flush=True)
        self.wanted = [p for p in self.wanted if p != name]
        return None

    def peers(self, x, flex):
        """{name: (forward, backward)} and the fraction of blocks kept by each mode."""
        norms = (torch.ones(x.H * x.D, device="cuda"),) * 2
        peers, kept, first = {}, None, None
        for name in ("ours", "portable"):
            if name in self.wanted:
                more, kept, first = ours_peers(self.library, x, norms, name == "portable")
                peers.update(more)
        if "official" in self.wanted:
            peers.update(official_peers(self.official, x, norms))
        if "fla" in self.wanted and x.T < 65536:
            peers["fla"] = fla_peer(self.fla, x)
        if "flex" in self.wanted and flex and first is not None:
            peers["flex"] = flex_peer(self.flex, x, first)
        elif "flex" in self.wanted and flex:
            print("flex is left out: its ranges come from ours or portable", flush=True)
        for name in ("cudnn", "flash"):
            if name in self.wanted:
                peers[name] = dense_peer(f"{name.upper()}_ATTENTION", x)
        return peers, kept

    def shape(self, name):
        """The result of one shape: kept, and of each peer forward and backward milliseconds."""
        B, T, H, D, gates = SHAPES[name]
        result = dict(name=name, B=B, T=T, H=H, D=D, gates=gates)
        if gates != "trained":
            x = attention_inputs.make(B, T, H, D, gates)
            return dict(result, **self.measure(x, flex=T == 16384))
        layers = []
        for log_f in attention_inputs.trained_gates():
            x = attention_inputs.make(B, T, H, D, log_f)
            layers.append(self.measure(x, flex=False))
        everywhere = [peer for peer in layers[0]["ms"] if all(peer in layer["ms"] for layer in layers)]
        ms = {peer: {key: sum(layer["ms"][peer][key] for layer in layers) for key in layers[0]["ms"][peer]} for peer in everywhere}
        kept = {mode: statistics.fmean(layer["kept"][mode] for layer in layers) for mode in layers[0]["kept"] or ()}
        return dict(result, layers=len(layers), kept=kept, ms=ms)

    def measure(self, x, flex):
        peers, kept = self.peers(x, flex)
        order = random.Random(0)
        for name in list(peers):
            try:
                one_round({name: peers[name]}, order)
                torch.cuda.synchronize()
            except Exception as error:  # a peer's own limits: no kernel for this shape, no memory, no compiler
                why = (str(error).strip() or "-").splitlines()[0][:200]
                print(f"{name} is left out: {type(error).__name__}: {why}", flush=True)
                del peers[name]
        start = time.perf_counter()
        one_round(peers, order)
        torch.cuda.synchronize()
        rounds = max(5, min(self.rounds, int(LONGEST_ROUNDS_S / (time.perf_counter() - start))))
        marks = [one_round(peers, order) for _ in range(rounds)]
        torch.cuda.synchronize()
        ms = {}
        for name in peers:
            passes = [[a.elapsed_time(b) for a, b in zip(mark[name], mark[name][1:])] for mark in marks]
            forward, backward = ([p[i] for p in passes] for i in (0, 1))
            ms[name] = dict(
                forward=statistics.median(forward),
                backward=statistics.median(backward),
                both=statistics.median(map(sum, passes)),
                fastest=min(map(sum, passes)),
            )
        return dict(kept=kept, rounds=rounds, ms=ms)


def one_round(peers, order):
    """Enqueues every peer once; {name: events before, between and after its passes}."""
    marks, names = {}, list(peers)
    order.shuffle(names)
    for name in names:
        forward, backward = peers[name]
        marks[name] = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[name][0].record()
        o = forward()
        marks[name][1].record()
        backward(o)
        marks[name][2].record()
        del o
    return marks


# ---- results


def ratios(result):
    """Of times; and how much of what the ranges leave out is saved: pruned / (off * kept), 1 where all of it."""
    ms, found = result["ms"], {}
    for name, (a, b, which) in RATIOS.items():
        if a in ms and b in ms:
            found[name] = ms[a][which] / ms[b][which]
    for mode in ("paper", "tight"):
        for peer in ("ours", "portable"):
            if f"{peer} {mode}" in ms and f"{peer} off" in ms:
                whole = ms[f"{peer} off"]["both"] * result["kept"][mode]
                found[f"{peer} {mode} / (off x kept)"] = ms[f"{peer} {mode}"]["both"] / whole
    return found


def print_result(result):
    kept = result["kept"] or {}
    print(
        f"{result['name']}: D {result['D']}  T {result['T']} x {result['B']}  H {result['H']}  {result['gates']}"
        + "".join(f"  {mode} keeps {100 * kept[mode]:.1f}%" for mode in kept if mode != "off")
        + f"  ({result['seconds']:.0f} s)"
    )
    for peer, ms in result["ms"].items():
        print(f"    {peer:14} forward {ms['forward']:8.3f}  backward {ms['backward']:8.3f}  both {ms['both']:8.3f} ms")
    sys.stdout.flush()


def print_ratios(results):
    names = list(dict.fromkeys(name for result in results for name in result["ratios"]))
    width = max(map(len, names), default=0)
    print(f"{'ratio of times':{width}}" + "".join(f"{result['name']:>10}" for result in results))
    for name in names:
        values = (result["ratios"].get(name) for result in results)
        print(f"{name:{width}}" + "".join(f"{'-' if value is None else format(value, '.3f'):>10}" for value in values))
    sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", metavar="DIR", help="clone of the official repository")
    parser.add_argument("--fla", metavar="DIR", help="clone of flash-linear-attention")
    parser.add_argument(
        "--only", nargs="+", default=list(SHAPES), choices=SHAPES, metavar="SHAPE", help=f"of {' '.join(SHAPES)}, in this order"
    )
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS, metavar="PEER", help=f"of {' '.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=21, help="at most; fewer where they are long")
    parser.add_argument("--seconds", type=float, default=1e9, help="no shape is begun after so many seconds")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file")
    args = parser.parse_args()
    start = time.perf_counter()
    bench, results = Bench(args), []
    print(f"{bench.library.path}, {time.perf_counter() - start:.0f} s to load", flush=True)
    facts = dict(
        machine.facts(),
        torch=torch.__version__,
        triton=triton.__version__,
        cudnn=torch.backends.cudnn.version(),
        log_tolerance=LOG_TOLERANCE,
    )
    for name in (name for name in SHAPES if name in args.only):
        began = time.perf_counter()
        if began - start > args.seconds:
            print(f"{name} is left out: {args.seconds:.0f} s are over", flush=True)
            continue
        result = bench.shape(name)
        result.update(ratios=ratios(result), seconds=round(time.perf_counter() - began, 1))
        results.append(result)
        print_result(result)
        if args.out:
            args.out.write_text(json.dumps(dict(facts, shapes=results), indent=1) + "\n")
        gc.collect()
        torch.cuda.empty_cache()
    print_ratios(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
