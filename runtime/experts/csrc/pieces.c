/* Reads a run of pieces of files into one slot, so that nobody needs the interpreter between two of them.
   Decides nothing and mends nothing: whoever calls reads a piece that did not come whole by itself. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

enum { BLOCK = 4096 };

typedef struct {
    int64_t slot_offset, length;
} Part;

/* `length` bytes from `offset` of a file that is open as `buffered` and, for reads past the page cache, as
   `direct`, or -1; `parts` say where they belong in the slot, in the file's order. */
typedef struct {
    int64_t offset, length;
    const Part *parts;
    int64_t num_parts;
    int32_t direct, buffered;
} Piece;

static int64_t align_up(int64_t bytes) { return (bytes + BLOCK - 1) / BLOCK * BLOCK; }

static ssize_t fill(int descriptor, uint8_t *target, int64_t length, int64_t offset) {
    struct iovec part = {.iov_base = target, .iov_len = (size_t)length};
    ssize_t got;
    do got = preadv(descriptor, &part, 1, offset);
    while (got < 0 && errno == EINTR);
    return got;
}

static int is_whole(const Piece *piece, uint8_t *slot, uint8_t *bounce) {
    const Part *parts = piece->parts;
    int64_t skip = piece->offset % BLOCK;
    int is_direct = piece->direct >= 0;
    int is_aligned = !skip && piece->length % BLOCK == 0 && parts->slot_offset % BLOCK == 0;
    int whole;
    if (piece->num_parts == 1 && (is_aligned || !is_direct)) {
        int descriptor = is_direct ? piece->direct : piece->buffered;
        whole = fill(descriptor, slot + parts->slot_offset, piece->length, piece->offset) == piece->length;
    } else {
        const uint8_t *from = bounce + skip;
        if (is_direct)
            whole = fill(piece->direct, bounce, align_up(skip + piece->length), piece->offset - skip) >=
                    skip + piece->length;
        else
            whole = fill(piece->buffered, bounce + skip, piece->length, piece->offset) == piece->length;
        for (int64_t i = 0; whole && i < piece->num_parts; from += parts[i++].length)
            memcpy(slot + parts[i].slot_offset, from, (size_t)parts[i].length);
    }
    /* Pages that are covered in part would be kept. */
    if (!is_direct)
        posix_fadvise(piece->buffered, piece->offset - skip, align_up(skip + piece->length),
                      POSIX_FADV_DONTNEED);
    return whole;
}

/* How many of `count` pieces were read: all, or those before `*halt` was seen to be set. If a piece did not
   come whole, with an error or without, -1 minus those before it; nothing is known of its bytes. `bounce`
   holds the longest piece and two blocks, and starts on a block. */
int64_t outrider_read_pieces(const Piece *pieces, int64_t count, uint8_t *slot, uint8_t *bounce,
                             const int32_t *halt) {
    for (int64_t i = 0; i < count; i++) {
        if (__atomic_load_n(halt, __ATOMIC_RELAXED)) return i;
        if (!is_whole(&pieces[i], slot, bounce)) return -1 - i;
    }
    return count;
}
