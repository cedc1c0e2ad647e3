#!/usr/bin/env python3
"""How savings are distributed over heads.

    python3 scripts/figure_savings.py out -o savings.png              # sources as for figure_heads.py

Left: number of heads by the fraction of blocks that they skip, in steps of 5%. Right: all heads from the one that skips most to
the one that skips least, and the mean, which is what attention saves in all.
"""

import figures
import numpy as np


def draw(source, bound=8.0, step=None):
    pyplot = figures.pyplot()
    skipped, what = figures.head_fractions(source, bound, step)
    skipped = 100 * np.sort(skipped.ravel())[::-1]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3.3))
    left.hist(skipped, bins=np.arange(0, 101, 5), color="tab:blue", edgecolor="white")
    left.set_xlabel("blocks skipped, %")
    left.set_ylabel("heads")
    right.plot(np.arange(1, len(skipped) + 1), skipped, color="tab:blue", label="head")
    right.axhline(skipped.mean(), color="black", linestyle="--", linewidth=1, label=f"mean {skipped.mean():.1f}%")
    right.set_xlabel("heads, sorted")
    right.set_ylabel("blocks skipped, %")
    for axis in (left, right):
        axis.set_xlim(0, 100 if axis is left else len(skipped) + 1)
    right.set_ylim(0, 100)
    right.legend()
    figure.suptitle(what, fontsize=8)
    return figure


if __name__ == "__main__":
    figures.main_of_heads(__doc__, draw)
