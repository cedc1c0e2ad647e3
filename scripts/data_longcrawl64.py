#!/usr/bin/env python3
"""LongCrawl64 as shards, in the order in which the official FoX reads it.

    python3 scripts/data_longcrawl64.py longcrawl64 -o data -T 16384 --tokens 2.7e9 --val-tokens 33554432
    ./train_fox -i data -T 16384 --data-order file

LongCrawl64 (manifestai.com/articles/longcrawl64) is two Zarr arrays, train.zarr and heldout.zarr, of GPT-2 tokens in rows of
65,536. They are large: --list says which chunks the tokens asked for are in, so that only these need to be downloaded:

    gsutil cp gs://longcrawl64/train.zarr/.zarray longcrawl64/train.zarr/
    python3 scripts/data_longcrawl64.py longcrawl64 -T 16384 --tokens 2.7e9 --list train | gsutil -m cp -I longcrawl64/train.zarr/

(and the same with `heldout`). A chunk that is missing is an error: nothing is filled in.

The order is column by column: windows of T tokens at position 0 of all rows, then at position T of all rows, ...; rows that do
not fill a last batch of --batch-rows are left out. A window's input begins with the token 50256 in place of what came before
it, so that all T tokens are predicted: it is stored as 50256 and its T tokens, in a shard of windows that share nothing
(dataloader.h). With -d = --batch-rows * T and `--data-order file`, step s reads what the official data module calls batch s.

--val-tokens are taken from heldout.zarr in the same order, all of the first --val-tokens / 65536 rows. Shards have names
longcrawl64_{train,val}_NNNNNN.bin; those that are whole already, and of the same rows of the same array, are kept, so a conversion that was stopped goes on.
"""

import argparse
import hashlib
import json
import pathlib
import sys

try:
    import numpy as np
except ImportError:
    raise SystemExit("the Python package numpy is missing: pip install -r scripts/requirements.txt")

ROW, CHUNK = 65536, 2048  # tokens in a row; rows, and tokens, of a chunk
BEGIN, VOCAB_SIZE = 50256, 50257
MAGIC, VERSION, HEADER_BYTES = 20240520, 2, 1024


class Rows:
    """An array of rows of tokens. Reading what is not there ends the program."""

    def __init__(self, path):
        self.path = path
        about = path / ".zarray"
        if not about.is_file():
            raise SystemExit(f"{about}: not there; gsutil cp gs://longcrawl64/{path.name}/.zarray {path}/ fetches it")
        facts = json.loads(about.read_text())
        expected = dict(zarr_format=2, dtype="<u2", chunks=[CHUNK, CHUNK], order="C")
        for key, value in expected.items():
            if facts.get(key) != value:
                raise SystemExit(f"{about}: expected {key} {value}, found {facts.get(key)}")
        if len(facts["shape"]) != 2 or facts["shape"][1] != ROW or facts.get("dimension_separator", ".") != ".":
            raise SystemExit(f"{about}: expected rows of {ROW} tokens in chunks named r.c, found shape {facts['shape']}")
        self.count = facts["shape"][0]
        self._array = self._place = self._block = None

    @staticmethod
    def chunks(rows, start, end):
        """Names of the chunks that hold tokens [start, end) of the chunk row of `rows`."""
        return [f"{rows // CHUNK}.{c}" for c in range(start // CHUNK, (end - 1) // CHUNK + 1)]

    def block(self, row, start, end):
        """Tokens [start, end) of all rows of the chunk row that `row` is in, [rows, end - start]."""
        first = row // CHUNK * CHUNK
        if self._place == (first, start, end):
            return self._block
        for name in self.chunks(row, start, end):
            chunk = self.path / name
            if not chunk.is_file() or chunk.stat().st_size == 0:
                raise SystemExit(f"{chunk}: this chunk is missing; --list names those that are needed")
        try:
            import zarr

            if self._array is None:
                self._array = zarr.open_array(str(self.path), mode="r")
            block = np.asarray(self._array[first : min(first + CHUNK, self.count), start:end])
        except ImportError:
            raise SystemExit("the Python package zarr is missing: pip install -r scripts/requirements.txt")
        except Exception as error:  # whatever the decoder finds wrong
            raise SystemExit(f"{self.path}: rows from {first}, tokens {start} to {end}: cannot be read: {error}")
        if block.size and block.max() >= VOCAB_SIZE:
            raise SystemExit(
                f"{self.path}: rows from {first}, tokens {start} to {end}: a token is {block.max()}, expected tokens below {VOCAB_SIZE}"
            )
        self._place, self._block = (first, start, end), block
        return block


class Split:
    """The windows of one array that are wanted, in their order: number w is at row w % rows, column w // rows."""

    def __init__(self, array, T, rows, windows):
        self.array, self.T, self.rows, self.windows = array, T, rows, windows

    def runs(self, begin, end):
        """Windows [begin, end) as (row, rows after it in the same chunk row, column)."""
        while begin < end:
            row, column = begin % self.rows, begin // self.rows
            count = min(end - begin, self.rows - row, CHUNK - row % CHUNK)
            yield row, count, column
            begin += count

    def chunks(self):
        """Names of all chunks that hold them."""
        found = {}
        for row, _, column in self.runs(0, self.windows):
            found.update(dict.fromkeys(self.array.chunks(row, column * self.T, (column + 1) * self.T)))
        return list(found)

    def read(self, begin, end):
        """Windows [begin, end): [end - begin, T + 1]."""
        parts = []
        for row, count, column in self.runs(begin, end):
            block = self.array.block(row, column * self.T, (column + 1) * self.T)
            part = np.full((count, self.T + 1), BEGIN, dtype="<u2")
            part[:, 1:] = block[row % CHUNK : row % CHUNK + count]
            parts.append(part)
        return np.concatenate(parts)


def header(windows, split):
    """With a mark, for this script alone, of what decides which windows a shard holds but does not show in its size."""
    words = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    origin = hashlib.sha256(f"{split.array.path.resolve()} {split.array.count} {split.rows}".encode()).digest()
    words[:6] = MAGIC, VERSION, windows * (split.T + 1), VOCAB_SIZE, split.T + 1, int.from_bytes(origin[:3], "little")
    return words.tobytes()


def is_whole(path, windows, split):
    if not path.is_file() or path.stat().st_size != HEADER_BYTES + 2 * windows * (split.T + 1):
        return False
    with open(path, "rb") as file:
        return file.read(HEADER_BYTES) == header(windows, split)


def write_split(split, name, out, shard_tokens):
    per_shard = max(1, int(shard_tokens) // (split.T + 1))
    count = -(-split.windows // per_shard)
    for i in range(count):
        begin, end = i * per_shard, min((i + 1) * per_shard, split.windows)
        path = out / f"longcrawl64_{name}_{i:06d}.bin"
        if is_whole(path, end - begin, split):
            print(f"{path}: there already", flush=True)
            continue
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            file.write(header(end - begin, split))
            for first in range(begin, end, CHUNK):
                file.write(split.read(first, min(first + CHUNK, end)).tobytes())
        temporary.replace(path)
        print(f"{path}: {end - begin} windows of {split.T} tokens", flush=True)
    others = [p for p in sorted(out.glob(f"longcrawl64_{name}_*.bin")) if int(p.stem.rsplit("_", 1)[1]) >= count]
    if others:
        raise SystemExit(f"{others[0]}: of a larger conversion; remove it, or give another -o")


def open_train(args):
    array = Rows(args.source / "train.zarr")
    rows = array.count - array.count % args.batch_rows
    windows = min(int(args.tokens) // args.context, rows * (ROW // args.context))
    if windows == 0:
        raise SystemExit(f"--tokens {args.tokens:g}: not one window of {args.context} tokens in batches of {args.batch_rows} rows")
    return Split(array, args.context, rows, windows)


def open_heldout(args):
    array = Rows(args.source / "heldout.zarr")
    rows = args.val_tokens // ROW
    if args.val_tokens % ROW != 0 or rows > array.count:
        raise SystemExit(f"--val-tokens {args.val_tokens}: expected a multiple of {ROW}, at most {array.count * ROW}")
    return Split(array, args.context, rows, rows * (ROW // args.context))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=pathlib.Path, help="folder with train.zarr and heldout.zarr")
    parser.add_argument("-o", "--out", type=pathlib.Path, default=pathlib.Path("data"), help="folder for the shards")
    parser.add_argument("-T", "--context", type=int, default=16384, help="tokens in a window")
    parser.add_argument("--tokens", type=float, default=2684354560, help="of training")
    parser.add_argument("--val-tokens", type=int, default=0, help="of validation, a multiple of 65536; 0: none")
    parser.add_argument("--batch-rows", type=int, default=32, help="windows in a step of training")
    parser.add_argument("--shard-tokens", type=float, default=1e8, help="tokens in a shard")
    parser.add_argument("--list", choices=("train", "heldout"), help="print the chunks that are needed and do nothing")
    args = parser.parse_args()
    if args.context < 1 or ROW % args.context != 0 or args.batch_rows < 1:
        raise SystemExit(f"-T {args.context}: expected a divisor of {ROW}, and --batch-rows of at least 1")
    if args.list:
        split = open_train(args) if args.list == "train" else open_heldout(args)
        print("\n".join(f"gs://longcrawl64/{args.list}.zarr/{name}" for name in split.chunks()))
        return 0
    splits = dict(train=open_train(args))
    if args.val_tokens:
        splits["val"] = open_heldout(args)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, split in splits.items():
        write_split(split, name, args.out, args.shard_tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
