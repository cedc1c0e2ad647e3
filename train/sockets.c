#include "sockets.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

/* Small messages leave at once; a connection is not inherited by programs we start. */
static int prepare(int fd) {
    int yes = 1;
    if (fd >= 0) {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
        fcntl(fd, F_SETFD, FD_CLOEXEC);
    }
    return fd;
}

static int listen_on(int family, const struct sockaddr *address, socklen_t length, int *port) {
    int fd = prepare(socket(family, SOCK_STREAM, 0)), yes = 1, no = 0;
    if (fd < 0) {
        return -1;
    }
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (family == AF_INET6) {
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof no);
    }
    struct sockaddr_storage bound;
    socklen_t size = sizeof bound;
    if (bind(fd, address, length) != 0 || listen(fd, 1024) != 0 || getsockname(fd, (struct sockaddr *)&bound, &size) != 0) {
        int reason = errno;
        close(fd);
        errno = reason;
        return -1;
    }
    *port = ntohs(family == AF_INET6 ? ((struct sockaddr_in6 *)&bound)->sin6_port : ((struct sockaddr_in *)&bound)->sin_port);
    return fd;
}

int socket_listen(bool this_machine_only, int *port, FoxError *err) {
    struct sockaddr_in6 six;
    struct sockaddr_in four;
    int fd = -1, wanted = *port;
    memset(&six, 0, sizeof six);
    memset(&four, 0, sizeof four);
    six.sin6_family = AF_INET6; // the address "any", which takes IPv4 too
    six.sin6_port = htons((uint16_t)wanted);
    four.sin_family = AF_INET;
    four.sin_port = six.sin6_port;
    four.sin_addr.s_addr = htonl(this_machine_only ? INADDR_LOOPBACK : INADDR_ANY);
    if (!this_machine_only) {
        fd = listen_on(AF_INET6, (struct sockaddr *)&six, sizeof six, port);
    }
    if (fd < 0) {
        fd = listen_on(AF_INET, (struct sockaddr *)&four, sizeof four, port);
    }
    if (fd < 0) {
        fox_fail(err, "rank 0 cannot listen on port %d: %s; set another MASTER_PORT", wanted, strerror(errno));
    }
    return fd;
}

/* Milliseconds until `deadline`, for poll. */
static int remaining(double deadline) {
    double left = deadline - fox_now();
    return left <= 0 ? 0 : left > 1e6 ? 1000000000 : (int)(1e3 * left) + 1;
}

int socket_accept(int listener, double deadline) {
    struct pollfd waiting = {listener, POLLIN, 0};
    for (;;) {
        int ready = poll(&waiting, 1, remaining(deadline));
        int fd = ready > 0 ? accept(listener, NULL, NULL) : -1;
        if (fd >= 0) {
            return prepare(fd);
        }
        if (ready == 0 || fox_now() >= deadline) {
            return -1;
        }
    }
}

/* connect() with a time limit: by itself it waits minutes for a host that does not answer. 0 or an errno. */
static int connect_until(int fd, const struct addrinfo *address, double deadline) {
    int reason = 0, flags = fcntl(fd, F_GETFL);
    socklen_t size = sizeof reason;
    struct pollfd waiting = {fd, POLLOUT, 0};
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0) {
        return errno;
    }
    if (connect(fd, address->ai_addr, address->ai_addrlen) != 0) {
        if (errno != EINPROGRESS) {
            return errno;
        }
        int ready;
        do {
            ready = poll(&waiting, 1, remaining(deadline));
        } while (ready < 0 && errno == EINTR);
        if (ready <= 0) {
            return ready == 0 ? ETIMEDOUT : errno;
        }
        if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &reason, &size) != 0 || reason != 0) {
            return reason != 0 ? reason : errno;
        }
    }
    return fcntl(fd, F_SETFL, flags) == 0 ? 0 : errno;
}

/* While nobody listens at a port of this machine, a socket may get that port for itself, and meet itself. */
static bool is_own_end(int fd) {
    struct sockaddr_storage own, peer;
    socklen_t own_size = sizeof own, peer_size = sizeof peer;
    memset(&own, 0, sizeof own);
    memset(&peer, 0, sizeof peer);
    return getsockname(fd, (struct sockaddr *)&own, &own_size) == 0 && getpeername(fd, (struct sockaddr *)&peer, &peer_size) == 0 &&
           own_size == peer_size && memcmp(&own, &peer, own_size) == 0;
}

/* Tries each address, for ten seconds at most. -1 and errno. */
static int connect_once(const struct addrinfo *addresses, double deadline) {
    int reason = EHOSTUNREACH;
    for (const struct addrinfo *a = addresses; a != NULL; a = a->ai_next) {
        int fd = socket(a->ai_family, SOCK_STREAM, 0);
        reason = fd < 0 ? errno : connect_until(fd, a, fmin(deadline, fox_now() + 10));
        reason = reason == 0 && is_own_end(fd) ? ECONNREFUSED : reason;
        if (fd >= 0 && reason == 0) {
            return prepare(fd);
        }
        if (fd >= 0) {
            close(fd);
        }
    }
    errno = reason;
    return -1;
}

int socket_connect(const char *host, int port, double deadline, FoxError *err) {
    char service[16];
    struct addrinfo hints, *addresses = NULL;
    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM;
    snprintf(service, sizeof service, "%d", port);
    for (;;) {
        int status = getaddrinfo(host, service, &hints, &addresses);
        int fd = -1, reason = 0;
        if (status == 0) {
            fd = connect_once(addresses, deadline);
            reason = errno;
            freeaddrinfo(addresses);
        }
        if (fd >= 0) {
            return fd;
        }
        if (fox_now() >= deadline) {
            fox_fail(err, "cannot reach rank 0 at %s, port %d: %s; is it started, and may the ranks connect to that port?", host, port,
                     status != 0 ? gai_strerror(status) : strerror(reason));
            return -1;
        }
        usleep(50000);
    }
}

bool socket_send(int fd, const void *bytes, int64_t count) {
    const char *p = (const char *)bytes;
    while (count > 0) {
        ssize_t sent = send(fd, p, (size_t)fox_min64(count, 1 << 30), MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) {
            continue;
        }
        if (sent <= 0) {
            return false;
        }
        p += sent;
        count -= sent;
    }
    return true;
}

bool socket_receive(int fd, void *bytes, int64_t count) {
    char *p = (char *)bytes;
    while (count > 0) {
        ssize_t got = recv(fd, p, (size_t)fox_min64(count, 1 << 30), MSG_WAITALL);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0) {
            return false;
        }
        p += got;
        count -= got;
    }
    return true;
}

void socket_limit(int fd, double seconds) {
    struct timeval limit;
    limit.tv_sec = (time_t)seconds;
    limit.tv_usec = (suseconds_t)(1e6 * (seconds - floor(seconds)));
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
}
