/* UTF-8, one character at a time. */
#ifndef FOX_UTF8_H
#define FOX_UTF8_H

#include <stdbool.h>
#include <stdint.h>

/* Length of the valid UTF-8 sequence at p (1 to 4) and its code point, 0 where there is none: stray or missing
 * continuation bytes, overlong forms, surrogates, beyond U+10FFFF. Needs p < end. */
static inline int utf8_decode(const uint8_t *p, const uint8_t *end, uint32_t *code_point) {
    uint32_t c = p[0];
    if (c < 0x80) {
        *code_point = c;
        return 1;
    }
    int length = c < 0xc2 ? 0 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : c < 0xf5 ? 4 : 0;
    if (length == 0 || end - p < length) {
        return 0;
    }
    c &= 0x7fu >> length;
    for (int i = 1; i < length; i++) {
        if ((p[i] & 0xc0) != 0x80) {
            return 0;
        }
        c = c << 6 | (p[i] & 0x3fu);
    }
    bool overlong = (length == 3 && c < 0x800) || (length == 4 && c < 0x10000);
    if (overlong || c > 0x10ffff || (c >= 0xd800 && c <= 0xdfff)) {
        return 0;
    }
    *code_point = c;
    return length;
}

/* Writes the code point as UTF-8 and returns its length, 1 to 4. */
static inline int utf8_encode(uint32_t c, uint8_t *out) {
    if (c < 0x80) {
        out[0] = (uint8_t)c;
        return 1;
    }
    int length = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (int i = length - 1; i > 0; i--) {
        out[i] = (uint8_t)(0x80 | (c & 0x3f));
        c >>= 6;
    }
    out[0] = (uint8_t)((0xf00u >> length & 0xff) | c);
    return length;
}

#endif
