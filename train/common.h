/* The few things every module needs: errors as values, checked memory, counter-based random numbers, a clock.
 *
 * Errors. A function that can fail for a reason outside the program (a file, an option, a full disk) returns
 * bool and takes a FoxError: false means failed, and the error holds one line that says what is wrong, where, and
 * what to do about it. Whoever opened the run prints it. fox_die() is for what no caller could handle.
 *
 * Every header here compiles as C11 and as C++17, because nvcc compiles the
 * files of cuda/ that include them as C++. */
#ifndef FOX_COMMON_H
#define FOX_COMMON_H

#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__GNUC__)
#define FOX_PRINTF(fmt, first) __attribute__((__format__(__printf__, fmt, first)))
#define FOX_NORETURN __attribute__((noreturn))
#else
#define FOX_PRINTF(fmt, first)
#define FOX_NORETURN
#endif

typedef struct FoxError {
    char text[1024]; /* one line, no trailing newline; empty while nothing failed */
} FoxError;

/* Writes the message (the first one wins, so the root cause survives) and returns false:
 * `return fox_fail(err, "%s: ...", path);`. err may be NULL. */
FOX_PRINTF(2, 3)
static inline bool fox_fail(FoxError *err, const char *format, ...) {
    if (err != NULL && err->text[0] == '\0') {
        va_list args;
        va_start(args, format);
        vsnprintf(err->text, sizeof err->text, format, args);
        va_end(args);
        for (char *p = err->text; *p != '\0'; p++) {
            *p = (unsigned char)*p < ' ' || *p == 127 ? '?' : *p; /* a path may hold a line break: still one line */
        }
    }
    return false;
}

/* Prints "fox: error: ..." on stderr and exits with code 1, at once: what runs at an exit could wait for a GPU that waits for
 * another rank. For failures that no caller could handle. */
FOX_PRINTF(1, 2)
FOX_NORETURN static inline void fox_die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("fox: error: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    fflush(NULL);
    _Exit(1);
}

/* Zeroed memory, aligned to 64 bytes; release with free(). Never returns NULL: out of memory is fox_die. For
 * sizes that the program chose itself; a size read from a file is checked against the file first. */
static inline void *fox_alloc(size_t bytes) {
    size_t rounded = (bytes + 63) / 64 * 64;
    void *p = rounded < bytes ? NULL : aligned_alloc(64, rounded ? rounded : 64);
    if (p == NULL) {
        fox_die("out of memory: %.1f MiB asked for at once", (double)bytes / 1048576.0);
    }
    memset(p, 0, rounded ? rounded : 64);
    return p;
}

/* `count` zeroed elements of `type`. */
#define FOX_NEW(type, count) ((type *)fox_alloc(sizeof(type) * (size_t)(count)))

/* Smallest multiple of `unit` that is not below x >= 0. */
static inline int64_t fox_round_up(int64_t x, int64_t unit) {
    return (x + unit - 1) / unit * unit;
}

static inline int64_t fox_min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* Seconds on a clock that never goes back. */
static inline double fox_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* One step of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words that passes for random. */
static inline uint64_t fox_mix64(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* Random 64 bits as a function of (key, counter): the same on every machine, thread and rank. */
static inline uint64_t fox_random(uint64_t key, uint64_t counter) {
    return fox_mix64(fox_mix64(key) ^ fox_mix64(counter + 0x632be59bd9b4e019u));
}

/* Uniform in [0, 1), 53 bits. */
static inline double fox_uniform(uint64_t key, uint64_t counter) {
    return (double)(fox_random(key, counter) >> 11) * 0x1p-53;
}

/* Standard normal (Box-Muller). */
static inline double fox_normal(uint64_t key, uint64_t counter) {
    double u = 1.0 - fox_uniform(key, 2 * counter); /* in (0, 1] */
    double v = fox_uniform(key, 2 * counter + 1);
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v);
}

/* 64-bit hash of a byte string, chained through `hash` (start with 0). For fingerprints, not for security. */
static inline uint64_t fox_hash(uint64_t hash, const void *data, size_t bytes) {
    const unsigned char *p = (const unsigned char *)data;
    while (bytes >= 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        hash = fox_mix64(hash ^ word);
        p += 8;
        bytes -= 8;
    }
    uint64_t tail = bytes;
    for (size_t i = 0; i < bytes; i++) {
        tail = tail << 8 | p[i];
    }
    return fox_mix64(hash ^ tail);
}

#endif
