#include "metrics.h"

#include "files.h"
#include "json.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#define LIVE_LINE_SECONDS 0.25 /* on a terminal: seconds between two states of the line; mpirun's is full soon when nobody reads */
#define PLAIN_LINE_SECONDS 10  /* without one: seconds between two lines */

/* ---- metrics.jsonl */

/* True when the line is a whole record of a step up to `last`. */
static bool belongs_to_run(const char *line, size_t length, int64_t last) {
    JsonDocument document;
    if (length == 0 || line[length - 1] != '\n' || !json_parse(line, length, "metrics.jsonl", &document, NULL)) {
        return false;
    }
    const Json *step = json_get(document.root, "step");
    bool keep = step != NULL && step->is_integer && step->integer <= last;
    json_free(&document);
    return keep;
}

/* Rewrites the file without the lines after step `last`. */
static bool cut_after(const char *path, int64_t last, FoxError *err) {
    FILE *in = fopen(path, "r");
    if (in == NULL) {
        return errno == ENOENT || fox_fail(err, "%s: cannot read: %s", path, strerror(errno));
    }
    char temporary[1100];
    snprintf(temporary, sizeof temporary, "%s.tmp", path);
    FILE *out = fopen(temporary, "w");
    bool ok = out != NULL || file_finish(NULL, temporary, err);
    char *line = NULL;
    size_t capacity = 0;
    for (ssize_t length; ok && (length = getline(&line, &capacity, in)) > 0;) {
        if (belongs_to_run(line, (size_t)length, last)) {
            ok = fwrite(line, 1, (size_t)length, out) == (size_t)length;
        }
    }
    ok = ok && !ferror(in);
    free(line);
    fclose(in);
    ok = out != NULL && file_finish(out, temporary, err) &&
         (ok || fox_fail(err, "%s: reading or copying it failed", path));
    if (ok && rename(temporary, path) != 0) {
        ok = fox_fail(err, "%s: cannot be renamed to metrics.jsonl: %s", temporary, strerror(errno));
    }
    if (!ok) {
        unlink(temporary);
    }
    return ok;
}

void metrics_begin(Metrics *m, bool active) {
    memset(m, 0, sizeof *m);
    m->fd = -1;
    m->active = active;
    m->terminal = isatty(STDOUT_FILENO) == 1;
}

static bool open_file(Metrics *m, const char *path, FoxError *err) {
    m->fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    return m->fd >= 0 || fox_fail(err, "%s: cannot write: %s", path, strerror(errno));
}

/* The records of an earlier run, which left no checkpoint, get a name of their own: metrics-1.jsonl, -2, ... */
static bool keep_earlier(const char *path, FoxError *err) {
    char kept[1100];
    struct stat earlier;
    if (stat(path, &earlier) != 0 || earlier.st_size == 0) {
        return true;
    }
    int stem = (int)strlen(path) - (int)strlen(".jsonl"), number = 0;
    do {
        snprintf(kept, sizeof kept, "%.*s-%d.jsonl", stem, path, ++number);
    } while (access(kept, F_OK) == 0);
    return rename(path, kept) == 0 || fox_fail(err, "%s: cannot be renamed to %s: %s", path, kept, strerror(errno));
}

bool metrics_open(Metrics *m, const char *out_dir, int64_t step, FoxError *err) {
    char path[1080];
    snprintf(path, sizeof path, "%s/metrics.jsonl", out_dir);
    return !m->active || ((step == 0 ? keep_earlier(path, err) : cut_after(path, step, err)) && open_file(m, path, err));
}

bool metrics_open_eval(Metrics *m, const char *out_dir, FoxError *err) {
    char path[1080];
    snprintf(path, sizeof path, "%s/eval.jsonl", out_dir);
    return !m->active || open_file(m, path, err);
}

static void record_begin(JsonText *r, const char *kind, int64_t step) {
    json_text_begin(r);
    fprintf(r->stream, "{\"kind\": \"%s\", \"step\": %lld", kind, (long long)step);
}

static void record_number(JsonText *r, const char *key, double value) {
    fprintf(r->stream, ", \"%s\": ", key);
    json_write_number(r->stream, value);
}

static void record_integer(JsonText *r, const char *key, int64_t value) {
    fprintf(r->stream, ", \"%s\": %lld", key, (long long)value);
}

/* Ends the line and appends it to the file: all of it, or nothing. */
static void record_write(Metrics *m, JsonText *r) {
    fputs("}\n", r->stream);
    json_text_end(r);
    off_t end = lseek(m->fd, 0, SEEK_END);
    ssize_t written = write(m->fd, r->text, r->length);
    bool ok = written == (ssize_t)r->length;
    if (!ok) {
        int reason = written < 0 ? errno : ENOSPC;
        if (written > 0 && end >= 0 && ftruncate(m->fd, end) != 0) {
            reason = errno;
        }
        if (!m->write_failed) {
            metrics_warn(m, "a line of the records cannot be written: %s; the run goes on, lines are missing until it works again",
                         strerror(reason));
        }
    }
    m->write_failed = !ok;
    free(r->text);
}

void metrics_close(Metrics *m) {
    if (m->live_width > 0) {
        putchar('\n');
        m->live_width = 0;
    }
    fflush(stdout);
    if (m->fd >= 0) {
        close(m->fd);
        m->fd = -1;
    }
}

void metrics_run(Metrics *m, int64_t step, const char *settings) {
    if (m->active) {
        JsonText r;
        record_begin(&r, "run", step);
        fprintf(r.stream, ", \"settings\": %s", settings);
        record_write(m, &r);
    }
}

/* ", "key": [value, ...]" of count values. */
static void record_numbers(JsonText *r, const char *key, const double *values, int count) {
    fprintf(r->stream, ", \"%s\": ", key);
    for (int i = 0; i < count; i++) {
        fputs(i > 0 ? ", " : "[", r->stream);
        json_write_number(r->stream, values[i]);
    }
    fputc(']', r->stream);
}

void metrics_validation(Metrics *m, int64_t step, int64_t tokens, double loss, double pruned, const PositionBins *bins) {
    if (!m->active) {
        return;
    }
    double edges[POSITION_BINS + 1], means[POSITION_BINS];
    for (int i = 0; i <= bins->count; i++) {
        edges[i] = (double)bins->edges[i];
    }
    for (int i = 0; i < bins->count; i++) {
        means[i] = bins->losses[i] / bins->tokens[i];
    }
    JsonText r;
    record_begin(&r, "validation", step);
    record_integer(&r, "tokens", tokens);
    record_number(&r, "loss", loss);
    record_number(&r, "pruned", pruned);
    record_numbers(&r, "position_edges", edges, bins->count + 1);
    record_numbers(&r, "position_loss", means, bins->count);
    record_numbers(&r, "position_tokens", bins->tokens, bins->count);
    record_write(m, &r);
}

void metrics_checkpoint(Metrics *m, int64_t step, double stall, double copy, double write_seconds) {
    if (m->active) {
        JsonText r;
        record_begin(&r, "checkpoint", step);
        record_number(&r, "stall_ms", round(1e6 * stall) / 1e3);
        record_number(&r, "copy_ms", round(1e6 * copy) / 1e3);
        record_number(&r, "write_ms", round(1e6 * write_seconds) / 1e3);
        record_write(m, &r);
    }
}

void metrics_pruning(Metrics *m, int64_t step, int layers, int heads, const double *skipped, const double *total) {
    double all_skipped = 0, all = 0;
    for (int i = 0; i < layers * heads; i++) {
        all_skipped += skipped[i];
        all += total[i];
    }
    if (!m->active || !(all > 0)) {
        return;
    }
    JsonText r;
    record_begin(&r, "pruning", step);
    record_number(&r, "pruned", all_skipped / all);
    fputs(", \"layers\": [", r.stream);
    for (int l = 0; l < layers; l++) {
        for (int h = 0; h < heads; h++) {
            int i = l * heads + h;
            fputs(h > 0 ? ", " : l > 0 ? ", [" : "[", r.stream);
            json_write_number(r.stream, total[i] > 0 ? skipped[i] / total[i] : (double)NAN);
        }
        fputc(']', r.stream);
    }
    fputc(']', r.stream);
    record_write(m, &r);
}

void metrics_ranges(Metrics *m, int64_t step, int layers, int heads, int64_t context, int block, const int *first) {
    if (!m->active) {
        return;
    }
    int64_t blocks = (context + block - 1) / block;
    JsonText r;
    record_begin(&r, "ranges", step);
    record_integer(&r, "context", context);
    record_integer(&r, "block", block);
    fputs(", \"first\": [", r.stream);
    for (int l = 0; l < layers; l++) {
        for (int h = 0; h < heads; h++) {
            fputs(h > 0 ? ", " : l > 0 ? ", [" : "[", r.stream);
            for (int64_t i = 0; i < blocks; i++) {
                fprintf(r.stream, "%s%d", i > 0 ? ", " : "[", first[(l * heads + h) * blocks + i]);
            }
            fputc(']', r.stream);
        }
        fputc(']', r.stream);
    }
    fputc(']', r.stream);
    record_write(m, &r);
}

/* ---- the screen */

static void clear_live_line(Metrics *m) {
    if (m->live_width > 0) {
        printf("\r%*s\r", m->live_width, "");
        fflush(stdout);
        m->live_width = 0;
    }
}

void metrics_say(Metrics *m, const char *format, ...) {
    if (!m->active) {
        return;
    }
    clear_live_line(m);
    va_list args;
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    putchar('\n');
    fflush(stdout);
}

void metrics_warn(Metrics *m, const char *format, ...) {
    clear_live_line(m);
    va_list args;
    va_start(args, format);
    fputs("train_fox: warning: ", stderr);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
}

static void format_duration(char *out, size_t size, double seconds) {
    long long s = seconds < 1e12 ? (long long)(seconds + 0.5) : 0;
    if (s >= 86400) {
        snprintf(out, size, "%lldd %lldh", s / 86400, s % 86400 / 3600);
    } else if (s >= 3600) {
        snprintf(out, size, "%lldh %02lldm", s / 3600, s % 3600 / 60);
    } else {
        snprintf(out, size, "%lldm %02llds", s / 60, s % 60);
    }
}

static void show_progress(Metrics *m, const StepRecord *s) {
    double weight = m->step_seconds > 0 ? 0.1 : 1;
    m->step_seconds += weight * (s->seconds - m->step_seconds);
    double now = fox_now();
    double pause = m->terminal ? LIVE_LINE_SECONDS : PLAIN_LINE_SECONDS;
    if (s->step != s->steps && m->last_line != 0 && now - m->last_line < pause) {
        return;
    }
    char line[256], left[32], pruned[32] = "";
    format_duration(left, sizeof left, m->step_seconds * (double)(s->steps - s->step));
    if (s->pruned >= 0) {
        snprintf(pruned, sizeof pruned, " | pruned %.1f%%", 100 * s->pruned);
    }
    int width = snprintf(line, sizeof line, "%3.0f%% | step %lld/%lld | loss %.4f | %.0f tokens/s%s | %s left",
                         100.0 * (double)s->step / (double)s->steps, (long long)s->step, (long long)s->steps, s->loss,
                         (double)s->step_tokens / m->step_seconds, pruned, left);
    m->last_line = now;
    if (m->terminal) {
        struct winsize window; /* a line that breaks would stay, and the next begin below it */
        int columns = ioctl(STDOUT_FILENO, TIOCGWINSZ, &window) == 0 && window.ws_col > 0 ? window.ws_col : 80;
        width = width < columns ? width : columns - 1;
        line[width] = '\0';
        m->live_width = m->live_width < columns ? m->live_width : columns - 1;
        printf("\r%s%*s", line, m->live_width > width ? m->live_width - width : 0, "");
        m->live_width = width;
    } else {
        puts(line);
    }
    fflush(stdout);
}

void metrics_step(Metrics *m, const StepRecord *s) {
    if (!m->active) {
        return;
    }
    JsonText r;
    record_begin(&r, "step", s->step);
    record_integer(&r, "tokens", s->tokens);
    record_number(&r, "loss", s->loss);
    record_number(&r, "lr", s->learning_rate);
    record_number(&r, "grad_norm", s->grad_norm);
    fprintf(r.stream, ", \"applied\": %s", s->applied ? "true" : "false");
    record_number(&r, "step_ms", round(1e6 * s->seconds) / 1e3);
    record_number(&r, "tokens_per_s", round(10 * (double)s->step_tokens / s->seconds) / 10);
    record_number(&r, "mfu", s->mfu);
    record_number(&r, "pruned", s->pruned);
    if (s->gpu_memory >= 0) {
        record_integer(&r, "gpu_mem_bytes", s->gpu_memory);
    } else {
        fputs(", \"gpu_mem_bytes\": null", r.stream);
    }
    if (s->exchanged > 0) {
        record_number(&r, "exchanged_bytes", s->exchanged);
        record_number(&r, "exchange_ms", round(1e3 * s->exchange_ms) / 1e3);
        record_number(&r, "exposed_ms", round(1e3 * s->exposed_ms) / 1e3);
    }
    record_write(m, &r);
    show_progress(m, s);
}
