/* What a process does to the files of its data directory, recorded for power_loss.py.

   Preloaded into a node (LD_PRELOAD), so that sqlite's writes are seen like Python's. Each call
   stands in the journal before it is done (after, if it opens a file); a sync is only recorded, for the page cache outlives
   the process, and the test decides what of it the disk had.

   Environment: KV_POWER_PREFIX begins the paths that count, KV_POWER_JOURNALS is a directory, where
   the journal is called by the pid. A record: kind, number of the open file, offset, length (13
   bytes and 4, big-endian), and as many bytes. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define FILES_MAX 65536
#ifndef RWF_DSYNC
#define RWF_DSYNC 2
#endif

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint32_t number_of[FILES_MAX]; /* of an open file that counts; 0: it does not */
static uint32_t last_number;
static int journal = -1;
static const char *prefix;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void begin(void) {
    const char *directory = getenv("KV_POWER_JOURNALS");
    char path[4096];
    prefix = getenv("KV_POWER_PREFIX");
    if (directory == NULL || prefix == NULL) return;
    snprintf(path, sizeof path, "%s/%d", directory, getpid());
    journal = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (journal < 0) abort();
}

static int counts(const char *path) {
    return journal >= 0 && strncmp(path, prefix, strlen(prefix)) == 0;
}

static uint32_t number(int fd) {
    return fd >= 0 && fd < FILES_MAX ? number_of[fd] : 0;
}

static void put(unsigned char *at, uint64_t value, int bytes) {
    while (bytes-- > 0) {
        at[bytes] = value & 255;
        value >>= 8;
    }
}

/* One call for the whole record: half a record would hide all that follow. */
static void record(char kind, uint32_t file, uint64_t offset, const struct iovec *parts, int count) {
    unsigned char head[17];
    struct iovec all[64];
    size_t length = 0;
    if (count > 63) abort();
    for (int i = 0; i < count; i++) {
        all[i + 1] = parts[i];
        length += parts[i].iov_len;
    }
    head[0] = kind;
    put(head + 1, file, 4);
    put(head + 5, offset, 8);
    put(head + 13, length, 4);
    all[0].iov_base = head;
    all[0].iov_len = sizeof head;
    if (syscall(SYS_writev, journal, all, count + 1) != (ssize_t)(length + sizeof head)) abort();
}

static void record_text(char kind, uint32_t file, const char *text, size_t length) {
    struct iovec part = {(void *)text, length};
    record(kind, file, 0, &part, 1);
}

/* ---- Names ---- */

static int opened(int fd, const char *path, int flags) {
    struct stat status;
    if (fd < 0 || fd >= FILES_MAX || !counts(path)) return fd;
    fstat(fd, &status);
    number_of[fd] = ++last_number;
    char kind = S_ISDIR(status.st_mode) ? 'd' : flags & O_TRUNC ? 't' : flags & O_CREAT ? 'c' : 'o';
    record_text(kind, last_number, path, strlen(path));
    return fd;
}

static int open_at(int directory, const char *path, int flags, mode_t mode) {
    pthread_mutex_lock(&lock);
    int fd = opened(syscall(SYS_openat, directory, path, flags, mode), path, flags);
    int error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    return fd;
}

#define MODE(flags)                          \
    mode_t mode = 0;                         \
    if (flags & (O_CREAT | __O_TMPFILE)) {   \
        va_list more;                        \
        va_start(more, flags);               \
        mode = va_arg(more, mode_t);         \
        va_end(more);                        \
    }

int open(const char *path, int flags, ...) { MODE(flags) return open_at(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return open_at(AT_FDCWD, path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { MODE(flags) return open_at(at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE(flags) return open_at(at, path, flags, mode); }

int close(int fd) {
    pthread_mutex_lock(&lock);
    if (number(fd)) number_of[fd] = 0;
    int result = syscall(SYS_close, fd), error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

int rename(const char *from, const char *to) {
    struct iovec parts[3] = {{(void *)from, strlen(from)}, {"", 1}, {(void *)to, strlen(to)}};
    pthread_mutex_lock(&lock);
    if (counts(from)) record('r', 0, 0, parts, 3);
    int result = REAL(rename)(from, to), error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

int unlink(const char *path) {
    pthread_mutex_lock(&lock);
    if (counts(path)) record_text('u', 0, path, strlen(path));
    int result = syscall(SYS_unlinkat, AT_FDCWD, path, 0), error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

/* ---- Contents ---- */

static ssize_t write_at(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
    uint32_t file = number(fd);
    ssize_t result;
    int error;
    if (!file) return syscall(SYS_pwritev2, fd, parts, (long)count, (long)offset, 0L, (long)flags);
    pthread_mutex_lock(&lock);
    off_t at = offset < 0 ? lseek(fd, 0, SEEK_CUR) : offset;
    record(flags & RWF_DSYNC ? 'W' : 'w', file, at, parts, count);
    result = syscall(SYS_pwritev2, fd, parts, (long)count, (long)offset, 0L, (long)(flags & ~RWF_DSYNC));
    error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

ssize_t write(int fd, const void *data, size_t length) {
    struct iovec part = {(void *)data, length};
    if (!number(fd)) return syscall(SYS_write, fd, data, length);
    return write_at(fd, &part, 1, -1, 0);
}

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset) {
    struct iovec part = {(void *)data, length};
    return write_at(fd, &part, 1, offset, 0);
}
ssize_t pwrite64(int fd, const void *data, size_t length, off64_t offset) {
    return pwrite(fd, data, length, offset);
}

ssize_t pwritev2(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
    return write_at(fd, parts, count, offset, flags);
}
ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags) {
    return write_at(fd, parts, count, offset, flags);
}

int ftruncate(int fd, off_t length) {
    pthread_mutex_lock(&lock);
    if (number(fd)) record('l', number(fd), length, NULL, 0);
    int result = syscall(SYS_ftruncate, fd, length), error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}
int ftruncate64(int fd, off64_t length) { return ftruncate(fd, length); }

static int synced(int fd, long call) {
    if (!number(fd)) return syscall(call, fd);
    pthread_mutex_lock(&lock);
    record('s', number(fd), 0, NULL, 0);
    pthread_mutex_unlock(&lock);
    return 0;
}
int fsync(int fd) { return synced(fd, SYS_fsync); }
int fdatasync(int fd) { return synced(fd, SYS_fdatasync); }

/* What is not recorded must not happen unseen. */
#define UNSEEN(type, name, ...)                                        \
    type name(__VA_ARGS__) {                                           \
        fprintf(stderr, "power_loss.c does not record " #name "\n");   \
        abort();                                                       \
    }
UNSEEN(int, fallocate, int fd, int mode, off_t offset, off_t length)
UNSEEN(int, fallocate64, int fd, int mode, off64_t offset, off64_t length)
UNSEEN(int, posix_fallocate, int fd, off_t offset, off_t length)
UNSEEN(int, sync_file_range, int fd, off64_t offset, off64_t length, unsigned flags)
UNSEEN(ssize_t, copy_file_range, int in, off64_t *from, int out, off64_t *to, size_t length, unsigned flags)
