/* The threads of one call: they share out the tasks of a stage, and wait for each other at its end.
 *
 * Tasks of a stage are numbered. Each thread has a contiguous range of them, so that it reads weights front to back, and
 * takes tasks from other ranges when its own is done. Which thread runs a task never changes a result.
 */
#pragma once

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MAX_THREADS 256
#define SPINS 4000 /* looks at a barrier before a thread sleeps: some 50 us, longer than threads usually differ */

typedef struct {
    _Alignas(64) atomic_int taken; /* tasks of one thread's range */
} Counter;

typedef struct {
    int threads;
    atomic_int started;
    _Alignas(64) atomic_int arrived;    /* threads at the end of the current stage */
    _Alignas(64) atomic_int generation; /* stages that have ended */
    atomic_int sleepers;
    Counter counters[2][MAX_THREADS]; /* of this stage, and of the one before */
} Team;

/* One thread's view of a call. */
typedef struct Member {
    Team *team;
    int number;
    int stage;
    void (*work)(struct Member *, void *);
    void *job;
} Member;

static void sleep_while(atomic_int *place, int value) {
    syscall(SYS_futex, place, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void wake_all(atomic_int *place) { syscall(SYS_futex, place, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0); }

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Wait until all threads have ended the stage. */
static void end_stage(Member *me) {
    Team *team = me->team;
    const int generation = atomic_load(&team->generation);
    if (atomic_fetch_add(&team->arrived, 1) + 1 == team->threads) {
        for (int i = 0; i < team->threads; i++)
            atomic_store_explicit(&team->counters[me->stage % 2][i].taken, 0, memory_order_relaxed);
        atomic_store(&team->arrived, 0);
        atomic_store(&team->generation, generation + 1);
        if (atomic_load(&team->sleepers)) wake_all(&team->generation);
    } else {
        for (int spin = 0; spin < SPINS && atomic_load_explicit(&team->generation, memory_order_acquire) == generation;
             spin++)
            pause_briefly();
        while (atomic_load(&team->generation) == generation) {
            atomic_fetch_add(&team->sleepers, 1);
            sleep_while(&team->generation, generation);
            atomic_fetch_sub(&team->sleepers, 1);
        }
    }
    me->stage++;
}

/* Run `count` tasks together with all other threads, which call this with the same arguments; returns when all have run. */
static void run_stage(Member *me, void (*task)(const void *stage, int index, int thread), const void *stage, int count) {
    Team *team = me->team;
    for (int i = 0; i < team->threads; i++) {
        const int owner = (me->number + i) % team->threads;
        const int first = (int)((int64_t)count * owner / team->threads);
        const int end = (int)((int64_t)count * (owner + 1) / team->threads);
        atomic_int *taken = &team->counters[me->stage % 2][owner].taken;
        while (atomic_load_explicit(taken, memory_order_relaxed) < end - first) {
            const int index = first + atomic_fetch_add_explicit(taken, 1, memory_order_relaxed);
            if (index < end) task(stage, index, me->number);
        }
    }
    end_stage(me);
}

static void *run_member(void *argument) {
    Member *me = argument;
    while (!atomic_load(&me->team->started)) sleep_while(&me->team->started, 0);
    me->work(me, me->job);
    return NULL;
}

/* Call `work` on so many threads, the caller among them, and return when all have. Where the system allows fewer threads,
 * it runs on those. */
static void run_team(int threads, void (*work)(Member *, void *), void *job) {
    Team team = {.threads = 1};
    Member members[MAX_THREADS];
    pthread_t handles[MAX_THREADS];
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the program's own threads */
    for (int i = 0; i < min_int(threads, MAX_THREADS); i++) {
        members[i] = (Member){&team, i, 0, work, job};
        if (i > 0) {
            if (pthread_create(&handles[i], NULL, run_member, &members[i])) break;
            team.threads = i + 1;
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    atomic_store(&team.started, 1);
    wake_all(&team.started);
    work(&members[0], job);
    for (int i = 1; i < team.threads; i++) pthread_join(handles[i], NULL);
}
