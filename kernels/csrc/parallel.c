/* The threads: a pool of our own, or another library's through its fork call. */
#define _GNU_SOURCE
#include "outrider.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

enum { MAX_THREADS = 256, SPINS = 2000 };

/* libgomp's entry point: fn(data) on num_threads threads, the caller among them, or on fewer; and how
   many they are, asked inside. */
typedef void (*Fork)(void (*fn)(void *), void *data, unsigned num_threads, unsigned flags);
typedef int (*TeamSize)(void);

static _Atomic(Fork) fork_call;
static _Atomic(TeamSize) fork_size;

/* Borrow the threads of libgomp's GOMP_parallel and omp_get_num_threads; NULLs return to the pool. */
void outrider_use_fork(void *parallel, void *num_threads) {
    atomic_store(&fork_size, (TeamSize)num_threads);
    atomic_store(&fork_call, (Fork)parallel);
}

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

void barrier_wait(Barrier *barrier, int32_t waiters) {
    int32_t generation = atomic_load(&barrier->generation);
    if (atomic_fetch_add(&barrier->arrived, 1) == waiters - 1) {
        atomic_store(&barrier->arrived, 0);
        atomic_store(&barrier->generation, generation + 1);
        return;
    }
    for (int32_t spins = 0; atomic_load(&barrier->generation) == generation; spins++) relax(spins);
}

typedef struct {
    Body body;
    void *context;
    int32_t num_threads; /* 0: ask the library whose threads these are */
    atomic_int next;
} Team;

static void team_member(void *data) {
    Team *team = data;
    int32_t thread = atomic_fetch_add(&team->next, 1);
    team->body(team->context, thread, team->num_threads ? team->num_threads : fork_size());
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

void run_parallel(Body body, void *context, int32_t num_threads) {
    Fork fork_function = atomic_load(&fork_call);
    Team team = {.body = body, .context = context, .num_threads = num_threads};
    if (num_threads <= 1) {
        body(context, 0, 1);
    } else if (fork_function) {
        team.num_threads = 0;
        fork_function(team_member, &team, (unsigned)num_threads, 0);
    } else {
        pthread_mutex_lock(&pool.callers);
        int32_t helpers = grow(num_threads - 1 < MAX_THREADS ? num_threads - 1 : MAX_THREADS);
        team.num_threads = helpers + 1;
        pthread_mutex_lock(&pool.lock);
        pool.team = &team;
        pool.wanted = helpers;
        atomic_store(&pool.running, helpers);
        atomic_fetch_add(&pool.generation, 1);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);
        team_member(&team);
        for (int32_t spins = 0; atomic_load(&pool.running); spins++) relax(spins);
        pthread_mutex_unlock(&pool.callers);
    }
}
