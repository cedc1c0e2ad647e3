#!/usr/bin/env python3
"""Text to train on from Debian packages: documentation and source code, three to two.

    python3 scripts/data_debian.py -o text                                           # 44M tokens
    python3 scripts/data_debian.py -o text --prose-bytes 92e6 --code-bytes 165e6      # 107M tokens, mostly code
    ./make_shards -o data --vocab tests/data/gpt2/gpt2.tiktoken --val-fraction 0.02 text

Downloads the packages with apt-get (Debian or Ubuntu, no root needed, 600 MB), unpacks them in --cache (3.4 GB, kept
for the next time), and writes one file a document into -o. Documentation is what the packages hold as HTML,
reStructuredText, POD, Markdown and dictionaries, as plain text, where it is English; code is the Linux kernel's C.
Lines of HTML that many pages of a package share (menus, footers) are left out. The whole takes some five minutes. A
document's name begins with the hash of its text, so make_shards, which goes by name, mixes the packages; the same
packages give the same files. Packages that this release does not have are named and left out.
"""

import argparse
import collections
import gzip
import hashlib
import html.parser
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile

KERNEL = ("linux-source-6.1", "linux-source-6.12", "linux-source-6.8.0")  # the first that there is
# Per package at most --package-bytes of text are taken, so that none is most of the corpus.
PROSE = """python3.11-doc python3.13-doc python3.12-doc postgresql-doc-15 postgresql-doc-17 postgresql-doc-16 git-doc
perl-doc libreoffice-help-en-us sqlite3-doc rust-doc anarchism debian-handbook debian-reference-en debian-policy
developers-reference python-django-doc python-pandas-doc python-scipy-doc python-sqlalchemy-doc python-sympy-doc
dict-gcide dict-wn dict-foldoc dict-jargon gimp-help-en vim-runtime cmake-doc nodejs-doc erlang-doc octave-doc
libboost1.81-doc libboost1.83-doc ghc-doc libstdc++-12-doc llvm-14-doc lilypond-doc-html gap-doc maxima-doc harden-doc
debian-edu-doc-en shorewall-doc installation-guide-amd64 bash-doc zsh-doc racket-doc sphinx-doc""".split()
PLAIN = (".rst", ".txt", ".md", ".pod")
PART_BYTES = 65536  # dictionaries are cut into documents of this size
SMALLEST, LARGEST = 500, 1000000  # bytes of a document
COMMON = 8  # a line of HTML in more pages of a package than this is furniture


class PageText(html.parser.HTMLParser):
    """The text of an HTML page: a line for each block, <pre> as it stands, no scripts, menus or heads."""

    SKIPPED = {"script", "style", "nav", "head", "header", "footer", "button", "select", "svg"}
    BLOCKS = {
        "p",
        "div",
        "li",
        "ul",
        "ol",
        "dl",
        "dt",
        "dd",
        "table",
        "tr",
        "section",
        "article",
        "blockquote",
        "pre",
        "br",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "hr",
        "body",
    }

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts, self.skipped, self.pre = [], [], 0

    def handle_starttag(self, tag, attributes):
        if tag in self.SKIPPED:
            self.skipped.append(tag)
        elif tag in self.BLOCKS:
            self.parts.append("\n\n" if tag in ("p", "pre") or tag[0] == "h" else "\n")
        elif tag in ("td", "th"):
            self.parts.append("  ")
        self.pre += tag == "pre"

    def handle_endtag(self, tag):
        if self.skipped and tag == self.skipped[-1]:
            self.skipped.pop()
        if tag in self.BLOCKS:
            self.parts.append("\n")
        self.pre -= tag == "pre" and self.pre > 0

    def handle_data(self, data):
        if not self.skipped:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def page_text(page):
    parser = PageText()
    parser.feed(page)
    parser.close()
    text = "".join(parser.parts).replace("\u00b6", "")  # the mark of a link to a heading
    lines = [line.rstrip() for line in text.split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def without_furniture(pages):
    """The pages without the lines that more than COMMON of them, and a fiftieth of them, have."""
    count = collections.Counter(line for page in pages for line in set(page.split("\n")))
    common = {line for line, n in count.items() if n > max(COMMON, len(pages) / 50) and len(line.strip()) > 2}
    kept = ("\n".join(line for line in page.split("\n") if line not in common) for page in pages)
    return [re.sub(r"\n{3,}", "\n\n", page).strip() + "\n" for page in kept]


def read_text(path):
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    return data.decode("utf-8", errors="replace").replace("\r\n", "\n")


def parts_of(text):
    """A long text cut between lines into parts of about PART_BYTES."""
    part, size = [], 0
    for line in text.split("\n"):
        part.append(line)
        size += len(line) + 1
        if size >= PART_BYTES:
            yield "\n".join(part) + "\n"
            part, size = [], 0
    yield "\n".join(part) + "\n"


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def prose_of(folder, limit):
    """Documents of an unpacked documentation package, in no order; not many more than `limit` bytes are read."""
    plain, pages = [], []
    paths = [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
    for path in sorted(paths, key=lambda p: digest(str(p.relative_to(folder)))):
        if sum(map(len, pages)) > 1.3 * limit:
            break
        name = path.name.removesuffix(".gz")
        if "changelog" in name or name in ("copyright", "genindex.html"):
            continue
        if name.endswith(PLAIN):
            plain.append(read_text(path))
        elif name.endswith((".html", ".htm", ".xhtml")):
            pages.append(page_text(read_text(path)))
        elif name.endswith(".dict.dz"):
            plain.extend(parts_of(read_text(path)))
    # Sphinx ships the source of every page beside it: the sources are cleaner than the pages.
    documents = plain if len(plain) > len(pages) / 2 else plain + without_furniture(pages)
    return filter(is_english, documents)


def kernel_of(folder):
    """The kernel's documentation and its code."""
    archive = next(folder.rglob("linux-source-*.tar.xz"), None)
    if archive is None:
        raise SystemExit(f"{folder}: no linux-source-*.tar.xz in it; remove this folder, to fetch it again")
    prose, code = [], []
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.split("/", 1)[-1]
            if not member.isfile() or "translations/" in name or not SMALLEST <= member.size <= LARGEST:
                continue
            if name.startswith("Documentation/") and name.endswith((".rst", ".txt")):
                prose.append(tar.extractfile(member).read().decode("utf-8", errors="replace"))
            elif name.endswith(".c"):
                code.append(tar.extractfile(member).read().decode("utf-8", errors="replace"))
    return prose, code


def fetch(package, cache):
    """The folder of the unpacked package; None when this release has no such package."""
    folder = cache / package
    if not folder.is_dir():
        if subprocess.run(["apt-get", "download", "-qq", package], cwd=cache, capture_output=True).returncode != 0:
            return None
        deb, part = next(cache.glob(f"{package}_*.deb")), cache / f"{package}.part"
        shutil.rmtree(part, ignore_errors=True)
        if subprocess.run(["dpkg", "-x", deb, part]).returncode != 0:
            raise SystemExit(f"{deb}: cannot be unpacked; make room, or remove it, to fetch it again")
        part.rename(folder)  # whole, or not there
        deb.unlink()
    return folder


def is_english(text):
    return 1000 * text.count(" the ") >= len(text) and len(text.encode()) < 1.05 * len(text)


def choose(documents, limit):
    """Documents in the order of their hashes, each text once, up to `limit` bytes; {hash: text}."""
    chosen, size = {}, 0
    for name, text in sorted((digest(t), t) for t in documents):
        if name not in chosen and SMALLEST <= len(text) <= LARGEST and size + len(text) <= limit:
            chosen[name] = text
            size += len(text)
    return chosen


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=pathlib.Path, required=True, help="folder for the documents")
    parser.add_argument("--cache", type=pathlib.Path, default=pathlib.Path("debian_packages"), help="where packages are unpacked and stay")
    parser.add_argument("--prose-bytes", type=float, default=74e6, help="bytes of documentation")
    parser.add_argument("--code-bytes", type=float, default=42e6, help="bytes of C")
    parser.add_argument("--package-bytes", type=float, default=0, help="most from one package; 0: a tenth of the prose")
    args = parser.parse_args()
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is missing: this needs Debian, or what is made from it")
    args.cache.mkdir(parents=True, exist_ok=True)
    cache = args.cache.resolve()
    most = args.package_bytes or args.prose_bytes / 10
    kernel = next((folder for folder in (fetch(name, cache) for name in KERNEL) if folder), None)
    if kernel is None:
        raise SystemExit(f"none of {', '.join(KERNEL)} can be downloaded; is `apt-get update` done?")
    manual, code = kernel_of(kernel)
    prose, missing = choose(filter(is_english, manual), most), []
    for package in PROSE:
        folder = fetch(package, cache)
        if folder is None:
            missing.append(package)
            continue
        found = choose(prose_of(folder, most), most)
        print(f"{package:28} {len(found):6} documents {sum(map(len, found.values())) / 1e6:7.1f} MB", flush=True)
        prose.update(found)
    chosen = {**choose(prose.values(), args.prose_bytes), **choose(code, args.code_bytes)}
    args.out.mkdir(parents=True, exist_ok=True)
    files = {f"{name[:20]}.txt": text for name, text in chosen.items()}
    others = sorted(p.name for p in args.out.iterdir() if p.name not in files)
    if others:
        raise SystemExit(f"{args.out}: {len(others)} other files are there, such as {others[0]}; remove them, or choose another -o")
    for name, text in files.items():
        (args.out / name).write_text(text)
    size = sum(map(len, chosen.values()))
    print(
        f"{args.out}: {len(chosen)} documents, {size / 1e6:.1f} MB; of "
        f"{sum(map(len, prose.values())) / 1e6:.0f} MB of documentation and {sum(map(len, code)) / 1e6:.0f} MB of code"
        + (f"; not in this release: {' '.join(missing)}" if missing else "")
    )


if __name__ == "__main__":
    sys.exit(main())
