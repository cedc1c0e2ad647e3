#!/usr/bin/env python3
"""Which blocks of attention one head computes: between the causal edge and the pruned edge.

    ./train_fox -i data/ -T 16384 -e out/step_00001000 --eval
    python3 scripts/figure_blocks.py out/eval.jsonl --layer 3 --head 5 -o blocks.png
    python3 scripts/figure_blocks.py tests/data/gates/trained_gates_125m.safetensors --layer 3 --head 5 -o blocks.png

--eval records the ranges that the run used, of the first window of the validation. To a gates file the paper's test is applied
with a bound of the logits (--bound) that the file does not hold.
"""

import figures
import numpy as np


def load(source, layer, head, bound=8.0):
    """First key block of every query block of one head, the tokens of a block and of the window, and what it is of."""
    if str(source).endswith(".safetensors"):
        c = figures.read_gates(source)
        check(c.shape[:2], layer, head)
        return figures.first_blocks(c[layer, head], bound), figures.GATES_BLOCK, c.shape[2], "paper's test"
    record = figures.of_kind(source, "ranges")[-1]
    check((len(record["first"]), len(record["first"][0])), layer, head)
    return (
        np.array(record["first"][layer][head]),
        record["block"],
        record["context"],
        f"--acp {figures.options_of(source, record)['acp']}",
    )


def check(shape, layer, head):
    if not (0 <= layer < shape[0] and 0 <= head < shape[1]):
        raise SystemExit(f"--layer {layer} --head {head}: the model has {shape[0]} layers of {shape[1]} heads, from 0")


def draw(source, layer=0, head=0, bound=8.0):
    pyplot = figures.pyplot()
    first, block, T, what = load(source, layer, head, bound)
    n = len(first)
    query, key = np.arange(n)[:, None], np.arange(n)[None]
    state = np.where(key > query, 0, np.where(key < first[:, None], 1, 2))  # future, skipped, computed
    edges = np.minimum(np.arange(n + 1) * block, T)
    figure, axis = pyplot.subplots(figsize=(5, 4.8))
    from matplotlib.colors import ListedColormap

    axis.pcolormesh(edges, edges, state, cmap=ListedColormap(["white", "#e4e4e4", "#4c78a8"]), vmin=0, vmax=2)
    axis.stairs(edges[1:], edges, orientation="horizontal", baseline=None, color="black", linewidth=1, label="causal edge")
    axis.stairs(edges[first], edges, orientation="horizontal", baseline=None, color="tab:red", linewidth=1.2, label="pruned edge")
    axis.set_xlim(0, T)
    axis.set_ylim(T, 0)
    axis.set_aspect("equal")
    axis.grid(False)
    axis.set_xlabel("key")
    axis.set_ylabel("query")
    axis.legend(loc="upper right")
    axis.set_title(
        f"layer {layer}, head {head}: {100 * (1 - figures.skipped_fraction(first)):.1f}% of the blocks of {block} are computed, {what}",
        fontsize=8,
    )
    return figure


def main():
    parser = figures.parser(__doc__)
    parser.add_argument("source", help="eval.jsonl or its folder, or gates file (.safetensors)")
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--head", type=int, default=0)
    parser.add_argument(
        "--bound", type=float, default=8.0, help="with a gates file: bound of the logits; 8 is QK-norm with weights of 1 and heads of 64"
    )
    args = parser.parse_args()
    figures.save(draw(args.source, args.layer, args.head, args.bound), args.out)


if __name__ == "__main__":
    main()
