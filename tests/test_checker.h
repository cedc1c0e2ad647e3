/* The checker's own test: NaN, Inf and a 5% error must fail, in one element among many. */
#ifndef FOX_TESTS_CHECKER_H
#define FOX_TESTS_CHECKER_H

#include "check.h"

/* What check_error makes of an error, on a counter of its own. */
static bool fails(double error, double tolerance) {
    Tests inner;
    memset(&inner, 0, sizeof inner);
    inner.quiet = true;
    return !check_error(&inner, "", error, tolerance) && inner.failed == 1;
}

static void test_checker(Tests *t) {
    enum { COUNT = 1000 };
    float ref[COUNT], a[COUNT];
    for (int i = 0; i < COUNT; i++) {
        ref[i] = (float)fox_normal(99, (uint64_t)i);
    }
    const float bad[] = {NAN, INFINITY, -INFINITY};
    memcpy(a, ref, sizeof a);
    check(t, !fails(relative_error(a, ref, COUNT), 1e-4) && !fails(max_error(a, ref, COUNT), 1e-4), "equal arrays pass");
    for (size_t i = 0; i < 3; i++) {
        for (int at = 0; at < COUNT; at += COUNT - 1) {
            memcpy(a, ref, sizeof a);
            a[at] = bad[i];
            check(t, fails(relative_error(a, ref, COUNT), 1e-4), "%f at %d fails the relative comparison", (double)bad[i], at);
            check(t, fails(max_error(a, ref, COUNT), 1e-4), "%f at %d fails the largest difference", (double)bad[i], at);
            check(t, fails(max_error(ref, a, COUNT), 1e-4), "%f at %d in the reference fails", (double)bad[i], at);
            check(t, fails(relative_error(ref, a, COUNT), 1e-4), "%f at %d in the reference fails", (double)bad[i], at);
        }
    }
    for (int i = 0; i < COUNT; i++) {
        a[i] = 1.05f * ref[i];
    }
    check(t, fails(relative_error(a, ref, COUNT), 1e-4) && fails(relative_error(a, ref, COUNT), 0.049), "an error of 5%% fails");
    check(t, !fails(relative_error(a, ref, COUNT), 0.051), "and is measured as 5%%");

    const double errors[] = {0.5, 2, 1};
    for (int bad_at = -1; bad_at < 3; bad_at++) {
        double worst = 0;
        for (int i = 0; i < 3; i++) {
            worst = worse(worst, i == bad_at ? (double)NAN : errors[i]);
        }
        check(t, bad_at < 0 ? worst == 2 : worst != worst, "the worst of three errors, NaN at %d, is %g", bad_at, worst);
    }
    check(t, worse(-INFINITY, -3) == -3 && worse(-3, -INFINITY) == -3 && worse(INFINITY, 1) == INFINITY, "the worse of infinite errors");

    Tests inner;
    memset(&inner, 0, sizeof inner);
    inner.quiet = true;
    check(&inner, true, "unused");
    check(t, inner.passed == 1 && inner.failed == 0, "a passing check counts as passed");
    check_error(&inner, "a NaN error", (double)NAN, 1e30);
    check(t, inner.passed == 1 && inner.failed == 1, "a NaN error counts as failed");
    skip(&inner, "unused");
    check(t, inner.skipped == 1 && inner.passed == 1 && inner.failed == 1, "what is skipped is neither passed nor failed");

    const char *required = getenv("FOX_REQUIRE_GPU");
    char *before = required != NULL ? strdup(required) : NULL;
    setenv("FOX_REQUIRE_GPU", "1", 1);
    skip_without_gpus(&inner, 2, "unused");
    check(t, inner.skipped == 2 && inner.failed == 1, "one GPU must be there: what needs two is skipped");
    skip_without_gpus(&inner, 1, "unused");
    check(t, inner.skipped == 2 && inner.failed == 2, "one GPU must be there: what needs one fails");
    unsetenv("FOX_REQUIRE_GPU");
    skip_without_gpus(&inner, 1, "unused");
    check(t, inner.skipped == 3 && inner.failed == 2, "no GPU must be there: what needs one is skipped");
    if (before != NULL) {
        setenv("FOX_REQUIRE_GPU", before, 1);
    }
    free(before);
}

#endif
