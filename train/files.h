/* Files the careful way: whole reads, whole writes, errors in words. */
#ifndef FOX_FILES_H
#define FOX_FILES_H

#include "common.h"

/* Reads a whole regular file; text[length] = 0. The caller frees *text. `limit`: largest size accepted, in bytes. */
bool file_read(const char *path, size_t limit, char **text, size_t *length, FoxError *);

/* Reads exactly `count` bytes at `offset` of an open file; `path` names it in the error. */
bool file_read_at(int fd, const char *path, int64_t offset, int64_t count, void *out, FoxError *);

/* Ends a file that was written: flushes, syncs to the disk and closes. Fails with the system's reason when any write so
 * far failed (a full disk). `file` is closed either way; NULL (a failed fopen, errno still set) fails too. */
bool file_finish(FILE *file, const char *path, FoxError *);

/* The same without syncing: for a file that others write on, and sync. */
bool file_close(FILE *file, const char *path, FoxError *);

enum { PATH_SIZE = 1024 };

/* directory/name. Fails when that is longer than PATH_SIZE - 1 bytes. */
bool path_join(char path[PATH_SIZE], const char *directory, const char *name, FoxError *);

/* Whether a directory, or a link to one, is there. */
bool is_directory(const char *path);

/* mkdir -p. */
bool make_directories(const char *path, FoxError *);

/* Paths matching a directory (all names that match `pattern` in it), a glob, or a single file; sorted by name. Fails
 * when nothing matches. Free with path_list_free. */
typedef struct PathList {
    int count;
    char **paths;
} PathList;
bool path_list(const char *where, const char *pattern, PathList *, FoxError *);
void path_list_free(PathList *);

/* Removes a directory of plain files (no subdirectories). False when something is left of it; a path that is not a
 * directory (a link to one, say) is not touched. */
bool remove_directory(const char *path);

/* fsync of a directory, so that a rename in it survives a power cut. */
bool sync_directory(const char *path, FoxError *);

#endif
