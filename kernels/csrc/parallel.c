/* The threads: a pool of our own, or another library's through its fork call. */
#define _GNU_SOURCE
#include "outrider.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

enum { MAX_THREADS = 256, SPINS = 2000 };

/* libgomp's entry point: fn(data) on num_threads threads, the caller among them, or on fewer. */
typedef void (*Fork)(void (*fn)(void *), void *data, unsigned num_threads, unsigned flags);

static _Atomic(Fork) fork_call;

/* Borrow the threads of libgomp's GOMP_parallel; NULL returns to the pool. */
void outrider_use_fork(void *parallel) { atomic_store(&fork_call, (Fork)parallel); }

static void relax(int32_t spins) {
#if defined(__x86_64__)
    if (spins < SPINS) {
        __builtin_ia32_pause();
        return;
    }
#elif defined(__aarch64__)
    if (spins < SPINS) {
        __asm__ volatile("yield");
        return;
    }
#endif
    (void)spins;
    sched_yield();
}

/* Threads held by one caller. `ticket` is odd while there is work to join, and another number each time;
   `inside` counts who has joined it. So work ends when its pieces do, whoever was asleep meanwhile. */
typedef struct {
    void (*call)(void *);
    void *context;
    pthread_t leader;
    int32_t num_threads;
    atomic_int num_members;
    Body body;
    void *work;
    _Alignas(64) _Atomic uint32_t ticket;
    _Alignas(64) atomic_int inside;
} Team;

enum { ENDED = 1 }; /* work begins with ticket 3 */

static _Thread_local Team *held;

static void serve(Team *team, int32_t thread) {
    uint32_t served = 0;
    for (int32_t spins = 0;;) {
        uint32_t ticket = atomic_load(&team->ticket);
        if (ticket == ENDED) return;
        if (ticket % 2 == 0 || ticket == served) {
            relax(spins);
            spins += spins < SPINS;
            continue;
        }
        atomic_fetch_add(&team->inside, 1);
        /* Whoever closed it before we were counted does not wait for us. */
        if (atomic_load(&team->ticket) == ticket) {
            team->body(team->work, thread);
            served = ticket;
            spins = 0;
        }
        atomic_fetch_sub(&team->inside, 1);
    }
}

static void team_member(void *data) {
    Team *team = data;
    if (pthread_equal(pthread_self(), team->leader)) {
        held = team;
        team->call(team->context);
        held = NULL;
        atomic_store(&team->ticket, ENDED);
        return;
    }
    int32_t thread = 1 + atomic_fetch_add(&team->num_members, 1);
    if (thread < team->num_threads) serve(team, thread);
}

/* The pool: workers sleep until `generation` moves, spin for a moment first. One caller at a time. */
static struct {
    pthread_mutex_t callers, lock;
    pthread_cond_t wake;
    int32_t num_workers;
    int32_t born[MAX_THREADS]; /* the generation at a worker's start, which it must not serve */
    Team *team;
    int32_t wanted;
    atomic_int generation, running;
} pool = {.callers = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER};

static void *worker(void *argument) {
    int32_t index = (int32_t)(intptr_t)argument;
    int32_t seen = pool.born[index];
    for (;;) {
        for (int32_t spins = 0; spins < SPINS && atomic_load(&pool.generation) == seen; spins++)
            relax(spins);
        pthread_mutex_lock(&pool.lock);
        while (atomic_load(&pool.generation) == seen) pthread_cond_wait(&pool.wake, &pool.lock);
        seen = atomic_load(&pool.generation);
        Team *team = index < pool.wanted ? pool.team : NULL;
        pthread_mutex_unlock(&pool.lock);
        if (team) {
            team_member(team);
            atomic_fetch_sub(&pool.running, 1);
        }
    }
    return NULL;
}

/* A forked child has the pool's state but none of its threads. */
static void after_fork(void) {
    pthread_mutex_init(&pool.callers, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pool.num_workers = 0;
    atomic_store(&pool.generation, 0);
    atomic_store(&pool.running, 0);
}

static int32_t grow(int32_t wanted) {
    static int registered;
    if (!registered) registered = pthread_atfork(NULL, NULL, after_fork) == 0;
    while (pool.num_workers < wanted) {
        pthread_t thread;
        pool.born[pool.num_workers] = atomic_load(&pool.generation);
        if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)pool.num_workers)) break;
        pthread_detach(thread);
        pool.num_workers++;
    }
    return pool.num_workers < wanted ? pool.num_workers : wanted;
}

void with_team(void (*call)(void *), void *context, int32_t num_threads) {
    Fork fork_function = atomic_load(&fork_call);
    Team team = {.call = call, .context = context, .leader = pthread_self(),
                 .num_threads = num_threads, .ticket = 2};
    if (num_threads <= 1 || held) {
        call(context);
    } else if (fork_function) {
        fork_function(team_member, &team, (unsigned)num_threads, 0);
    } else {
        pthread_mutex_lock(&pool.callers);
        int32_t helpers = grow(num_threads - 1 < MAX_THREADS ? num_threads - 1 : MAX_THREADS);
        pthread_mutex_lock(&pool.lock);
        pool.team = &team;
        pool.wanted = helpers;
        atomic_store(&pool.running, helpers);
        atomic_fetch_add(&pool.generation, 1);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);
        team_member(&team);
        for (int32_t spins = 0; atomic_load(&pool.running); spins += spins < SPINS) relax(spins);
        pthread_mutex_unlock(&pool.callers);
    }
}

typedef struct {
    Body body;
    void *context;
    int32_t num_threads;
} Parallel;

static void run_held(void *context) {
    Parallel *parallel = context;
    run_parallel(parallel->body, parallel->context, parallel->num_threads);
}

void run_parallel(Body body, void *context, int32_t num_threads) {
    Team *team = held;
    Parallel parallel = {body, context, num_threads};
    if (num_threads <= 1) {
        body(context, 0);
    } else if (!team) {
        with_team(run_held, &parallel, num_threads);
    } else {
        uint32_t ticket = atomic_load(&team->ticket) + 1;
        team->body = body;
        team->work = context;
        atomic_store(&team->ticket, ticket);
        body(context, 0);
        atomic_store(&team->ticket, ticket + 1);
        for (int32_t spins = 0; atomic_load(&team->inside); spins += spins < SPINS) relax(spins);
    }
}

static atomic_llong product_ns;

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

void run_products(Body body, void *context, int32_t num_threads) {
    int64_t began = now_ns();
    run_parallel(body, context, num_threads);
    atomic_fetch_add(&product_ns, now_ns() - began);
}

/* Nanoseconds that callers have spent in `run_products` so far. */
int64_t outrider_product_ns(void) { return atomic_load(&product_ns); }
