#include "files.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <glob.h>
#include <sys/stat.h>
#include <unistd.h>

/* Reads exactly `length` bytes; a file that shrinks meanwhile is an error. */
static bool read_all(int fd, const char *path, char *out, size_t length, FoxError *err) {
    size_t done = 0;
    while (done < length) {
        ssize_t n = read(fd, out + done, length - done);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            return fox_fail(err, "%s: cannot read: %s", path, strerror(errno));
        }
        if (n == 0) {
            return fox_fail(err, "%s: ends after %zu of %zu bytes: it changed while it was read", path, done, length);
        }
        done += (size_t)n;
    }
    return true;
}

bool file_read(const char *path, size_t limit, char **text, size_t *length, FoxError *err) {
    *text = NULL;
    *length = 0;
    // Without O_NONBLOCK a named pipe would make open() wait for ever.
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        return fox_fail(err, "%s: cannot open: %s", path, strerror(errno));
    }
    struct stat info;
    bool ok = fstat(fd, &info) == 0;
    if (!ok) {
        fox_fail(err, "%s: cannot read its size: %s", path, strerror(errno));
    } else if (!S_ISREG(info.st_mode)) {
        ok = fox_fail(err, "%s: is not a regular file", path);
    } else if ((uintmax_t)info.st_size > limit) {
        ok = fox_fail(err, "%s: has %jd bytes, at most %zu are accepted here", path, (intmax_t)info.st_size, limit);
    } else {
        size_t size = (size_t)info.st_size;
        char *bytes = (char *)malloc(size + 1);
        if (bytes == NULL) {
            ok = fox_fail(err, "%s: out of memory for %zu bytes", path, size);
        } else if ((ok = read_all(fd, path, bytes, size, err))) {
            bytes[size] = '\0';
            *text = bytes;
            *length = size;
        } else {
            free(bytes);
        }
    }
    close(fd);
    return ok;
}

static bool end_file(FILE *file, const char *path, bool sync, FoxError *err) {
    if (file == NULL) {
        return fox_fail(err, "%s: cannot create: %s", path, strerror(errno));
    }
    errno = 0;
    bool ok = !ferror(file) && fflush(file) == 0 && (!sync || fsync(fileno(file)) == 0);
    int reason = errno;
    if (fclose(file) != 0 && ok) {
        ok = false;
        reason = errno;
    }
    // A write that failed long ago has lost its errno.
    return ok || fox_fail(err, "%s: cannot write: %s", path, reason ? strerror(reason) : "an earlier write failed");
}

bool file_read_at(int fd, const char *path, int64_t offset, int64_t count, void *out, FoxError *err) {
    int64_t done = 0;
    while (done < count) {
        ssize_t got = pread(fd, (char *)out + done, (size_t)(count - done), (off_t)(offset + done));
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got < 0) {
            return fox_fail(err, "%s: reading at byte %lld failed: %s", path, (long long)(offset + done), strerror(errno));
        }
        if (got == 0) {
            return fox_fail(err, "%s: ends at byte %lld, expected data up to byte %lld: it became shorter while it was read", path,
                            (long long)(offset + done), (long long)(offset + count));
        }
        done += got;
    }
    return true;
}

bool file_finish(FILE *file, const char *path, FoxError *err) {
    return end_file(file, path, true, err);
}

bool file_close(FILE *file, const char *path, FoxError *err) {
    return end_file(file, path, false, err);
}

bool path_join(char path[PATH_SIZE], const char *directory, const char *name, FoxError *err) {
    int length = snprintf(path, PATH_SIZE, "%s/%s", directory, name);
    return (length >= 0 && length < PATH_SIZE) ||
           fox_fail(err, "%.64s...: the path is longer than %d bytes", directory, PATH_SIZE - 1);
}

bool is_directory(const char *path) {
    struct stat info;
    return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

bool make_directories(const char *path, FoxError *err) {
    char part[4096];
    size_t length = strlen(path);
    if (length == 0 || length >= sizeof part) {
        return fox_fail(err, "'%s': is no name for a directory", path);
    }
    for (size_t i = 1; i <= length; i++) {
        if (path[i] != '/' && path[i] != '\0') {
            continue;
        }
        memcpy(part, path, i);
        part[i] = '\0';
        if (mkdir(part, 0777) != 0) {
            int reason = errno;
            if (!is_directory(part)) {
                return fox_fail(err, "%s: cannot create the directory: %s", part, strerror(reason));
            }
        }
    }
    return true;
}

/* Appends a copy of "directory/name" (or just the name when directory is NULL), unless it is a directory itself. */
static void path_list_add(PathList *list, const char *directory, const char *name) {
    size_t size = strlen(name) + (directory ? strlen(directory) + 1 : 0) + 1;
    char *path = (char *)malloc(size);
    char **paths = (char **)realloc(list->paths, sizeof *paths * ((size_t)list->count + 1));
    if (path == NULL || paths == NULL) {
        fox_die("out of memory for a list of %d paths", list->count + 1);
    }
    list->paths = paths;
    snprintf(path, size, "%s%s%s", directory ? directory : "", directory ? "/" : "", name);
    if (is_directory(path)) {
        free(path);
    } else {
        list->paths[list->count++] = path;
    }
}

static int compare_paths(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static bool list_directory(const char *where, const char *pattern, PathList *list, FoxError *err) {
    DIR *dir = opendir(where);
    if (dir == NULL) {
        return fox_fail(err, "%s: cannot open the directory: %s", where, strerror(errno));
    }
    for (struct dirent *entry; (entry = readdir(dir)) != NULL;) {
        if (fnmatch(pattern, entry->d_name, FNM_PERIOD) == 0) {
            path_list_add(list, where, entry->d_name);
        }
    }
    closedir(dir);
    return list->count > 0 || fox_fail(err, "%s: no file in this directory is named like '%s'", where, pattern);
}

static bool list_glob(const char *where, PathList *list, FoxError *err) {
    glob_t found;
    int status = glob(where, 0, NULL, &found);
    if (status == 0) {
        for (size_t i = 0; i < found.gl_pathc; i++) {
            path_list_add(list, NULL, found.gl_pathv[i]);
        }
    }
    globfree(&found);
    return list->count > 0 || fox_fail(err, "%s: no such file, and as a pattern it matches none", where);
}

bool path_list(const char *where, const char *pattern, PathList *list, FoxError *err) {
    memset(list, 0, sizeof *list);
    bool ok = true;
    if (is_directory(where)) {
        ok = list_directory(where, pattern, list, err);
    } else if (access(where, F_OK) == 0) {
        path_list_add(list, NULL, where);
    } else if (errno != ENOENT) {
        ok = fox_fail(err, "%s: cannot open: %s", where, strerror(errno));
    } else {
        ok = list_glob(where, list, err);
    }
    if (ok) {
        qsort(list->paths, (size_t)list->count, sizeof *list->paths, compare_paths);
    } else {
        path_list_free(list);
    }
    return ok;
}

void path_list_free(PathList *list) {
    for (int i = 0; i < list->count; i++) {
        free(list->paths[i]);
    }
    free(list->paths);
    memset(list, 0, sizeof *list);
}

bool remove_directory(const char *path) {
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);
    if (dir == NULL) {
        if (fd >= 0) {
            close(fd);
        }
        return false;
    }
    // Some file systems skip entries while others are being removed, hence the passes until nothing more goes.
    for (bool removed = true; removed;) {
        removed = false;
        rewinddir(dir);
        for (struct dirent *entry; (entry = readdir(dir)) != NULL;) {
            removed |= unlinkat(fd, entry->d_name, 0) == 0; // fails for directories, "." and ".." among them
        }
    }
    closedir(dir);
    return rmdir(path) == 0;
}

bool sync_directory(const char *path, FoxError *err) {
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool ok = fd >= 0 && fsync(fd) == 0;
    if (!ok) {
        fox_fail(err, "%s: cannot sync the directory: %s", path, strerror(errno));
    }
    if (fd >= 0) {
        close(fd);
    }
    return ok;
}
