#include "stop.h"

#include "common.h"

#include <signal.h>
#include <unistd.h>

#define IMPATIENCE_SECONDS 3

/* Set by a signal; a handler can reach nothing but a global. */
static volatile sig_atomic_t stop_requested = 0, stop_tells = 0;
static volatile double stop_time = 0;

/* The first signal asks for the end after this step. Another one a while later ends at once; launchers and terminals may send
 * the same wish twice, and so may the watch (train/watch.h), whose launcher is gone. */
static void on_signal(int number, siginfo_t *info, void *context) {
    static const char told[] = "\nstops after this step; the same signal 3 seconds later ends at once, and saves nothing\n";
    double now = fox_now();
    (void)context;
    if (stop_requested && now - stop_time > IMPATIENCE_SECONDS && info->si_pid != getpid()) {
        _Exit(128 + number);
    }
    if (!stop_requested) {
        stop_time = now;
        stop_requested = 1;
        if (stop_tells && write(STDOUT_FILENO, told, sizeof told - 1) < 0) {
            stop_tells = 0; // nobody reads
        }
    }
}

/* SIGUSR1 is what mpirun passes on and srun --signal sends; SIGHUP comes when a terminal, or mpirun's, goes. SIGINT and SIGHUP stay
 * ignored where the caller ignored them (nohup, a shell's background). The other two are never anything but a wish, and some
 * that start programs ignore or block SIGUSR1 themselves. */
void stop_take_signals(bool tells) {
    static const int signals[] = {SIGINT, SIGTERM, SIGUSR1, SIGHUP};
    struct sigaction action, before;
    sigset_t ours;
    stop_tells = tells;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_RESTART | SA_SIGINFO;
    sigemptyset(&ours);
    for (size_t i = 0; i < sizeof signals / sizeof signals[0]; i++) {
        bool wish = signals[i] == SIGTERM || signals[i] == SIGUSR1;
        sigaddset(&ours, signals[i]);
        if (sigaction(signals[i], NULL, &before) == 0 && (wish || before.sa_handler != SIG_IGN)) {
            sigaction(signals[i], &action, NULL);
        }
    }
    pthread_sigmask(SIG_UNBLOCK, &ours, NULL);
}

bool stop_wanted(void) {
    return stop_requested != 0;
}
