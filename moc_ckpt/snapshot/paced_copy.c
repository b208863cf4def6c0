/*
 * Copies from a device into pinned host memory so that whatever else needs the copy engine gets its turn.
 *
 * A copy engine serves one stream until nothing of it is left: the few bytes of a loss or a gradient norm that training itself
 * reads wait for every copy that is queued before them in another stream, and so does cudaDeviceSynchronize, which
 * DeepSpeed calls at every step. So pieces alternate between two streams, each waiting for the one before, which makes the
 * engine look for other work after every piece; and no more than a window of pieces is ever with the device.
 *
 * In C because hundreds of pieces follow each other within microseconds, whoever has the interpreter's lock.
 * Needs no header and no library of CUDA: the caller passes the driver's functions. Loaded with ctypes.
 */

#include <stddef.h>
#include <stdint.h>
#include <time.h>

#define NOT_READY 600   /* CUDA_ERROR_NOT_READY */
#define TIMED_OUT (-1)  /* no code of the driver */
#define PAUSE_NS 100000 /* a third of what a piece takes; the window is a multiple of it */

struct driver {
    int (*copy)(void *target, uint64_t source, size_t nbytes, void *stream); /* cuMemcpyDtoHAsync */
    int (*record)(void *event, void *stream);                               /* cuEventRecord */
    int (*wait)(void *stream, void *event, unsigned flags);                 /* cuStreamWaitEvent */
    int (*query)(void *event);                                              /* cuEventQuery */
};

struct run {
    uint64_t source; /* address on the device */
    uint64_t target; /* address in host memory */
    uint64_t nbytes;
};

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int wait_for(const struct driver *driver, void *event, int64_t deadline_ns) {
    const struct timespec pause = {0, PAUSE_NS};
    const int64_t end = now_ns() + deadline_ns;
    int code;

    while ((code = driver->query(event)) == NOT_READY) {
        if (now_ns() > end)
            return TIMED_OUT;
        nanosleep(&pause, NULL);
    }
    return code;
}

/*
 * Issues all runs in order, in pieces of at most `piece` bytes; returns when the last one is with the device.
 *
 * `events` are `window` events; at most so many pieces are with the device. What the first stream waits for before the
 * call holds for all pieces. `last` becomes the index of the stream whose end is the end of all.
 * Returns 0, the driver's error code, or TIMED_OUT if a piece is not done `deadline_ns` after it was waited for.
 */
int moc_paced_copy_1(const struct driver *driver, void *const streams[2], void *const *events, size_t window,
                     const struct run *runs, size_t count, uint64_t piece, int64_t deadline_ns, int *last) {
    uint64_t done = 0; /* bytes of runs[at] */
    size_t at = 0, issued = 0;
    int code;

    *last = 0;
    while (at < count) {
        void *event = events[issued % window];
        int which = (int)(issued % 2);
        uint64_t queued = 0;

        if (issued >= window && (code = wait_for(driver, event, deadline_ns)) != 0)
            return code;
        if (issued > 0 && (code = driver->wait(streams[which], events[(issued - 1) % window], 0)) != 0)
            return code;
        while (at < count && queued < piece) {
            uint64_t nbytes = runs[at].nbytes - done;
            if (nbytes > piece - queued)
                nbytes = piece - queued;
            code = driver->copy((void *)(uintptr_t)(runs[at].target + done), runs[at].source + done, nbytes, streams[which]);
            if (code != 0)
                return code;
            queued += nbytes;
            done += nbytes;
            if (done == runs[at].nbytes) {
                at++;
                done = 0;
            }
        }
        if ((code = driver->record(event, streams[which])) != 0)
            return code;
        *last = which;
        issued++;
    }
    return 0;
}
