#!/usr/bin/env python3
"""Compares tokenizer.h with tiktoken, token for token, and times both on one core.

    pip install tiktoken
    python3 dev/check_tokenizer.py            # everything: about two minutes
    python3 dev/check_tokenizer.py --write    # also writes tests/data/gpt2/code_points.json

Texts: every code point in several contexts; words of 18 scripts, emoji, controls and white space, mixed; what this
machine has of real text (C headers, documentation, translations, Python sources); pieces of these with stray bytes put
in, so that they are no UTF-8 any more (there tiktoken's _encode_bytes is the reference); JSON escapes against Python's
json. tiktoken is timed with the pattern above and, on real text, with the faster equivalent that it ships.
"""

import argparse
import base64
import json
import os
import pathlib
import random
import struct
import subprocess
import sys
import tempfile
import time
import zlib

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

ROOT = pathlib.Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data" / "gpt2"
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTEXT = "a@b 1@2 .@. @ @@\n@x '@s @"
SCRIPTS = {
    "latin": (0x61, 0x7A),
    "latin extended": (0xC0, 0x24F),
    "greek": (0x370, 0x3FF),
    "cyrillic": (0x400, 0x4FF),
    "armenian": (0x531, 0x586),
    "hebrew": (0x5D0, 0x5EA),
    "arabic": (0x620, 0x669),
    "devanagari": (0x900, 0x96F),
    "bengali": (0x980, 0x9EF),
    "tamil": (0xB82, 0xBEF),
    "thai": (0xE01, 0xE59),
    "georgian": (0x10A0, 0x10FF),
    "ethiopic": (0x1200, 0x137C),
    "hiragana and katakana": (0x3041, 0x30FF),
    "han": (0x4E00, 0x9FFF),
    "hangul": (0xAC00, 0xD7A3),
    "mathematical": (0x1D400, 0x1D7FF),
    "cuneiform": (0x12000, 0x12399),
}
SPECIAL = [
    "'s",
    "'t",
    "'re",
    "'ve",
    "'m",
    "'ll",
    "'d",
    "'S",
    "'",
    "\u2019s",
    " ",
    "  ",
    "   ",
    "\n",
    "\r\n",
    "\n\n",
    "\t",
    "\u00a0",
    "\u2003",
    "\u3000",
    "\u0085",
    "\u2028",
    "\u200b",
    "\u200d",
    "\ufeff",
    "\u0301",
    "\x00",
    "\x1f",
    "\x7f",
    "\u00b2",
    "\u00bd",
    "\u2167",
    "\u0663",
    "0",
    "12",
    "1234567",
    ".",
    "...",
    ",",
    "!?",
    "{",
    "};",
    "==",
    "->",
    "_",
    "<|endoftext|>",
    "\ufffd",
    "\U000e0041",
    "\U0010ffff",
]


def reference(pattern=PATTERN):
    ranks = {}
    for line in (DATA / "gpt2.tiktoken").read_text().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})


def reference_tokens(encoding, document):
    try:
        return encoding.encode_ordinary(document.decode())
    except UnicodeDecodeError:
        return encoding._encode_bytes(document)


class Ours:
    """Runs dev/tokenize.c on lists of documents."""

    def __init__(self, folder):
        self.folder = folder
        self.program = folder / "tokenize"
        sources = [ROOT / "dev" / "tokenize.c", ROOT / "train" / "files.c", ROOT / "train" / "json.c"]
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-O3", "-std=gnu11", "-o", self.program, *sources, "-lm"], check=True)

    def run(self, documents, mode="encode"):
        """Returns (one bytes object per document, seconds)."""
        given, made = self.folder / "documents", self.folder / "tokens"
        given.write_bytes(b"".join(struct.pack("<I", len(d)) + d for d in documents))
        command = [self.program, DATA / "gpt2.tiktoken", given, made, mode]
        seconds = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        data, at, out = made.read_bytes(), 0, []
        size = 2 if mode == "encode" else 1
        for _ in documents:
            (count,) = struct.unpack_from("<I", data, at)
            out.append(data[at + 4 : at + 4 + size * count])
            at += 4 + size * count
        return out, seconds


def pack(tokens):
    return struct.pack(f"<{len(tokens)}H", *tokens)


def words(rng, low, high, count):
    """Word-like text out of a range of code points."""
    out = []
    for _ in range(count):
        word = "".join(chr(rng.randint(low, high)) for _ in range(min(12, 1 + int(rng.expovariate(0.25)))))
        out.append(word + rng.choice(["", "", "", ",", ".", "'s", "'", "\n", " ", "!"]))
    return rng.choice([" ", " ", "", "\n"]).join(out)


def emoji(rng):
    base = [chr(rng.randint(0x1F300, 0x1FAFF)) for _ in range(rng.randint(1, 4))]
    return rng.choice(["", "\u200d", "\ufe0f", "\U0001f3fd"]).join(base)


def made_up(rng, megabytes):
    documents, size = [], 0
    while size < megabytes * 1e6:
        parts = []
        for _ in range(rng.randint(1, 30)):
            kind = rng.random()
            if kind < 0.6:
                parts.append(words(rng, *rng.choice(list(SCRIPTS.values())), rng.randint(1, 30)))
            elif kind < 0.7:
                parts.append(emoji(rng))
            elif kind < 0.75:
                parts.append("".join(chr(rng.randint(0, 0x9F)) for _ in range(rng.randint(1, 10))))
            else:
                parts.append("".join(rng.choice(SPECIAL) for _ in range(rng.randint(1, 10))))
        documents.append("".join(parts).encode())
        size += len(documents[-1])
    return documents


def real_text(megabytes):
    """Files of this machine, each folder up to its share."""
    folders = ["/usr/include", "/usr/share/doc", "/usr/share/i18n", "/usr/share/locale", os.path.dirname(os.__file__)]
    documents = []
    for folder in folders:
        size = 0
        for path, names, files in os.walk(folder):
            names.sort()
            for name in sorted(files):
                file = pathlib.Path(path, name)
                if size < megabytes * 1e6 / len(folders) and file.is_file() and not file.suffix == ".pyc":
                    documents.append(file.read_bytes()[:1000000])
                    size += len(documents[-1])
    return documents


def damaged(rng, documents, count):
    """Pieces of the documents with bytes that make them invalid UTF-8."""
    bad = [b"\xff", b"\x80", b"\xc3", b"\xe9", b"\xe3\x81", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf5\x80"]
    out = []
    while len(out) < count:
        document = rng.choice(documents)
        start = rng.randrange(len(document) + 1)
        piece = bytearray(document[start : start + int(rng.expovariate(1 / 400))])
        for _ in range(rng.randint(0, 3)):
            at = rng.randrange(len(piece) + 1)
            piece[at:at] = rng.choice(bad)
        out.append(bytes(piece))
    return out + [rng.randbytes(rng.randrange(400)) for _ in range(count // 4)]


def is_utf8(document):
    try:
        document.decode()
        return True
    except UnicodeDecodeError:
        return False


def compare(encoding, ours, name, documents):
    """Prints a line; returns the number of documents that differ."""
    size = sum(map(len, documents))
    valid = sum(map(is_utf8, documents))
    start = time.process_time()
    want = [reference_tokens(encoding, d) for d in documents]
    theirs_s = time.process_time() - start
    found, ours_s = ours.run(documents)
    tokens = sum(map(len, want))
    wrong = [i for i in range(len(documents)) if found[i] != pack(want[i])]
    theirs, mine = size / 1e6 / theirs_s, size / 1e6 / ours_s
    print(
        f"{name:19} {size / 1e6:7.2f} MB {len(documents):7} documents ({len(documents) - valid} not UTF-8) "
        f"{tokens:9} tokens   {len(wrong)} differ   tiktoken {theirs:5.1f} MB/s, ours {mine:5.1f} MB/s",
        flush=True,
    )
    for i in wrong[:3]:
        print("  differs:", documents[i][:200])
    return len(wrong)


def code_points(encoding, ours, write):
    """All code points, 65,536 at a time; the checksums go to code_points.json."""
    wrong, sums = 0, []
    for plane in range(17):
        points = [c for c in range(plane << 16, (plane + 1) << 16) if not 0xD800 <= c < 0xE000]
        documents = [CONTEXT.replace("@", chr(c)).encode() for c in points]
        want = [pack(t) for t in encoding.encode_ordinary_batch([d.decode() for d in documents], num_threads=1)]
        found, _ = ours.run(documents)
        wrong += sum(a != b for a, b in zip(want, found))
        joined = b"".join(want)
        sums.append({"tokens": len(joined) // 2, "crc32": zlib.crc32(joined)})
    print(f"every code point    {len(CONTEXT)} characters of context   {wrong} differ", flush=True)
    if write:
        rows = ",\n".join(json.dumps(row) for row in sums)
        (DATA / "code_points.json").write_text(f"[{rows}]\n")
    return wrong


def escapes(ours, documents):
    found, seconds = ours.run(documents, "escape")
    want = [json.dumps(d.decode("utf-8", "surrogateescape"))[1:-1].encode() for d in documents]
    wrong = sum(a != b for a, b in zip(want, found))
    print(
        f"JSON escapes        {sum(map(len, documents)) / 1e6:.2f} MB   {wrong} differ   "
        f"ours {sum(map(len, documents)) / 1e6 / seconds:.1f} MB/s"
    )
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write tests/data/gpt2/code_points.json")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--megabytes", type=float, default=12, help="of made-up and of real text, each")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    print(f"tiktoken {tiktoken.__version__}, seed {options.seed}, {len(SCRIPTS)} scripts")
    encoding = reference()
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(pathlib.Path(folder))
        mixed, real = made_up(rng, options.megabytes), real_text(options.megabytes)
        valid = [d for d in real if is_utf8(d)]
        broken = damaged(rng, mixed + valid, 10000)
        wrong = compare(encoding, ours, "mixed scripts", mixed)
        wrong += compare(encoding, ours, "real text", valid)
        wrong += compare(reference(r50k_pat_str), ours, "... shipped pattern", valid)
        wrong += compare(encoding, ours, "real, not UTF-8", [d for d in real if not is_utf8(d)])
        wrong += compare(encoding, ours, "damaged text", broken)
        wrong += escapes(ours, mixed + real + broken)
        wrong += code_points(encoding, ours, options.write)
    print("all equal" if wrong == 0 else f"{wrong} documents differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
