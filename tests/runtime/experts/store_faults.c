/* Preloaded into a packing process: makes its n-th file operation fatal, or makes writing fail.
 *
 * fault_arm(KILL, n, 0): the n-th operation is the last; a write is torn in half first.
 * fault_arm(FAIL, n, error): from the n-th operation that needs space on, all of those fail.
 * fault_count(): operations seen since arming.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/types.h>
#include <unistd.h>

enum { OFF, KILL, FAIL };
static int mode = OFF, failure = 0;
static long fatal = 0, count = 0;

void fault_arm(int new_mode, long n, int error) {
    mode = new_mode;
    fatal = n;
    failure = error;
    count = 0;
}

long fault_count(void) { return count; }

static void die(void) { kill(getpid(), SIGKILL); }

/* Returns 1 where the call is to fail with `failure`. */
static int step(int needs_space) {
    if (mode == OFF || (mode == FAIL && !needs_space)) return 0;
    count++;
    if (count < fatal) return 0;
    if (mode == KILL && count == fatal) die();
    if (mode == KILL) return 0;
    errno = failure;
    return 1;
}

#define REAL(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    if (mode == KILL && count + 1 == fatal) {
        ssize_t ignored = real(fd, data, size / 2);
        (void)ignored;
    }
    if (step(1)) return -1;
    return real(fd, data, size);
}

int fsync(int fd) {
    REAL(fsync);
    return step(1) ? -1 : real(fd);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    return step(0) ? -1 : real(from, to);
}

int unlink(const char *path) {
    REAL(unlink);
    return step(0) ? -1 : real(path);
}

int mkdir(const char *path, mode_t bits) {
    REAL(mkdir);
    return step(1) ? -1 : real(path, bits);
}

int chmod(const char *path, mode_t bits) {
    REAL(chmod);
    return step(0) ? -1 : real(path, bits);
}

static mode_t bits_of(int flags, va_list arguments) {
    return flags & O_CREAT ? va_arg(arguments, mode_t) : 0;
}

int open(const char *path, int flags, ...) {
    REAL(open);
    va_list arguments;
    va_start(arguments, flags);
    mode_t bits = bits_of(flags, arguments);
    va_end(arguments);
    if ((flags & O_CREAT) && step(1)) return -1;
    return real(path, flags, bits);
}

int open64(const char *path, int flags, ...) {
    REAL(open64);
    va_list arguments;
    va_start(arguments, flags);
    mode_t bits = bits_of(flags, arguments);
    va_end(arguments);
    if ((flags & O_CREAT) && step(1)) return -1;
    return real(path, flags, bits);
}
