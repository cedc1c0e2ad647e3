#!/usr/bin/env python3
"""Gathers what the parts of dev/gpu_check.sh left in their folder into one JSON file of results.

    python3 dev/report.py build/gpu_check --out docs/results

The file is named after the GPU (gpu_h100.json; cpu.json without one). It says where, when and at which commit, and has
    parts          what ran: seconds, ok or not, and the line of the test program
    layers         dev/bench_layers.cu
    attention      dev/bench_attention.cu: shape, pruning, kept fraction, milliseconds
    profile        dev/profile_step.py
    peers          dev/bench_peers.py
    deterministic  dev/check_deterministic.py
    speed          dev/bench_official.py
as far as these parts ran.
"""

import argparse
import json
import pathlib
import re

import machine

# A line of bench_attention.
ATTENTION = re.compile(
    r"D +(?P<D>\d+) +T +(?P<T>\d+) x (?P<B>\d+) +(?P<acp>\w+) +kept +(?P<kept>[\d.]+)% +"
    r"forward +(?P<forward_ms>[\d.]+) +backward +(?P<backward_ms>[\d.]+)"
)


def attention_rows(log):
    """The table that bench_attention printed."""
    rows = []
    for match in filter(None, map(ATTENTION.search, log.read_text().splitlines())):
        row = {key: int(match[key]) for key in ("D", "T", "B")}
        row.update(
            acp=match["acp"],
            kept=round(float(match["kept"]) / 100, 4),
            forward_ms=float(match["forward_ms"]),
            backward_ms=float(match["backward_ms"]),
        )
        rows.append(row)
    return rows


def parts_of(table):
    """The lines 'name TAB verdict TAB seconds TAB last line' that gpu_check.sh wrote."""
    rows = [line.split("\t") for line in table.read_text().splitlines()]
    return {name: dict(ok=verdict == "ok", seconds=int(seconds), said=said) for name, verdict, seconds, said in rows}


def gather(logs):
    result = machine.facts()
    if (logs / "parts.tsv").exists():
        result["parts"] = parts_of(logs / "parts.tsv")
    if (logs / "attention.txt").exists():
        result["attention"] = attention_rows(logs / "attention.txt")
    for name in ("layers", "peers", "deterministic"):
        if (logs / f"{name}.json").exists():
            result[name] = json.loads((logs / f"{name}.json").read_text())
    for name in ("profile", "speed"):
        files = sorted(logs.glob(f"{name}-*.json"))
        if files:
            result[name] = [json.loads(file.read_text()) for file in files]
    return result


def file_name(device):
    """'NVIDIA H100 80GB HBM3' to 'gpu_h100.json'."""
    chip = re.search(r"\b(?:RTX )?[A-Z]{1,2}\d+\w*\b|\d{4}", device or "")
    return f"gpu_{chip[0].lower().replace(' ', '_')}.json" if chip else "gpu.json" if device else "cpu.json"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=pathlib.Path, help="folder of logs")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/results"), help="folder for the file")
    args = parser.parse_args()
    result = gather(args.logs)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / file_name(result["device"])
    path.write_text(json.dumps(result, indent=1) + "\n")
    found = [key for key in ("parts", "layers", "attention", "peers", "profile", "deterministic", "speed") if key in result]
    print(f"{path}: {', '.join(found) or 'nothing'}")


if __name__ == "__main__":
    main()
