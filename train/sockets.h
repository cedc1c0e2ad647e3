/* TCP between ranks: whole messages, blocking, with deadlines where strangers or late starters are waited for. */
#ifndef FOX_SOCKETS_H
#define FOX_SOCKETS_H

#include "common.h"

/* A socket that listens on *port (0: any free one, which *port then holds), on all addresses of this machine or only where
 * its own processes reach it. -1 and an error when that fails. */
int socket_listen(bool this_machine_only, int *port, FoxError *);

/* The next connection, or -1 when none came until `deadline` (on the clock of fox_now). */
int socket_accept(int listener, double deadline);

/* Connects to host:port, trying again while nobody listens there, until `deadline`. -1 and an error when that fails. */
int socket_connect(const char *host, int port, double deadline, FoxError *);

/* Sends or receives all of it. False when the connection is broken or closed, or when a time limit has passed. */
bool socket_send(int fd, const void *bytes, int64_t count);
bool socket_receive(int fd, void *bytes, int64_t count);

/* A receive that waits longer than this fails; 0: no limit. */
void socket_limit(int fd, double seconds);

#endif
