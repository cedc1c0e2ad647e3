/* Fuzzes the JSON reader: any bytes parse or fail cleanly, errors are one line, and what parses is a well-formed tree
 * that survives being written out and read again. */
#include "../train/json.h"

static void require(bool ok) {
    if (!ok) {
        abort();
    }
}

static void write_value(FILE *out, const Json *v, int depth);

static void write_members(FILE *out, const Json *v, int depth) {
    int count = 0;
    for (const Json *m = v->first; m != NULL; m = m->next, count++) {
        require((m->key != NULL) == (v->type == JSON_OBJECT));
        if (m->key != NULL) {
            require(m->key[m->key_length] == '\0');
            const Json *found = json_get(v, m->key);
            require(strlen(m->key) != m->key_length || found == m);
            json_write_string(out, m->key);
            fputc(':', out);
        }
        write_value(out, m, depth + 1);
        fputs(m->next != NULL ? "," : "", out);
    }
    require(count == v->count);
}

static void write_value(FILE *out, const Json *v, int depth) {
    require(depth <= 64);
    switch (v->type) {
    case JSON_NULL: fputs("null", out); break;
    case JSON_BOOL: fputs(v->boolean ? "true" : "false", out); break;
    case JSON_NUMBER:
        require(isfinite(v->number) && (!v->is_integer || (double)v->integer == v->number));
        json_write_number(out, v->number);
        break;
    case JSON_STRING:
        require(v->string[v->string_length] == '\0');
        json_write_string(out, v->string);
        break;
    case JSON_ARRAY:
        fputc('[', out);
        write_members(out, v, depth);
        fputc(']', out);
        break;
    case JSON_OBJECT:
        fputc('{', out);
        write_members(out, v, depth);
        fputc('}', out);
        break;
    }
}

/* Equal but for what writing loses: text behind a zero byte. */
static void require_equal(const Json *a, const Json *b) {
    require(a->type == b->type && a->boolean == b->boolean && a->number == b->number && a->count == b->count);
    require(a->type != JSON_STRING || strcmp(a->string, b->string) == 0);
    require(a->key == NULL || strcmp(a->key, b->key) == 0);
    for (const Json *x = a->first, *y = b->first; x != NULL; x = x->next, y = y->next) {
        require_equal(x, y);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    JsonDocument first, second;
    FoxError err = {""};
    if (!json_parse((const char *)data, size, "fuzz", &first, &err)) {
        require(err.text[0] != '\0' && strchr(err.text, '\n') == NULL && first.root == NULL && first.memory == NULL);
        return 0;
    }
    char *text = NULL;
    size_t length = 0;
    FILE *out = open_memstream(&text, &length);
    write_value(out, first.root, 0);
    fclose(out);
    if (json_parse(text, length, "written", &second, &err)) {
        require_equal(first.root, second.root);
        json_free(&second);
    } else {
        require(strstr(err.text, "twice") != NULL); /* keys that differ only behind a zero byte */
    }
    free(text);
    json_free(&first);
    return 0;
}
