#!/usr/bin/env bash
# Any folder of text as shards of GPT-2's tokens:
#
#   scripts/data_text.sh ~/books -o data/books
#   ./train_fox -i data/books -T 16384
#
# Every file is a document; folders are walked; a hundredth of the documents becomes validation data. --vocab FILE: another
# vocabulary than tests/data/gpt2/gpt2.tiktoken. Further options go to ./make_shards (--help lists them), which is built if need
# be.
set -u
here=$(cd "$(dirname "$0")/.." >/dev/null && pwd)
out=data
vocab=$here/tests/data/gpt2/gpt2.tiktoken
rest=()

fail() {
    echo "data_text.sh: error: $*" >&2
    exit 1
}
while [ $# -gt 0 ]; do
    case $1 in
    -o) out=${2:-}; shift ;;
    --vocab) vocab=${2:-}; shift ;;
    *) rest+=("$1") ;;
    esac
    shift || break
done
[ ${#rest[@]} -gt 0 ] || fail 'no text given; usage: scripts/data_text.sh FOLDER... [-o OUT] [--vocab FILE]'
[ -n "$out" ] || fail '-o needs a folder'
[ -e "$vocab" ] || fail "$vocab: this vocabulary is not there; --vocab FILE names another one"
if [ ! -x "$here/make_shards" ]; then
    make -C "$here" make_shards >/dev/null || fail "make_shards cannot be built; run make in $here to see why"
fi
exec "$here/make_shards" -o "$out" --vocab "$vocab" "${rest[@]}"
