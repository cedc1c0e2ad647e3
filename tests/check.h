/* The checker behind test_fox: counts passes, failures and what was skipped, compares arrays.
 *
 * A comparison passes only when "error <= tolerance" is true, so NaN fails by itself; Inf fails because its error is
 * Inf or NaN. The largest of several errors comes from worse(), which keeps a NaN. test_checker() proves it on NaN, Inf
 * and a 5% error. */
#ifndef FOX_TESTS_CHECK_H
#define FOX_TESTS_CHECK_H

#include "../train/common.h"

typedef struct Tests {
    const char *only;      /* run only the groups whose name contains this; NULL: all */
    const char *train_fox; /* path of the program for tests that start it */
    const char *data;      /* the folder tests/data */
    const char *scratch;   /* an empty folder, removed at the end */
    bool quick;            /* smaller repetition counts, for sanitizer builds */
    bool quiet;            /* failures and skips are counted, not printed: the checker's own test */
    int passed, failed, skipped;
} Tests;

/* Counts one check and prints it when it failed. Returns ok. */
FOX_PRINTF(3, 4)
static inline bool check(Tests *t, bool ok, const char *format, ...) {
    if (ok) {
        t->passed++;
    } else {
        t->failed++;
        if (t->quiet) {
            return false;
        }
        va_list args;
        va_start(args, format);
        fputs("FAILED: ", stdout);
        vprintf(format, args);
        fputc('\n', stdout);
        va_end(args);
        fflush(stdout);
    }
    return ok;
}

/* Says what cannot be tested here, and why. */
FOX_PRINTF(2, 3)
static inline void skip(Tests *t, const char *format, ...) {
    t->skipped++;
    if (t->quiet) {
        return;
    }
    va_list args;
    va_start(args, format);
    fputs("SKIPPED: ", stdout);
    vprintf(format, args);
    fputc('\n', stdout);
    va_end(args);
    fflush(stdout);
}

/* Skips what needs that many GPUs. FOX_REQUIRE_GPU=N of the environment says that there must be N: then it fails. */
FOX_PRINTF(3, 4)
static inline void skip_without_gpus(Tests *t, int needed, const char *format, ...) {
    const char *required = getenv("FOX_REQUIRE_GPU");
    char why[512];
    va_list args;
    va_start(args, format);
    vsnprintf(why, sizeof why, format, args);
    va_end(args);
    if (required != NULL && atoi(required) >= needed) {
        check(t, false, "%s; FOX_REQUIRE_GPU is %s", why, required);
    } else {
        skip(t, "%s", why);
    }
}

/* ||a - ref|| / ||ref|| in double precision (||a|| where ref is all zero). NaN or Inf when an input has one. */
static inline double relative_error(const float *a, const float *ref, int64_t n) {
    double diff = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        double d = (double)a[i] - (double)ref[i];
        diff += d * d;
        norm += (double)ref[i] * (double)ref[i];
    }
    return norm > 0 ? sqrt(diff / norm) : sqrt(diff);
}

/* The larger of two errors; NaN when one is, whatever follows: fmax would drop it. */
static inline double worse(double a, double b) {
    return b <= a || a != a ? a : b;
}

/* max |a - ref|; NaN when any element is NaN. */
static inline double max_error(const float *a, const float *ref, int64_t n) {
    double worst = 0;
    for (int64_t i = 0; i < n; i++) {
        worst = worse(worst, fabs((double)a[i] - (double)ref[i]));
    }
    return worst;
}

/* Checks error <= tolerance, naming what was compared. */
static inline bool check_error(Tests *t, const char *what, double error, double tolerance) {
    return check(t, error <= tolerance, "%s: error %.3g, allowed %.3g", what, error, tolerance);
}

#endif
