#!/usr/bin/env python3
"""Draws the curves of dev/compare_training.py.

    python3 dev/plot_training.py docs/results/training_125m.json docs/results/training_125m.png

Above: training losses, means of ten steps, and validation losses as points. Below: training loss minus that of the
official run (or of the first run, where there is none) at the same step, means of twenty steps.
"""

import argparse
import json

import numpy as np

LABELS = {
    "official": "official PyTorch, ACP",
    "official-off": "official PyTorch, no pruning",
    "paper": "fox.c, --acp paper",
    "tight": "fox.c, --acp tight",
    "off": "fox.c, --acp off",
    "transformer": "fox.c, Transformer",
}
COLORS = {
    "official": "black",
    "official-off": "gray",
    "paper": "tab:red",
    "tight": "tab:blue",
    "off": "tab:green",
    "transformer": "tab:orange",
}


def means(values, count):
    values = np.asarray(values[: len(values) // count * count], dtype=float)
    return values.reshape(-1, count).mean(1)


def style(name):
    kind, _, seed = name.partition("@")
    return dict(label=LABELS[kind] + (f", seed {seed}" if seed else ""), color=COLORS[kind], linestyle="--" if seed else "-", linewidth=1.2)


def draw(result, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs, settings = result["runs"], result["settings"]
    reference = "official" if "official" in runs else next(iter(runs))
    million = settings["batch_tokens"] / 1e6
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(3, 2))
    for name, run in runs.items():
        losses = means(run["loss"], 10)
        top.plot((np.arange(len(losses)) + 0.5) * 10 * million, losses, **style(name))
        top.plot(
            [step * million for step, _ in run["validation"]],
            [loss for _, loss in run["validation"]],
            ".",
            color=style(name)["color"],
            markersize=5,
        )
        n = min(len(run["loss"]), len(runs[reference]["loss"]))
        if name != reference and run["seed"] == runs[reference]["seed"]:
            apart = means(run["loss"][:n], 20) - means(runs[reference]["loss"][:n], 20)
            bottom.plot((np.arange(len(apart)) + 0.5) * 20 * million, apart, **style(name))
    # The first steps fall from ln V and would flatten the rest.
    top.set_ylim(top=min(top.get_ylim()[1], max(run["loss"][len(run["loss"]) // 16] for run in runs.values())))
    top.set_ylabel("loss (points: validation)")
    top.legend()
    top.set_title(
        f"{settings['model']}, T = {settings['context']:,}, {settings['batch_tokens']:,} tokens a step, "
        f"{runs[reference]['device'] or 'CPU'}"
    )
    bottom.axhline(0, color="black", linewidth=0.8)
    bottom.set_ylabel(f"loss − {LABELS[reference.partition('@')[0]]}")
    bottom.set_xlabel("training tokens, millions")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", help="JSON file of dev/compare_training.py")
    parser.add_argument("picture", help="PNG file to write")
    args = parser.parse_args()
    with open(args.result) as file:
        draw(json.load(file), args.picture)


if __name__ == "__main__":
    main()
