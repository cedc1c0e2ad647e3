/* A library that the CUDA driver loads into any program, and that sums up what its GPU did: for dev/profile_step.py.
 *
 *     cc -O2 -shared -fPIC -I$CUDA/include dev/cupti_trace.c -o cupti_trace.so -L$CUDA/lib64 -lcupti -lpthread
 *     CUDA_INJECTION64_PATH=$PWD/cupti_trace.so CUPTI_TRACE_OUT=trace.json program ...
 *
 * CUPTI reports every kernel, copy and fill with its first and last moment on the GPU. A step ends with the last kernel
 * whose name contains $CUPTI_TRACE_STEP ("adamw_kernel"); such kernels with at most STEP_GAP others between them belong
 * to one step. What is summed up begins where step $CUPTI_TRACE_SKIP (0) ends and ends where the last step does. At
 * exit the file gets, as JSON, the number of steps, the length of that span, the time in it during which the GPU did
 * anything, and for every name the calls, the time and the bytes (of copies and fills). A moment in which several run
 * counts once, for the one that began first: kernels that start early, to wait for the one before, have only what they add.
 *
 * With CUPTI_TRACE_SWITCH=FILE nothing is traced before FILE is there: until then CUPTI is not even called, and the
 * program runs as without this library. FILE is removed as soon as tracing has begun (or failed to), and steps count from
 * there. The first one may have begun before that, so at least its end is left out. */
#include <cupti.h>

#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BUFFER_BYTES (8 << 20)
#define STEP_GAP 32
#define POLL_MICROSECONDS 5000

typedef struct Event {
    uint64_t start, end; /* ns */
    int name;            /* index into Trace.names */
    int64_t bytes;       /* 0 for kernels */
} Event;

typedef struct Name {
    char *text;
    int64_t calls, bytes;
    double ns;
} Name;

/* The one trace of the process. CUPTI's callbacks take no argument of ours, so it cannot be but global. */
typedef struct Trace {
    pthread_mutex_t mutex;
    Event *events;
    size_t count, capacity;
    Name *names;
    int name_count, name_capacity;
    uint64_t dropped;
} Trace;

static Trace trace = {.mutex = PTHREAD_MUTEX_INITIALIZER};

static void *grow(void *memory, size_t bytes) {
    memory = realloc(memory, bytes);
    if (memory == NULL) {
        fputs("cupti_trace: out of memory\n", stderr);
        abort();
    }
    return memory;
}

static int find_name(const char *text) {
    for (int i = trace.name_count - 1; i >= 0; i--) {
        if (strcmp(trace.names[i].text, text) == 0) {
            return i;
        }
    }
    if (trace.name_count == trace.name_capacity) {
        trace.name_capacity = 2 * trace.name_capacity + 64;
        trace.names = (Name *)grow(trace.names, sizeof(Name) * (size_t)trace.name_capacity);
    }
    Name *name = &trace.names[trace.name_count];
    memset(name, 0, sizeof *name);
    name->text = (char *)grow(NULL, strlen(text) + 1);
    strcpy(name->text, text);
    return trace.name_count++;
}

static void add(const char *name, uint64_t start, uint64_t end, uint64_t bytes) {
    if (end == 0) { /* CUPTI knows no times of it */
        trace.dropped++;
        return;
    }
    if (trace.count == trace.capacity) {
        trace.capacity = 2 * trace.capacity + 4096;
        trace.events = (Event *)grow(trace.events, sizeof(Event) * trace.capacity);
    }
    Event *e = &trace.events[trace.count++];
    e->start = start;
    e->end = end;
    e->name = find_name(name);
    e->bytes = (int64_t)bytes;
}

static const char *copy_name(int kind) {
    switch (kind) {
    case CUPTI_ACTIVITY_MEMCPY_KIND_HTOD: return "memcpy host to device";
    case CUPTI_ACTIVITY_MEMCPY_KIND_DTOH: return "memcpy device to host";
    case CUPTI_ACTIVITY_MEMCPY_KIND_DTOD: return "memcpy device to device";
    default: return "memcpy other";
    }
}

/* The records only ever grow at their end from one CUPTI to the next, so an older type reads a newer record. */
static void add_record(const CUpti_Activity *record) {
    if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
        const CUpti_ActivityKernel9 *k = (const CUpti_ActivityKernel9 *)record;
        add(k->name, k->start, k->end, 0);
    } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
        const CUpti_ActivityMemcpy5 *m = (const CUpti_ActivityMemcpy5 *)record;
        add(copy_name(m->copyKind), m->start, m->end, m->bytes);
    } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
        const CUpti_ActivityMemset4 *m = (const CUpti_ActivityMemset4 *)record;
        add("memset", m->start, m->end, m->bytes);
    }
}

static void CUPTIAPI give_buffer(uint8_t **buffer, size_t *size, size_t *max_records) {
    *size = BUFFER_BYTES;
    *max_records = 0; /* as many as fit */
    if (posix_memalign((void **)buffer, 8, BUFFER_BYTES) != 0) {
        *buffer = NULL;
        *size = 0;
    }
}

static void CUPTIAPI take_buffer(CUcontext context, uint32_t stream, uint8_t *buffer, size_t size, size_t valid) {
    CUpti_Activity *record = NULL;
    size_t dropped = 0;
    (void)size;
    pthread_mutex_lock(&trace.mutex);
    while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
        add_record(record);
    }
    if (cuptiActivityGetNumDroppedRecords(context, stream, &dropped) == CUPTI_SUCCESS) {
        trace.dropped += dropped;
    }
    pthread_mutex_unlock(&trace.mutex);
    free(buffer);
}

static int by_start(const void *a, const void *b) {
    uint64_t x = ((const Event *)a)->start, y = ((const Event *)b)->start;
    return (x > y) - (x < y);
}

/* Steps whose end is in the trace; [*begin, *end) of time are those after the first `skip`. */
static int find_steps(const char *marker, int skip, uint64_t *begin, uint64_t *end) {
    bool *marks = (bool *)grow(NULL, sizeof(bool) * (size_t)(trace.name_count + 1));
    for (int i = 0; i < trace.name_count; i++) {
        marks[i] = strstr(trace.names[i].text, marker) != NULL;
    }
    int steps = 0, since = STEP_GAP + 1;
    *begin = trace.count > 0 ? trace.events[0].start : 0;
    *end = *begin;
    for (size_t i = 0; i < trace.count; i++) {
        const Event *e = &trace.events[i];
        if (!marks[e->name]) {
            since++;
            continue;
        }
        steps += since > STEP_GAP;
        since = 0;
        *end = e->end;
        if (steps == skip) {
            *begin = e->end;
        }
    }
    free(marks);
    return steps;
}

static void sum_up(uint64_t begin, uint64_t end, double *busy) {
    uint64_t reached = begin;
    *busy = 0;
    for (size_t i = 0; i < trace.count; i++) {
        const Event *e = &trace.events[i];
        if (e->start < begin || e->end > end) {
            continue;
        }
        Name *name = &trace.names[e->name];
        name->calls++;
        name->bytes += e->bytes;
        if (e->end > reached) { /* what lies before began earlier, and has this time already */
            double ns = (double)(e->end - (e->start > reached ? e->start : reached));
            name->ns += ns;
            *busy += ns;
            reached = e->end;
        }
    }
}

static void write_json(FILE *out, int steps, double span, double busy) {
    fprintf(out, "{\"steps\": %d, \"span_ms\": %.6f, \"busy_ms\": %.6f, \"dropped\": %llu, \"kernels\": [", steps,
            1e-6 * span, 1e-6 * busy, (unsigned long long)trace.dropped);
    const char *separator = "";
    for (int i = 0; i < trace.name_count; i++) {
        const Name *name = &trace.names[i];
        if (name->calls > 0) {
            fprintf(out, "%s\n{\"name\": \"", separator);
            for (const char *p = name->text; *p != '\0'; p++) {
                fprintf(out, *p == '"' || *p == '\\' ? "\\%c" : "%c", *p);
            }
            fprintf(out, "\", \"calls\": %lld, \"ms\": %.6f, \"bytes\": %lld}", (long long)name->calls, 1e-6 * name->ns,
                    (long long)name->bytes);
            separator = ",";
        }
    }
    fputs("]}\n", out);
}

static void finish(void) {
    const char *path = getenv("CUPTI_TRACE_OUT"), *marker = getenv("CUPTI_TRACE_STEP");
    const char *skipped = getenv("CUPTI_TRACE_SKIP");
    int skip = skipped != NULL ? atoi(skipped) : 0;
    if (getenv("CUPTI_TRACE_SWITCH") != NULL && skip < 1) {
        skip = 1; /* of the step during which tracing began only a part is known */
    }
    uint64_t begin, end;
    double busy;
    cuptiActivityFlushAll(1);
    pthread_mutex_lock(&trace.mutex);
    /* A process that did nothing on the GPU writes nothing: it may be the parent of the one that did. */
    FILE *out = path != NULL && trace.count > 0 ? fopen(path, "w") : NULL;
    if (out != NULL) {
        qsort(trace.events, trace.count, sizeof(Event), by_start);
        int steps = find_steps(marker != NULL ? marker : "adamw_kernel", skip, &begin, &end);
        sum_up(begin, end, &busy);
        write_json(out, steps > skip ? steps - skip : 0, (double)(end - begin), busy);
        fclose(out);
    }
    pthread_mutex_unlock(&trace.mutex);
}

static bool works(CUptiResult result, const char *what) {
    const char *text = "unknown";
    if (result != CUPTI_SUCCESS) {
        cuptiGetResultString(result, &text);
        fprintf(stderr, "cupti_trace: %s failed: %s\n", what, text);
    }
    return result == CUPTI_SUCCESS;
}

static void begin(void) {
    if (works(cuptiActivityRegisterCallbacks(give_buffer, take_buffer), "registering") &&
        works(cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL), "tracing kernels") &&
        works(cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY), "tracing copies") &&
        works(cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMSET), "tracing fills")) {
        atexit(finish);
    }
}

static void *await_switch(void *path) {
    while (access((const char *)path, F_OK) != 0) {
        usleep(POLL_MICROSECONDS);
    }
    begin();
    unlink((const char *)path);
    return NULL;
}

/* The thread that waits for the file; signals are for the program's own threads. */
static void begin_later(char *path) {
    pthread_t thread;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (pthread_create(&thread, NULL, await_switch, path) == 0) {
        pthread_detach(thread);
    } else {
        fputs("cupti_trace: no thread can be started\n", stderr);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Called by the driver when the program first uses it. */
__attribute__((visibility("default"))) int InitializeInjection(void) {
    char *path = getenv("CUPTI_TRACE_SWITCH");
    if (path != NULL) {
        begin_later(path);
    } else {
        begin();
    }
    return 1;
}
