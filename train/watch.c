#include "watch.h"

#include "sockets.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BEAT 1.0             /* seconds between two statuses */
#define STOPPED (5 * BEAT)   /* a thread that did not come to run for so long was stopped, with its process */
#define SILENCE 40.0         /* seconds without any, after which a rank counts as stopped, until ranks_patience says otherwise */
#define PAUSES 4             /* times the longest pause so far, which is no hang yet */
#define REST 30              /* times as long may a rank rest */
#define END_SECONDS 2        /* the end may take: a terminal may not read, NCCL waits for ranks of this machine that may be stopped */
#define TEXT 600

typedef enum Kind { STATUS = 1, FAILED, LEAVING } Kind;
typedef enum State { RESTING, WORKING, WAITING } State;

/* What goes over a control connection, all of one size. */
typedef struct Message {
    int32_t kind, state;
    int32_t waits_for, sent; /* WAITING: rank 0 for whom; the others: whether their part has left */
    int64_t meeting;         /* collectives begun so far */
    int64_t step;
    double idle, limit; /* seconds without progress, and how many are too many (0: any) */
    char text[TEXT];    /* of FAILED */
} Message;

/* What rank 0 knows of a rank, every other rank of rank 0. */
typedef struct Peer {
    int fd, rank;
    bool left;
    double heard; /* when */
    Message status;
    char inbox[sizeof(Message)];
    size_t received;
} Peer;

struct Watch {
    const Ranks *ranks;
    Peer *peers;
    int peer_count;
    int wake[2];
    pid_t parent; /* whose end is ours; 0: nobody's */
    pthread_t thread;
    bool leaving;          /* atomic, as `turned` and `ending` are */
    double turned;         /* when the watching thread last came round */
    pthread_mutex_t mutex; /* guards what follows */
    bool sent;
    State state, before; /* before: what it was when it began to wait */
    int waits_for;
    int64_t step, meeting;
    double since, longest; /* last progress; longest pause */
    double patience, more, silence;
    RanksGuard guard; /* check NULL: none */
    Message seen;     /* own_status's last answer, but for `idle`, and `since` as it was then */
    double seen_since;
    int ending; /* a thread ends this process */
};

/* ---- what the main thread says */

/* When the watching thread last came round, in seconds of fox_now. For both threads. */
static double last_turn(Watch *w) {
    double turned;
    __atomic_load(&w->turned, &turned, __ATOMIC_ACQUIRE);
    return turned;
}

/* Progress: the pause that ends here counts for what is usual, unless this process was stopped meanwhile. */
static void progress(Watch *w, State state) {
    double now = fox_now();
    if (w->state == WORKING && now - last_turn(w) <= STOPPED && now - w->since > w->longest) {
        w->longest = now - w->since;
    }
    w->since = now;
    w->state = state;
}

void watch_working(Watch *w, int64_t step) {
    pthread_mutex_lock(&w->mutex);
    progress(w, WORKING);
    w->step = step;
    pthread_mutex_unlock(&w->mutex);
}

void watch_resting(Watch *w) {
    pthread_mutex_lock(&w->mutex);
    progress(w, RESTING);
    pthread_mutex_unlock(&w->mutex);
}

int64_t watch_step(Watch *w) {
    pthread_mutex_lock(&w->mutex);
    int64_t step = w->step;
    pthread_mutex_unlock(&w->mutex);
    return step;
}

void watch_begin(Watch *w) {
    pthread_mutex_lock(&w->mutex);
    w->before = w->state;
    progress(w, WAITING);
    w->meeting++;
    w->sent = false;
    w->waits_for = 0;
    pthread_mutex_unlock(&w->mutex);
}

void watch_wait_for(Watch *w, int rank) {
    pthread_mutex_lock(&w->mutex);
    w->waits_for = rank;
    w->since = fox_now();
    pthread_mutex_unlock(&w->mutex);
}

void watch_sent(Watch *w) {
    pthread_mutex_lock(&w->mutex);
    w->sent = true;
    pthread_mutex_unlock(&w->mutex);
}

void watch_end(Watch *w) {
    pthread_mutex_lock(&w->mutex);
    progress(w, w->before);
    pthread_mutex_unlock(&w->mutex);
}

void watch_patience(Watch *w, double progress_seconds, double more, double silence, bool forget) {
    pthread_mutex_lock(&w->mutex);
    w->longest = forget ? 0 : w->longest;
    w->patience = progress_seconds;
    w->more = more;
    w->silence = silence;
    pthread_mutex_unlock(&w->mutex);
}

void watch_guard(Watch *w, const RanksGuard *guard) {
    pthread_mutex_lock(&w->mutex);
    memset(&w->guard, 0, sizeof w->guard);
    if (guard != NULL) {
        w->guard = *guard;
    }
    pthread_mutex_unlock(&w->mutex);
}

/* Locks; false where the main thread stands still inside: stopped there, it must not silence the thread that watches it. */
static bool lock_in_time(Watch *w) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += (long)(5e8 * BEAT);
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    return pthread_mutex_timedlock(&w->mutex, &until) == 0;
}

/* This rank's state as the others may see it. */
static Message own_status(Watch *w) {
    bool locked = lock_in_time(w); // if not, nobody else changes what was seen before
    Message *m = &w->seen;
    if (locked) {
        m->kind = STATUS;
        m->state = w->state;
        m->waits_for = w->waits_for;
        m->sent = w->sent;
        m->meeting = w->meeting;
        m->step = w->step;
        m->limit = w->patience > 0 ? w->patience * (w->state == RESTING ? REST : 1) + w->more + PAUSES * w->longest : 0;
        w->seen_since = w->since;
    }
    Message answer = *m;
    double now = fox_now(), turned = last_turn(w); // a stop of this process since its thread came round is not the main thread's
    answer.idle = (now - turned > STOPPED ? turned : now) - w->seen_since;
    if (locked) {
        pthread_mutex_unlock(&w->mutex);
    }
    return answer;
}

/* ---- the end */

static void tell(Watch *w, const Message *m) {
    for (int i = 0; i < w->peer_count; i++) {
        struct pollfd room = {w->peers[i].fd, POLLOUT, 0}; // when there is any, there is far more than a message takes: none is cut
        if (!w->peers[i].left && w->peers[i].fd >= 0 && poll(&room, 1, 0) > 0) {
            send(w->peers[i].fd, m, sizeof *m, MSG_NOSIGNAL | MSG_DONTWAIT); // who does not listen is lost anyway
        }
    }
}

FOX_NORETURN static void end(Watch *w, const char *text, bool print) {
    while (__atomic_exchange_n(&w->ending, 1, __ATOMIC_ACQ_REL)) {
        pause(); // another thread ends this process: what fails here is a consequence
    }
    signal(SIGALRM, SIG_DFL);
    sigset_t alarms;
    sigemptyset(&alarms);
    sigaddset(&alarms, SIGALRM);
    pthread_sigmask(SIG_UNBLOCK, &alarms, NULL); // for this thread: a main thread that is stopped takes no signal
    alarm(END_SECONDS);
    if (print) {
        fprintf(stderr, "\ntrain_fox: error: %s; all ranks end\n", text);
        fflush(stderr);
    }
    RanksGuard guard;
    memset(&guard, 0, sizeof guard);
    if (pthread_mutex_trylock(&w->mutex) == 0) {
        guard = w->guard;
        pthread_mutex_unlock(&w->mutex);
    }
    if (guard.abort != NULL) {
        guard.abort(guard.context);
    }
    _exit(1);
}

void watch_fail(Watch *w, const char *format, ...) {
    Message m = own_status(w);
    m.kind = FAILED;
    va_list args;
    va_start(args, format);
    vsnprintf(m.text, sizeof m.text, format, args);
    va_end(args);
    tell(w, &m);
    end(w, m.text, true);
}

void watch_lost(Watch *w, int rank) {
    char name[96];
    ranks_name(w->ranks, rank, name);
    for (double deadline = fox_now() + 5; fox_now() < deadline;) {
        usleep(100000); // a signal ends it early
    }
    watch_fail(w, "the connection to %s is broken", name);
}

/* ---- the thread */

/* One rank of every host speaks. Rank 0 does where it is alive: `rank0_lost` says that it is not. */
static bool speaks(const Watch *w, bool rank0_lost) {
    char mine[96], first[96];
    const Ranks *r = w->ranks;
    ranks_name(r, r->rank, mine);
    ranks_name(r, 0, first);
    bool with_rank0 = strcmp(strchr(mine, '('), strchr(first, '(')) == 0;
    return r->local_rank == (rank0_lost && with_rank0 ? 1 : 0);
}

/* A peer is lost. Rank 0 tells everybody. */
FOX_NORETURN static void lost(Watch *w, const Peer *peer, const char *how) {
    char name[96];
    ranks_name(w->ranks, peer->rank, name);
    if (w->ranks->rank == 0) {
        watch_fail(w, "%s %s in step %lld", name, how, (long long)peer->status.step + 1);
    }
    Message own = own_status(w); // rank 0 says nothing of its step; it is ours
    char text[TEXT];
    bool speaker = speaks(w, true);
    snprintf(text, sizeof text, "%s %s in step %lld", name, how, (long long)own.step + 1);
    if (!speaker) { // it may notice a beat later: a launcher would end it as soon as this process has ended
        sleep((unsigned)(2 * BEAT));
    }
    end(w, text, speaker);
}

static void handle(Watch *w, Peer *peer, const Message *m) {
    peer->heard = fox_now();
    if (m->kind == LEAVING) {
        peer->left = true;
    } else if (m->kind == FAILED) {
        Message copy = *m;
        copy.text[TEXT - 1] = '\0';
        if (w->ranks->rank == 0) {
            tell(w, &copy);
        }
        // the rank that found it has printed it, and so has rank 0
        char name[96], theirs[96];
        ranks_name(w->ranks, w->ranks->rank, name);
        ranks_name(w->ranks, peer->rank, theirs);
        bool same_host = strcmp(strchr(name, '('), strchr(theirs, '(')) == 0;
        end(w, copy.text, !same_host && speaks(w, false));
    } else {
        peer->status = *m;
    }
}

/* Takes what has come from a peer, in whole messages. */
static void take(Watch *w, Peer *peer) {
    ssize_t got = recv(peer->fd, peer->inbox + peer->received, sizeof peer->inbox - peer->received, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) {
        return;
    }
    if (got <= 0 && !peer->left) {
        lost(w, peer, "was lost (killed, crashed, or ended by an error of its own)");
    }
    if (got <= 0) {
        close(peer->fd);
        peer->fd = -1;
        return;
    }
    peer->received += (size_t)got;
    if (peer->received == sizeof(Message)) {
        Message m;
        memcpy(&m, peer->inbox, sizeof m);
        peer->received = 0;
        handle(w, peer, &m);
    }
}

/* Rank 0 looks for the rank that has hung the longest beyond its limit. Its own waiting is no sign of that, however long it lasts,
 * while the rank it waits for works within its limit: what ranks do tells first. */
static void judge_progress(Watch *w) {
    Message own = own_status(w);
    bool waits = own.state == WAITING && own.waits_for > 0, own_late = own.limit > 0 && own.idle > own.limit;
    const Message *worst = own_late && !waits ? &own : NULL;
    int rank = 0;
    for (int i = 0; i < w->peer_count; i++) {
        const Message *m = &w->peers[i].status;
        if (m->state != WAITING && m->limit > 0 && m->idle > m->limit && (worst == NULL || m->idle > worst->idle)) {
            worst = m;
            rank = w->peers[i].rank;
        }
    }
    if (worst == NULL && own_late) { // it waits too long, though nobody who works is late: nothing comes where both wait
        const Message *other = &w->peers[own.waits_for - 1].status;
        // what rank 0 waits for is there, and it does not take it; or it has, and the other is in the next collective already
        bool arrived = other->meeting > own.meeting || (other->meeting == own.meeting && other->sent);
        if (other->state == WAITING) {
            worst = &own;
            rank = arrived ? 0 : own.waits_for;
        }
    }
    if (worst != NULL) {
        char name[96];
        ranks_name(w->ranks, rank, name);
        watch_fail(w, "%s made no progress for %.0f s in step %lld (--hang-timeout)", name, worst->idle, (long long)worst->step + 1);
    }
}

static void judge_silence(Watch *w, double now, double silence) {
    for (int i = 0; i < w->peer_count; i++) {
        Peer *peer = &w->peers[i];
        if (silence > 0 && !peer->left && now - peer->heard > silence) {
            char how[96];
            snprintf(how, sizeof how, "was silent for %.0f s (stopped, or its machine is gone)", now - peer->heard);
            lost(w, peer, how);
        }
    }
}

/* Once a second. */
static void beat(Watch *w, double now) {
    Message own = own_status(w);
    FoxError err;
    err.text[0] = '\0';
    double silence = 0;
    bool ok = true;
    if (lock_in_time(w)) {
        silence = w->silence;
        ok = w->guard.check == NULL || w->guard.check(w->guard.context, &err);
        pthread_mutex_unlock(&w->mutex);
    }
    if (!ok) {
        char name[96];
        ranks_name(w->ranks, w->ranks->rank, name);
        watch_fail(w, "%s, step %lld: %s", name, (long long)own.step + 1, err.text);
    }
    tell(w, &own);
    judge_silence(w, now, silence);
    if (w->ranks->rank == 0) {
        judge_progress(w);
    }
    if (w->parent != 0 && getppid() != w->parent) {
        w->parent = 0;
        kill(getpid(), SIGTERM); // the main thread's, as from a user: save and end
    }
}

/* The watching thread comes round. Where this process was stopped for a while what the others sent is still to be read, and its main
 * thread did not hang. */
static void come_round(Watch *w, double now, bool stopped) {
    for (int i = 0; stopped && i < w->peer_count; i++) {
        w->peers[i].heard = now;
    }
    if (stopped && lock_in_time(w)) {
        w->since = now;
        pthread_mutex_unlock(&w->mutex);
    }
    __atomic_store(&w->turned, &now, __ATOMIC_RELEASE); // after `since`: the main thread may be at progress() now
}

static void *watch_loop(void *context) {
    Watch *w = (Watch *)context;
    struct pollfd *waiting = FOX_NEW(struct pollfd, w->peer_count + 1);
    double last = w->turned, next = last;
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, NULL); // signals are the main thread's
    while (!__atomic_load_n(&w->leaving, __ATOMIC_ACQUIRE)) {
        for (int i = 0; i < w->peer_count; i++) {
            waiting[i].fd = w->peers[i].fd;
            waiting[i].events = POLLIN;
            waiting[i].revents = 0;
        }
        waiting[w->peer_count].fd = w->wake[0];
        waiting[w->peer_count].events = POLLIN;
        poll(waiting, (nfds_t)w->peer_count + 1, (int)(1e3 * BEAT / 4));
        double now = fox_now();
        come_round(w, now, now - last > STOPPED);
        last = now;
        for (int i = 0; i < w->peer_count; i++) {
            if (waiting[i].revents != 0 && w->peers[i].fd >= 0) {
                take(w, &w->peers[i]);
            }
        }
        if (now >= next) {
            beat(w, now);
            next = now + BEAT;
        }
    }
    free(waiting);
    return NULL;
}

Watch *watch_start(const Ranks *ranks, const int *control, bool by_mpi) {
    Watch *w = FOX_NEW(Watch, 1);
    double now = fox_now();
    w->ranks = ranks;
    w->peer_count = ranks->rank == 0 ? ranks->size - 1 : 1;
    w->peers = FOX_NEW(Peer, w->peer_count);
    for (int i = 0; i < w->peer_count; i++) {
        Peer *peer = &w->peers[i];
        peer->rank = ranks->rank == 0 ? i + 1 : 0;
        peer->fd = control[peer->rank];
        peer->heard = now;
    }
    w->parent = by_mpi ? getppid() : 0;
    w->since = w->turned = now;
    w->silence = SILENCE;
    pthread_mutex_init(&w->mutex, NULL);
    int code = pipe(w->wake) != 0 ? errno : pthread_create(&w->thread, NULL, watch_loop, w);
    if (code != 0) {
        fox_die("the thread that watches the other ranks cannot be started: %s", strerror(code));
    }
    return w;
}

void watch_stop(Watch *w) {
    Message m = own_status(w);
    m.kind = LEAVING;
    __atomic_store_n(&w->leaving, true, __ATOMIC_RELEASE);
    if (write(w->wake[1], "", 1) != 1) {
        fox_die("the thread that watches the other ranks cannot be woken: %s", strerror(errno));
    }
    pthread_join(w->thread, NULL);
    tell(w, &m);
    for (int i = 0; i < w->peer_count; i++) {
        if (w->peers[i].fd >= 0) {
            close(w->peers[i].fd);
        }
    }
    close(w->wake[0]);
    close(w->wake[1]);
    pthread_mutex_destroy(&w->mutex);
    free(w->peers);
    free(w);
}
