#!/usr/bin/env python3
"""Tests of the scripts that bring data, on small arrays and files of exactly the public layout.

    python3 tests/check_data.py                    needs numpy and zarr (scripts/requirements.txt), curl, a built program
    python3 tests/check_data.py --official DIR     also against the official data module, read from a clone of its repository

Ends with "N passed, N failed".
"""

import argparse
import gzip
import json
import pathlib
import shutil
import sys
import tarfile
import tempfile
import types

import numpy as np
from checks import Checks

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[1:1] = [str(ROOT / "dev"), str(ROOT / "scripts")]
import data_debian  # noqa: E402
from official import options  # noqa: E402
from train_official import Plan  # noqa: E402

ROW, CHUNK, BEGIN = 65536, 2048, 50256
CONVERT = [sys.executable, ROOT / "scripts" / "data_longcrawl64.py"]


def tokens_of(rows, start, end, salt):
    """Rows [0, rows) of an array, tokens [start, end): any token at any place, below 50257."""
    r, c = np.arange(rows, dtype=np.uint64)[:, None], np.arange(start, end, dtype=np.uint64)[None]
    x = (r * np.uint64(ROW) + c + np.uint64(salt)) * np.uint64(0x9E3779B97F4A7C15)
    return ((x >> np.uint64(33)) % np.uint64(50257)).astype("<u2")


def write_array(path, rows, columns, salt):
    """A Zarr v2 array as LongCrawl64 is one. Only the first `columns` tokens of the rows are written: the chunks of the others
    are missing."""
    import numcodecs
    import zarr

    array = zarr.create_array(
        str(path),
        shape=(rows, ROW),
        chunks=(CHUNK, CHUNK),
        dtype="<u2",
        zarr_format=2,
        order="C",
        compressors=numcodecs.Blosc(cname="lz4"),
        fill_value=0,
    )
    for start in range(0, columns, CHUNK):
        array[:, start : start + CHUNK] = tokens_of(rows, start, start + CHUNK, salt)


def official_batch(data, T, batch_rows, batch):
    """Inputs and labels of a batch by the definition: columns of T tokens, one after the other; of each, rows in groups of
    batch_rows; 50256 before the first token."""
    groups = len(data) // batch_rows
    column, group = divmod(batch, groups)
    labels = data[group * batch_rows : (group + 1) * batch_rows, column * T : (column + 1) * T].astype(np.int64)
    inputs = np.concatenate([np.full((batch_rows, 1), BEGIN), labels[:, :-1]], axis=1)
    return inputs, labels


def plan_of(data, T, batch_rows, steps):
    """What train_fox reads at every step."""
    return Plan(options(i=data, e="fox-pro-tiny", T=T, b=1, d=batch_rows * T, x=steps, data_order="file", val_batches=0))


def header_of(path):
    return np.fromfile(path, dtype="<i4", count=256)


def check_order(t, folder):
    """70 rows: 6 are left out, 64 give two batches of 32 a column, 4 columns."""
    source, out, T = folder / "full", folder / "shards", 16384
    write_array(source / "train.zarr", 70, ROW, 1)
    write_array(source / "heldout.zarr", 35, ROW, 2)
    about = json.loads((source / "train.zarr" / ".zarray").read_text())
    t.check(
        about["compressor"]["id"] == "blosc" and about["compressor"]["cname"] == "lz4" and about["dtype"] == "<u2",
        f"the test's array is as LongCrawl64's: {about}",
    )
    convert = [*CONVERT, source, "-o", out, "-T", T, "--tokens", 1e9, "--val-tokens", 3 * ROW, "--shard-tokens", 1.1e6]
    t.run(convert, "conversion")
    shards = sorted(out.glob("longcrawl64_train_*.bin"))
    words = [header_of(path) for path in shards]
    t.equal(len(shards), 4, "shards of 67 windows")
    t.equal(sum(int(w[2]) for w in words), 256 * (T + 1), "tokens in all shards")
    t.check(all(w[0] == 20240520 and w[1] == 2 and w[3] == 50257 and w[4] == T + 1 and not w[6:].any() for w in words), "headers")
    t.check(all(path.stat().st_size == 1024 + 2 * w[2] for path, w in zip(shards, words)), "sizes of the files")
    plan, data = plan_of(out, T, 32, 8), tokens_of(70, 0, ROW, 1)
    t.equal(plan.windows, 256, "windows that train_fox finds")
    for step in range(8):
        windows, (inputs, labels) = plan.windows_of_step(step), official_batch(data, T, 32, step)
        t.check(np.array_equal(windows[:, :-1], inputs) and np.array_equal(windows[:, 1:], labels), f"windows of step {step}")
    held, val = tokens_of(3, 0, ROW, 2), list(plan.validation())
    t.equal(len(val), 12, "windows of the validation")
    for i, window in enumerate(val):
        inputs, labels = official_batch(held, T, 1, i)
        t.check(np.array_equal(window[:, :-1], inputs) and np.array_equal(window[:, 1:], labels), f"validation window {i}")

    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in shards}
    shards[1].unlink()
    shards[2].write_bytes(before[shards[2]][1][:-10])
    t.run(convert, "conversion, again")
    t.check(all(path.read_bytes() == content for path, (_, content) in before.items()), "a conversion goes on")
    t.check(shards[0].stat().st_mtime_ns == before[shards[0]][0], "a whole shard is kept")
    again, fresh = folder / "again", folder / "fresh"
    for where, rows in ((again, 32), (again, 35), (fresh, 35)):
        t.run([*convert, "-o", where, "--batch-rows", rows], f"conversion with {rows} rows in a batch")
    names = sorted(path.name for path in fresh.iterdir())
    t.equal(sorted(path.name for path in again.iterdir()), names, "shards of another conversion")
    t.check(all((again / name).read_bytes() == (fresh / name).read_bytes() for name in names), "shards of other rows are not kept")
    t.fails(
        [*CONVERT, source, "-o", out, "-T", T, "--tokens", 1e6, "--shard-tokens", 1.1e6],
        "larger conversion",
        "a smaller conversion into the same folder",
    )
    t.fails(
        [ROOT / "train_fox", "-i", out, "-o", folder / "run2", "-e", "fox-pro-tiny", "-T", T // 2, "-x", 1],
        f"made for -T {T}",
        "another context",
    )
    return source, data


def check_chunk_rows(t, folder):
    """2080 rows are two rows of chunks. Only the first two columns of chunks are there."""
    source, out, T = folder / "part", folder / "part_shards", 2048
    write_array(source / "train.zarr", 2080, 2 * CHUNK, 3)
    (source / "heldout.zarr").mkdir()
    t.run([*CONVERT, source, "-o", out, "-T", T, "--tokens", 2080 * 4096], "conversion of what is there")
    data = tokens_of(2080, 0, 4096, 3)
    words = header_of(out / "longcrawl64_train_000000.bin")
    t.equal(int(words[2]), 4160 * (T + 1), "two columns of 2080 windows")
    found = np.fromfile(out / "longcrawl64_train_000000.bin", dtype="<u2", offset=1024).reshape(4160, T + 1)
    t.check((found[:, 0] == BEGIN).all(), "every window begins with 50256")
    t.check(np.array_equal(found[:2080, 1:], data[:, :T]) and np.array_equal(found[2080:, 1:], data[:, T:]), "rows across chunks")
    given = options(i=out, o=folder / "run", e="fox-pro-tiny", T=T, b=1, d=T, x=1, n=0, v=0, data_order="file", device="cpu")
    run = t.run([ROOT / "train_fox", *given], "a run on them")
    t.check("done at step 1 of 1" in run, f"a run on them: {run[-300:]}")
    t.fails([*CONVERT, source, "-o", folder / "no", "-T", T, "--tokens", 2080 * 4096 + T], "0.2: this chunk is missing", "a missing chunk")
    t.check(not list((folder / "no").glob("*.bin")), "nothing is written for a missing chunk")
    t.fails([*CONVERT, source, "-o", folder / "no", "--val-tokens", ROW], ".zarray: not there", "an array without its description")
    names = t.run([*CONVERT, source, "-T", 4096, "--tokens", 2080 * 4096, "--list", "train"], "--list").split()
    t.equal(sorted(names), [f"gs://longcrawl64/train.zarr/{r}.{c}" for r in (0, 1) for c in (0, 1)], "--list")
    (source / "train.zarr" / "1.1").write_bytes(b"")
    t.fails([*CONVERT, source, "-o", folder / "no", "-T", T, "--tokens", 2080 * 4096], "1.1: this chunk is missing", "an empty chunk")
    (source / "train.zarr" / "1.1").write_bytes(b"\x02\x01 nothing that blosc knows")
    t.fails([*CONVERT, source, "-o", folder / "no", "-T", T, "--tokens", 2080 * 4096], "cannot be read", "a broken chunk")


def check_bad_arrays(t, source, folder):
    bad = folder / "bad"
    for key, value, words in (
        ("dtype", "<u4", "expected dtype"),
        ("chunks", [1024, 2048], "expected chunks"),
        ("zarr_format", 3, "expected zarr_format"),
        ("shape", [70, 32768], "rows of 65536"),
    ):
        shutil.rmtree(bad, ignore_errors=True)
        (bad / "train.zarr").mkdir(parents=True)
        about = json.loads((source / "train.zarr" / ".zarray").read_text())
        (bad / "train.zarr" / ".zarray").write_text(json.dumps({**about, key: value}))
        t.fails([*CONVERT, bad, "-o", folder / "no"], words, f"an array with {key} {value}")
    for given, words in (
        (["-T", 3000], "divisor of 65536"),
        (["--tokens", 5], "not one window"),
        (["--val-tokens", 1000], "multiple of 65536"),
        (["--val-tokens", 36 * ROW], "at most"),
    ):
        t.fails([*CONVERT, source, "-o", folder / "no", *given], words, f"options {given}")
    t.fails([sys.executable, "-S", CONVERT[1], source], "numpy is missing", "conversion without packages")
    import zarr

    array = zarr.open_array(str(source / "train.zarr"), mode="r+")
    array[3, 5] = 50257
    t.fails([*CONVERT, source, "-o", folder / "no", "-T", 16384], "a token is 50257", "a token out of range")


def check_official(t, source, data, directory):
    """The official LongCrawlDataset on the same array; only what it needs of lightning and torch stands in for them."""
    stand_ins = {}
    for name in (
        "lightning",
        "torch",
        "torch.utils",
        "torch.utils.data",
        "forgetting_transformer",
        "forgetting_transformer.datamodule",
        "forgetting_transformer.utils",
    ):
        stand_ins[name] = types.ModuleType(name)
    stand_ins["lightning"].LightningDataModule = object
    for name in ("IterableDataset", "DataLoader", "Sampler", "Dataset"):
        setattr(stand_ins["torch.utils.data"], name, type(name, (), {}))
    stand_ins["torch"].LongTensor = stand_ins["torch"].BoolTensor = object
    stand_ins["forgetting_transformer"].__path__ = [str(directory / "src" / "forgetting_transformer")]
    stand_ins["forgetting_transformer.datamodule"].__path__ = [str(directory / "src" / "forgetting_transformer" / "datamodule")]
    stand_ins["forgetting_transformer.utils"].safe_divide = lambda a, b: a // b
    stand_ins["forgetting_transformer.utils"].check_divisible = lambda a, b: a % b == 0
    sys.modules.update(stand_ins)
    from forgetting_transformer.datamodule import longcrawl64

    longcrawl64.TRAIN_DOC_COUNT, longcrawl64.HELDOUT_DOC_COUNT = 70, 35
    for split, total, rows, T, batch in (("train", None, 70, 16384, 32), ("heldout", 3 * ROW, 3, 16384, 3), ("train", None, 70, 65536, 8)):
        dataset = longcrawl64.LongCrawlDataset(
            str(source / f"{split}.zarr"), world_size=1, rank=0, batch_size=batch, batch_len=T, split=split, total_tokens=total
        )
        used = data if split == "train" else tokens_of(rows, 0, ROW, 2)
        for i in range(len(dataset)):
            inputs, labels = official_batch(used, T, batch, i)
            theirs = dataset[i]
            t.check(
                np.array_equal(theirs.input_ids, inputs) and np.array_equal(theirs.labels, labels),
                f"official {split}, T = {T}, batch {i} of {batch} rows",
            )


def check_fineweb(t, folder):
    source, out = folder / "web", folder / "fineweb"
    source.mkdir()
    rng = np.random.default_rng(0)
    sizes = {"fineweb_val_000000.bin": 700, "fineweb_train_000001.bin": 5000, "fineweb_train_000002.bin": 3000}
    for name, size in sizes.items():
        words = np.zeros(256, dtype="<i4")
        words[:3] = 20240520, 1, size
        (source / name).write_bytes(words.tobytes() + rng.integers(0, 50257, size).astype("<u2").tobytes())
    script, environment = (
        ["bash", ROOT / "scripts" / "data_fineweb.sh", "-o", out],
        dict(FINEWEB_URL=f"file://{source}", PATH="/usr/bin:/bin"),
    )
    out.mkdir()
    whole = (source / "fineweb_train_000001.bin").read_bytes()
    (out / "fineweb_train_000001.bin.part").write_bytes(whole[:3000])
    t.run([*script, "-n", 2], "fineweb", env=environment)
    t.check(all((out / name).read_bytes() == (source / name).read_bytes() for name in sizes), "the files, one of them continued")
    t.equal(sorted(p.name for p in out.iterdir()), sorted(sizes), "no other files")
    plan = Plan(["-i", str(out), "-e", "fox-pro-tiny", "-T", "512", "-b", "1", "-d", "512", "-x", "4"])
    t.equal((plan.vocab_size, plan.windows), (50257, 9 + 5), "vocabulary and windows that train_fox finds")
    (source / "fineweb_train_000002.bin").write_bytes(b"other")
    said = t.run([*script, "-n", 2], "fineweb again", env=environment)
    t.equal(said.count("there already"), 3, "whole files are kept")
    (out / "fineweb_train_000002.bin").unlink()
    t.fails([*script, "-n", 2], "5 bytes", "a file that is no shard", env=environment)
    (source / "fineweb_train_000002.bin").write_bytes(whole[:-1])
    (out / "fineweb_train_000002.bin.part").unlink()
    t.fails([*script, "-n", 2], "11023 bytes, its header says 11024", "a file that was cut", env=environment)
    t.check(not (out / "fineweb_train_000002.bin").exists(), "a bad file gets no name")
    t.fails([*script, "-n", 0], "1..103", "no shards", env=environment)
    (source / "fineweb_train_000002.bin").write_bytes(whole)
    (out / "fineweb_train_000002.bin.part").unlink()
    t.fails([*script, "-n", 3], "fineweb_train_000003.bin: the download failed", "a file that is not there", env=environment)


def check_text(t, folder):
    """Texts whose tokens tiktoken knows, each a file: every document is 50256 and its tokens."""
    text, out = folder / "text", folder / "text_shards"
    text.mkdir()
    answers = json.loads((ROOT / "tests" / "data" / "gpt2" / "known_answers.json").read_text())
    pairs = [(a["text"], a["tokens"]) for a in answers if a["text"] and "\0" not in a["text"]]
    for i, (words, _) in enumerate(pairs):
        (text / f"{i:03d}.txt").write_bytes(words.encode())
    t.run(["bash", ROOT / "scripts" / "data_text.sh", text, "-o", out, "--val-fraction", "0"], "data_text.sh")
    shard = next(out.glob("*train*.bin"))
    words, tokens = header_of(shard), np.fromfile(shard, dtype="<u2", offset=1024).tolist()
    expected = [x for _, ids in pairs for x in [50256, *ids]]
    t.equal(int(words[3]), 50257, "vocabulary")
    t.check(len(pairs) > 3 and tokens == expected, f"tokens of {len(pairs)} texts: {len(tokens)}, expected {len(expected)}")
    t.fails(["bash", ROOT / "scripts" / "data_text.sh"], "no text given", "no text")
    t.fails(["bash", ROOT / "scripts" / "data_text.sh", text, "--vocab", folder / "none"], "not there", "no vocabulary")


def check_debian_text(t):
    """scripts/data_debian.py: pages and long texts to documents."""
    page = """<html><head><title>no</title><style>p {}</style></head><body><nav><a>menu</a></nav>
        <h1>A heading&para;</h1><p>One   line
        &amp; more <b>of it</b>.</p><script>if (a < b) no();</script>
        <table><tr><td>x</td><td>y</td></tr></table><pre>  as
  it   stands</pre><ul><li>first<li>second</ul><footer>no</footer></body></html>"""
    text = data_debian.page_text(page)
    t.equal(
        [line.strip() for line in text.splitlines() if line.strip()],
        ["A heading", "One line & more of it.", "x  y", "as", "it   stands", "first", "second"],
        "page_text: lines",
    )
    t.check("  as\n  it   stands\n" in text, f"page_text: <pre> as it stands: {text!r}")
    t.check("\n\n\n" not in text and text[-1] == "\n" and text[-2] != "\n" and text[0] == "A", f"page_text: blank lines: {text!r}")
    t.equal(data_debian.page_text(""), "\n", "page_text of nothing")

    pages = [f"Contents | Index\n\n\ntext {i}\n}}\n" for i in range(18)]
    t.equal(
        data_debian.without_furniture(pages),
        [f"text {i}\n}}\n" for i in range(18)],
        "without_furniture: lines of many pages go, those of a letter or two stay",
    )
    t.equal(
        data_debian.without_furniture(pages[:8]), [page.replace("\n\n\n", "\n\n") for page in pages[:8]], "without_furniture: few pages"
    )
    many = ["rare\n" * (i < 9) + f"text {i}\n" for i in range(1000)]
    t.equal(data_debian.without_furniture(many), many, "without_furniture: a line of fewer than a fiftieth of the pages stays")

    lines = [f"line {i} " + "x" * (i % 90) for i in range(5000)]
    parts = list(data_debian.parts_of("\n".join(lines)))
    t.equal("".join(parts).splitlines(), lines, "parts_of: every line once, in order")
    sizes, longest = [len(part) for part in parts], max(map(len, lines)) + 1
    least, most = data_debian.PART_BYTES, data_debian.PART_BYTES + longest
    t.check(len(parts) > 2 and all(least <= size <= most for size in sizes[:-1]) and sizes[-1] <= most, f"parts_of: sizes {sizes}")
    t.equal(list(data_debian.parts_of("short")), ["short\n"], "parts_of a short text")

    t.check(data_debian.is_english("what is the sum of the parts"), "is_english")
    for other in ("was ist die Summe der Teile", "over the über die schöne größere Straße fährt", "x" * 2000 + " the "):
        t.check(not data_debian.is_english(other), f"is_english: {other[:40]}")


def check_debian_choice(t):
    """Each text once, in the order of hashes, none too short or too long, up to a limit that later ones may still fit under."""
    texts = [f"{i} " * 300 for i in range(40)]
    order = sorted(texts, key=data_debian.digest)
    chosen = data_debian.choose(texts + texts[:7] + ["short", "x" * (data_debian.LARGEST + 1)], 1e9)
    t.equal(list(chosen.values()), order, "choose: order, and each text once")
    t.equal(list(chosen), [data_debian.digest(text) for text in order], "choose: names")
    size = sum(map(len, texts))
    t.equal(len(data_debian.choose(texts + texts, size)), len(texts), "choose: a text that is there twice takes its place once")
    few = data_debian.choose(reversed(texts), 6000)
    t.check(4000 < sum(map(len, few.values())) <= 6000, f"choose: {sum(map(len, few.values()))} of 6000 bytes")
    t.equal(list(few.values())[:6], order[:6], "choose: the first ones, whatever order they come in")
    large = max(order[:3], key=len) + "y" * 5000
    t.check(large not in data_debian.choose([*texts, large], 3000).values(), "choose: what does not fit is left out")
    t.equal(data_debian.choose([], 1e9), {}, "choose of nothing")


def check_debian_package(t, folder):
    """An unpacked package: its documents, not its changelogs; sources instead of the pages made of them. A kernel's archive."""
    package = folder / "package"
    (package / "doc").mkdir(parents=True)
    prose = "what the program does with the text of the file\n"
    (package / "doc" / "page.html").write_text(f"<body><p>page: {prose}</p></body>")
    (package / "doc" / "deutsch.html").write_text("<body><p>was das Programm mit dem Text macht</p></body>")
    (package / "doc" / "changelog.html").write_text(f"<body>changelog: {prose}</body>")
    (package / "doc" / "copyright").write_text(prose)
    (package / "doc" / "program").write_text(prose)
    t.equal(sorted(data_debian.prose_of(package, 1e6)), [f"page: {prose}"], "prose_of: pages")
    (package / "doc" / "page.txt.gz").write_bytes(gzip.compress(f"source: {prose}".encode().replace(b"\n", b"\r\n")))
    (package / "doc" / "words.dict.dz").write_bytes(gzip.compress(f"words: {prose}".encode()))
    (package / "doc" / "link.md").symlink_to("program")
    t.equal(sorted(data_debian.prose_of(package, 1e6)), [f"source: {prose}", f"words: {prose}\n"], "prose_of: sources instead of pages")

    kernel, source = folder / "kernel", folder / "linux-source-6.1"
    big = "int x;\n" * 100
    for name, text in {
        "Documentation/a.rst": prose * 20,
        "Documentation/translations/b.rst": prose * 20,
        "Documentation/c.png": big,
        "kernel/d.c": big,
        "kernel/e.h": big,
        "kernel/f.c": "int x;\n",
    }.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    kernel.mkdir()
    with tarfile.open(kernel / "linux-source-6.1.tar.xz", "w:xz") as tar:
        tar.add(source, arcname=source.name)
    t.equal(data_debian.kernel_of(kernel), ([prose * 20], [big]), "kernel_of: documentation, code")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=pathlib.Path, metavar="DIR", help="clone of the official repository")
    args = parser.parse_args()
    t = Checks()
    with tempfile.TemporaryDirectory(prefix="fox_data_") as scratch:
        folder = pathlib.Path(scratch)
        check_fineweb(t, folder)
        check_text(t, folder)
        check_debian_text(t)
        check_debian_choice(t)
        check_debian_package(t, folder)
        source, data = check_order(t, folder)
        check_chunk_rows(t, folder)
        if args.official:
            check_official(t, source, data, args.official)
        check_bad_arrays(t, source, folder)
    t.finish()


if __name__ == "__main__":
    main()
