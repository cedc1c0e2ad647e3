/* Fuzzes the readers of vocabulary files, and encoding with whatever vocabulary they accept.
 *
 * Input: a byte for the mode, two 16-bit lengths, then a vocabulary file, merges.txt and a text of these lengths (the
 * text gets the rest). In the modes 1 and 3 the 256 one-byte tokens stand before the file's bytes, so that small inputs
 * reach the code behind the check for them. Aborts when decode(encode(text)) or unescape(escape(text)) is not the text,
 * or when a failure comes without its one line.
 *
 *     clang -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined \
 *         fuzz/fuzz_tokenizer.c train/json.c train/files.c -lm */
#include "../tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(bool ok) {
    if (!ok) {
        abort();
    }
}

/* The 256 one-byte tokens as the first lines of a .tiktoken file. */
static void put_byte_ranks(FILE *out) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (int i = 0; i < 256; i++) {
        fprintf(out, "%c%c== %d\n", digits[i >> 2], digits[(i & 3) << 4], i);
    }
}

/* The beginning of a vocab.json with the 256 one-byte tokens and end of text. */
static void put_byte_vocab(FILE *out) {
    int16_t byte_of[TOKENIZER_BYTE_NAMES];
    tokenizer_byte_names(byte_of);
    fprintf(out, "{\"<|endoftext|>\":256");
    for (int c = 0; c < TOKENIZER_BYTE_NAMES; c++) {
        if (byte_of[c] >= 0) {
            uint8_t name[4];
            int length = utf8_encode((uint32_t)c, name);
            fprintf(out, ",\"%s%.*s\":%d", c == '"' || c == '\\' ? "\\" : "", length, (const char *)name, byte_of[c]);
        }
    }
}

static void check_text(const Tokenizer *t, const uint8_t *text, size_t length) {
    TokenList list = {NULL, 0, 0};
    size_t back_length, escaped_length;
    tokenizer_encode(t, text, length, &list);
    char *back = tokenizer_decode(t, list.tokens, list.count, &back_length);
    must(back_length == length && memcmp(back, text, length) == 0);
    free(back);
    free(list.tokens);
    char *escaped = tokenizer_json_escape(text, length, &escaped_length);
    back = tokenizer_json_unescape(escaped, escaped_length, &back_length);
    must(back_length == length && memcmp(back, text, length) == 0);
    free(back);
    free(escaped);
    back = tokenizer_json_unescape(text, length, &back_length);
    must(back_length <= length);
    free(back);
}

/* Parses the files of this mode; true when they are a vocabulary. */
static bool parse(int mode, const char *file, size_t file_length, const char *merges, size_t merges_length,
                  Tokenizer *t, FoxError *err) {
    char *joined = NULL;
    size_t joined_length = 0;
    FILE *out = open_memstream(&joined, &joined_length);
    must(out != NULL);
    if (mode == 1) {
        put_byte_ranks(out);
    } else if (mode == 3) {
        put_byte_vocab(out);
    }
    fwrite(file, 1, file_length, out);
    fclose(out);
    bool ok = mode <= 1 ? tokenizer_parse_ranks(t, "vocabulary", joined, joined_length, err)
                        : tokenizer_parse_pair(t, "vocab.json", joined, joined_length, "merges.txt", merges,
                                               merges_length, err);
    free(joined);
    return ok;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 5) {
        return 0;
    }
    int mode = data[0] & 3;
    size_t file_length = (size_t)data[1] | (size_t)data[2] << 8, merges_length = (size_t)data[3] | (size_t)data[4] << 8;
    data += 5;
    size -= 5;
    file_length = file_length < size ? file_length : size;
    merges_length = merges_length < size - file_length ? merges_length : size - file_length;
    const uint8_t *text = data + file_length + merges_length;
    size_t text_length = size - file_length - merges_length;
    Tokenizer t;
    FoxError err = {""};
    memset(&t, 0, sizeof t);
    if (parse(mode, (const char *)data, file_length, (const char *)data + file_length, merges_length, &t, &err)) {
        must(err.text[0] == '\0' && t.end_of_text >= 0 && t.end_of_text < t.vocab_size);
        check_text(&t, text, text_length);
    } else {
        must(err.text[0] != '\0' && strchr(err.text, '\n') == NULL);
    }
    tokenizer_free(&t);
    return 0;
}
