/* The tests of fox.c.
 *
 *   ./test_fox                     everything; ends with "N passed, N failed", exit code 1 when something failed
 *   ./test_fox --only NAME         the groups whose name contains NAME; exit code 1 as well when nothing was checked
 *   ./test_fox --quick             fewer repetitions (sanitizer builds)
 *   ./test_fox FILE.safetensors..  the check of the fixtures on other files of their form
 *
 * Run it in the project's folder: the data lies in tests/data, and the programs under test beside this one. What cannot be
 * tested here is named on a line that begins with "SKIPPED: ". FOX_REQUIRE_GPU=N in the environment: N GPUs must be there, and
 * what is skipped for want of one of them fails. */
#include <libgen.h>
#include <unistd.h>

#include "tests/test_acp.h"
#include "tests/test_checker.h"
#include "tests/test_checkpoint.h"
#ifdef FOX_CUDA
#include "tests/test_cuda_attention.h"
#include "tests/test_cuda_layers.h"
#include "tests/test_cuda_model.h"
#endif
#include "tests/test_data.h"
#include "tests/test_eval.h"
#include "tests/test_fixtures.h"
#include "tests/test_layers.h"
#include "tests/test_options.h"
#include "tests/test_ranks.h"
#include "tests/test_runs.h"
#include "tests/test_sampler.h"
#include "tests/test_tokenizer.h"
#include "train/files.h"

typedef struct TestGroup {
    const char *name;
    void (*run)(Tests *);
} TestGroup;

static const TestGroup groups[] = {
    {"checker", test_checker},     {"layers", test_layers},       {"fixtures", test_fixtures}, {"acp", test_acp},
    {"data", test_data},           {"options", test_options},     {"files", test_files},       {"checkpoint", test_checkpoint},
    {"tokenizer", test_tokenizer}, {"sampler", test_sampler},     {"runs", test_runs},
    {"eval", test_eval},           {"ranks", test_ranks},         {"ranks_killed", test_ranks_killed},
#ifdef FOX_CUDA
    {"cuda_layers", test_cuda_layers}, {"cuda_attention", test_cuda_attention}, {"cuda_model", test_cuda_model},
    {"cuda_runs", test_cuda_runs}, {"cuda_eval", test_cuda_eval},     {"cuda_ranks", test_cuda_ranks},
#endif
};

static int usage(const char *problem) {
    fprintf(stderr, "test_fox: error: %s; usage: ./test_fox [--only NAME] [--quick] [FILE.safetensors ...]\n", problem);
    return 1;
}

int main(int argc, char **argv) {
    Tests t;
    char scratch[] = "/tmp/fox_test_XXXXXX", self[1024], train_fox[1100], command[64];
    int files = 0, runs = 0;
    memset(&t, 0, sizeof t);
    setvbuf(stdout, NULL, _IOLBF, 0); // a crash loses nothing of what was printed
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--only") == 0 && i + 1 < argc) {
            t.only = argv[++i];
        } else if (strcmp(argv[i], "--quick") == 0) {
            t.quick = true;
        } else if (argv[i][0] == '-') {
            return usage("unknown option");
        } else {
            files++;
            test_fixture_file(&t, argv[i]);
        }
    }
    snprintf(self, sizeof self, "%s", argv[0]);
    snprintf(train_fox, sizeof train_fox, "%s/train_fox", dirname(self));
    t.train_fox = train_fox;
    t.data = "tests/data";
    t.scratch = mkdtemp(scratch);
    if (t.scratch == NULL || access(t.data, R_OK) != 0) {
        return usage("no tests/data here, or /tmp is not writable");
    }
    for (size_t g = 0; files == 0 && g < sizeof groups / sizeof groups[0]; g++) {
        if (t.only == NULL || strstr(groups[g].name, t.only) != NULL) {
            double start = fox_now();
            printf("== %s\n", groups[g].name);
            groups[g].run(&t);
            printf("   %.1f s\n", fox_now() - start);
            runs++;
        }
    }
    snprintf(command, sizeof command, "rm -rf '%s'", scratch);
    if (system(command) != 0) {
        fprintf(stderr, "test_fox: %s is left behind\n", scratch);
    }
    if (files + runs == 0) {
        return usage("no test of that name");
    }
#ifndef FOX_CUDA
    const char *required = getenv("FOX_REQUIRE_GPU");
    if (required != NULL && atoi(required) > 0) {
        check(&t, false, "built without CUDA; FOX_REQUIRE_GPU is %s", required);
    }
#endif
    if (t.skipped > 0) {
        printf("%d skipped\n", t.skipped);
    }
    bool nothing = t.only != NULL && t.passed + t.failed == 0;
    if (nothing) {
        fprintf(stderr, "test_fox: error: --only %s: nothing was checked%s\n", t.only, t.skipped > 0 ? ", all was skipped" : "");
    }
    printf("%d passed, %d failed\n", t.passed, t.failed);
    return t.failed > 0 || nothing;
}
