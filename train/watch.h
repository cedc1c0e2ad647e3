/* The watch over a run of several ranks: a thread in every rank that ends them all when one is lost.
 *
 *     rank r  -- status each second: step, what its main thread does and since when -->  rank 0
 *             <-- "alive" each second, or the news that the run has failed ----------
 *
 *     a rank died                 its connection closes: noticed at once
 *     a rank is stopped           (SIGSTOP, a machine that froze, a cut cable) nothing comes from it for `silence` seconds
 *     a main thread hangs         outside of collectives: no progress for `progress` seconds beyond four times its longest pause so far
 *     a device reports an error   the guard's check() says so
 *
 * Rank 0 decides, tells the others and prints one line with rank, host and step; one rank of every other host prints it too.
 * Then every process ends, whatever its main thread waits for: with code 1, or by SIGALRM where that takes more than two
 * seconds. When rank 0 itself is lost, every rank notices
 * for itself. Time during which this process was stopped itself does not count against the others. */
#ifndef FOX_WATCH_H
#define FOX_WATCH_H

#include "ranks.h"

typedef struct Watch Watch;

/* Starts the thread. control: rank 0's connections to all ranks, [size]; elsewhere [0] is the one to rank 0. `ranks` must
 * outlive the watch. by_mpi: when the parent process ends, the run is asked to stop (SIGTERM). */
Watch *watch_start(const Ranks *ranks, const int *control, bool by_mpi);

/* Ends the thread and frees everything. All ranks must have agreed to leave (a barrier). */
void watch_stop(Watch *);

/* See ranks_patience, ranks_guard, ranks_working and ranks_resting. */
void watch_patience(Watch *, double progress, double more, double silence, bool forget);
void watch_guard(Watch *, const RanksGuard *);
void watch_working(Watch *, int64_t step);
void watch_resting(Watch *);
/* The step that the main thread last named. */
int64_t watch_step(Watch *);

/* The main thread does something together with the others: begins; waits for `rank` (rank 0 for each in turn); has sent what
 * it had to send and waits for rank 0; is done. Waiting for others is no hang. But when rank 0 waits for a rank that waits as
 * well, one of the two hangs: which, these calls tell. */
void watch_begin(Watch *);
void watch_wait_for(Watch *, int rank);
void watch_sent(Watch *);
void watch_end(Watch *);

/* The run has failed: tells the others, prints the line, ends this process. For any thread. */
FOX_PRINTF(2, 3) FOX_NORETURN void watch_fail(Watch *, const char *format, ...);

/* The main thread's connection to a rank is broken: gives the watch a moment to find out why, which ends the process. */
FOX_NORETURN void watch_lost(Watch *, int rank);

#endif
