/* A small JSON reader (RFC 8259) for config.json, vocab.json, state.json and safetensors headers, and the escaping that
 * the writers need. Reads untrusted bytes: depth, number of values and memory are bounded, errors give the position. */
#ifndef FOX_JSON_H
#define FOX_JSON_H

#include "common.h"

typedef enum JsonType { JSON_NULL, JSON_BOOL, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT } JsonType;

/* A value in a parsed document. Arrays and objects are linked lists: `for (v = a->first; v; v = v->next)`. */
typedef struct Json {
    JsonType type;
    bool boolean;
    double number;
    int64_t integer;     /* exact where is_integer */
    bool is_integer;     /* the number had no fraction or exponent and fits int64_t */
    const char *string;  /* UTF-8, unescaped, 0-terminated; may hold 0 bytes before string_length */
    size_t string_length;
    const char *key;     /* in an object: this member's name (unescaped, 0-terminated); else NULL */
    size_t key_length;
    struct Json *first;  /* first element or member */
    struct Json *next;
    int count;           /* elements or members */
} Json;

typedef struct JsonDocument {
    Json *root;
    void *memory; /* owns every value and string */
} JsonDocument;

/* Parses the whole text (trailing white space allowed, anything else is an error). `what` names the source in errors,
 * which give line and column. Duplicate keys are an error. Depth is limited to 64. Free with json_free. */
bool json_parse(const char *text, size_t length, const char *what, JsonDocument *out, FoxError *err);
bool json_parse_file(const char *path, JsonDocument *out, FoxError *err);
void json_free(JsonDocument *);

/* The member of that name, or NULL (also when `object` is NULL or no object). */
const Json *json_get(const Json *object, const char *name);

/* Text under construction in memory. It must stay where it is: the stream writes to its fields. */
typedef struct JsonText {
    FILE *stream;
    char *text;
    size_t length;
} JsonText;
/* Begins it; without memory the program ends. */
void json_text_begin(JsonText *);
/* Ends it. Returns .text, of .length bytes and a 0; the caller frees it. */
char *json_text_end(JsonText *);

/* Writes s as a JSON string with quotes; control characters and invalid UTF-8 bytes are escaped (the latter as
 * U+FFFD), so that the line is always valid JSON. */
void json_write_string(FILE *out, const char *s);

/* Writes a double so that it reads back the same; NaN and infinities as null. */
void json_write_number(FILE *out, double value);

#endif
