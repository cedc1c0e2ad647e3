/* The wish to end a run early, which comes as a signal. */
#ifndef FOX_STOP_H
#define FOX_STOP_H

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Takes charge of SIGTERM and SIGUSR1, and of SIGINT and SIGHUP unless the caller ignored them: the first that comes is a wish to stop
 * after this step; another one, 3 seconds later or more, ends the process at once, with exit code 128 + its number, and nothing is
 * saved. tells: says so on stdout. Call it once, from the main thread. */
void stop_take_signals(bool tells);

/* Whether such a wish has come. */
bool stop_wanted(void);

#ifdef __cplusplus
}
#endif

#endif
