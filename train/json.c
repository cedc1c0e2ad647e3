#include "json.h"

#include "files.h"
#include "utf8.h"

#define MAX_DEPTH 64
#define MAX_VALUES (1 << 22)           /* bounds the memory that a short hostile text can ask for */
#define MAX_FILE_BYTES ((size_t)1 << 27)

/* Values come from blocks that double in size, so a small document stays small. */
typedef struct Block {
    struct Block *next;
    int used, capacity;
    Json *values;
} Block;

typedef struct Memory {
    Block *blocks;
    char *strings; /* a string never grows by unescaping, so the text's own length is enough for all of them */
} Memory;

typedef struct Parser {
    const char *start, *at, *end;
    const char *what;
    FoxError *err;
    Memory *memory;
    char *string_end; /* free space in memory->strings */
    int values;
} Parser;

FOX_PRINTF(2, 3)
static bool parse_fail(Parser *p, const char *format, ...) {
    char message[512];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    for (char *c = message; *c != '\0'; c++) {
        if ((unsigned char)*c < 0x20) {
            *c = '?'; // a key may hold a line break, an error is one line
        }
    }
    int line = 1;
    const char *line_start = p->start;
    for (const char *c = p->start; c < p->at; c++) {
        if (*c == '\n') {
            line++;
            line_start = c + 1;
        }
    }
    return fox_fail(p->err, "%s: line %d, column %td: %s", p->what, line, p->at - line_start + 1, message);
}

/* "expected X, found Y" at the current position. */
static bool unexpected(Parser *p, const char *expected) {
    if (p->at == p->end) {
        return parse_fail(p, "expected %s, found the end", expected);
    }
    unsigned char c = (unsigned char)*p->at;
    if (c > 0x20 && c < 0x7f) {
        return parse_fail(p, "expected %s, found '%c'", expected, c);
    }
    return parse_fail(p, "expected %s, found the byte 0x%02x", expected, c);
}

static void skip_space(Parser *p) {
    while (p->at < p->end && (*p->at == ' ' || *p->at == '\n' || *p->at == '\r' || *p->at == '\t')) {
        p->at++;
    }
}

/* Steps over c if it is next. */
static bool take(Parser *p, char c) {
    bool found = p->at < p->end && *p->at == c;
    p->at += found;
    return found;
}

static Json *new_value(Parser *p) {
    Block *block = p->memory->blocks;
    if (block == NULL || block->used == block->capacity) {
        int capacity = block == NULL ? 32 : block->capacity < 65536 ? 2 * block->capacity : block->capacity;
        Block *fresh = FOX_NEW(Block, 1);
        fresh->capacity = capacity;
        fresh->values = FOX_NEW(Json, capacity);
        fresh->next = block;
        p->memory->blocks = block = fresh;
    }
    p->values++;
    return &block->values[block->used++];
}

/* The four hexadecimal digits after "\u". */
static bool parse_hex4(Parser *p, uint32_t *code) {
    *code = 0;
    for (int i = 0; i < 4; i++, p->at++) {
        char c = p->at < p->end ? *p->at : '\0';
        uint32_t digit;
        if (c >= '0' && c <= '9') {
            digit = (uint32_t)(c - '0');
        } else if ((c | 0x20) >= 'a' && (c | 0x20) <= 'f') {
            digit = (uint32_t)((c | 0x20) - 'a' + 10);
        } else {
            return unexpected(p, "four hexadecimal digits after \\u");
        }
        *code = *code << 4 | digit;
    }
    return true;
}

/* What follows a backslash; appends the character to *out. */
static bool parse_escape(Parser *p, char **out) {
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    const char *name = p->at < p->end && *p->at != '\0' ? strchr(names, *p->at) : NULL;
    if (name != NULL) {
        p->at++;
        *(*out)++ = values[name - names];
        return true;
    }
    if (!take(p, 'u')) {
        return unexpected(p, "an escape such as \\n or \\u0041");
    }
    uint32_t code, low;
    if (!parse_hex4(p, &code)) {
        return false;
    }
    if (code >= 0xdc00 && code < 0xe000) {
        return parse_fail(p, "\\u%04x is the second half of a surrogate pair without the first", code);
    }
    if (code >= 0xd800 && code < 0xdc00) {
        if (!take(p, '\\') || !take(p, 'u')) {
            return parse_fail(p, "\\u%04x is the first half of a surrogate pair without the second", code);
        }
        if (!parse_hex4(p, &low)) {
            return false;
        }
        if (low < 0xdc00 || low >= 0xe000) {
            return parse_fail(p, "\\u%04x\\u%04x is no surrogate pair", code, low);
        }
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    }
    *out += utf8_encode(code, (uint8_t *)*out);
    return true;
}

/* A string after its opening quote. */
static bool parse_string(Parser *p, const char **string, size_t *length) {
    char *out = p->string_end;
    *string = out;
    while (!take(p, '"')) {
        if (p->at == p->end) {
            return parse_fail(p, "a string does not end");
        }
        unsigned char c = (unsigned char)*p->at;
        if (c < 0x20) {
            return parse_fail(p, "a string holds the control character 0x%02x; write it as \\u%04x", c, c);
        }
        if (c == '\\') {
            p->at++;
            if (!parse_escape(p, &out)) {
                return false;
            }
            continue;
        }
        uint32_t code;
        int bytes = utf8_decode((const uint8_t *)p->at, (const uint8_t *)p->end, &code);
        if (bytes == 0) {
            return parse_fail(p, "a string holds the byte 0x%02x, which is no UTF-8", c);
        }
        memcpy(out, p->at, (size_t)bytes);
        out += bytes;
        p->at += bytes;
    }
    *length = (size_t)(out - *string);
    *out++ = '\0';
    p->string_end = out;
    return true;
}

/* One or more digits; returns how many. */
static size_t take_digits(Parser *p) {
    const char *begin = p->at;
    while (p->at < p->end && *p->at >= '0' && *p->at <= '9') {
        p->at++;
    }
    return (size_t)(p->at - begin);
}

/* Sets *out when the digits (with an optional minus) fit. */
static bool digits_to_int64(const char *s, const char *end, int64_t *out) {
    bool negative = *s == '-';
    int64_t value = 0;
    for (s += negative; s < end; s++) {
        int digit = *s - '0';
        // Counting downwards reaches INT64_MIN, which has no positive twin.
        if (value < (INT64_MIN + digit) / 10) {
            return false;
        }
        value = value * 10 - digit;
    }
    if (!negative && value == INT64_MIN) {
        return false;
    }
    *out = negative ? value : -value;
    return true;
}

static bool parse_number(Parser *p, Json *v) {
    const char *begin = p->at;
    bool whole = true;
    take(p, '-');
    if (!take(p, '0') && take_digits(p) == 0) {
        return unexpected(p, "a digit");
    }
    if (take(p, '.')) {
        whole = false;
        if (take_digits(p) == 0) {
            return unexpected(p, "a digit after the decimal point");
        }
    }
    if (take(p, 'e') || take(p, 'E')) {
        whole = false;
        if (!take(p, '+')) {
            take(p, '-');
        }
        if (take_digits(p) == 0) {
            return unexpected(p, "a digit in the exponent");
        }
    }
    // strtod wants a terminated copy; the free string space is large enough for it.
    size_t length = (size_t)(p->at - begin);
    memcpy(p->string_end, begin, length);
    p->string_end[length] = '\0';
    v->type = JSON_NUMBER;
    v->number = strtod(p->string_end, NULL);
    v->is_integer = whole && digits_to_int64(begin, p->at, &v->integer);
    return isfinite(v->number) || parse_fail(p, "a number is too large");
}

static bool parse_word(Parser *p, const char *word) {
    size_t length = strlen(word);
    if ((size_t)(p->end - p->at) < length || memcmp(p->at, word, length) != 0) {
        return unexpected(p, "a value (true, false, null, a number, a string, an array or an object)");
    }
    p->at += length;
    return true;
}

typedef struct KeyHash {
    uint64_t hash;
    const Json *member;
} KeyHash;

static int compare_keys(const void *a, const void *b) {
    const KeyHash *x = (const KeyHash *)a, *y = (const KeyHash *)b;
    if (x->hash != y->hash) {
        return x->hash < y->hash ? -1 : 1;
    }
    if (x->member->key_length != y->member->key_length) {
        return x->member->key_length < y->member->key_length ? -1 : 1;
    }
    return memcmp(x->member->key, y->member->key, x->member->key_length);
}

/* Sorting by hash keeps an object of 50,000 keys fast, and one of hostile keys no slower than n log n. */
static bool check_duplicate_keys(Parser *p, const Json *object) {
    if (object->count < 2) {
        return true;
    }
    KeyHash *keys = FOX_NEW(KeyHash, object->count);
    int n = 0;
    for (const Json *m = object->first; m != NULL; m = m->next) {
        keys[n].hash = fox_hash(0, m->key, m->key_length);
        keys[n++].member = m;
    }
    qsort(keys, (size_t)n, sizeof *keys, compare_keys);
    bool ok = true;
    for (int i = 1; i < n && ok; i++) {
        if (compare_keys(&keys[i - 1], &keys[i]) == 0) {
            ok = parse_fail(p, "the object that ends here has the key \"%.200s\" twice", keys[i].member->key);
        }
    }
    free(keys);
    return ok;
}

static bool parse_value(Parser *p, Json *v, int depth);

/* The elements of an array or members of an object, after the opening bracket. */
static bool parse_container(Parser *p, Json *v, int depth, char close) {
    bool object = v->type == JSON_OBJECT;
    Json **link = &v->first;
    skip_space(p);
    if (take(p, close)) {
        return true;
    }
    for (;;) {
        if (p->values == MAX_VALUES) {
            return parse_fail(p, "more than %d values", MAX_VALUES);
        }
        Json *item = new_value(p);
        skip_space(p);
        if (object) {
            if (!take(p, '"')) {
                return unexpected(p, "a key in quotes");
            }
            if (!parse_string(p, &item->key, &item->key_length)) {
                return false;
            }
            skip_space(p);
            if (!take(p, ':')) {
                return unexpected(p, "':' after the key");
            }
            skip_space(p);
        }
        if (!parse_value(p, item, depth + 1)) {
            return false;
        }
        *link = item;
        link = &item->next;
        v->count++;
        skip_space(p);
        if (take(p, close)) {
            return !object || check_duplicate_keys(p, v);
        }
        if (!take(p, ',')) {
            return unexpected(p, object ? "',' or '}'" : "',' or ']'");
        }
    }
}

/* The value at the current position, which is not white space. Recursion ends at MAX_DEPTH. */
static bool parse_value(Parser *p, Json *v, int depth) {
    char c = p->at < p->end ? *p->at : '\0';
    if (c == '{' || c == '[') {
        if (depth >= MAX_DEPTH) {
            return parse_fail(p, "nested more than %d deep", MAX_DEPTH);
        }
        p->at++;
        v->type = c == '{' ? JSON_OBJECT : JSON_ARRAY;
        return parse_container(p, v, depth, c == '{' ? '}' : ']');
    }
    if (c == '"') {
        p->at++;
        v->type = JSON_STRING;
        return parse_string(p, &v->string, &v->string_length);
    }
    if (c == '-' || (c >= '0' && c <= '9')) {
        return parse_number(p, v);
    }
    if (c == 't' || c == 'f') {
        v->type = JSON_BOOL;
        v->boolean = c == 't';
        return parse_word(p, c == 't' ? "true" : "false");
    }
    v->type = JSON_NULL;
    return parse_word(p, "null");
}

bool json_parse(const char *text, size_t length, const char *what, JsonDocument *out, FoxError *err) {
    Memory *memory = FOX_NEW(Memory, 1);
    memory->strings = FOX_NEW(char, length + 1);
    out->memory = memory;
    Parser parser = {text, text, text + length, what, err, memory, memory->strings, 0};
    out->root = new_value(&parser);
    skip_space(&parser);
    bool ok = parse_value(&parser, out->root, 0);
    if (ok) {
        skip_space(&parser);
        ok = parser.at == parser.end || unexpected(&parser, "the end");
    }
    if (!ok) {
        json_free(out);
    }
    return ok;
}

bool json_parse_file(const char *path, JsonDocument *out, FoxError *err) {
    char *text;
    size_t length;
    memset(out, 0, sizeof *out);
    if (!file_read(path, MAX_FILE_BYTES, &text, &length, err)) {
        return false;
    }
    bool ok = json_parse(text, length, path, out, err);
    free(text);
    return ok;
}

void json_free(JsonDocument *document) {
    Memory *memory = (Memory *)document->memory;
    if (memory != NULL) {
        for (Block *block = memory->blocks; block != NULL;) {
            Block *next = block->next;
            free(block->values);
            free(block);
            block = next;
        }
        free(memory->strings);
        free(memory);
    }
    memset(document, 0, sizeof *document);
}

const Json *json_get(const Json *object, const char *name) {
    if (object == NULL || object->type != JSON_OBJECT) {
        return NULL;
    }
    size_t length = strlen(name);
    for (const Json *m = object->first; m != NULL; m = m->next) {
        if (m->key_length == length && memcmp(m->key, name, length) == 0) {
            return m;
        }
    }
    return NULL;
}

void json_text_begin(JsonText *t) {
    memset(t, 0, sizeof *t);
    t->stream = open_memstream(&t->text, &t->length);
    if (t->stream == NULL) {
        fox_die("out of memory");
    }
}

char *json_text_end(JsonText *t) {
    if (fclose(t->stream) != 0) {
        fox_die("out of memory");
    }
    return t->text;
}

void json_write_string(FILE *out, const char *s) {
    const uint8_t *p = (const uint8_t *)s, *end = p + strlen(s);
    fputc('"', out);
    while (p < end) {
        uint32_t code;
        int bytes = utf8_decode(p, end, &code);
        if (bytes == 0) {
            fputs("\\ufffd", out);
            bytes = 1;
        } else if (*p == '\n') {
            fputs("\\n", out);
        } else if (*p < 0x20 || *p == 0x7f) {
            fprintf(out, "\\u%04x", *p);
        } else {
            if (*p == '"' || *p == '\\') {
                fputc('\\', out);
            }
            fwrite(p, 1, (size_t)bytes, out);
        }
        p += bytes;
    }
    fputc('"', out);
}

void json_write_number(FILE *out, double value) {
    if (!isfinite(value)) {
        fputs("null", out);
        return;
    }
    char text[40];
    for (int digits = 15; digits <= 17; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, value);
        if (strtod(text, NULL) == value) {
            break;
        }
    }
    fputs(text, out);
}
