/* Text to tokens and back: byte-level BPE as GPT-2 has it, or plain bytes.
 *
 *   bytes -> UTF-8 characters -> pieces (words, numbers, punctuation, white space) -> byte-pair merges -> tokens
 *
 * Two kinds of vocabulary:
 *   built in    256 tokens, one for each byte, and end of text = 256. No file.
 *   GPT-2's     a .tiktoken file ("BASE64 RANK" a line, token = rank, end of text = number of lines), or vocab.json
 *               (token name -> number, "<|endoftext|>" among them) with merges.txt beside it (one merge a line, the
 *               most urgent first). Ids fit uint16: at most 65,536 tokens.
 *
 * Pieces. GPT-2 cuts text with
 *     's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
 * and no token crosses a cut. tokenizer_piece() is that pattern by hand; train/unicode_tables.h has its classes.
 *
 * Merges. A piece starts as its bytes. Of all neighbours that form a token together the pair with the lowest rank (the
 * leftmost one of equals) is joined, until no pair forms a token. Ranks are found by pair of tokens: merges.txt lists
 * the pairs; a .tiktoken file lists results only, so every way to split a token into two tokens counts as a pair.
 *
 * Invalid UTF-8. encode() takes any bytes, and decode(encode(x)) = x always. From the first invalid byte on nothing can
 * be cut reliably, so the rest of the text, with the piece before it, is merged as one piece. This is tiktoken's rule
 * (_encode_bytes), and the tokens are equal to tiktoken's for every input; it is exact for text that a buffer's end cut
 * inside a character. A text with stray bytes in it gives good tokens up to the first one and less regular ones after
 * it: make_shards says how many documents have any.
 *
 * A Tokenizer is read-only once open: threads may share it. */
#ifndef FOX_TOKENIZER_H
#define FOX_TOKENIZER_H

#include <unistd.h>

#include "train/common.h"
#include "train/files.h"
#include "train/json.h"
#include "train/unicode_tables.h"
#include "train/utf8.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "shards and the tokenizer's word keys are little-endian"
#endif

#define TOKENIZER_END_OF_TEXT "<|endoftext|>"
#define TOKENIZER_MAX_TOKENS 65536                   /* ids are uint16 */
#define TOKENIZER_MAX_TOKEN_BYTES 255                /* GPT-2's longest has 128 */
#define TOKENIZER_MAX_FILE ((size_t)16 << 20)        /* bytes of a vocabulary file; GPT-2's has 0.8 MB */
#define TOKENIZER_MAX_STRETCH ((size_t)64 << 20)     /* a longer stretch is cut here, to bound memory */
#define TOKENIZER_SHORT_STRETCH 96                   /* bytes up to which a linear search beats a heap */
#define TOKENIZER_NO_RANK UINT32_MAX

/* Character classes of the split pattern. */
enum { TOKENIZER_OTHER, TOKENIZER_LETTER, TOKENIZER_NUMBER, TOKENIZER_SPACE };

/* Growing list of tokens; start from all zeros, release with free(list.tokens). */
typedef struct TokenList {
    uint16_t *tokens;
    size_t count, capacity;
} TokenList;

/* Where a token's bytes are in Tokenizer.bytes. */
typedef struct TokenSpan {
    uint32_t start, length;
} TokenSpan;

/* Slot of the table from a whole piece to its token. key: the bytes themselves up to 8 of them, else their hash. */
typedef struct TokenizerWord {
    uint64_t key;
    uint32_t length; /* 0: empty slot */
    uint32_t token;
} TokenizerWord;

/* Slot of the table from two neighbours to the rank of their merge. */
typedef struct TokenizerPair {
    uint32_t pair; /* left << 16 | right */
    uint32_t rank; /* TOKENIZER_NO_RANK: empty slot */
} TokenizerPair;

typedef struct Tokenizer {
    int vocab_size;  /* ids are 0 .. vocab_size - 1 */
    int end_of_text; /* starts every document; encode() never returns it, whatever the text says */
    /* The rest is private. */
    bool merges;           /* false: the byte vocabulary */
    TokenSpan *spans;      /* [vocab_size] */
    uint8_t *bytes;        /* all tokens' bytes */
    uint16_t byte_token[256];
    uint8_t *classes;      /* [0x110000] class of each code point */
    uint8_t *joined;       /* [a << 8 | b] 1 where some token has the bytes a b in a row */
    TokenizerWord *words;  /* [word_mask + 1] open addressing, never full */
    uint64_t word_mask;
    TokenizerPair *pairs;  /* [pair_mask + 1] likewise */
    uint64_t pair_mask;
    uint16_t *merged;      /* [rank] the token that the merge of this rank makes */
} Tokenizer;

/* ---- UTF-8 ------------------------------------------------------------------------------------------------------ */

/* Number of bytes before the first invalid one; `length` when all is valid UTF-8. */
static inline size_t tokenizer_valid_utf8(const void *text, size_t length) {
    const uint8_t *start = (const uint8_t *)text, *end = start + length, *p = start;
    while (p < end) {
        uint64_t eight;
        if (end - p >= 8 && (memcpy(&eight, p, 8), (eight & 0x8080808080808080u) == 0)) {
            p += 8;
            continue;
        }
        uint32_t c;
        int n = utf8_decode(p, end, &c);
        if (n == 0) {
            break;
        }
        p += n;
    }
    return (size_t)(p - start);
}

/* ---- Pieces ----------------------------------------------------------------------------------------------------- */

/* Class and length of the character at p. Valid UTF-8 only, p < end. */
static inline int tokenizer_class(const Tokenizer *t, const uint8_t *p, int *length) {
    uint32_t c = p[0];
    if (c < 0x80) {
        *length = 1;
    } else if (c < 0xe0) {
        *length = 2;
        c = (c & 0x1f) << 6 | (p[1] & 0x3fu);
    } else if (c < 0xf0) {
        *length = 3;
        c = (c & 0x0f) << 12 | (p[1] & 0x3fu) << 6 | (p[2] & 0x3fu);
    } else {
        *length = 4;
        c = (c & 0x07) << 18 | (p[1] & 0x3fu) << 12 | (p[2] & 0x3fu) << 6 | (p[3] & 0x3fu);
    }
    return t->classes[c];
}

/* Length of 's 't 're 've 'm 'll 'd at p, 0 where there is none of them. */
static inline size_t tokenizer_contraction(const uint8_t *p, const uint8_t *end) {
    if (end - p >= 2 && (p[1] == 's' || p[1] == 't' || p[1] == 'm' || p[1] == 'd')) {
        return 2;
    }
    bool two = end - p >= 3 && ((p[1] == 'r' && p[2] == 'e') || (p[1] == 'v' && p[2] == 'e') ||
                                (p[1] == 'l' && p[2] == 'l'));
    return two ? 3 : 0;
}

/* Length in bytes of the piece that the split pattern takes at p. Valid UTF-8 only, p < end. */
static inline size_t tokenizer_piece(const Tokenizer *t, const uint8_t *p, const uint8_t *end) {
    if (*p == '\'') {
        size_t n = tokenizer_contraction(p, end);
        if (n > 0) {
            return n;
        }
    }
    int length;
    int kind = tokenizer_class(t, p, &length);
    const uint8_t *q = p + length;
    if (kind == TOKENIZER_SPACE) {
        const uint8_t *last = p; // the last white-space character of the run
        int next = TOKENIZER_SPACE;
        while (q < end && (next = tokenizer_class(t, q, &length)) == TOKENIZER_SPACE) {
            last = q;
            q += length;
        }
        if (q == end) {
            return (size_t)(q - p); // \s+(?!\S) takes all of it
        }
        if (last > p) {
            return (size_t)(last - p); // \s+(?!\S) gives one character back, so that the next one is no \S
        }
        if (*p != ' ') {
            return (size_t)(q - p); // \s+ on a single character
        }
        kind = next; // one blank belongs to the run after it
        q += length;
    }
    while (q < end && tokenizer_class(t, q, &length) == kind) {
        q += length;
    }
    return (size_t)(q - p);
}

/* ---- Hash tables ------------------------------------------------------------------------------------------------ */

/* Key of a piece in the word table. `end`: the readable memory ends there, at or after p + length. */
static inline uint64_t tokenizer_word_key(const uint8_t *p, size_t length, const uint8_t *end) {
    if (length > 8) {
        return fox_hash(0, p, length);
    }
    uint64_t key = 0;
    if (end - p >= 8) {
        memcpy(&key, p, 8); // one load and a mask: most pieces are this short
        return key & (UINT64_MAX >> (64 - 8 * length));
    }
    memcpy(&key, p, length);
    return key;
}

/* The slot of that piece, or the empty slot where it would go. */
static inline TokenizerWord *tokenizer_word(const Tokenizer *t, const uint8_t *p, size_t length, const uint8_t *end) {
    uint64_t key = tokenizer_word_key(p, length, end);
    for (uint64_t i = (key ^ length) * 0x9e3779b97f4a7c15u >> 32;; i++) {
        TokenizerWord *word = &t->words[i & t->word_mask];
        if (word->length == 0) {
            return word;
        }
        if (word->key == key && word->length == length &&
            (length <= 8 || memcmp(t->bytes + t->spans[word->token].start, p, length) == 0)) {
            return word;
        }
    }
}

/* Token of exactly these bytes, -1 if there is none. */
static inline int tokenizer_find(const Tokenizer *t, const uint8_t *p, size_t length, const uint8_t *end) {
    if (length == 0 || length > TOKENIZER_MAX_TOKEN_BYTES) {
        return -1;
    }
    const TokenizerWord *word = tokenizer_word(t, p, length, end);
    return word->length == 0 ? -1 : (int)word->token;
}

/* Makes `token`, whose span is set, known by its bytes. false: another token has the same bytes. */
static inline bool tokenizer_add_word(Tokenizer *t, int token) {
    TokenSpan span = t->spans[token];
    const uint8_t *p = t->bytes + span.start;
    TokenizerWord *word = tokenizer_word(t, p, span.length, p + span.length);
    if (word->length != 0) {
        return false;
    }
    word->key = tokenizer_word_key(p, span.length, p + span.length);
    word->length = span.length;
    word->token = (uint32_t)token;
    return true;
}

/* The slot of that pair, or the empty slot where it would go. */
static inline TokenizerPair *tokenizer_pair(const Tokenizer *t, uint32_t left, uint32_t right) {
    uint32_t pair = left << 16 | right;
    for (uint64_t i = pair * 0x9e3779b97f4a7c15u >> 32;; i++) {
        TokenizerPair *slot = &t->pairs[i & t->pair_mask];
        if (slot->rank == TOKENIZER_NO_RANK || slot->pair == pair) {
            return slot;
        }
    }
}

/* The smallest 2^n - 1 that leaves a table of `count` entries at most half full. */
static inline uint64_t tokenizer_mask(size_t count) {
    uint64_t size = 16;
    while (size < 2 * (uint64_t)count) {
        size *= 2;
    }
    return size - 1;
}

static inline void tokenizer_make_words(Tokenizer *t, size_t count) {
    t->word_mask = tokenizer_mask(count);
    t->words = FOX_NEW(TokenizerWord, t->word_mask + 1);
}

static inline void tokenizer_make_pairs(Tokenizer *t, size_t count) {
    t->pair_mask = tokenizer_mask(count);
    t->pairs = FOX_NEW(TokenizerPair, t->pair_mask + 1);
    for (uint64_t i = 0; i <= t->pair_mask; i++) {
        t->pairs[i].rank = TOKENIZER_NO_RANK;
    }
}

/* ---- Merging ---------------------------------------------------------------------------------------------------- */

/* Makes room for `more` tokens. */
static inline void token_list_reserve(TokenList *list, size_t more) {
    if (list->capacity - list->count >= more) {
        return;
    }
    size_t capacity = list->capacity + list->capacity / 2 + more + 64;
    uint16_t *tokens = (uint16_t *)realloc(list->tokens, capacity * sizeof *tokens);
    if (tokens == NULL) {
        fox_die("out of memory for %zu tokens; split the text into smaller documents", capacity);
    }
    list->tokens = tokens;
    list->capacity = capacity;
}

/* Appends one token. */
static inline void token_list_push(TokenList *list, int token) {
    token_list_reserve(list, 1);
    list->tokens[list->count++] = (uint16_t)token;
}

/* Merges n <= TOKENIZER_SHORT_STRETCH bytes into tokens[] and returns their number. O(n^2), all in the first cache. */
static inline size_t tokenizer_merge_short(const Tokenizer *t, const uint8_t *p, size_t n, uint16_t *tokens) {
    uint32_t rank[TOKENIZER_SHORT_STRETCH + 1]; // rank[i]: of the pair (i, i + 1)
    for (size_t i = 0; i < n; i++) {
        tokens[i] = t->byte_token[p[i]];
    }
    for (size_t i = 0; i + 1 < n; i++) {
        rank[i] = tokenizer_pair(t, tokens[i], tokens[i + 1])->rank;
    }
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++) {
            if (rank[i] < rank[best]) {
                best = i;
            }
        }
        if (rank[best] == TOKENIZER_NO_RANK) {
            break;
        }
        tokens[best] = t->merged[rank[best]];
        n--;
        memmove(tokens + best + 1, tokens + best + 2, (n - best - 1) * sizeof *tokens);
        memmove(rank + best, rank + best + 1, (n - best) * sizeof *rank);
        if (best > 0) {
            rank[best - 1] = tokenizer_pair(t, tokens[best - 1], tokens[best])->rank;
        }
        if (best + 1 < n) {
            rank[best] = tokenizer_pair(t, tokens[best], tokens[best + 1])->rank;
        }
    }
    return n;
}

/* A binary heap of candidates, rank << 32 | position: the smallest is the leftmost of the lowest rank. */
typedef struct TokenizerHeap {
    uint64_t *items;
    size_t count;
} TokenizerHeap;

/* Restores the heap below item i. */
static inline void tokenizer_heap_sink(TokenizerHeap *heap, size_t i) {
    uint64_t item = heap->items[i];
    for (size_t child; (child = 2 * i + 1) < heap->count; i = child) {
        child += child + 1 < heap->count && heap->items[child + 1] < heap->items[child];
        if (item <= heap->items[child]) {
            break;
        }
        heap->items[i] = heap->items[child];
    }
    heap->items[i] = item;
}

static inline uint64_t tokenizer_heap_pop(TokenizerHeap *heap) {
    uint64_t item = heap->items[0];
    heap->items[0] = heap->items[--heap->count];
    tokenizer_heap_sink(heap, 0);
    return item;
}

static inline void tokenizer_heap_push(TokenizerHeap *heap, uint64_t item) {
    size_t i = heap->count++;
    for (; i > 0 && item < heap->items[(i - 1) / 2]; i = (i - 1) / 2) {
        heap->items[i] = heap->items[(i - 1) / 2];
    }
    heap->items[i] = item;
}

/* A token of a long stretch, at the position of its first byte, in a doubly linked list. */
typedef struct TokenizerNode {
    uint32_t previous, next; /* positions; the stretch's length past either end */
    uint32_t rank;           /* of the pair (this, next) */
    uint16_t token;
} TokenizerNode;

/* Looks up the pair that starts at node i anew and makes it a candidate. */
static inline void tokenizer_rank_node(const Tokenizer *t, TokenizerNode *nodes, uint32_t i, uint32_t n,
                                       TokenizerHeap *heap) {
    uint32_t next = nodes[i].next;
    nodes[i].rank = next == n ? TOKENIZER_NO_RANK : tokenizer_pair(t, nodes[i].token, nodes[next].token)->rank;
    if (nodes[i].rank != TOKENIZER_NO_RANK) {
        tokenizer_heap_push(heap, (uint64_t)nodes[i].rank << 32 | i);
    }
}

/* The same merges for any length up to TOKENIZER_MAX_STRETCH, O(n log n): candidates wait in a heap, and one
 * whose node has another rank by now is dropped when it comes up. */
static inline void tokenizer_merge_long(const Tokenizer *t, const uint8_t *p, size_t length, TokenList *out) {
    uint32_t n = (uint32_t)length;
    TokenizerNode *nodes = FOX_NEW(TokenizerNode, n);
    TokenizerHeap heap = {FOX_NEW(uint64_t, 2 * length), 0}; // each merge takes one candidate out, puts two in at most
    for (uint32_t i = 0; i < n; i++) {
        nodes[i].previous = i == 0 ? n : i - 1;
        nodes[i].next = i + 1;
        nodes[i].token = t->byte_token[p[i]];
    }
    for (uint32_t i = 0; i < n; i++) {
        tokenizer_rank_node(t, nodes, i, n, &heap);
    }
    while (heap.count > 0) {
        uint64_t item = tokenizer_heap_pop(&heap);
        uint32_t i = (uint32_t)item, rank = (uint32_t)(item >> 32);
        if (nodes[i].rank != rank) {
            continue;
        }
        uint32_t gone = nodes[i].next;
        nodes[i].token = t->merged[rank];
        nodes[i].next = nodes[gone].next;
        nodes[gone].rank = TOKENIZER_NO_RANK;
        if (nodes[i].next != n) {
            nodes[nodes[i].next].previous = i;
        }
        if (nodes[i].previous != n) {
            tokenizer_rank_node(t, nodes, nodes[i].previous, n, &heap);
        }
        tokenizer_rank_node(t, nodes, i, n, &heap);
    }
    for (uint32_t i = 0; i < n; i = nodes[i].next) {
        out->tokens[out->count++] = nodes[i].token;
    }
    free(nodes);
    free(heap.items);
}

/* Appends the merged bytes of one piece. Where no token at all has the two bytes around a place in a row, no merge ever
 * crosses it: the stretches between such places are merged one by one, which gives the same tokens and keeps the work
 * small and in the cache, however long the piece is. */
static inline void tokenizer_merge(const Tokenizer *t, const uint8_t *p, size_t length, TokenList *out) {
    for (size_t n; length > 0; p += n, length -= n) {
        for (n = 1; n < length && n < TOKENIZER_MAX_STRETCH && t->joined[p[n - 1] << 8 | p[n]]; n++) {
        }
        if (n <= TOKENIZER_SHORT_STRETCH) {
            out->count += tokenizer_merge_short(t, p, n, out->tokens + out->count);
        } else {
            tokenizer_merge_long(t, p, n, out);
        }
    }
}

/* Appends the tokens of one piece: the token of exactly these bytes, or else the merged bytes. */
static inline void tokenizer_encode_piece(const Tokenizer *t, const uint8_t *p, size_t length, const uint8_t *end,
                                          TokenList *out) {
    token_list_reserve(out, length);
    int token = tokenizer_find(t, p, length, end);
    if (token >= 0) {
        out->tokens[out->count++] = (uint16_t)token;
    } else {
        tokenizer_merge(t, p, length, out);
    }
}

/* ---- Encode, decode --------------------------------------------------------------------------------------------- */

/* A token's bytes (not 0-terminated) and their number: end of text is "<|endoftext|>"; NULL and 0 for an id that the
 * vocabulary does not have. */
static inline const uint8_t *tokenizer_token_bytes(const Tokenizer *t, int token, size_t *length) {
    if (token < 0 || token >= t->vocab_size) {
        *length = 0;
        return NULL;
    }
    *length = t->spans[token].length;
    return t->bytes + t->spans[token].start;
}

/* True for a token of blanks, tabs and line feeds only. */
static inline bool tokenizer_is_blank(const Tokenizer *t, int token) {
    size_t length;
    const uint8_t *p = tokenizer_token_bytes(t, token, &length);
    for (size_t i = 0; i < length; i++) {
        if (p[i] != ' ' && p[i] != '\n' && p[i] != '\t') {
            return false;
        }
    }
    return true;
}

/* Takes the tokens of the last piece, which begin at `last`, off the list, returns how many bytes they stand for. A
 * piece of white space goes with all the blank tokens before it: tiktoken's own allowance for patterns whose cut there
 * would move, kept because the tokens should be equal to tiktoken's. */
static inline size_t tokenizer_take_back(const Tokenizer *t, TokenList *list, size_t first, size_t last) {
    if (last < list->count && tokenizer_is_blank(t, list->tokens[last])) {
        while (last > first && tokenizer_is_blank(t, list->tokens[last - 1])) {
            last--;
        }
    }
    size_t bytes = 0;
    for (size_t i = last; i < list->count; i++) {
        bytes += t->spans[list->tokens[i]].length;
    }
    list->count = last;
    return bytes;
}

/* Appends the tokens of `length` bytes to the list, which the caller owns. Takes any bytes; never fails. */
static inline void tokenizer_encode(const Tokenizer *t, const void *text, size_t length, TokenList *out) {
    const uint8_t *p = (const uint8_t *)text;
    if (!t->merges) {
        token_list_reserve(out, length);
        for (size_t i = 0; i < length; i++) {
            out->tokens[out->count++] = p[i];
        }
        return;
    }
    const uint8_t *end = p + length, *valid_end = p + tokenizer_valid_utf8(text, length);
    size_t first = out->count, last = first; // where this text's and the last piece's tokens begin
    while (p < valid_end) {
        size_t n = tokenizer_piece(t, p, valid_end);
        last = out->count;
        tokenizer_encode_piece(t, p, n, end, out);
        p += n;
    }
    if (p < end) {
        p -= tokenizer_take_back(t, out, first, last);
        tokenizer_encode_piece(t, p, (size_t)(end - p), end, out);
    }
}

/* The bytes of `count` tokens, 0-terminated besides; their number in *length. Ids that the vocabulary does not have
 * give nothing. The caller frees it. */
static inline char *tokenizer_decode(const Tokenizer *t, const uint16_t *tokens, size_t count, size_t *length) {
    size_t total = 0, n;
    for (size_t i = 0; i < count; i++) {
        tokenizer_token_bytes(t, tokens[i], &n);
        total += n;
    }
    char *text = FOX_NEW(char, total + 1), *out = text;
    for (size_t i = 0; i < count; i++) {
        const uint8_t *bytes = tokenizer_token_bytes(t, tokens[i], &n);
        if (n > 0) {
            memcpy(out, bytes, n);
            out += n;
        }
    }
    *length = total;
    return text;
}

/* ---- Opening a vocabulary --------------------------------------------------------------------------------------- */

static inline void tokenizer_free(Tokenizer *t) {
    free(t->spans);
    free(t->bytes);
    free(t->classes);
    free(t->joined);
    free(t->words);
    free(t->pairs);
    free(t->merged);
    memset(t, 0, sizeof *t);
}

/* Sets a token's bytes, appended at t->bytes + *used. */
static inline void tokenizer_set_bytes(Tokenizer *t, int token, const void *bytes, size_t length, size_t *used) {
    memcpy(t->bytes + *used, bytes, length);
    t->spans[token].start = (uint32_t)*used;
    t->spans[token].length = (uint32_t)length;
    *used += length;
}

/* The built-in vocabulary. */
static inline void tokenizer_open_bytes(Tokenizer *t) {
    size_t used = 0;
    t->end_of_text = 256;
    t->vocab_size = 257;
    t->spans = FOX_NEW(TokenSpan, 257);
    t->bytes = FOX_NEW(uint8_t, 256 + sizeof TOKENIZER_END_OF_TEXT);
    for (int i = 0; i < 256; i++) {
        uint8_t byte = (uint8_t)i;
        tokenizer_set_bytes(t, i, &byte, 1, &used);
    }
    tokenizer_set_bytes(t, 256, TOKENIZER_END_OF_TEXT, sizeof TOKENIZER_END_OF_TEXT - 1, &used);
}

static inline void tokenizer_fill_class(Tokenizer *t, const UnicodeRange *ranges, size_t count, int kind) {
    for (size_t i = 0; i < count; i++) {
        memset(t->classes + ranges[i].first, kind, ranges[i].last - ranges[i].first + 1);
    }
}

/* Fills classes[] and, from all tokens' bytes, joined[]. */
static inline void tokenizer_make_tables(Tokenizer *t) {
    t->classes = FOX_NEW(uint8_t, 0x110000); // zero is TOKENIZER_OTHER
    tokenizer_fill_class(t, unicode_letters, sizeof unicode_letters / sizeof unicode_letters[0], TOKENIZER_LETTER);
    tokenizer_fill_class(t, unicode_numbers, sizeof unicode_numbers / sizeof unicode_numbers[0], TOKENIZER_NUMBER);
    tokenizer_fill_class(t, unicode_spaces, sizeof unicode_spaces / sizeof unicode_spaces[0], TOKENIZER_SPACE);
    t->joined = FOX_NEW(uint8_t, 65536);
    for (int token = 0; token < t->vocab_size; token++) {
        const uint8_t *p = t->bytes + t->spans[token].start;
        for (uint32_t i = 1; i < t->spans[token].length; i++) {
            t->joined[p[i - 1] << 8 | p[i]] = 1;
        }
    }
}

/* Finds the 256 one-byte tokens: with all of them there, any text can be encoded. */
static inline bool tokenizer_find_bytes(Tokenizer *t, const char *path, FoxError *err) {
    for (int i = 0; i < 256; i++) {
        uint8_t byte = (uint8_t)i;
        int token = tokenizer_find(t, &byte, 1, &byte + 1);
        if (token < 0) {
            return fox_fail(err, "%s: no token for the single byte 0x%02x; a byte-level vocabulary has all 256", path,
                            i);
        }
        t->byte_token[i] = (uint16_t)token;
    }
    return true;
}

/* A line of a text file, and what an error needs to name it. */
typedef struct TokenizerLine {
    const char *path;
    int number;       /* from 1; 0 before the first */
    const char *text; /* not 0-terminated; without \n or \r\n */
    size_t length;
} TokenizerLine;

/* Moves to the next line of [*p, end): false at the end of the text. */
static inline bool tokenizer_next_line(const char **p, const char *end, TokenizerLine *line) {
    if (*p == end) {
        return false;
    }
    const char *stop = (const char *)memchr(*p, '\n', (size_t)(end - *p));
    line->number++;
    line->text = *p;
    line->length = (size_t)((stop == NULL ? end : stop) - *p);
    line->length -= line->length > 0 && line->text[line->length - 1] == '\r';
    *p = stop == NULL ? end : stop + 1;
    return true;
}

static inline int tokenizer_base64_digit(char c) {
    return c >= 'A' && c <= 'Z' ? c - 'A' : c >= 'a' && c <= 'z' ? c - 'a' + 26 : c >= '0' && c <= '9' ? c - '0' + 52
         : c == '+' ? 62 : c == '/' ? 63 : -1;
}

/* Decodes padded base64 into at most (length / 4) * 3 bytes; returns their number, 0 when it is malformed or empty. */
static inline size_t tokenizer_base64(const char *text, size_t length, uint8_t *out) {
    if (length == 0 || length % 4 != 0) {
        return 0;
    }
    size_t padding = (size_t)(text[length - 1] == '=') + (text[length - 1] == '=' && text[length - 2] == '=');
    size_t count = 0;
    uint32_t bits = 0;
    for (size_t i = 0; i < length; i++) {
        int digit = i >= length - padding ? 0 : tokenizer_base64_digit(text[i]);
        if (digit < 0) {
            return 0;
        }
        bits = bits << 6 | (uint32_t)digit;
        if (i % 4 == 3) {
            out[count++] = (uint8_t)(bits >> 16);
            out[count++] = (uint8_t)(bits >> 8);
            out[count++] = (uint8_t)bits;
        }
    }
    return count - padding;
}

/* Reads a rank: decimal digits up to the line's end, below `limit`. -1 when it is anything else. */
static inline int tokenizer_rank(const char *text, size_t length, int limit) {
    int rank = length == 0 ? -1 : 0;
    for (size_t i = 0; i < length; i++) {
        if (text[i] < '0' || text[i] > '9') {
            return -1;
        }
        rank = rank * 10 + (text[i] - '0');
        if (rank >= limit) {
            return -1;
        }
    }
    return rank;
}

/* One line of a .tiktoken file of `count` ranks. */
static inline bool tokenizer_rank_line(Tokenizer *t, const TokenizerLine *line, int count, size_t *used,
                                       FoxError *err) {
    const char *blank = (const char *)memchr(line->text, ' ', line->length);
    if (blank == NULL) {
        return fox_fail(err, "%s:%d: expected \"BASE64 RANK\", found no blank", line->path, line->number);
    }
    size_t digits = (size_t)(blank - line->text);
    if (digits > TOKENIZER_MAX_TOKEN_BYTES / 3 * 4) {
        return fox_fail(err, "%s:%d: token too long, expected at most %d bytes", line->path, line->number,
                        TOKENIZER_MAX_TOKEN_BYTES);
    }
    size_t bytes = tokenizer_base64(line->text, digits, t->bytes + *used);
    if (bytes == 0) {
        return fox_fail(err, "%s:%d: the token before the blank is not base64", line->path, line->number);
    }
    int rank = tokenizer_rank(blank + 1, line->length - digits - 1, count);
    if (rank < 0) {
        return fox_fail(err, "%s:%d: bad rank, expected a number from 0 to %d (the file has %d tokens)", line->path,
                        line->number, count - 1, count);
    }
    if (t->spans[rank].length > 0) {
        return fox_fail(err, "%s:%d: rank %d is given twice", line->path, line->number, rank);
    }
    t->spans[rank].start = (uint32_t)*used;
    t->spans[rank].length = (uint32_t)bytes;
    *used += bytes;
    if (!tokenizer_add_word(t, rank)) {
        return fox_fail(err, "%s:%d: another line has the same token", line->path, line->number);
    }
    return true;
}

/* Fills the pair table from the tokens alone: every split of a token into two tokens. */
static inline void tokenizer_derive_pairs(Tokenizer *t, int ranks, size_t bytes) {
    TokenizerPair *found = FOX_NEW(TokenizerPair, bytes); // a token of n bytes has n - 1 splits
    size_t count = 0;
    t->merged = FOX_NEW(uint16_t, ranks);
    for (int rank = 0; rank < ranks; rank++) {
        const uint8_t *p = t->bytes + t->spans[rank].start, *end = p + t->spans[rank].length;
        t->merged[rank] = (uint16_t)rank;
        for (const uint8_t *cut = p + 1; cut < end; cut++) {
            int left = tokenizer_find(t, p, (size_t)(cut - p), end);
            int right = left < 0 ? -1 : tokenizer_find(t, cut, (size_t)(end - cut), end);
            if (right >= 0) {
                found[count].pair = (uint32_t)left << 16 | (uint32_t)right;
                found[count++].rank = (uint32_t)rank;
            }
        }
    }
    tokenizer_make_pairs(t, count);
    for (size_t i = 0; i < count; i++) {
        *tokenizer_pair(t, found[i].pair >> 16, found[i].pair & 0xffff) = found[i];
    }
    free(found);
}

/* Reads the text of a .tiktoken file; `path` names it in errors. */
static inline bool tokenizer_parse_ranks(Tokenizer *t, const char *path, const char *text, size_t size, FoxError *err) {
    TokenizerLine line = {path, 0, NULL, 0};
    const char *end = text + size, *p = text;
    size_t used = 0;
    int count = 0;
    while (tokenizer_next_line(&p, end, &line)) {
        count += line.length > 0;
        if (count >= TOKENIZER_MAX_TOKENS) {
            return fox_fail(err, "%s: more than %d tokens; with end of text they must fit 16 bits", path,
                            TOKENIZER_MAX_TOKENS - 1);
        }
    }
    t->merges = true;
    t->end_of_text = count;
    t->vocab_size = count + 1;
    t->spans = FOX_NEW(TokenSpan, count + 1);
    t->bytes = FOX_NEW(uint8_t, size + sizeof TOKENIZER_END_OF_TEXT);
    tokenizer_make_words(t, (size_t)count);
    line.number = 0;
    for (p = text; tokenizer_next_line(&p, end, &line);) {
        if (line.length > 0 && !tokenizer_rank_line(t, &line, count, &used, err)) {
            return false;
        }
    }
    if (!tokenizer_find_bytes(t, path, err)) {
        return false;
    }
    tokenizer_derive_pairs(t, count, used);
    tokenizer_set_bytes(t, count, TOKENIZER_END_OF_TEXT, sizeof TOKENIZER_END_OF_TEXT - 1, &used);
    tokenizer_make_tables(t);
    return true;
}

/* GPT-2 writes bytes as printable characters: those that are printable in Latin-1 as themselves, the others as U+0100,
 * U+0101, ... in order. Fills byte_of[0 .. 323], -1 where a character stands for no byte. */
#define TOKENIZER_BYTE_NAMES 324
static inline void tokenizer_byte_names(int16_t *byte_of) {
    int next = 256;
    for (int i = 0; i < TOKENIZER_BYTE_NAMES; i++) {
        byte_of[i] = -1;
    }
    for (int i = 0; i < 256; i++) {
        bool printable = (i >= '!' && i <= '~') || (i >= 0xa1 && i <= 0xac) || i >= 0xae;
        byte_of[printable ? i : next++] = (int16_t)i;
    }
}

/* Decodes a token's name as vocab.json and merges.txt write it into out (at most `length` bytes). Returns the number of
 * bytes, 0 when a character stands for no byte. */
static inline size_t tokenizer_unname(const int16_t *byte_of, const char *name, size_t length, uint8_t *out) {
    const uint8_t *p = (const uint8_t *)name, *end = p + length;
    size_t count = 0;
    while (p < end) {
        uint32_t c;
        int n = utf8_decode(p, end, &c);
        if (n == 0 || c >= TOKENIZER_BYTE_NAMES || byte_of[c] < 0) {
            return 0;
        }
        out[count++] = (uint8_t)byte_of[c];
        p += n;
    }
    return count;
}

/* One member of vocab.json. Names that are not made of byte names are special tokens: they decode as they are written,
 * and encode() never returns them. */
static inline bool tokenizer_vocab_member(Tokenizer *t, const char *path, const Json *member, const int16_t *byte_of,
                                          size_t *used, FoxError *err) {
    if (!member->is_integer || member->integer < 0 || member->integer >= t->vocab_size) {
        return fox_fail(err, "%s: bad token number, expected 0 to %d, each once (the file has %d tokens)", path,
                        t->vocab_size - 1, t->vocab_size);
    }
    int token = (int)member->integer;
    if (t->spans[token].length > 0) {
        return fox_fail(err, "%s: token number %d is given twice", path, token);
    }
    if (member->key_length == 0 || member->key_length > 2 * TOKENIZER_MAX_TOKEN_BYTES) {
        return fox_fail(err, "%s: token %d has a name of %zu bytes, expected 1 to %d", path, token, member->key_length,
                        2 * TOKENIZER_MAX_TOKEN_BYTES);
    }
    uint8_t bytes[2 * TOKENIZER_MAX_TOKEN_BYTES];
    size_t length = tokenizer_unname(byte_of, member->key, member->key_length, bytes);
    if (strcmp(member->key, TOKENIZER_END_OF_TEXT) == 0) {
        t->end_of_text = token;
        length = 0;
    }
    if (length > TOKENIZER_MAX_TOKEN_BYTES) {
        return fox_fail(err, "%s: token %d has %zu bytes, expected at most %d", path, token, length,
                        TOKENIZER_MAX_TOKEN_BYTES);
    }
    if (length == 0) {
        tokenizer_set_bytes(t, token, member->key, member->key_length, used);
        return true;
    }
    tokenizer_set_bytes(t, token, bytes, length, used);
    return tokenizer_add_word(t, token) || fox_fail(err, "%s: token %d is there twice", path, token);
}

/* Reads vocab.json's object. */
static inline bool tokenizer_parse_vocab(Tokenizer *t, const char *path, const Json *root, const int16_t *byte_of,
                                         FoxError *err) {
    if (root->type != JSON_OBJECT || root->count == 0 || root->count > TOKENIZER_MAX_TOKENS) {
        return fox_fail(err, "%s: expected an object of 1 to %d token names and numbers", path, TOKENIZER_MAX_TOKENS);
    }
    size_t total = 0, used = 0;
    for (const Json *m = root->first; m != NULL; m = m->next) {
        total += m->key_length;
    }
    t->merges = true;
    t->vocab_size = root->count;
    t->end_of_text = -1;
    t->spans = FOX_NEW(TokenSpan, t->vocab_size);
    t->bytes = FOX_NEW(uint8_t, total);
    tokenizer_make_words(t, (size_t)t->vocab_size);
    for (const Json *m = root->first; m != NULL; m = m->next) {
        if (!tokenizer_vocab_member(t, path, m, byte_of, &used, err)) {
            return false;
        }
    }
    if (t->end_of_text < 0) {
        return fox_fail(err, "%s: no token \"" TOKENIZER_END_OF_TEXT "\"; documents are separated by it", path);
    }
    return tokenizer_find_bytes(t, path, err);
}

/* One line "LEFT RIGHT" of merges.txt, the merge of that rank. */
static inline bool tokenizer_merge_line(Tokenizer *t, const TokenizerLine *line, const int16_t *byte_of, uint32_t rank,
                                        FoxError *err) {
    const char *blank = (const char *)memchr(line->text, ' ', line->length);
    if (blank == NULL || line->length > 4 * TOKENIZER_MAX_TOKEN_BYTES) {
        return fox_fail(err, "%s:%d: expected two token names with one blank between them", line->path, line->number);
    }
    uint8_t bytes[4 * TOKENIZER_MAX_TOKEN_BYTES];
    size_t left_name = (size_t)(blank - line->text);
    size_t left = tokenizer_unname(byte_of, line->text, left_name, bytes);
    size_t right = tokenizer_unname(byte_of, blank + 1, line->length - left_name - 1, bytes + left);
    const uint8_t *end = bytes + left + right;
    int left_token = tokenizer_find(t, bytes, left, end);
    int right_token = tokenizer_find(t, bytes + left, right, end);
    int token = tokenizer_find(t, bytes, left + right, end);
    if (left_token < 0 || right_token < 0 || token < 0) {
        const char *missing = left_token < 0 ? "left" : right_token < 0 ? "right" : "merged";
        return fox_fail(err, "%s:%d: the %s token is not in vocab.json; the two files must belong together", line->path,
                        line->number, missing);
    }
    TokenizerPair *slot = tokenizer_pair(t, (uint32_t)left_token, (uint32_t)right_token);
    if (slot->rank != TOKENIZER_NO_RANK) {
        return fox_fail(err, "%s:%d: this merge is given twice", line->path, line->number);
    }
    slot->pair = (uint32_t)left_token << 16 | (uint32_t)right_token;
    slot->rank = rank;
    t->merged[rank] = (uint16_t)token;
    return true;
}

/* Reads the text of merges.txt. */
static inline bool tokenizer_parse_merges(Tokenizer *t, const char *path, const char *text, size_t size,
                                          const int16_t *byte_of, FoxError *err) {
    TokenizerLine line = {path, 0, NULL, 0};
    const char *end = text + size, *p = text;
    while (tokenizer_next_line(&p, end, &line)) {
    }
    tokenizer_make_pairs(t, (size_t)line.number);
    t->merged = FOX_NEW(uint16_t, line.number + 1);
    line.number = 0;
    uint32_t rank = 0;
    for (p = text; tokenizer_next_line(&p, end, &line);) {
        bool version = line.number == 1 && line.length >= 8 && memcmp(line.text, "#version", 8) == 0;
        if (line.length > 0 && !version && !tokenizer_merge_line(t, &line, byte_of, rank++, err)) {
            return false;
        }
    }
    return true;
}

/* Drops from the word table what the merges never make, so that a whole piece found there equals its merged bytes. */
static inline void tokenizer_drop_unreachable(Tokenizer *t) {
    TokenizerWord *all = t->words;
    uint64_t slots = t->word_mask + 1;
    TokenList list = {NULL, 0, 0};
    tokenizer_make_words(t, (size_t)t->vocab_size);
    for (uint64_t i = 0; i < slots; i++) {
        if (all[i].length == 0) {
            continue;
        }
        // Nothing longer than what is in the new table so far is found there: these bytes are merged from scratch.
        const uint8_t *p = t->bytes + t->spans[all[i].token].start;
        list.count = 0;
        tokenizer_encode_piece(t, p, all[i].length, p + all[i].length, &list);
        if (list.count == 1 && list.tokens[0] == all[i].token) {
            tokenizer_add_word(t, (int)all[i].token);
        }
    }
    free(list.tokens);
    free(all);
}

/* Reads a .tiktoken file. */
static inline bool tokenizer_open_ranks(Tokenizer *t, const char *path, FoxError *err) {
    char *text = NULL;
    size_t size = 0;
    if (!file_read(path, TOKENIZER_MAX_FILE, &text, &size, err)) {
        return false;
    }
    bool ok = tokenizer_parse_ranks(t, path, text, size, err);
    free(text);
    return ok;
}

/* Builds the vocabulary from the texts of vocab.json and merges.txt; the paths name them in errors. */
static inline bool tokenizer_parse_pair(Tokenizer *t, const char *vocab_path, const char *vocab, size_t vocab_size,
                                        const char *merges_path, const char *merges, size_t merges_size,
                                        FoxError *err) {
    int16_t byte_of[TOKENIZER_BYTE_NAMES];
    tokenizer_byte_names(byte_of);
    JsonDocument document = {NULL, NULL};
    if (!json_parse(vocab, vocab_size, vocab_path, &document, err)) {
        return false;
    }
    bool ok = tokenizer_parse_vocab(t, vocab_path, document.root, byte_of, err) &&
              tokenizer_parse_merges(t, merges_path, merges, merges_size, byte_of, err);
    json_free(&document);
    if (ok) {
        tokenizer_make_tables(t);
        tokenizer_drop_unreachable(t);
    }
    return ok;
}

/* Reads vocab.json and the merges.txt beside it. */
static inline bool tokenizer_open_pair(Tokenizer *t, const char *path, FoxError *err) {
    const char *slash = strrchr(path, '/');
    int folder = slash == NULL ? 0 : (int)(slash + 1 - path);
    char merges_path[4096];
    if (snprintf(merges_path, sizeof merges_path, "%.*smerges.txt", folder, path) >= (int)sizeof merges_path) {
        return fox_fail(err, "%.100s...: path too long", path);
    }
    char *vocab = NULL, *merges = NULL;
    size_t vocab_size = 0, merges_size = 0;
    bool ok = file_read(path, TOKENIZER_MAX_FILE, &vocab, &vocab_size, err) &&
              file_read(merges_path, TOKENIZER_MAX_FILE, &merges, &merges_size, err) &&
              tokenizer_parse_pair(t, path, vocab, vocab_size, merges_path, merges, merges_size, err);
    free(vocab);
    free(merges);
    return ok;
}

/* Opens the vocabulary in a folder: vocab.json with merges.txt, or the one .tiktoken file there. */
static inline bool tokenizer_open_folder(Tokenizer *t, const char *path, FoxError *err) {
    char vocab[4096];
    if (snprintf(vocab, sizeof vocab, "%s/vocab.json", path) >= (int)sizeof vocab) {
        return fox_fail(err, "%.100s...: path too long", path);
    }
    if (access(vocab, F_OK) == 0) {
        return tokenizer_open_pair(t, vocab, err);
    }
    PathList list;
    FoxError nothing = {""};
    if (!path_list(path, "*.tiktoken", &list, &nothing)) {
        return fox_fail(err, "%s: neither vocab.json nor a .tiktoken file in this folder", path);
    }
    bool ok = list.count == 1 ? tokenizer_open_ranks(t, list.paths[0], err)
                              : fox_fail(err, "%s: %d .tiktoken files in this folder; name one of them", path,
                                         list.count);
    path_list_free(&list);
    return ok;
}

/* Opens a vocabulary. path: NULL or "" for the built-in bytes, a .tiktoken file, a vocab.json with merges.txt beside
 * it, or a folder with either. Release with tokenizer_free; after a failure there is nothing to release. */
static inline bool tokenizer_open(const char *path, Tokenizer *t, FoxError *err) {
    memset(t, 0, sizeof *t);
    if (path == NULL || path[0] == '\0') {
        tokenizer_open_bytes(t);
        return true;
    }
    size_t length = strlen(path);
    bool folder = is_directory(path);
    bool json = length >= 5 && strcmp(path + length - 5, ".json") == 0;
    bool ok = folder ? tokenizer_open_folder(t, path, err)
            : json   ? tokenizer_open_pair(t, path, err)
                     : tokenizer_open_ranks(t, path, err);
    if (!ok) {
        tokenizer_free(t);
    }
    return ok;
}

/* ---- JSON escapes ----------------------------------------------------------------------------------------------- */

/* Writes \uXXXX. */
static inline size_t tokenizer_put_escape(uint32_t unit, char *out) {
    if (out != NULL) {
        const char *digits = "0123456789abcdef";
        out[0] = '\\';
        out[1] = 'u';
        for (int i = 0; i < 4; i++) {
            out[2 + i] = digits[unit >> (12 - 4 * i) & 15];
        }
    }
    return 6;
}

/* Escapes into `out`, or only counts where it is NULL. Returns the number of bytes. */
static inline size_t tokenizer_escape_into(const uint8_t *p, const uint8_t *end, char *out) {
    static const char special[] = "\"\\\n\r\t\f\b", letter[] = "\"\\nrtfb";
    size_t count = 0;
    while (p < end) {
        char *to = out == NULL ? NULL : out + count;
        const char *found = *p == 0 ? NULL : strchr(special, *p);
        uint32_t c;
        int n = utf8_decode(p, end, &c);
        p += n == 0 ? 1 : n;
        if (n == 0) {
            count += tokenizer_put_escape(0xdc00u | p[-1], to);
        } else if (found != NULL) {
            if (to != NULL) {
                to[0] = '\\';
                to[1] = letter[found - special];
            }
            count += 2;
        } else if (c >= ' ' && c <= '~') {
            if (to != NULL) {
                to[0] = (char)c;
            }
            count++;
        } else if (c < 0x10000) {
            count += tokenizer_put_escape(c, to);
        } else {
            count += tokenizer_put_escape(0xd800 + ((c - 0x10000) >> 10), to);
            count += tokenizer_put_escape(0xdc00 + ((c - 0x10000) & 0x3ff), to == NULL ? NULL : to + 6);
        }
    }
    return count;
}

/* The text as Python's json.dumps(text)[1:-1] writes it: pure ASCII, \uXXXX with surrogate pairs, no outer quotes. An
 * invalid byte 0xNN becomes \udcNN, as Python has it after decoding with errors="surrogateescape". *out_length bytes,
 * 0-terminated; the caller frees it. */
static inline char *tokenizer_json_escape(const void *text, size_t length, size_t *out_length) {
    const uint8_t *p = (const uint8_t *)text;
    *out_length = tokenizer_escape_into(p, p + length, NULL);
    char *out = FOX_NEW(char, *out_length + 1);
    tokenizer_escape_into(p, p + length, out);
    return out;
}

/* The 16-bit unit of a \uXXXX at p, -1 where there is none. */
static inline int tokenizer_get_escape(const uint8_t *p, const uint8_t *end) {
    if (end - p < 6 || p[0] != '\\' || p[1] != 'u') {
        return -1;
    }
    int unit = 0;
    for (int i = 2; i < 6; i++) {
        int c = p[i];
        int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10
                  : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
        if (digit < 0) {
            return -1;
        }
        unit = unit << 4 | digit;
    }
    return unit;
}

/* The inverse of tokenizer_json_escape: unescape(escape(x)) = x for any bytes. Made for what a model writes, so nothing
 * is an error: a malformed escape stays as it is, a lone surrogate that stands for no byte becomes U+FFFD. Never longer
 * than its input; the caller frees it. */
static inline char *tokenizer_json_unescape(const void *text, size_t length, size_t *out_length) {
    static const char letter[] = "\"\\/nrtfb", plain[] = "\"\\/\n\r\t\f\b";
    const uint8_t *p = (const uint8_t *)text, *end = p + length;
    uint8_t *out = FOX_NEW(uint8_t, length + 1);
    size_t count = 0;
    while (p < end) {
        const char *found = p[0] == '\\' && end - p >= 2 && p[1] != 0 ? strchr(letter, p[1]) : NULL;
        int unit = tokenizer_get_escape(p, end);
        if (found != NULL) {
            out[count++] = (uint8_t)plain[found - letter];
            p += 2;
        } else if (unit < 0) {
            out[count++] = *p++;
        } else {
            p += 6;
            int low = unit >= 0xd800 && unit < 0xdc00 ? tokenizer_get_escape(p, end) : -1;
            if (low >= 0xdc00 && low < 0xe000) {
                p += 6;
                uint32_t c = 0x10000 + ((uint32_t)(unit - 0xd800) << 10) + (uint32_t)(low - 0xdc00);
                count += (size_t)utf8_encode(c, out + count);
            } else if (unit >= 0xdc80 && unit <= 0xdcff) {
                out[count++] = (uint8_t)unit;
            } else {
                bool surrogate = unit >= 0xd800 && unit < 0xe000;
                count += (size_t)utf8_encode(surrogate ? 0xfffd : (uint32_t)unit, out + count);
            }
        }
    }
    *out_length = count;
    return (char *)out;
}

#endif
