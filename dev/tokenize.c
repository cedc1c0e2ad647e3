/* Encodes many documents and times it, for dev/check_tokenizer.py:
 *
 *     tokenize VOCAB DOCUMENTS TOKENS [encode|escape]
 *
 * VOCAB: as --vocab of train_fox, or "bytes". DOCUMENTS: each one a little-endian uint32 length and that many bytes.
 * TOKENS, written: for each document a uint32 count and that many uint16 tokens (encode), or a uint32 length and the
 * JSON-escaped text (escape). Decodes (unescapes) every document too, and fails where that is not the document again.
 * Prints the seconds of processor time spent encoding.
 *
 *     cc -O3 -o tokenize dev/tokenize.c train/files.c train/json.c -lm */
#include "../tokenizer.h"

static void put(FILE *out, const void *data, size_t size, size_t count) {
    uint32_t n = (uint32_t)count;
    if (fwrite(&n, 4, 1, out) != 1 || fwrite(data, size, count, out) != count) {
        fox_die("cannot write the output");
    }
}

/* Seconds of processor time, so that other work on the machine does not count. */
static double cpu_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static double encode(const Tokenizer *t, const char *text, size_t length, TokenList *list, FILE *out) {
    double start = cpu_seconds();
    list->count = 0;
    tokenizer_encode(t, text, length, list);
    double seconds = cpu_seconds() - start;
    size_t back_length;
    char *back = tokenizer_decode(t, list->tokens, list->count, &back_length);
    if (back_length != length || memcmp(back, text, length) != 0) {
        fox_die("decode(encode(x)) != x for a document of %zu bytes", length);
    }
    free(back);
    put(out, list->tokens, 2, list->count);
    return seconds;
}

static double escape(const char *text, size_t length, FILE *out) {
    double start = cpu_seconds();
    size_t escaped_length, back_length;
    char *escaped = tokenizer_json_escape(text, length, &escaped_length);
    double seconds = cpu_seconds() - start;
    char *back = tokenizer_json_unescape(escaped, escaped_length, &back_length);
    if (back_length != length || memcmp(back, text, length) != 0) {
        fox_die("unescape(escape(x)) != x for a document of %zu bytes", length);
    }
    free(back);
    put(out, escaped, 1, escaped_length);
    free(escaped);
    return seconds;
}

int main(int argc, char **argv) {
    FoxError err = {""};
    Tokenizer t;
    char *text = NULL;
    size_t size = 0;
    if (argc < 4) {
        fox_die("usage: tokenize VOCAB DOCUMENTS TOKENS [encode|escape]");
    }
    if (!tokenizer_open(strcmp(argv[1], "bytes") == 0 ? NULL : argv[1], &t, &err) ||
        !file_read(argv[2], SIZE_MAX / 2, &text, &size, &err)) {
        fox_die("%s", err.text);
    }
    FILE *out = fopen(argv[3], "wb");
    if (out == NULL) {
        fox_die("%s: cannot be written", argv[3]);
    }
    bool escapes = argc > 4 && strcmp(argv[4], "escape") == 0;
    TokenList list = {NULL, 0, 0};
    double seconds = 0;
    for (size_t at = 0; at < size;) {
        uint32_t length;
        memcpy(&length, text + at, 4);
        // A copy of its own, so that an address sanitizer sees a read past the document's end.
        char *document = (char *)malloc(length + 1);
        memcpy(document, text + at + 4, length);
        document = (char *)realloc(document, length > 0 ? length : 1);
        seconds += escapes ? escape(document, length, out) : encode(&t, document, length, &list, out);
        free(document);
        at += 4 + (size_t)length;
    }
    if (fclose(out) != 0) {
        fox_die("%s: cannot be written", argv[3]);
    }
    printf("%.6f\n", seconds);
    free(list.tokens);
    free(text);
    tokenizer_free(&t);
    return 0;
}
