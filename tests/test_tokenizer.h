/* Tests of tokenizer.h and make_shards: tiktoken's known answers (single texts, and every code point in context through
 * checksums), a naive byte-pair encoder as the oracle for merging, round trips, malformed vocabularies, shards read
 * back by a reader of their own. */
#ifndef FOX_TEST_TOKENIZER_H
#define FOX_TEST_TOKENIZER_H

#include <sys/wait.h>

#include "../tokenizer.h"
#include "check.h"

/* ---- A naive byte-pair encoder ---------------------------------------------------------------------------------- */

/* The ranks of a .tiktoken file, sorted by bytes. */
typedef struct NaiveToken {
    const uint8_t *bytes;
    size_t length;
    int rank;
} NaiveToken;

typedef struct NaiveRanks {
    const Tokenizer *owner; /* lends the bytes only */
    int count;
    NaiveToken *sorted;
} NaiveRanks;

static int naive_compare(const void *a, const void *b) {
    const NaiveToken *x = (const NaiveToken *)a, *y = (const NaiveToken *)b;
    int order = memcmp(x->bytes, y->bytes, x->length < y->length ? x->length : y->length);
    return order != 0 ? order : (x->length > y->length) - (x->length < y->length);
}

static NaiveRanks naive_ranks(const Tokenizer *t) {
    NaiveRanks ranks = {t, t->vocab_size - 1, FOX_NEW(NaiveToken, t->vocab_size)};
    for (int i = 0; i < ranks.count; i++) {
        ranks.sorted[i].bytes = tokenizer_token_bytes(t, i, &ranks.sorted[i].length);
        ranks.sorted[i].rank = i;
    }
    qsort(ranks.sorted, (size_t)ranks.count, sizeof(NaiveToken), naive_compare);
    return ranks;
}

/* Rank of these bytes if it is below `limit`, else `limit`. */
static int naive_rank(const NaiveRanks *ranks, const uint8_t *p, size_t length, int limit) {
    NaiveToken key = {p, length, 0};
    const NaiveToken *found =
        (const NaiveToken *)bsearch(&key, ranks->sorted, (size_t)ranks->count, sizeof key, naive_compare);
    return found == NULL || found->rank >= limit ? limit : found->rank;
}

/* Splits one piece by joining the two neighbours of the lowest rank below `limit` again and again. starts[0 .. parts]:
 * where the parts begin, the end of the piece last. Returns the number of parts. */
static size_t naive_merge(const NaiveRanks *ranks, const uint8_t *p, size_t length, int limit, size_t *starts) {
    size_t parts = length;
    for (size_t i = 0; i <= length; i++) {
        starts[i] = i;
    }
    for (;;) {
        int best = limit;
        size_t at = 0;
        for (size_t i = 0; i + 1 < parts; i++) {
            int rank = naive_rank(ranks, p + starts[i], starts[i + 2] - starts[i], limit);
            if (rank < best) {
                best = rank;
                at = i;
            }
        }
        if (best == limit) {
            return parts;
        }
        memmove(starts + at + 1, starts + at + 2, (parts - at - 1) * sizeof *starts);
        parts--;
    }
}

/* ---- Helpers ---------------------------------------------------------------------------------------------------- */

static void test_write_file(const char *path, const void *bytes, size_t length) {
    FILE *file = fopen(path, "wb");
    if (file == NULL || fwrite(bytes, 1, length, file) != length || fclose(file) != 0) {
        fox_die("%s: the test cannot write it", path);
    }
}

static bool same_tokens(const TokenList *a, const TokenList *b) {
    return a->count == b->count && (a->count == 0 || memcmp(a->tokens, b->tokens, 2 * a->count) == 0);
}

/* Checks decode(encode(text)) = text; false where it is not. */
static bool round_trips(const Tokenizer *t, const void *text, size_t length) {
    TokenList list = {NULL, 0, 0};
    tokenizer_encode(t, text, length, &list);
    size_t back_length;
    char *back = tokenizer_decode(t, list.tokens, list.count, &back_length);
    bool same = back_length == length && memcmp(back, text, length) == 0;
    for (size_t i = 0; i < list.count; i++) {
        same = same && list.tokens[i] < t->vocab_size && list.tokens[i] != t->end_of_text;
    }
    free(back);
    free(list.tokens);
    return same;
}

/* ---- vocab.json and merges.txt out of ranks --------------------------------------------------------------------- */

/* GPT-2's name of a byte as UTF-8: printable Latin-1 as it is, the others from U+0100 on, in order. */
static void put_byte_name(FILE *file, int byte, bool json) {
    int code = byte;
    bool plain = (byte > 32 && byte < 127) || (byte > 160 && byte != 173);
    if (!plain) {
        code = 256 + (byte <= 32 ? byte : byte < 161 ? byte - 127 + 33 : 67);
    }
    if (code < 128) {
        fprintf(file, "%s%c", json && (code == '"' || code == '\\') ? "\\" : "", code);
    } else {
        fprintf(file, "%c%c", 0xc0 | code >> 6, 0x80 | (code & 63));
    }
}

static void put_token_name(FILE *file, const uint8_t *p, size_t length, bool json) {
    for (size_t i = 0; i < length; i++) {
        put_byte_name(file, p[i], json);
    }
}

/* Writes folder/vocab.json and folder/merges.txt. Token `rank` gets the number (rank + shift) mod vocabulary, so that
 * with a shift numbers and ranks differ. The two halves of a token are what merges of lower rank leave of it. */
static void write_pair(const NaiveRanks *ranks, const char *folder, int shift) {
    char path[4096];
    snprintf(path, sizeof path, "%s/vocab.json", folder);
    FILE *vocab = fopen(path, "w");
    snprintf(path, sizeof path, "%s/merges.txt", folder);
    FILE *merges = fopen(path, "w");
    if (vocab == NULL || merges == NULL) {
        fox_die("%s: the test cannot write there", path);
    }
    int size = ranks->count + 1;
    fprintf(vocab, "{\"<|endoftext|>\": %d", (size - 1 + shift) % size);
    fprintf(merges, "#version: 0.2\n");
    for (int rank = 0; rank < ranks->count; rank++) {
        size_t length, starts[300];
        const uint8_t *p = tokenizer_token_bytes(ranks->owner, rank, &length);
        fprintf(vocab, ",\n\"");
        put_token_name(vocab, p, length, true);
        fprintf(vocab, "\": %d", (rank + shift) % size);
        if (length > 1 && naive_merge(ranks, p, length, rank, starts) == 2) {
            put_token_name(merges, p, starts[1], false);
            fputc(' ', merges);
            put_token_name(merges, p + starts[1], length - starts[1], false);
            fputc('\n', merges);
        }
    }
    fprintf(vocab, "}\n");
    fclose(vocab);
    fclose(merges);
}

/* ---- Known answers ---------------------------------------------------------------------------------------------- */

static void check_known_answers(Tests *t, const Tokenizer *tokenizer, int shift) {
    char path[4096];
    snprintf(path, sizeof path, "%s/gpt2/known_answers.json", t->data);
    JsonDocument document;
    FoxError err = {""};
    if (!check(t, json_parse_file(path, &document, &err), "%s", err.text)) {
        return;
    }
    for (const Json *v = document.root->first; v != NULL; v = v->next) {
        const Json *text = json_get(v, "text"), *tokens = json_get(v, "tokens");
        TokenList list = {NULL, 0, 0};
        tokenizer_encode(tokenizer, text->string, text->string_length, &list);
        bool same = list.count == (size_t)tokens->count;
        size_t i = 0;
        for (const Json *k = tokens->first; same && k != NULL; k = k->next) {
            same = list.tokens[i++] == (k->integer + shift) % tokenizer->vocab_size;
        }
        check(t, same, "known answer \"%s\" (shift %d)", text->string, shift);
        free(list.tokens);
    }
    json_free(&document);
}

static uint32_t crc32_of(uint32_t crc, const void *data, size_t length) {
    const uint8_t *p = (const uint8_t *)data;
    crc = ~crc;
    for (size_t i = 0; i < length; i++) {
        crc ^= p[i];
        for (int k = 0; k < 8; k++) {
            crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
        }
    }
    return ~crc;
}

/* Every code point in eleven contexts: code_points.json holds, per 65,536 of them, the number and the CRC-32 of the
 * tokens that tiktoken gives (dev/check_tokenizer.py writes it). Looks at the first `planes` of 17. */
static void check_code_points(Tests *t, const Tokenizer *tokenizer, uint32_t planes) {
    char path[4096];
    snprintf(path, sizeof path, "%s/gpt2/code_points.json", t->data);
    JsonDocument document;
    FoxError err = {""};
    if (!check(t, json_parse_file(path, &document, &err), "%s", err.text)) {
        return;
    }
    uint32_t plane = 0;
    TokenList list = {NULL, 0, 0};
    for (const Json *v = document.root->first; v != NULL && plane < planes; v = v->next, plane++) {
        size_t count = 0;
        uint32_t crc = 0;
        for (uint32_t c = plane << 16; c < (plane + 1) << 16; c++) {
            if (c >= 0xd800 && c < 0xe000) {
                continue;
            }
            char name[5] = {0}, text[256];
            utf8_encode(c, (uint8_t *)name);
            static const char form[] = "a@b 1@2 .@. @ @@\n@x '@s @";
            size_t length = 0;
            for (const char *f = form; *f != '\0'; f++) {
                size_t n = *f == '@' ? (c == 0 ? 1 : strlen(name)) : 1;
                memcpy(text + length, *f == '@' ? name : f, n);
                length += n;
            }
            list.count = 0;
            tokenizer_encode(tokenizer, text, length, &list);
            crc = crc32_of(crc, list.tokens, 2 * list.count);
            count += list.count;
        }
        int64_t want = json_get(v, "tokens")->integer, want_crc = json_get(v, "crc32")->integer;
        check(t, (int64_t)count == want && crc == want_crc,
              "code points of plane %u: %zu tokens, crc %08x, expected %lld, %08x", plane, count, crc, (long long)want,
              (unsigned)want_crc);
    }
    check(t, plane == planes, "code_points.json: %u planes", plane);
    free(list.tokens);
    json_free(&document);
}

/* ---- Merging and round trips ------------------------------------------------------------------------------------ */

/* From an invalid byte on a text is one piece: there the tokens are exactly the naive encoder's. */
static void check_merging(Tests *t, const Tokenizer *tokenizer, const NaiveRanks *ranks, uint64_t seed) {
    static const char corpus[] = "the quick abababaaaaabbaa    \n\n\n  {} == 0000000 thing ing ther her e";
    TokenList list = {NULL, 0, 0}, want = {NULL, 0, 0};
    int cases = t->quick ? 100 : 600;
    for (int i = 0; i < cases; i++) {
        uint8_t text[400];
        size_t starts[401], length = 1 + (size_t)(fox_uniform(seed, 2 * (uint64_t)i) * 399);
        // Whole tokens in a row make many merges compete; few letters make many equal ranks.
        for (size_t k = 0; k < length; k++) {
            uint64_t r = fox_random(seed + 1, (uint64_t)i * 400 + k);
            size_t n;
            const uint8_t *token = tokenizer_token_bytes(tokenizer, (int)((r >> 8) % (uint64_t)ranks->count), &n);
            text[k] = (r & 3) == 0 ? token[0] : (uint8_t)corpus[(r >> 3) % (sizeof corpus - 1)];
        }
        text[0] = 0xff;
        list.count = want.count = 0;
        tokenizer_encode(tokenizer, text, length, &list);
        size_t parts = naive_merge(ranks, text, length, ranks->count, starts);
        for (size_t k = 0; k < parts; k++) {
            token_list_push(&want, naive_rank(ranks, text + starts[k], starts[k + 1] - starts[k], ranks->count));
        }
        check(t, same_tokens(&list, &want), "merges of one piece of %zu bytes (seed %llu, case %d)", length,
              (unsigned long long)seed, i);
    }
    free(list.tokens);
    free(want.tokens);
}

static size_t random_text(uint64_t seed, uint64_t *counter, uint8_t *out, size_t limit) {
    static const char *const words[] = {
        " ", "  ", "\n", "\t", "'s", "'ll", "'", " the", "I", "1", ".", "\xc2\xa0", "\xe3\x80\x80", "\xc2\xb2",
        "\xd0\x9f\xd1\x80\xd0\xb8", "\xe6\x97\xa5", "\xf0\x9f\x98\x80"};
    size_t length = 0, target = (size_t)(fox_uniform(seed, (*counter)++) * (double)limit);
    uint64_t kind = fox_random(seed, (*counter)++) % 3;
    while (length + 4 <= target) {
        uint64_t r = fox_random(seed, (*counter)++);
        if (kind == 0) {
            out[length++] = (uint8_t)r; // any bytes
        } else if (kind == 1) {
            uint32_t c = (uint32_t)(r >> 32) % ((r & 1) != 0 ? 0x110000u : 0x3000u);
            length += (size_t)utf8_encode(c >= 0xd800 && c < 0xe000 ? 0x20 : c, out + length);
        } else if ((r & 63) == 0) {
            out[length++] = (uint8_t)(0x80 | r >> 8);
        } else {
            const char *word = words[(r >> 8) % (sizeof words / sizeof words[0])];
            size_t n = strlen(word) < target - length ? strlen(word) : target - length;
            memcpy(out + length, word, n);
            length += n;
        }
    }
    return length;
}

static void check_round_trips(Tests *t, const Tokenizer *tokenizer, const char *name, uint64_t seed) {
    static const char *const adversarial[] = {
        "", "'", "''s", "'s't're've'm'll'd", " '", "'r", "'re", " ", "  ", " \n ", "\r\n\r\n", "<|endoftext|>",
        "\xff", "\xc3", "a\xc3", " \xff", "  \n\xff", "\xed\xa0\x80", "\xed\xb0\x80", "\xc0\x80", "\xf4\x90\x80\x80",
        "\xf8\x88\x80\x80\x80", "\xe2\x82", "x \xe2\x82", "\xf0\x9f\x98", "\xef\xbb\xbf", "\xef\xbf\xbf",
        "\xf4\x8f\xbf\xbf", "\x7f", "e\xcc\x81"};
    for (size_t i = 0; i < sizeof adversarial / sizeof adversarial[0]; i++) {
        check(t, round_trips(tokenizer, adversarial[i], strlen(adversarial[i])), "%s: adversarial text %zu", name, i);
    }
    check(t, round_trips(tokenizer, "a\0b\0\0", 5), "%s: text with 0 bytes", name);
    uint8_t text[2000];
    uint64_t counter = 0;
    bool all = true;
    for (int i = 0; all && i < (t->quick ? 300 : 5000); i++) {
        uint64_t first = counter;
        size_t length = random_text(seed, &counter, text, sizeof text);
        all = round_trips(tokenizer, text, length);
        if (all) {
            size_t escaped_length, back_length;
            char *escaped = tokenizer_json_escape(text, length, &escaped_length);
            char *back = tokenizer_json_unescape(escaped, escaped_length, &back_length);
            all = back_length == length && memcmp(back, text, length) == 0;
            for (size_t k = 0; k < escaped_length; k++) {
                all = all && escaped[k] >= ' ' && escaped[k] <= '~';
            }
            free(escaped);
            free(back);
        }
        check(t, all, "%s: random text (seed %llu, counter %llu)", name, (unsigned long long)seed,
              (unsigned long long)first);
    }
}

/* A megabyte in one piece: a quadratic merge would take minutes. */
static void check_long_pieces(Tests *t, const Tokenizer *tokenizer) {
    size_t length = t->quick ? 200000 : 1000000;
    char *text = FOX_NEW(char, length);
    static const char *const units[] = {"a", " ", "ab", "\n", "\xff", "=-", "\xe6\x97\xa5"};
    double start = fox_now();
    for (size_t u = 0; u < sizeof units / sizeof units[0]; u++) {
        for (size_t i = 0; i < length; i++) {
            text[i] = units[u][i % strlen(units[u])];
        }
        check(t, round_trips(tokenizer, text, length), "a long piece of \"%s\"", units[u]);
    }
    check(t, fox_now() - start < 60, "long pieces took %.1f s", fox_now() - start);
    free(text);
}

/* ---- JSON escapes ----------------------------------------------------------------------------------------------- */

static void check_json_escape(Tests *t) {
    static const char *const cases[][2] = {
        {"", ""},
        {"plain text", "plain text"},
        {"\"\\/", "\\\"\\\\/"},
        {"\n\r\t\f\b", "\\n\\r\\t\\f\\b"},
        {"\x01\x1f\x7f", "\\u0001\\u001f\\u007f"},
        {"caf\xc3\xa9", "caf\\u00e9"},
        {"\xe6\x97\xa5", "\\u65e5"},
        {"\xf0\x9f\x98\x80", "\\ud83d\\ude00"},
        {"\xf4\x8f\xbf\xbf", "\\udbff\\udfff"},
        {"\xff" "a\xc3", "\\udcffa\\udcc3"},
        {"\xed\xa0\x80", "\\udced\\udca0\\udc80"},
    };
    // The other way only: what a model may write.
    static const char *const loose[][2] = {
        {"\\", "\\"}, {"\\u12", "\\u12"}, {"\\x", "\\x"}, {"\\/", "/"}, {"\\u00E9", "\xc3\xa9"},
        {"\\ud83d", "\xef\xbf\xbd"}, {"\\ud83dx", "\xef\xbf\xbdx"}, {"\\ude00", "\xef\xbf\xbd"}, {"\xff\"", "\xff\""},
        {"\\ud83d\\ud83d\\ude00", "\xef\xbf\xbd\xf0\x9f\x98\x80"},
    };
    size_t length;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char *escaped = tokenizer_json_escape(cases[i][0], strlen(cases[i][0]), &length);
        check(t, length == strlen(cases[i][1]) && strcmp(escaped, cases[i][1]) == 0,
              "escape %zu: found %s, expected %s", i, escaped, cases[i][1]);
        char *back = tokenizer_json_unescape(escaped, length, &length);
        check(t, length == strlen(cases[i][0]) && strcmp(back, cases[i][0]) == 0, "unescape %zu: found %s", i, back);
        free(escaped);
        free(back);
    }
    for (size_t i = 0; i < sizeof loose / sizeof loose[0]; i++) {
        char *text = tokenizer_json_unescape(loose[i][0], strlen(loose[i][0]), &length);
        check(t, length == strlen(loose[i][1]) && strcmp(text, loose[i][1]) == 0, "unescape of %s: found %s",
              loose[i][0], text);
        free(text);
    }
    char *zero = tokenizer_json_escape("\0x", 2, &length);
    check(t, strcmp(zero, "\\u0000x") == 0, "escape of a 0 byte: %s", zero);
    free(zero);
}

/* ---- Vocabulary files ------------------------------------------------------------------------------------------- */

/* A tiny vocabulary: "ab" from a + b, "bc" from b + c, "abc" from a + bc only. After ab no merge makes abc out of
 * ab + c (a .tiktoken file cannot say so: there abc is one token), so "abc" is [ab][c] by merges.txt. */
static void write_tiny_pair(const char *folder, const char *vocab_tail, const char *merges) {
    char path[4096];
    snprintf(path, sizeof path, "%s/vocab.json", folder);
    FILE *file = fopen(path, "w");
    if (file == NULL) {
        fox_die("%s: the test cannot write it", path);
    }
    fprintf(file, "{");
    for (int i = 0; i < 256; i++) {
        fprintf(file, "\"");
        put_byte_name(file, i, true);
        fprintf(file, "\": %d, ", i);
    }
    fprintf(file, "%s", vocab_tail);
    fclose(file);
    snprintf(path, sizeof path, "%s/merges.txt", folder);
    test_write_file(path, merges, strlen(merges));
}

#define TINY_VOCAB "\"ab\": 256, \"bc\": 257, \"abc\": 258, \"<|endoftext|>\": 260, \"<my pad>\": 259}"
#define TINY_MERGES "#version: 0.2\na b\nb c\na bc\n"

static void check_tiny_pair(Tests *t, const char *folder) {
    char path[4096];
    FoxError err = {""};
    Tokenizer tiny;
    TokenList list = {NULL, 0, 0};
    write_tiny_pair(folder, TINY_VOCAB, TINY_MERGES);
    snprintf(path, sizeof path, "%s/vocab.json", folder);
    if (!check(t, tokenizer_open(path, &tiny, &err), "tiny vocabulary: %s", err.text)) {
        return;
    }
    tokenizer_encode(&tiny, "abcbca<my pad>", 6, &list);
    static const uint16_t want[] = {256, 'c', 257, 'a'};
    check(t, list.count == 4 && memcmp(list.tokens, want, sizeof want) == 0, "tiny vocabulary: merges by pair");
    check(t, tiny.vocab_size == 261 && tiny.end_of_text == 260, "tiny vocabulary: sizes");
    check(t, round_trips(&tiny, "<my pad> abc", 12), "tiny vocabulary: special names in text are plain text");
    uint16_t special[] = {259, 260, 65535};
    size_t length;
    char *text = tokenizer_decode(&tiny, special, 3, &length);
    check(t, strcmp(text, "<my pad><|endoftext|>") == 0, "tiny vocabulary: special tokens decode to \"%s\"", text);
    free(text);
    free(list.tokens);
    tokenizer_free(&tiny);
}

static void check_bad_open(Tests *t, const char *path, const char *what, const char *expected) {
    FoxError err = {""};
    Tokenizer tokenizer;
    bool opened = tokenizer_open(path, &tokenizer, &err);
    if (check(t, !opened, "bad vocabulary accepted: %s", what)) {
        check(t, strstr(err.text, expected) != NULL && strchr(err.text, '\n') == NULL,
              "bad vocabulary, %s: expected \"%s\" in \"%s\"", what, expected, err.text);
    } else {
        tokenizer_free(&tokenizer);
    }
}

/* Each case replaces line 300 of the ranks, or is a file of its own. */
static void check_bad_ranks(Tests *t, const char *good, size_t good_length, const char *folder) {
    static const char *const lines[][3] = {
        {"no blank", "IQ==", ":300: expected"},
        {"no base64", "I*== 299", ":300: the token"},
        {"padding inside", "I==Q 299", ":300: the token"},
        {"odd base64", "IQ= 299", ":300: the token"},
        {"empty token", " 299", ":300: the token"},
        {"no rank", "IQQQ ", ":300: bad rank"},
        {"negative rank", "IQQQ -1", ":300: bad rank"},
        {"fractional rank", "IQQQ 299.0", ":300: bad rank"},
        {"huge rank", "IQQQ 99999999999999999999", ":300: bad rank"},
        {"rank out of range", "IQQQ 50256", ":300: bad rank"},
        {"rank twice", "IQQQ 298", ":300: rank 298 is given twice"},
        {"token twice", "IQ== 299", ":300: another line"},
    };
    char path[4096];
    snprintf(path, sizeof path, "%s/bad.tiktoken", folder);
    const char *line = good;
    for (int i = 1; i < 300; i++) {
        line = strchr(line, '\n') + 1;
    }
    const char *rest = strchr(line, '\n');
    for (size_t i = 0; i < sizeof lines / sizeof lines[0]; i++) {
        FILE *file = fopen(path, "wb");
        fwrite(good, 1, (size_t)(line - good), file);
        fputs(lines[i][1], file);
        fwrite(rest, 1, (size_t)(good + good_length - rest), file);
        fclose(file);
        check_bad_open(t, path, lines[i][0], lines[i][2]);
    }
    test_write_file(path, good, (size_t)(line - good)); // 299 lines are a vocabulary
    Tokenizer small;
    FoxError err = {""};
    check(t, tokenizer_open(path, &small, &err) && small.vocab_size == 300, "the first 299 ranks: %s", err.text);
    tokenizer_free(&small);
    test_write_file(path, "", 0);
    check_bad_open(t, path, "empty file", "single byte 0x00");
    test_write_file(path, "IQ== 0\n", 7);
    check_bad_open(t, path, "one token", "single byte 0x00");
    test_write_file(path, "\0\0\0\n\xff\xfe", 6);
    check_bad_open(t, path, "binary", ":1: expected");
    char long_line[1100];
    memset(long_line, 'A', sizeof long_line);
    memcpy(long_line + 1000, " 0\n", 4);
    test_write_file(path, long_line, 1003);
    check_bad_open(t, path, "long token", ":1: token too long");
    char *many = FOX_NEW(char, 70000 * 2);
    memset(many, '\n', 70000 * 2);
    for (int i = 0; i < 70000; i++) {
        many[2 * i] = 'x';
    }
    test_write_file(path, many, 70000 * 2);
    check_bad_open(t, path, "too many tokens", "more than 65535 tokens");
    free(many);
    snprintf(path, sizeof path, "%s/missing.tiktoken", folder);
    check_bad_open(t, path, "missing file", "missing.tiktoken");
}

static void check_bad_pairs(Tests *t, const char *folder) {
    static const char *const cases[][4] = {
        {"no end of text", "\"ab\": 256, \"bc\": 257, \"abc\": 258}", TINY_MERGES, "no token \"<|endoftext|>\""},
        {"number twice", "\"ab\": 256, \"bc\": 256, \"<|endoftext|>\": 257}", "a b\n", "256 is given twice"},
        {"number out of range", "\"ab\": 300, \"<|endoftext|>\": 257}", "a b\n", "bad token number"},
        {"number no integer", "\"ab\": 256.5, \"<|endoftext|>\": 257}", "a b\n", "bad token number"},
        {"number a string", "\"ab\": \"256\", \"<|endoftext|>\": 257}", "a b\n", "bad token number"},
        {"negative number", "\"ab\": -1, \"<|endoftext|>\": 257}", "a b\n", "bad token number"},
        {"empty name", "\"\": 256, \"<|endoftext|>\": 257}", "a b\n", "name of 0 bytes"},
        {"truncated json", "\"ab\": 256, \"<|endo", "a b\n", "vocab.json"},
        {"half a merge", TINY_VOCAB, "#version: 0.2\na b\nb\n", "merges.txt:3: expected two"},
        {"three tokens", TINY_VOCAB, "a b c\n", "merges.txt:1: the right token"},
        {"unknown left", TINY_VOCAB, "a b\nzz b\n", "merges.txt:2: the left token"},
        {"unknown merged", TINY_VOCAB, "a b\n\nb b\n", "merges.txt:3: the merged token"},
        {"merge twice", TINY_VOCAB, "a b\na b\n", "merges.txt:2: this merge is given twice"},
        {"not UTF-8", TINY_VOCAB, "a \xff\n", "merges.txt:1: the right token"},
    };
    char path[4096];
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        write_tiny_pair(folder, cases[i][1], cases[i][2]);
        check_bad_open(t, folder, cases[i][0], cases[i][3]);
    }
    snprintf(path, sizeof path, "%s/merges.txt", folder);
    unlink(path);
    write_tiny_pair(folder, TINY_VOCAB, "");
    unlink(path);
    check_bad_open(t, folder, "no merges.txt", "merges.txt");
    snprintf(path, sizeof path, "%s/vocab.json", folder);
    test_write_file(path, "[1, 2]", 6);
    check_bad_open(t, path, "vocab.json is an array", "merges.txt");
    char merges[4096];
    snprintf(merges, sizeof merges, "%s/merges.txt", folder);
    test_write_file(merges, "", 0);
    check_bad_open(t, path, "vocab.json is an array", "expected an object");
    test_write_file(path, "{\"<|endoftext|>\": 0}", 20);
    check_bad_open(t, path, "no bytes", "single byte 0x00");
    unlink(path);
    unlink(merges);
    check_bad_open(t, folder, "empty folder", "neither vocab.json nor a .tiktoken");
}

/* ---- make_shards ------------------------------------------------------------------------------------------------ */

/* Runs "make_shards ARGUMENTS" in the folder; its output goes to folder/log. Returns the exit status. */
FOX_PRINTF(3, 4)
static int run_make_shards(const char *program, const char *folder, const char *format, ...) {
    char arguments[4096], command[16384];
    va_list args;
    va_start(args, format);
    vsnprintf(arguments, sizeof arguments, format, args);
    va_end(args);
    snprintf(command, sizeof command, "cd '%s' && { %s '%s' %s; } > log 2>&1", folder,
             strncmp(arguments, "LIMIT ", 6) == 0 ? "ulimit -f 2;" : "", program,
             strncmp(arguments, "LIMIT ", 6) == 0 ? arguments + 6 : arguments);
    int status = system(command);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* Reads every shard folder/SPLIT_NNNNNN.bin into one list. Returns their number, -1 when one is malformed. */
static int read_shards(const char *folder, const char *split, int vocab_size, TokenList *out) {
    for (int index = 0;; index++) {
        char path[4096], *bytes;
        size_t size;
        snprintf(path, sizeof path, "%s/%s_%06d.bin", folder, split, index);
        if (!file_read(path, SIZE_MAX / 2, &bytes, &size, NULL)) {
            return index;
        }
        int32_t header[256] = {0};
        bool ok = size >= 1024;
        memcpy(header, bytes, ok ? 1024 : 0);
        ok = ok && header[0] == 20240520 && header[1] == 1 && header[3] == vocab_size && header[2] > 0 &&
             size == 1024 + 2 * (size_t)header[2];
        for (int i = 4; i < 256; i++) {
            ok = ok && header[i] == 0;
        }
        for (size_t i = 1024; ok && i < size; i += 2) {
            token_list_push(out, (uint8_t)bytes[i] | (uint8_t)bytes[i + 1] << 8);
        }
        free(bytes);
        if (!ok) {
            return -1;
        }
    }
}

#define SHARD_DOCUMENTS 40

/* The text of document i of the test: one to four bytes short of a line, no two alike. */
static size_t shard_document(int i, char *text, size_t size) {
    return (size_t)snprintf(text, size, "document %d says \"caf\xc3\xa9\"%.*s\n", i, i % 7, "\t.......");
}

/* Splits the tokens of bytes at the end-of-text token and checks that they are documents of the test in rising order.
 * Marks them in seen[]. */
static bool are_documents(const TokenList *list, bool *seen) {
    int last = -1;
    for (size_t at = 0; at < list->count;) {
        char found[256] = {0}, want[256];
        size_t length = 0;
        if (list->tokens[at++] != 256) {
            return false;
        }
        while (at < list->count && list->tokens[at] != 256 && length < 255) {
            found[length++] = (char)list->tokens[at++];
        }
        int number = -1;
        if (sscanf(found, "document %d", &number) != 1 || number <= last || number >= SHARD_DOCUMENTS || seen[number] ||
            shard_document(number, want, sizeof want) != length || memcmp(found, want, length) != 0) {
            return false;
        }
        seen[number] = true;
        last = number;
    }
    return true;
}

static void check_shards_of_bytes(Tests *t, const char *program, const char *folder) {
    char out[4200];
    snprintf(out, sizeof out, "%s/out", folder);
    for (int round = 0; round < 2; round++) { // the second time through an absolute path: the same split
        TokenList train = {NULL, 0, 0}, val = {NULL, 0, 0};
        bool seen[SHARD_DOCUMENTS] = {false}, in_val[SHARD_DOCUMENTS] = {false};
        const char *to = round == 0 ? "out" : out, *from = round == 0 ? "." : folder;
        int status =
            run_make_shards(program, folder, "-o '%s' --val-fraction 0.2 --shard-tokens=100 '%s/in'", to, from);
        check(t, status == 0, "make_shards: exit status %d", status);
        int train_files = read_shards(out, "train", 257, &train), val_files = read_shards(out, "val", 257, &val);
        check(t, train_files == (int)((train.count + 50) / 100), "%d train shards for %zu tokens", train_files,
              train.count);
        check(t, val_files == (int)((val.count + 50) / 100), "%d val shards for %zu tokens", val_files, val.count);
        check(t, are_documents(&val, in_val) && val.count > 0, "val documents");
        memcpy(seen, in_val, sizeof seen);
        check(t, are_documents(&train, seen) && train.count > 0, "train documents");
        for (int i = 0; i < SHARD_DOCUMENTS; i++) {
            check(t, seen[i], "document %d is in no shard", i);
        }
        free(train.tokens);
        free(val.tokens);
    }
    char path[4200], *log;
    size_t length;
    snprintf(path, sizeof path, "%s/log", folder);
    if (check(t, file_read(path, 1 << 20, &log, &length, NULL), "make_shards printed nothing")) {
        check(t, strstr(log, "documents  40 ") != NULL && strstr(log, " 1 binary") != NULL &&
              strstr(log, " 1 empty") != NULL && strstr(log, " 1 links") != NULL, "summary: %s", log);
        free(log);
    }
}

static void check_shards_of_gpt2(Tests *t, const char *program, const char *folder, const Tokenizer *gpt2) {
    char out[4200], data[4096], text[256];
    snprintf(out, sizeof out, "%s/out", folder);
    if (realpath(t->data, data) == NULL) {
        fox_die("%s: no such folder", t->data);
    }
    int status = run_make_shards(program, folder, "-o out --vocab '%s/gpt2' --json-escape --val-fraction 0 "
                                 "--extensions h,.txt in", data);
    check(t, status == 0, "make_shards with GPT-2's vocabulary: exit status %d", status);
    TokenList found = {NULL, 0, 0}, none = {NULL, 0, 0}, want = {NULL, 0, 0};
    check(t, read_shards(out, "train", 50257, &found) == 1, "one train shard; those of the earlier run are gone");
    check(t, read_shards(out, "val", 50257, &none) == 0, "no val shard");
    for (int i = 0; i < SHARD_DOCUMENTS; i++) {
        size_t length = shard_document(i, text, sizeof text), escaped_length;
        char *escaped = tokenizer_json_escape(text, length, &escaped_length);
        token_list_push(&want, 50256);
        tokenizer_encode(gpt2, escaped, escaped_length, &want);
        free(escaped);
    }
    check(t, same_tokens(&found, &want), "shards of GPT-2 tokens of escaped text");
    free(found.tokens);
    free(want.tokens);
}

static void check_bad_shards(Tests *t, const char *program, const char *folder) {
    static const char *const bad[] = {
        "", "-o", "-o x", "--what in", "-x in", "--val-fraction 1 in", "--val-fraction -0.1 in",
        "--val-fraction nan in", "--val-fraction 0.1x in", "--shard-tokens 0 in", "--shard-tokens 1e6 in",
        "--shard-tokens 99999999999999999999 in",
        "--max-bytes -5 in", "--max-bytes 1 in", "--vocab nothing in", "--vocab '' in", "nothing", "in/empty.txt",
        "--extensions .none in", "--json-escape=1 in", "-o in/doc_10.txt in", "LIMIT -o full in", "LIMIT -o out in"};
    char path[4200], out[4200], *log;
    size_t length;
    TokenList before = {NULL, 0, 0}, after = {NULL, 0, 0};
    snprintf(out, sizeof out, "%s/out", folder);
    int files = read_shards(out, "train", 50257, &before);
    snprintf(path, sizeof path, "%s/log", folder);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        check(t, run_make_shards(program, folder, "%s", bad[i]) == 1, "make_shards %s: expected exit status 1", bad[i]);
        if (check(t, file_read(path, 1 << 20, &log, &length, NULL), "make_shards %s printed nothing", bad[i])) {
            const char *line = strchr(log, '\n');
            check(t, line != NULL && line[1] == '\0' && strncmp(log, "fox: error: ", 12) == 0,
                  "make_shards %s: expected one error line, found %s", bad[i], log);
            free(log);
        }
    }
    snprintf(path, sizeof path, "%s/full", folder);
    PathList list;
    check(t, !path_list(path, "*", &list, NULL), "a failed run leaves files behind");
    check(t, !path_list(out, "*.tmp", &list, NULL), "a failed run leaves temporary files behind");
    check(t, read_shards(out, "train", 50257, &after) == files && files > 0 && same_tokens(&before, &after),
          "a failed run changes the shards of the run before");
    free(before.tokens);
    free(after.tokens);
}

static void check_make_shards(Tests *t, const Tokenizer *gpt2) {
    const char *slash = t->train_fox == NULL ? NULL : strrchr(t->train_fox, '/');
    char beside[4096], program[4096], folder[4096], path[4200], text[256];
    if (t->train_fox == NULL) {
        return;
    }
    snprintf(beside, sizeof beside, "%.*s/make_shards", slash == NULL ? 1 : (int)(slash - t->train_fox),
             slash == NULL ? "." : t->train_fox);
    if (!check(t, realpath(beside, program) != NULL, "%s is missing: make builds it", beside) ||
        realpath(t->scratch, path) == NULL) {
        return;
    }
    snprintf(folder, sizeof folder, "%.4000s/shards", path);
    snprintf(path, sizeof path, "%s/in/deep/er", folder);
    FoxError err = {""};
    check(t, make_directories(path, &err), "%s", err.text);
    for (int i = 0; i < SHARD_DOCUMENTS; i++) {
        // doc_00 .. doc_39 in sorted order: "deep/" sorts before "doc_".
        snprintf(path, sizeof path, "%s/in/%sdoc_%02d.txt", folder, i < 5 ? "deep/er/" : i < 10 ? "deep/f" : "", i);
        test_write_file(path, text, shard_document(i, text, sizeof text));
    }
    snprintf(path, sizeof path, "%s/in/.hidden", folder);
    test_write_file(path, "hidden", 6);
    snprintf(path, sizeof path, "%s/in/binary.txt", folder);
    test_write_file(path, "a\0b", 3);
    snprintf(path, sizeof path, "%s/in/empty.txt", folder);
    test_write_file(path, "", 0);
    snprintf(path, sizeof path, "%s/in/deep/loop", folder);
    check(t, symlink("../..", path) == 0, "cannot link");
    check_shards_of_bytes(t, program, folder);
    check_shards_of_gpt2(t, program, folder, gpt2);
    check_bad_shards(t, program, folder);
    check(t, run_make_shards(program, folder, "--help") == 0, "make_shards --help");
    char command[4200];
    snprintf(command, sizeof command, "rm -rf '%s'", folder);
    check(t, system(command) == 0, "cannot remove %s", folder);
}

/* ---- All -------------------------------------------------------------------------------------------------------- */

static void test_tokenizer(Tests *t) {
    uint64_t seed = (uint64_t)time(NULL) * 1000003u + (uint64_t)getpid();
    char path[4096], folder[2048], *text;
    size_t length;
    FoxError err = {""};
    Tokenizer bytes, gpt2, pair;
    check_json_escape(t);
    check(t, tokenizer_open(NULL, &bytes, &err) && bytes.vocab_size == 257 && bytes.end_of_text == 256,
          "byte vocabulary");
    check_round_trips(t, &bytes, "bytes", seed);
    tokenizer_free(&bytes);

    snprintf(path, sizeof path, "%s/gpt2/gpt2.tiktoken", t->data);
    snprintf(folder, sizeof folder, "%s/vocabulary", t->scratch);
    if (!check(t, tokenizer_open(path, &gpt2, &err), "%s", err.text) ||
        !check(t, make_directories(folder, &err), "%s", err.text)) {
        return;
    }
    check(t, gpt2.vocab_size == 50257 && gpt2.end_of_text == 50256, "GPT-2's vocabulary: %d", gpt2.vocab_size);
    NaiveRanks ranks = naive_ranks(&gpt2);
    check_known_answers(t, &gpt2, 0);
    check_code_points(t, &gpt2, t->quick ? 2 : 17);
    check_merging(t, &gpt2, &ranks, seed);
    check_round_trips(t, &gpt2, "gpt2", seed);
    check_long_pieces(t, &gpt2);

    for (int shift = 0; shift < 8; shift += 7) {
        write_pair(&ranks, folder, shift);
        if (check(t, tokenizer_open(folder, &pair, &err), "%s", err.text)) {
            check(t, pair.end_of_text == (50256 + shift) % 50257, "end of text %d in vocab.json", pair.end_of_text);
            check_known_answers(t, &pair, shift);
            if (shift == 0) {
                check_code_points(t, &pair, 1);
                check_merging(t, &pair, &ranks, seed);
            }
            tokenizer_free(&pair);
        }
    }
    check_tiny_pair(t, folder);
    check_bad_pairs(t, folder);
    if (check(t, file_read(path, 1 << 24, &text, &length, &err), "%s", err.text)) {
        check_bad_ranks(t, text, length, folder);
        free(text);
    }
    check(t, remove_directory(folder), "cannot remove %s", folder);
    check_make_shards(t, &gpt2);
    free(ranks.sorted);
    tokenizer_free(&gpt2);
}

#endif
