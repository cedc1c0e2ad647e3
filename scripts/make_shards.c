/* make_shards: text files to train_NNNNNN.bin and val_NNNNNN.bin, which train_fox reads.
 *
 *   plan   walk the arguments in sorted order, read every file once: its size, its hash, is it text
 *   split  a document goes to val by the hash of its content, so the split depends neither on the order nor on where
 *          the files lie, and copies of one file are never on both sides
 *   write  end-of-text token + tokens, document after document, into temporary files; renamed when all is written
 *
 * Shard: 256 little-endian int32 (magic 20240520, version 1, number of tokens, vocabulary size), then uint16 tokens. */
#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <sys/stat.h>

#include "../tokenizer.h"

#define SHARD_MAGIC 20240520
#define SHARD_VERSION 1
#define SHARD_HEADER_BYTES 1024
#define BINARY_PROBE 8000 /* a 0 byte among the first of these marks a binary file, as in git */

/* ---- Options ---------------------------------------------------------------------------------------------------- */

typedef struct Settings {
    const char *out, *vocab, *extensions;
    double val_fraction;
    int64_t shard_tokens, max_bytes;
    bool json_escape, help;
    char **paths; /* [path_count] */
    int path_count;
} Settings;

typedef enum OptionType { OPTION_TEXT, OPTION_INTEGER, OPTION_FRACTION, OPTION_FLAG } OptionType;

typedef struct Option {
    const char *name, *letter; /* letter may be NULL */
    OptionType type;
    const char *argument;
    int64_t low, high; /* of OPTION_INTEGER */
    size_t field;      /* offset in Settings */
    const char *help;
} Option;

static const Option options[] = {
    {"--out", "-o", OPTION_TEXT, "DIR", 0, 0, offsetof(Settings, out), "folder for the shards, made if missing (data)"},
    {"--vocab", NULL, OPTION_TEXT, "FILE", 0, 0, offsetof(Settings, vocab),
     "GPT-2 vocabulary: .tiktoken, vocab.json, or their folder; not given: bytes, 257 tokens with end of text"},
    {"--val-fraction", NULL, OPTION_FRACTION, "F", 0, 0, offsetof(Settings, val_fraction),
     "share of the documents for validation, from 0 to below 1 (0.01)"},
    {"--shard-tokens", NULL, OPTION_INTEGER, "N", 1, 1400000000, offsetof(Settings, shard_tokens),
     "tokens in a shard (100000000); a rest below N/2 joins the last one"},
    {"--json-escape", NULL, OPTION_FLAG, "", 0, 0, offsetof(Settings, json_escape),
     "escape text as in a JSON string before it is encoded (LongCrawl64)"},
    {"--extensions", NULL, OPTION_TEXT, ".c,.h", 0, 0, offsetof(Settings, extensions),
     "in folders take only files with these endings (all)"},
    {"--max-bytes", NULL, OPTION_INTEGER, "N", 1, INT64_MAX, offsetof(Settings, max_bytes),
     "leave out documents that would make the text longer (no limit)"},
    {"--help", "-h", OPTION_FLAG, "", 0, 0, offsetof(Settings, help), "print this"},
};
#define OPTION_COUNT (sizeof options / sizeof options[0])

static void print_help(void) {
    puts("usage: make_shards [options] FILE|DIR ...\n\n"
         "Turns text files into shards of tokens for train_fox. Every file is one document. Folders are walked in\n"
         "sorted order, without hidden names, links to folders and binary files; a file named here is always taken.\n");
    for (size_t i = 0; i < OPTION_COUNT; i++) {
        const Option *o = &options[i];
        char left[64];
        snprintf(left, sizeof left, "%s%s%s %s", o->letter == NULL ? "" : o->letter, o->letter == NULL ? "" : ", ",
                 o->name, o->argument);
        printf("  %-24s %s\n", left, o->help);
    }
}

static bool set_option(Settings *s, const Option *o, const char *value, FoxError *err) {
    char *field = (char *)s + o->field, *end;
    errno = 0;
    if (o->type == OPTION_FLAG) {
        *(bool *)field = true;
    } else if (value == NULL || value[0] == '\0') {
        return fox_fail(err, "%s: expected %s after it", o->name, o->argument);
    } else if (o->type == OPTION_TEXT) {
        *(const char **)field = value;
    } else if (o->type == OPTION_INTEGER) {
        long long number = strtoll(value, &end, 10);
        if (errno != 0 || *end != '\0' || number < o->low || number > o->high) {
            return fox_fail(err, "%s: found \"%s\", expected a whole number from %lld to %lld", o->name, value,
                            (long long)o->low, (long long)o->high);
        }
        *(int64_t *)field = number;
    } else {
        double number = strtod(value, &end);
        if (errno != 0 || *end != '\0' || !(number >= 0 && number < 1)) {
            return fox_fail(err, "%s: found \"%s\", expected a number from 0 to below 1", o->name, value);
        }
        *(double *)field = number;
    }
    return true;
}

/* The option whose name or letter these `length` bytes are, or NULL. */
static const Option *find_option(const char *text, size_t length) {
    for (size_t i = 0; i < OPTION_COUNT; i++) {
        const char *names[2] = {options[i].name, options[i].letter};
        for (int k = 0; k < 2; k++) {
            if (names[k] != NULL && strlen(names[k]) == length && memcmp(names[k], text, length) == 0) {
                return &options[i];
            }
        }
    }
    return NULL;
}

/* Reads the command line: "--name VALUE" or "--name=VALUE"; "--" ends the options. The paths are collected at the front of argv. */
static bool read_options(int argc, char **argv, Settings *s, FoxError *err) {
    s->paths = argv;
    bool only_paths = false;
    for (int i = 1; i < argc; i++) {
        if (only_paths || argv[i][0] != '-' || argv[i][1] == '\0') {
            s->paths[s->path_count++] = argv[i];
        } else if (strcmp(argv[i], "--") == 0) {
            only_paths = true;
        } else {
            size_t length = strcspn(argv[i], "=");
            const char *value = argv[i][length] == '=' ? argv[i] + length + 1 : NULL;
            const Option *o = find_option(argv[i], length);
            if (o == NULL || (o->type == OPTION_FLAG && value != NULL)) {
                return fox_fail(err, "%s: unknown option; make_shards --help lists them", argv[i]);
            }
            if (value == NULL && o->type != OPTION_FLAG && i + 1 < argc) {
                value = argv[++i];
            }
            if (!set_option(s, o, value, err)) {
                return false;
            }
        }
    }
    return s->help || s->path_count > 0 || fox_fail(err, "no FILE or DIR given; make_shards --help says how");
}

/* ---- Plan ------------------------------------------------------------------------------------------------------- */

typedef struct Document {
    char *path;
    int64_t bytes;
    uint64_t hash; /* of the content */
    bool val;
} Document;

typedef struct Plan {
    const Settings *settings;
    Document *documents;
    int64_t count, capacity, bytes;
    int64_t binary, unreadable, empty, links, too_much; /* left out */
} Plan;

static void plan_add(Plan *plan, const char *path, int64_t bytes, uint64_t hash) {
    if (plan->count == plan->capacity) {
        plan->capacity = 2 * plan->capacity + 64;
        plan->documents = (Document *)realloc(plan->documents, (size_t)plan->capacity * sizeof(Document));
    }
    Document document = {strdup(path), bytes, hash, false};
    if (plan->documents == NULL || document.path == NULL) {
        fox_die("out of memory for the list of %lld documents", (long long)plan->capacity);
    }
    plan->documents[plan->count++] = document;
    plan->bytes += bytes;
}

/* Reads a file once and takes it or counts why not. named: it stands on the command line, so it must be readable and
 * may hold 0 bytes. */
static bool plan_file(Plan *plan, const char *path, bool named, FoxError *err) {
    char *text;
    size_t length;
    struct stat info;
    FoxError reason = {""};
    if (stat(path, &info) == 0 && info.st_size > plan->settings->max_bytes - plan->bytes) {
        plan->too_much++; // known without reading it
        return true;
    }
    if (!file_read(path, SIZE_MAX / 2, &text, &length, &reason)) {
        plan->unreadable++;
        return !named || fox_fail(err, "%s", reason.text);
    }
    if (length == 0) {
        plan->empty++;
    } else if (!named && memchr(text, 0, length < BINARY_PROBE ? length : BINARY_PROBE) != NULL) {
        plan->binary++;
    } else {
        plan_add(plan, path, (int64_t)length, fox_hash(0, text, length));
    }
    free(text);
    return true;
}

/* Does the name end in one of the comma-separated endings? They may be given with or without their dot. */
static bool has_extension(const char *name, const char *extensions) {
    size_t length = strlen(name);
    for (const char *p = extensions; p != NULL && *p != '\0';) {
        p += *p == '.';
        size_t n = strcspn(p, ",");
        if (n > 0 && length > n && name[length - n - 1] == '.' && memcmp(name + length - n, p, n) == 0) {
            return true;
        }
        p += n + (p[n] == ',');
    }
    return extensions == NULL;
}

static int by_name(const struct dirent **a, const struct dirent **b) {
    return strcmp((*a)->d_name, (*b)->d_name);
}

static int not_hidden(const struct dirent *entry) {
    return entry->d_name[0] != '.';
}

/* Plans all that is in a folder. Links to folders are not followed: no loops, no folder twice. */
static void plan_folder(Plan *plan, const char *folder) {
    struct dirent **entries;
    int count = scandir(folder, &entries, not_hidden, by_name);
    if (count < 0) {
        plan->unreadable++;
        return;
    }
    for (int i = 0; i < count; i++) {
        char *path = (char *)fox_alloc(PATH_MAX); // not on the stack: folders may be deep
        struct stat info, target;
        size_t last = strlen(folder) - 1;
        int length = snprintf(path, PATH_MAX, "%s%s%s", folder, folder[last] == '/' ? "" : "/", entries[i]->d_name);
        if (length >= PATH_MAX || lstat(path, &info) != 0 || stat(path, &target) != 0) {
            plan->unreadable++;
        } else if (S_ISDIR(info.st_mode)) {
            plan_folder(plan, path);
        } else if (S_ISDIR(target.st_mode)) {
            plan->links++;
        } else if (S_ISREG(target.st_mode) && has_extension(entries[i]->d_name, plan->settings->extensions)) {
            plan_file(plan, path, false, NULL);
        }
        free(path);
        free(entries[i]);
    }
    free(entries);
}

static bool make_plan(Plan *plan, FoxError *err) {
    for (int i = 0; i < plan->settings->path_count; i++) {
        const char *path = plan->settings->paths[i];
        struct stat info;
        if (stat(path, &info) != 0) {
            return fox_fail(err, "%s: cannot open: %s", path, strerror(errno));
        }
        if (S_ISDIR(info.st_mode)) {
            plan_folder(plan, path);
        } else if (!plan_file(plan, path, true, err)) {
            return false;
        }
    }
    return plan->count > 0 ||
           fox_fail(err, "no document found: %lld files binary, %lld unreadable, %lld empty, %lld over --max-bytes",
                    (long long)plan->binary, (long long)plan->unreadable, (long long)plan->empty,
                    (long long)plan->too_much);
}

/* Marks for val the documents whose hash, as a number in [0, 1), is below the fraction. Of two or more documents at
 * least one goes to each side: the lowest hash to val, the highest to train. */
static void split_plan(Plan *plan) {
    if (plan->settings->val_fraction == 0 || plan->count < 2) {
        return;
    }
    uint64_t lowest = UINT64_MAX, highest = 0;
    for (int64_t i = 0; i < plan->count; i++) {
        uint64_t hash = plan->documents[i].hash;
        lowest = hash < lowest ? hash : lowest;
        highest = hash > highest ? hash : highest;
    }
    for (int64_t i = 0; i < plan->count; i++) {
        uint64_t hash = plan->documents[i].hash;
        bool below = (double)(hash >> 11) * 0x1p-53 < plan->settings->val_fraction;
        plan->documents[i].val = hash != highest && (hash == lowest || below);
    }
    if (lowest == highest) {
        plan->documents[0].val = true; // nothing but copies of one file
    }
}

static void free_plan(Plan *plan) {
    for (int64_t i = 0; i < plan->count; i++) {
        free(plan->documents[i].path);
    }
    free(plan->documents);
}

/* ---- Write ------------------------------------------------------------------------------------------------------ */

/* The shards of one split. Until commit_shards() they have temporary names, which no reader's pattern matches. */
typedef struct Writer {
    const char *folder, *split; /* "train" or "val" */
    int vocab_size;
    int64_t limit;  /* tokens in a shard */
    FILE *file;     /* the open shard; NULL: none */
    int64_t count;  /* tokens in the last shard */
    int64_t total;  /* tokens in all shards */
    int64_t documents;
    int shards;     /* begun so far */
    int removed;    /* shards of an earlier run */
} Writer;

static void shard_path(const Writer *w, int index, const char *ending, char path[PATH_MAX]) {
    snprintf(path, PATH_MAX, "%s/%s_%06d.bin%s", w->folder, w->split, index, ending);
}

/* Writes the header over what is at the start of the file. */
static bool write_header(const Writer *w, FILE *file, int64_t count) {
    int32_t header[SHARD_HEADER_BYTES / 4] = {SHARD_MAGIC, SHARD_VERSION, (int32_t)count, w->vocab_size};
    return fseeko(file, 0, SEEK_SET) == 0 && fwrite(header, sizeof header, 1, file) == 1;
}

/* Ends the open shard; after a failed write file_finish finds the reason. */
static bool close_shard(Writer *w, FoxError *err) {
    char path[PATH_MAX];
    shard_path(w, w->shards - 1, ".tmp", path);
    FILE *file = w->file;
    w->file = NULL;
    if (file != NULL) {
        errno = 0;
        if (!write_header(w, file, w->count)) {
            fox_fail(err, "%s: cannot write: %s", path, strerror(errno));
        }
        return file_finish(file, path, err) && err->text[0] == '\0';
    }
    return true;
}

static bool open_shard(Writer *w, FoxError *err) {
    char path[PATH_MAX];
    shard_path(w, w->shards, ".tmp", path);
    w->file = fopen(path, "wb");
    if (w->file == NULL) {
        return fox_fail(err, "%s: cannot create: %s", path, strerror(errno));
    }
    w->shards++;
    w->count = 0;
    return write_header(w, w->file, 0) || fox_fail(err, "%s: cannot write: %s", path, strerror(errno));
}

/* Appends tokens; a document may go on in the next shard. */
static bool write_tokens(Writer *w, const uint16_t *tokens, size_t count, FoxError *err) {
    while (count > 0) {
        if (w->file == NULL && !open_shard(w, err)) {
            return false;
        }
        size_t room = (size_t)(w->limit - w->count), n = count < room ? count : room;
        if (fwrite(tokens, 2, n, w->file) != n) {
            char path[PATH_MAX];
            shard_path(w, w->shards - 1, ".tmp", path);
            return fox_fail(err, "%s: cannot write: %s", path, strerror(errno));
        }
        tokens += n;
        count -= n;
        w->count += (int64_t)n;
        w->total += (int64_t)n;
        if (w->count == w->limit && !close_shard(w, err)) {
            return false;
        }
    }
    return true;
}

/* Ends the split. A last shard of less than half the size joins the one before it: a few tokens in a file of their own
 * might not fill a single training window. */
static bool finish_shards(Writer *w, FoxError *err) {
    int64_t rest = w->count;
    if (!close_shard(w, err) || w->shards < 2 || rest >= w->limit / 2) {
        return err->text[0] == '\0';
    }
    char path[PATH_MAX], rest_path[PATH_MAX];
    shard_path(w, w->shards - 1, ".tmp", rest_path);
    char *bytes;
    size_t size;
    if (!file_read(rest_path, SIZE_MAX / 2, &bytes, &size, err)) {
        return false;
    }
    shard_path(w, w->shards - 2, ".tmp", path);
    FILE *file = fopen(path, "r+b");
    bool ok = file != NULL && fseeko(file, 0, SEEK_END) == 0 &&
              fwrite(bytes + SHARD_HEADER_BYTES, 1, size - SHARD_HEADER_BYTES, file) == size - SHARD_HEADER_BYTES &&
              write_header(w, file, w->limit + rest);
    if (!ok) {
        fox_fail(err, "%s: cannot write: %s", path, strerror(errno));
    }
    ok = file_finish(file, path, err) && ok;
    free(bytes);
    if (ok) {
        unlink(rest_path);
        w->shards--;
    }
    return ok;
}

/* Gives the shards their names and removes those of an earlier run with higher numbers, so that the folder holds this
 * run's shards only. */
static bool commit_shards(Writer *w, FoxError *err) {
    char from[PATH_MAX], to[PATH_MAX];
    for (int i = 0; i < w->shards; i++) {
        shard_path(w, i, ".tmp", from);
        shard_path(w, i, "", to);
        if (rename(from, to) != 0) {
            return fox_fail(err, "%s: cannot rename to %s: %s", from, to, strerror(errno));
        }
    }
    for (int i = w->shards; shard_path(w, i, "", to), unlink(to) == 0; i++) {
        w->removed++;
    }
    return true;
}

/* Removes what has a temporary name. */
static void abandon_shards(Writer *w) {
    char path[PATH_MAX];
    if (w->file != NULL) {
        fclose(w->file);
        w->file = NULL;
    }
    for (int i = 0; i < w->shards; i++) {
        shard_path(w, i, ".tmp", path);
        unlink(path);
    }
}

/* A line on the terminal, twice a second. */
static void show_progress(int64_t done, int64_t bytes, double *shown) {
    if (fox_now() - *shown > 0.5 && isatty(STDERR_FILENO)) {
        fprintf(stderr, "\r%5.1f%% of %.1f MB ", 100.0 * (double)done / (double)bytes, (double)bytes / 1e6);
        *shown = fox_now();
    }
}

/* Encodes every document and writes it to its split's shards; counts those that are not valid UTF-8. */
static bool write_documents(const Plan *plan, const Tokenizer *tokenizer, Writer *train, Writer *val, int64_t *not_utf8,
                            FoxError *err) {
    TokenList list = {NULL, 0, 0};
    int64_t done = 0;
    double shown = fox_now();
    bool ok = true;
    for (int64_t i = 0; ok && i < plan->count; i++) {
        const Document *d = &plan->documents[i];
        Writer *writer = d->val ? val : train;
        char *text;
        size_t length;
        ok = file_read(d->path, SIZE_MAX / 2, &text, &length, err);
        if (!ok) {
            break;
        }
        *not_utf8 += tokenizer_valid_utf8(text, length) < length;
        if (plan->settings->json_escape) {
            char *escaped = tokenizer_json_escape(text, length, &length);
            free(text);
            text = escaped;
        }
        list.count = 0;
        token_list_push(&list, tokenizer->end_of_text);
        tokenizer_encode(tokenizer, text, length, &list);
        free(text);
        writer->documents++;
        ok = write_tokens(writer, list.tokens, list.count, err);
        done += d->bytes;
        show_progress(done, plan->bytes, &shown);
    }
    free(list.tokens);
    return ok && finish_shards(train, err) && finish_shards(val, err);
}

static void print_files(const Writer *w) {
    if (w->shards > 0) {
        char first[PATH_MAX];
        shard_path(w, 0, "", first);
        printf("%s%s", w->split[0] == 'v' ? ", " : "", first);
    }
    if (w->shards > 1) {
        printf(" .. %06d.bin", w->shards - 1);
    }
}

static void print_summary(const Plan *plan, const Writer *train, const Writer *val, int64_t not_utf8) {
    int64_t tokens = train->total + val->total;
    printf("documents  %lld (train %lld, val %lld)", (long long)plan->count, (long long)train->documents,
           (long long)val->documents);
    printf(not_utf8 > 0 ? ", %lld not valid UTF-8\n" : "\n", (long long)not_utf8);
    printf("skipped    %lld binary, %lld unreadable, %lld empty, %lld links to folders, %lld over --max-bytes\n",
           (long long)plan->binary, (long long)plan->unreadable, (long long)plan->empty, (long long)plan->links,
           (long long)plan->too_much);
    printf("bytes      %lld\n", (long long)plan->bytes);
    printf("tokens     %lld (train %lld, val %lld), %.2f bytes a token, vocabulary %d\n", (long long)tokens,
           (long long)train->total, (long long)val->total, (double)plan->bytes / (double)tokens, train->vocab_size);
    printf("files      %d: ", train->shards + val->shards);
    print_files(train);
    print_files(val);
    printf("\n");
    if (train->removed + val->removed > 0) {
        printf("removed    %d shards that an earlier run left there\n", train->removed + val->removed);
    }
    if (val->shards == 0 && plan->settings->val_fraction > 0) {
        printf("note       one document is not enough for a val shard\n");
    }
}

static bool make_shards(const Settings *settings, Plan *plan, const Tokenizer *tokenizer, FoxError *err) {
    Writer train = {settings->out, "train", tokenizer->vocab_size, settings->shard_tokens, NULL, 0, 0, 0, 0, 0};
    Writer val = {settings->out, "val", tokenizer->vocab_size, settings->shard_tokens, NULL, 0, 0, 0, 0, 0};
    int64_t not_utf8 = 0;
    split_plan(plan);
    bool ok = write_documents(plan, tokenizer, &train, &val, &not_utf8, err) && commit_shards(&train, err) &&
              commit_shards(&val, err) && sync_directory(settings->out, err);
    if (isatty(STDERR_FILENO)) {
        fputs("\r\033[K", stderr);
    }
    if (ok) {
        print_summary(plan, &train, &val, not_utf8);
    } else {
        abandon_shards(&train);
        abandon_shards(&val);
    }
    return ok;
}

int main(int argc, char **argv) {
    FoxError err = {""};
    Settings settings = {"data", NULL, NULL, 0.01, 100000000, INT64_MAX, false, false, NULL, 0};
    Plan plan = {&settings, NULL, 0, 0, 0, 0, 0, 0, 0, 0};
    Tokenizer tokenizer;
    signal(SIGXFSZ, SIG_IGN); // a file-size limit is then a failed write like any other
    if (!read_options(argc, argv, &settings, &err)) {
        fox_die("%s", err.text);
    }
    if (settings.help) {
        print_help();
        return 0;
    }
    if (strlen(settings.out) > PATH_MAX - 64) {
        fox_die("--out: path too long");
    }
    if (!tokenizer_open(settings.vocab, &tokenizer, &err)) {
        fox_die("%s", err.text);
    }
    bool ok = make_plan(&plan, &err) && make_directories(settings.out, &err) &&
              make_shards(&settings, &plan, &tokenizer, &err);
    free_plan(&plan);
    tokenizer_free(&tokenizer);
    if (!ok) {
        fox_die("%s", err.text);
    }
    return 0;
}
