/* Preloaded into a reading process: makes preadv fail as disks and signals do.
 *
 * Every answer is drawn from a seeded generator: a plain read, EINTR, EIO (never twice in a row in
 * one thread, which a reader must survive), a short read, a pause.
 * fault_arm(1) turns it on; fault_count(kind) says how often each happened.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { PLAIN, INTERRUPTED, BROKEN, SHORT, SLOW, KINDS };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int is_armed = 0;
static long counts[KINDS];
static unsigned long state = 88172645463325252UL;
static __thread int was_broken = 0;

void fault_arm(int on) { is_armed = on; }
long fault_count(int kind) { return counts[kind]; }

static unsigned long draw(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static int choose(void) {
    static const int table[10] = {PLAIN, PLAIN, PLAIN, SHORT, SHORT, SHORT,
                                  INTERRUPTED, BROKEN, BROKEN, SLOW};
    int kind = table[draw() % 10];
    if (kind == BROKEN && was_broken) kind = PLAIN;
    was_broken = kind == BROKEN;
    counts[kind]++;
    return kind;
}

typedef ssize_t (*plain_read)(int, const struct iovec *, int, off_t);
typedef ssize_t (*flagged_read)(int, const struct iovec *, int, off_t, int);

/* `flags` below 0: the call without flags. */
static ssize_t real_read(const char *name, int fd, const struct iovec *parts, int num_parts,
                         off_t offset, int flags) {
    void *real = dlsym(RTLD_NEXT, name);
    if (flags < 0) return ((plain_read)real)(fd, parts, num_parts, offset);
    return ((flagged_read)real)(fd, parts, num_parts, offset, flags);
}

static ssize_t read_with_faults(const char *name, int fd, const struct iovec *parts, int num_parts,
                                off_t offset, int flags) {
    if (!is_armed || num_parts != 1) return real_read(name, fd, parts, num_parts, offset, flags);
    pthread_mutex_lock(&lock);
    int kind = choose();
    unsigned long amount = draw();
    pthread_mutex_unlock(&lock);
    if (kind == INTERRUPTED) { errno = EINTR; return -1; }
    if (kind == BROKEN) { errno = EIO; return -1; }
    if (kind == SLOW) usleep(1000);
    ssize_t got = real_read(name, fd, parts, num_parts, offset, flags);
    /* Read all and admit to a part: the rest of the buffer then holds what must be read again. */
    return kind != SHORT || got < 2 ? got : 1 + (ssize_t)(amount % (unsigned long)(got - 1));
}

/* Which of these Python calls depends on how it was built. */
ssize_t preadv(int fd, const struct iovec *parts, int num_parts, off_t offset) {
    return read_with_faults("preadv", fd, parts, num_parts, offset, -1);
}

ssize_t preadv64(int fd, const struct iovec *parts, int num_parts, off_t offset) {
    return read_with_faults("preadv64", fd, parts, num_parts, offset, -1);
}

ssize_t preadv2(int fd, const struct iovec *parts, int num_parts, off_t offset, int flags) {
    return read_with_faults("preadv2", fd, parts, num_parts, offset, flags);
}

ssize_t preadv64v2(int fd, const struct iovec *parts, int num_parts, off_t offset, int flags) {
    return read_with_faults("preadv64v2", fd, parts, num_parts, offset, flags);
}
