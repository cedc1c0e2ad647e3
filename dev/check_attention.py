#!/usr/bin/env python3
"""acp_attention.cuh against attention in float64, beside the official kernel on the same input.

    python3 dev/check_attention.py --official DIR [--quick] [--portable] [--out check.json]

For every case the output, dq, dk, dv and d log f of the three modes are compared with the exact ones, nothing pruned,
by ||x - exact|| / ||exact||. The exact ones are computed in float64 on the GPU, every row and every pair; where there
are many heads at T >= 16k, for some of them. Checked:

    error    of each quantity at most 1.1 times that of the official kernel, on each input (with an allowance for chance
             where there are few rows) and over all inputs of one T and D together; the official kernel with ACP for the
             pruned modes at T >= 4096, without below, where it is the same. At T = 65,536 with gates near 1/2 ours is
             to be the smaller one
    d log f  within 1%, every head
    mass     pruned of every row, from exact weights: at most exp(log tolerance)
    bits     a thousand launches of forward and backward give the same ones

Cases: every T of 1, 63, 64, 65, 127, 128, 129, 200, 1000 and 4096 with every B of 1, 3, H of 1, 5, 24, D of 64, 128 and
seven kinds of gates (attention_inputs.py); at 16,384 and 65,536 every kind of gates with both D, and every B and H. In
every other case q, k and v are columns of a packed product with NaN beside them, and in every other one of those, and
of the rest, the logits are bounded by QK-norm weights or measured. What a kernel does not write is NaN. --quick: fewer
of all, for under a minute. Without --official: errors at most 5e-3.
"""

import argparse
import collections
import itertools
import json
import math
import pathlib
import sys
import time

import attention_inputs
import machine
import torch
from attention_library import BLOCK, MODES, AttentionLibrary

LOG_TOLERANCE = -10.0
QUANTITIES = ("o", "dq", "dk", "dv", "dlog_f")
RATIO = 1.1  # to the official kernel's error
GATE_LIMIT = 0.01  # d log f, of each head
ALONE_LIMIT = 5e-3  # where there is no official error to compare with
# Below these errors a ratio says nothing: at T = 1, say, the gradients of q, k and the gate are exactly 0.
FLOOR = dict(o=2e-4, dq=2e-4, dk=2e-4, dv=2e-4, dlog_f=1e-4)
SMALL_NORM = 1e-3  # per element: norms below count as this, all inputs being of order 1
ELEMENTS = 2**26  # of a float64 matrix at a time

Case = collections.namedtuple("Case", "B T H D gates packed weights")


# ---- cases


def small_cases(contexts, batches, heads, gates):
    products = itertools.product(contexts, (64, 128), batches, heads, gates)
    return [Case(B, T, H, D, kind, i % 2 == 1, i // 2 % 2 == 1) for i, (T, D, B, H, kind) in enumerate(products)]


def large_cases(T, rows):
    return [Case(B, T, H, D, kind, i % 2 == 1, i // 2 % 2 == 1) for i, (B, H, D, kind) in enumerate(rows)]


def all_cases(quick):
    if quick:
        return (
            small_cases((1, 65, 128, 200, 1000), (3,), (5,), ("spread", "half", "mixed"))
            + small_cases((4096,), (1,), (5,), ("spread", "resets"))
            + large_cases(16384, [(1, 24, 64, "spread"), (1, 5, 128, "half")])
        )
    kinds = list(attention_inputs.GATES)
    shapes = [(1, 5, 64), (3, 5, 128), (1, 1, 128), (3, 1, 64)]
    rows = [(*shapes[(i + turn) % 4], kind) for turn in range(4) for i, kind in enumerate(kinds)]
    wide = [(1, 24, 64, "spread"), (1, 24, 128, "spread"), (3, 24, 64, "half"), (3, 24, 64, "mixed")]
    halves = [(1, 5, 128, "half"), (3, 5, 64, "half")]
    return (
        small_cases((1, 63, 64, 65, 127, 128, 129, 200, 1000, 4096), (1, 3), (1, 5, 24), kinds)
        + large_cases(16384, rows + wide + [(3, 24, 128, "resets")])
        + large_cases(65536, rows[: 2 * len(kinds)] + wide + halves)
    )


def text(case):
    return (
        f"T {case.T} B {case.B} H {case.H} D {case.D} {case.gates}{', packed' if case.packed else ''}"
        f"{', weights' if case.weights else ', measured'}"
    )


def checked_heads(case, quick):
    """Which of the B*H heads are compared: all, or some evenly spaced ones, the first and the last among them."""
    most = 10**9 if case.T < 16384 else 3 if quick else 24 if case.T < 65536 else 6
    count = case.B * case.H
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


# ---- the exact result


def pick(x, heads):
    """[B, T, H, D] to the heads' [heads, T, D], [B, H, T] to [heads, T]."""
    if x.ndim == 4:
        x = x.transpose(1, 2)
    index = torch.tensor(heads, device=x.device)
    return x[index // x.shape[1], index % x.shape[1]]


def exact(q, k, v, dout, log_f, first):
    """Attention and its gradients in float64. q, k, v, dout: [N, T, D]; log_f: [N, T]; first: {mode: first key block of
    each query block [N, blocks]}. Returns {quantity: float64}, {mode: the largest mass that it prunes of a row}.

    With s = q.k / sqrt(D) + c_i - c_j, P = softmax(s): dS = P (dout v^T - dout.o), d log f_t = sum_{i >= t} dc_i and
    dc_t = minus column t of dS, the rows of dS having sum 0."""
    N, T, D = q.shape
    padded = -(-T // BLOCK) * BLOCK
    rows = min(1024, padded)
    heads = max(1, ELEMENTS // (rows * padded))
    out = {name: torch.empty(N, T, D, dtype=torch.float64, device=q.device) for name in QUANTITIES[:4]}
    out["dlog_f"] = torch.empty(N, T, dtype=torch.float64, device=q.device)
    mass = dict.fromkeys(first, 0.0)
    for n in range(0, N, heads):
        part = slice(n, n + heads)
        edges = {mode: edge[part] for mode, edge in first.items()}
        found, pruned = exact_heads(*(y[part] for y in (q, k, v, dout, log_f)), edges, rows)
        for name in out:
            out[name][part] = found[name]
        mass = {m: max(mass[m], pruned[m]) for m in mass}
    return out, mass


def exact_heads(q, k, v, dout, log_f, first, rows):
    N, T, D = q.shape
    extra = -T % BLOCK
    root = D**-0.5
    q, k, v, dout = (torch.nn.functional.pad(y.double(), (0, 0, 0, extra)) for y in (q, k, v, dout))
    c = torch.nn.functional.pad(log_f.double(), (0, extra)).cumsum(-1)[..., None]
    one = torch.ones_like(c)
    q_decay, k_decay = torch.cat([q * root, c, one], -1), torch.cat([k, one, -c], -1)
    o, dq = torch.empty_like(q), torch.empty_like(q)
    dk, dv, dc = torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(c[..., 0])
    block = torch.arange((T + extra) // BLOCK, device=q.device)
    mass = dict.fromkeys(first, 0.0)
    for start in range(0, T + extra, rows):
        end = min(start + rows, T + extra)
        here, seen = slice(start, end), slice(0, end)
        p = q_decay[:, here] @ k_decay[:, seen].mT
        future = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        p[:, :, start:].masked_fill_(future, float("-inf"))
        p = torch.softmax(p, -1)
        in_blocks = p.view(N, end - start, end // BLOCK, BLOCK).sum(-1)
        for mode, edge in first.items():
            gone = block[: end // BLOCK] < edge[:, start // BLOCK : end // BLOCK, None]
            lost = (in_blocks * gone.repeat_interleave(BLOCK, dim=1)).sum(-1)[:, : max(0, T - start)]
            mass[mode] = max(mass[mode], lost.max().item())
        o[:, here] = p @ v[:, seen]
        dv[:, seen].baddbmm_(p.mT, dout[:, here])
        ds = dout[:, here] @ v[:, seen].mT
        ds.sub_((dout[:, here] * o[:, here]).sum(-1, keepdim=True)).mul_(p)
        del p, in_blocks
        dq[:, here] = ds @ k[:, seen] * root
        dk[:, seen].baddbmm_(ds.mT, q[:, here], alpha=root)
        dc[:, seen].sub_(ds.sum(1))
    found = dict(o=o, dq=dq, dk=dk, dv=dv)
    found = {name: y[:, :T] for name, y in found.items()}
    return dict(found, dlog_f=dc[:, :T].flip(-1).cumsum(-1).flip(-1)), mass


# ---- errors


def errors(results, reference, heads):
    """{quantity: (relative error, the largest of a head's)}"""
    found = {}
    for name, x in zip(QUANTITIES, results):
        off, right = (pick(x, heads).double() - reference[name]).flatten(1), reference[name].flatten(1)
        # at T = 1 the gradients of q and k are exactly 0, and both kernels' are noise
        small = (SMALL_NORM if x.shape[1 if x.ndim == 4 else 2] > 1 else 0.1) * math.sqrt(right.shape[1])
        each = off.norm(dim=1) / right.norm(dim=1).clamp(min=small)
        whole = off.norm() / right.norm().clamp(min=small * math.sqrt(right.shape[0]))
        found[name] = tuple(torch.stack([whole, each.max()]).nan_to_num(nan=math.inf).tolist())
    return found


def right_ranges(first):
    """Whether each query block begins at or before its diagonal, and not before the one above. first: [N, blocks]"""
    diagonal = torch.arange(first.shape[1], device=first.device)
    return bool(((first >= 0) & (first <= diagonal)).all() and (first.diff(dim=1) >= 0).all())


class Check:
    def __init__(self, args):
        self.args, self.passed, self.failed = args, 0, 0
        self.library = AttentionLibrary()
        self.official = None
        if args.official:
            self.official = attention_inputs.official_kernel(args.official, any_size=True)
        self.worst = {}  # (mode, quantity): (ratio, error, official error, case)
        self.largest = collections.defaultdict(float)
        self.pooled = collections.defaultdict(lambda: [0.0, 0.0])  # (T, D, mode, quantity): sums of squared errors
        self.printed = collections.Counter()

    def expect(self, right, kind, text):
        """right must come from a comparison that NaN fails. The first few failures of a kind are printed."""
        if right:
            self.passed += 1
            return
        self.failed += 1
        self.printed[kind] += 1
        if self.printed[kind] <= 3:
            print(f"FAILED {kind}: {text}", flush=True)

    def official_errors(self, x, case, norms, pruned, reference, heads):
        if self.official is None:
            return None
        threshold = attention_inputs.official_threshold(x, norms, LOG_TOLERANCE) if pruned else None
        leaves = [y.detach().requires_grad_() for y in (x.q, x.k, x.v, x.log_f)]
        try:
            o = self.official(*leaves, threshold)
            gradients = torch.autograd.grad(o, leaves, x.dout)
        except Exception as error:  # it does not take every shape
            why = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:160]}"
            self.printed[why] += 1
            if self.printed[why] == 1:
                print(f"the official kernel does not run {text(case)}: {why}", flush=True)
            return None
        return errors((o.detach(), *gradients), reference, heads)

    def case(self, case, seed):
        x = attention_inputs.make(case.B, case.T, case.H, case.D, case.gates, seed, unit=case.weights, packed=case.packed)
        norms = (torch.ones(case.H * case.D, device="cuda"),) * 2 if case.weights else None
        heads = checked_heads(case, self.args.quick)
        attentions, first = {}, {}
        for mode in MODES:
            attentions[mode] = attention = self.library.attention(
                case.B, case.T, case.H, case.D, mode, LOG_TOLERANCE, norms, self.args.portable
            )
            attention.poison()
            attention.forward(x.q, x.k, x.v, x.log_f)
            attention.backward(x.dout)
            first[mode] = attention.ranges()[0].flatten(0, 1)[heads]
        reference, mass = exact(*(pick(y, heads) for y in (x.q, x.k, x.v, x.dout, x.log_f)), first)
        official = {False: self.official_errors(x, case, norms, False, reference, heads)}
        official[True] = official[False]
        if case.T >= 4096:
            official[True] = self.official_errors(x, case, norms, True, reference, heads)
        for mode, attention in attentions.items():
            ours = errors((attention.o, attention.dq, attention.dk, attention.dv, attention.dlog_f), reference, heads)
            self.compare(case, mode, ours, official[mode != "off"], len(heads) * case.T)
            limit = math.exp(LOG_TOLERANCE) if mode != "off" else 0.0
            self.expect(right_ranges(first[mode]), f"{mode} ranges", f"{text(case)}: {first[mode][0].tolist()[:9]} ..")
            self.expect(mass[mode] <= limit, f"{mode} mass", f"{text(case)}: {mass[mode]:.3g}, at most {limit:.3g}")
            self.largest[mode, "mass"] = max(self.largest[mode, "mass"], mass[mode])

    def compare(self, case, mode, ours, official, rows):
        for name, (error, head) in ours.items():
            self.largest[mode, name] = max(self.largest[mode, name], error)
            if name == "dlog_f":
                self.expect(head <= GATE_LIMIT, f"{mode} {name}, a head", f"{text(case)}: {head:.3g} > {GATE_LIMIT}")
                self.largest[mode, "dlog_f, a head"] = max(self.largest[mode, "dlog_f, a head"], head)
            if official is None or not math.isfinite(official[name][0]):
                self.expect(error <= ALONE_LIMIT, f"{mode} {name}", f"{text(case)}: {error:.3g}, at most {ALONE_LIMIT}")
                continue
            other = max(official[name][0], FLOOR[name])
            # two error norms of as many independent rows, equal on average, differ by 1 / sqrt(rows)
            limit = RATIO * (1 + 4 / math.sqrt(rows))
            if case.T == 65536 and case.gates == "half":
                other, limit = official[name][0], 1.0
            self.expect(
                error <= limit * other,
                f"{mode} {name}",
                f"{text(case)}: {error:.4g}, official {official[name][0]:.4g}, ratio {error / other:.3f}, at most {limit:.3f}",
            )
            pool = self.pooled[case.T, case.D, mode, name]
            pool[0] += error**2
            pool[1] += other**2
            key = mode, name
            if not error / other <= self.worst.get(key, (-1.0,))[0]:
                self.worst[key] = error / other, error, official[name][0], case

    def pools(self):
        """The errors of all inputs of one T and D together."""
        for (T, D, mode, name), (ours, other) in self.pooled.items():
            ratio = math.sqrt(ours / other)
            self.expect(ratio <= RATIO, f"{mode} {name}, all inputs", f"T {T} D {D}: {ratio:.3f} of the official error")

    def repeats(self, launches):
        """The same bits in every launch."""
        for D, mode in itertools.product((64, 128), MODES):
            B, T, H = 1, 4096, 5
            x = attention_inputs.make(B, T, H, D, "spread", seed=7)
            norms = (torch.ones(H * D, device="cuda"),) * 2
            a = self.library.attention(B, T, H, D, mode, LOG_TOLERANCE, norms, self.args.portable)

            def launch():
                a.poison()
                a.forward(x.q, x.k, x.v, x.log_f)
                a.backward(x.dout)
                return [y.view(torch.int16 if y.element_size() == 2 else torch.int32) for y in (a.o, a.lse, a.dq, a.dk, a.dv, a.dlog_f)]

            expected = [y.clone() for y in launch()]
            different = torch.zeros((), dtype=torch.int64, device=x.q.device)
            for _ in range(launches - 1):
                different += torch.stack([(y != z).any() for y, z in zip(launch(), expected)]).any()
            count = different.item()
            self.expect(count == 0, "bits", f"D {D} {mode}: {count} of {launches} launches differ from the first")

    def table(self):
        print("worst ratios to the official error")
        print(f"{'mode':6} {'quantity':9} {'ratio':>6} {'error':>10} {'official':>10}  input")
        for (mode, name), (ratio, error, official, case) in sorted(self.worst.items()):
            print(f"{mode:6} {name:9} {ratio:6.3f} {error:10.3g} {official:10.3g}  {text(case)}")
        over = {key: max(math.sqrt(o / p) for (_, _, *rest), (o, p) in self.pooled.items() if tuple(rest) == key) for key in self.worst}
        if over:
            print(
                "over all inputs of one T and D, largest ratio: "
                + ", ".join(f"{name} {max(over[m, name] for m in MODES):.3f}" for name in QUANTITIES)
            )
        for mode in MODES:
            print(f"largest error, {mode}: " + ", ".join(f"{name} {value:.2g}" for (m, name), value in self.largest.items() if m == mode))

    def report(self):
        worst = [
            dict(mode=mode, quantity=name, ratio=ratio, error=error, official=official, case=case._asdict())
            for (mode, name), (ratio, error, official, case) in self.worst.items()
        ]
        pooled = [dict(T=T, D=D, mode=mode, quantity=name, ratio=math.sqrt(o / p)) for (T, D, mode, name), (o, p) in self.pooled.items()]
        largest = {f"{mode} {name}": value for (mode, name), value in self.largest.items()}
        return dict(machine.facts(), passed=self.passed, failed=self.failed, worst=worst, pooled=pooled, largest=largest)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", metavar="DIR", help="clone of the official repository")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--portable", action="store_true", help="the kernels for every chip")
    parser.add_argument("-T", "--context", type=int, nargs="+", help="only these")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument("--launches", type=int, help="of the check of bits, 1000 (--quick: 100)")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file")
    args = parser.parse_args()
    start = time.perf_counter()
    check = Check(args)
    cases = [case for case in all_cases(args.quick) if not args.context or case.T in args.context]
    print(f"{check.library.path}; {len(cases)} cases, seed {args.seed}", flush=True)
    for T, group in itertools.groupby(cases, lambda case: case.T):
        began, count = time.perf_counter(), 0
        for count, case in enumerate(group, 1):
            check.case(case, args.seed + count)
        torch.cuda.empty_cache()
        if args.out:
            args.out.write_text(json.dumps(check.report(), indent=1) + "\n")
        print(f"T {T:6}: {count} cases, {time.perf_counter() - began:.1f} s, {check.failed} failed so far", flush=True)
    check.pools()
    check.repeats(args.launches or (100 if args.quick else 1000))
    check.table()
    if args.out:
        args.out.write_text(json.dumps(check.report(), indent=1) + "\n")
    print(f"{time.perf_counter() - start:.0f} s; {check.passed} passed, {check.failed} failed")
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
