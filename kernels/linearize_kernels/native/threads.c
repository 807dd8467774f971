/* Threads that wait for the next tasks for a moment before they sleep: a step has hundreds of short calls. Each takes the
   next task when it is done with one, so that nobody waits for a thread that does not run. */

#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>

enum { MOST_THREADS = 64, SPINS = 2000 };

static _Atomic uint64_t ticket; /* the number of the call, and in the lower half of its tasks that nobody has taken */
static _Atomic(Task) current;
static _Atomic(void *) given_to;
static _Atomic int64_t team, done;
static _Atomic int sleepers;
static pthread_mutex_t in_use = PTHREAD_MUTEX_INITIALIZER, asleep = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static int64_t made; /* threads, beside the callers */

static void rest(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Take a task and run it; 0 if there is none for this thread. A ticket that has not changed in between proves that what
   was read belongs to it, because a call replaces nothing before its last task is done. */
static int run_one(int64_t thread) {
    uint64_t now = atomic_load(&ticket);
    Task task = atomic_load(&current);
    void *given = atomic_load(&given_to);
    if (!(uint32_t)now || thread >= atomic_load(&team)) return 0;
    if (!atomic_compare_exchange_strong(&ticket, &now, now - 1)) return 1;
    task(given, (int64_t)(uint32_t)now - 1, thread);
    atomic_fetch_add(&done, 1);
    return 1;
}

static void *work(void *number) {
    for (;;) {
        uint32_t call = (uint32_t)(atomic_load(&ticket) >> 32);
        while (run_one((int64_t)(intptr_t)number)) continue;
        for (int i = 0; i < SPINS && atomic_load(&ticket) >> 32 == call; i++) rest();
        if (atomic_load(&ticket) >> 32 != call) continue;
        pthread_mutex_lock(&asleep);
        atomic_fetch_add(&sleepers, 1);
        while (atomic_load(&ticket) >> 32 == call) pthread_cond_wait(&wake, &asleep);
        atomic_fetch_sub(&sleepers, 1);
        pthread_mutex_unlock(&asleep);
    }
    return NULL;
}

static int start(int64_t number) {
    pthread_t thread;
    sigset_t every, before;
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before); /* signals go to the program's own threads */
    int failed = pthread_create(&thread, NULL, work, (void *)(intptr_t)number);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return !failed && !pthread_detach(thread);
}

static void forget(void) { /* a child process has none of its parent's threads */
    pthread_mutex_init(&in_use, NULL);
    pthread_mutex_init(&asleep, NULL);
    pthread_cond_init(&wake, NULL);
    atomic_store(&sleepers, 0);
    made = 0;
}

static void once(void) { pthread_atfork(NULL, NULL, forget); }

void share(Task task, void *given, int64_t count, int64_t threads) {
    static pthread_once_t first = PTHREAD_ONCE_INIT;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads > count) threads = count;
    /* A second caller at the same time has its own thread alone. */
    if (threads <= 1 || count > UINT32_MAX || pthread_mutex_trylock(&in_use)) {
        for (int64_t at = 0; at < count; at++) task(given, at, 0);
        return;
    }
    pthread_once(&first, once);
    while (made < threads - 1 && start(made + 1)) made++;
    atomic_store(&current, task);
    atomic_store(&given_to, given);
    atomic_store(&team, threads);
    atomic_store(&done, 0);
    atomic_store(&ticket, ((atomic_load(&ticket) >> 32) + 1) << 32 | (uint64_t)count);
    if (atomic_load(&sleepers)) {
        pthread_mutex_lock(&asleep);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&asleep);
    }
    while (run_one(0)) continue;
    for (int i = 0; atomic_load(&done) < count; i++) {
        if (i < SPINS) rest();
        else sched_yield();
    }
    pthread_mutex_unlock(&in_use);
}
