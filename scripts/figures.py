"""What the scripts figure_*.py share: records of runs, gates of a trained model, pictures.

A run is its folder (-o of train_fox) or a file of records in it: metrics.jsonl, or eval.jsonl of --eval. In a folder
with both it is metrics.jsonl.
"""

import argparse
import json
import pathlib

try:
    import numpy as np
except ImportError:
    raise SystemExit("the Python package numpy is missing: pip install -r scripts/requirements.txt")

GATES_BLOCK = 128  # queries, and keys, of a block on the GPU
SOURCES = {  # of the records of each kind
    "run": "./train_fox begins its file with one; give the whole file",
    "step": "training writes them; give the metrics.jsonl of a run",
    "validation": "./train_fox writes them every -v steps; of a checkpoint --eval does; give its eval.jsonl",
    "pruning": "./train_fox writes them every --pruning-every steps; of a checkpoint --eval does; give its eval.jsonl",
    "ranges": "./train_fox --eval writes them; give its eval.jsonl",
}


def file_of(run):
    """The file of a run's records."""
    path = pathlib.Path(run)
    if not path.is_dir():
        return path
    metrics, evaluation = path / "metrics.jsonl", path / "eval.jsonl"
    return evaluation if evaluation.is_file() and not metrics.exists() else metrics


def records(run):
    """All records of a run, as dictionaries."""
    path = file_of(run)
    if not path.is_file():
        raise SystemExit(f"{path}: not there; expected the folder of a run, or its metrics.jsonl or eval.jsonl")
    try:
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except ValueError:
        raise SystemExit(f"{path}: no text, and so no records of train_fox")
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
            found[-1]["kind"], found[-1]["step"]
        except (ValueError, KeyError, TypeError):
            raise SystemExit(f"{path}: line {number} is no record of train_fox")
    return found


def of_kind(run, kind):
    """Records of one kind; none are an error."""
    found = [r for r in records(run) if r["kind"] == kind]
    if not found:
        raise SystemExit(f"{file_of(run)}: no records of kind '{kind}': {SOURCES[kind]}")
    return found


def options_of(run, record=None):
    """The options of the run's last start; given one of its records, of the start that wrote it."""
    starts = of_kind(run, "run")
    if record is not None:
        found = records(run)
        before = max(i for i, r in enumerate(found) if r == record)
        starts = [r for r in found[:before] if r["kind"] == "run"] or starts
    return starts[-1]["settings"]["options"]


def at_step(found, step):
    """The record of that step, the last one when step is None."""
    chosen = [r for r in found if step is None or r["step"] == step]
    if not chosen:
        raise SystemExit(f"no record of step {step}; there are {', '.join(str(r['step']) for r in found)}")
    return chosen[-1]


def named(text):
    """'NAME=RUN' or 'RUN', which is its own name."""
    name, separator, run = text.partition("=")
    return (name, run) if separator else (pathlib.Path(text).name or text, text)


def means(values, count):
    """Means of `count` values each; a last group that is not full is left out, unless it is the only one."""
    values = np.asarray(values, dtype=float)
    count = max(1, min(count, len(values)))
    return values[: len(values) // count * count].reshape(-1, count).mean(1)


# ---- gates


def read_gates(path):
    """Cumulative log forget gates, [layer, head, position], from a safetensors file with the tensor `c`."""
    try:
        data = pathlib.Path(path).read_bytes()
        length = int.from_bytes(data[:8], "little")
        entry = json.loads(data[8 : 8 + length])["c"]
        begin, end = entry["data_offsets"]
        return np.frombuffer(data[8 + length + begin : 8 + length + end], dtype="<f4").reshape(entry["shape"])
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"{path}: no safetensors file with a float32 tensor c [layer, head, position]: {error}")


def first_blocks(c, bound, log_tolerance=-10.0, block=GATES_BLOCK):
    """First key block that each query block of one head keeps by the paper's test (cpu/acp.h): block J is skipped for query
    block I when c[first row of I] - c[last row of J] < -2 bound - log T + log_tolerance. c: [T]."""
    T = len(c)
    threshold = -2 * bound - np.log(T) + log_tolerance
    rows, last = np.arange(0, T, block), np.minimum(np.arange(block, T + block, block), T) - 1
    c = np.asarray(c, dtype=np.float64)
    skipped = (c[rows][:, None] - c[last][None] < threshold) & (last[None] < rows[:, None])
    return np.cumprod(skipped, axis=1).sum(1).astype(int)


def skipped_fraction(first):
    """Of the causal blocks of one head."""
    blocks = len(first)
    return float(np.sum(first)) / (blocks * (blocks + 1) / 2)


def head_fractions(source, bound, step=None):
    """Skipped fraction of every head, [layer, head], and what it is of: the report of pruning in a run, or a gates file."""
    if str(source).endswith(".safetensors"):
        c = read_gates(source)
        fractions = [[skipped_fraction(first_blocks(head, bound)) for head in layer] for layer in c]
        return np.array(fractions), f"{c.shape[2]:,} tokens of {pathlib.Path(source).name}"
    record = at_step(of_kind(source, "pruning"), step)
    options = options_of(source, record)
    return (
        np.array(record["layers"], dtype=float),
        f"{pathlib.Path(options['model']).name}, T = {options['context']:,}, --acp {options['acp']}, step {record['step']:,}",
    )


# ---- pictures


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("the Python package matplotlib is missing: pip install -r scripts/requirements.txt")
    matplotlib.use("Agg")
    from matplotlib import pyplot as module

    module.rcParams.update(
        {
            "font.size": 9,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "axes.axisbelow": True,
            "figure.constrained_layout.use": True,
            "savefig.dpi": 90,
        }
    )
    return module


def parser(doc):
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("-o", "--out", required=True, help="picture to write; its ending says the format: .png, .pdf, .svg")
    return made


def add_heads(made):
    made.add_argument("source", help="run, or gates file (.safetensors)")
    made.add_argument("--step", type=int, help="the report of this step; otherwise the last one")
    made.add_argument(
        "--bound", type=float, default=8.0, help="with a gates file: bound of the logits; 8 is QK-norm with weights of 1 and heads of 64"
    )


def main_of_heads(doc, draw):
    """The main of a figure that draw(source, bound, step) makes of a run or a gates file; doc: the script's own text."""
    made = parser(doc)
    add_heads(made)
    args = made.parse_args()
    save(draw(args.source, args.bound, args.step), args.out)


def save(figure, out):
    try:
        figure.savefig(out)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{out}: cannot be written: {error}")
    print(out)
