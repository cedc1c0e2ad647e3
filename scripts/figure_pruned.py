#!/usr/bin/env python3
"""Fraction of the attention blocks that pruning skips, over training: of every layer, and of all.

    python3 scripts/figure_pruned.py out -o pruned.png

From the reports of pruning in metrics.jsonl (--pruning-every of train_fox), each over the steps since the one before.
"""

import figures
import numpy as np


def draw(run):
    pyplot = figures.pyplot()
    options, reports = figures.options_of(run), figures.of_kind(run, "pruning")
    tokens = [r["step"] * options["batch_tokens"] / 1e6 for r in reports]
    layers = np.array([r["layers"] for r in reports], dtype=float).mean(2)  # [report, layer]
    figure, axis = pyplot.subplots(figsize=(7, 4))
    colors = pyplot.get_cmap("viridis")(np.linspace(0, 0.95, layers.shape[1]))
    for layer, color in enumerate(colors):
        axis.plot(tokens, 100 * layers[:, layer], color=color, linewidth=1, marker=".", label=f"layer {layer}")
    axis.plot(tokens, [100 * r["pruned"] for r in reports], color="black", linewidth=2, label="all")
    axis.set_ylim(0, 100)
    axis.set_xlabel("training tokens, millions")
    axis.set_ylabel("blocks skipped, %")
    axis.set_title(f"T = {options['context']:,}, --acp {options['acp']}")
    axis.legend(ncols=1 + layers.shape[1] // 13, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def main():
    parser = figures.parser(__doc__)
    parser.add_argument("run")
    args = parser.parse_args()
    figures.save(draw(args.run), args.out)


if __name__ == "__main__":
    main()
