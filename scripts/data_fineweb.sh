#!/usr/bin/env bash
# FineWeb as GPT-2 tokens, ready to train on: public shards in llm.c's format, 100M tokens (200 MB) each.
#
#   scripts/data_fineweb.sh                 10 shards, 1B tokens, into data/fineweb, and the one for validation
#   scripts/data_fineweb.sh -n 27 -o DIR    2.7B tokens, the papers' 125M
#   ./train_fox -i data/fineweb -T 16384
#
# There are 103 shards. Needs curl. A download that was stopped goes on where it stood; what is there and whole is kept. Every
# file is checked (magic number, version, size as the header says) before it gets its name.
# FINEWEB_URL: another place with files of the same names.
set -u
out=data/fineweb
shards=10
url=${FINEWEB_URL:-https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main}

fail() {
    echo "data_fineweb.sh: error: $*" >&2
    exit 1
}
while [ $# -gt 0 ]; do
    case $1 in
    -n) shards=${2:-}; shift ;;
    -o) out=${2:-}; shift ;;
    *) fail "unknown option $1; usage: scripts/data_fineweb.sh [-n SHARDS] [-o FOLDER]" ;;
    esac
    shift || break
done
[ "$shards" -ge 1 ] 2>/dev/null && [ "$shards" -le 103 ] || fail "-n $shards: expected a number of shards in 1..103"
shards=$((10#$shards)) # 08 is 8
[ -n "$out" ] || fail '-o needs a folder'
command -v curl >/dev/null || fail 'curl is missing; apt-get install curl'
mkdir -p "$out" || fail "$out: cannot be made"

int32() { # FILE INDEX: a number of the header
    od -A n -t d4 -j $((4 * $2)) -N 4 "$1" | tr -d ' '
}
# Prints what is wrong with a shard; nothing when it is whole.
problem() {
    local size count
    size=$(wc -c <"$1")
    [ "$size" -ge 1024 ] || { echo "$size bytes, a shard has 1024 or more"; return; }
    [ "$(int32 "$1" 0)" = 20240520 ] && [ "$(int32 "$1" 1)" = 1 ] || { echo 'not a token shard of version 1'; return; }
    count=$(int32 "$1" 2)
    [ "$size" -eq $((1024 + 2 * count)) ] || echo "$size bytes, its header says $((1024 + 2 * count))"
}

get() { # NAME
    local file="$out/$1" part="$out/$1.part" wrong
    if [ -e "$file" ]; then
        wrong=$(problem "$file")
        [ -z "$wrong" ] || fail "$file: $wrong; remove it and start again"
        echo "$file: there already"
        return
    fi
    if [ ! -e "$part" ] || [ -n "$(problem "$part")" ]; then
        curl --fail --location --silent --retry 5 --retry-delay 5 --continue-at - -o "$part" "$url/$1" ||
            fail "$url/$1: the download failed (curl says $?); start again to go on"
    fi
    wrong=$(problem "$part")
    [ -z "$wrong" ] || fail "$part: $wrong; remove it and start again"
    mv "$part" "$file"
    echo "$file: $(int32 "$file" 2) tokens"
}

get fineweb_val_000000.bin
for ((i = 1; i <= shards; i++)); do
    get "$(printf 'fineweb_train_%06d.bin' "$i")"
done
