/* Hands each call from the caller's thread to one of the library's own threads, which run Python, and waits.
 *
 * Callers never enter Python: their stacks may be small, and a thread that Python does not know costs it a thread state.
 * There are as many threads here as calls have been under way at a time. They end with the last backend. */
#define _GNU_SOURCE
#include "calls.h"

#include <errno.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_STACK_BYTES = 8 << 20 };

typedef struct ticket {
    wasi_nn_call *call;
    struct ticket *next;
    sem_t done;
} ticket;

typedef struct worker {
    pthread_t thread;
    struct worker *next;
} worker;

static struct {
    pthread_mutex_t lock;
    pthread_cond_t work;    /* a ticket came, or it is time to leave */
    pthread_cond_t stopped; /* all threads have ended */
    ticket *first, *last;
    worker *workers;
    unsigned n_queued, n_idle;
    unsigned n_users; /* open backends, and those about to open */
    bool stopping;    /* the last user went: threads leave */
    bool ended;       /* for good: Python or the process ends */
    uint32_t watched; /* the kinds of calls after which the exit is watched: a bit each */
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .work = PTHREAD_COND_INITIALIZER, .stopped = PTHREAD_COND_INITIALIZER};

/* Set in a child of fork(), which has none of these threads, and perhaps a lock that nobody will open. */
static volatile bool is_fork;

static __thread char last_error[WASI_NN_MESSAGE_BYTES_MAX];

char *wasi_nn_message(void)
{
    return last_error;
}

wasi_nn_error wasi_nn_refuse(wasi_nn_error code, const char *format, ...)
{
    va_list values;
    va_start(values, format);
    vsnprintf(last_error, sizeof last_error, format, values);
    va_end(values);
    return code;
}

/* -- Threads that run Python. All of this with the lock held, except where it says so. ------------------------------- */

static ticket *take_first(void)
{
    ticket *taken = pool.first;
    if (taken) {
        pool.first = taken->next;
        if (!pool.first)
            pool.last = NULL;
        pool.n_queued--;
    }
    return taken;
}

/* Without Python nobody can answer: all who wait are told why. Without the lock. */
static void fail_all(const char *reason)
{
    for (;;) {
        pthread_mutex_lock(&pool.lock);
        ticket *failed = take_first();
        pthread_mutex_unlock(&pool.lock);
        if (!failed)
            return;
        failed->call->code = runtime_error;
        snprintf(failed->call->message, failed->call->n_message_bytes_max, "%s", reason);
        sem_post(&failed->done);
    }
}

static void *work(void *unused)
{
    (void)unused;
    char reason[WASI_NN_MESSAGE_BYTES_MAX] = "cffi could not start; its message is on standard error";
    if (wasi_nn_start_python(reason, sizeof reason) != 0)
        fprintf(stderr, "wasi-nn: %s\n", reason);
    else if (wasi_nn_serve())
        return NULL;
    fail_all(reason);
    return NULL;
}

/* Signals are the host's: they are delivered to its threads, never to these or to threads that these start. Faults
 * stay, since a blocked fault ends the process without the host's handler. */
static int start_thread(pthread_t *thread)
{
    pthread_attr_t attributes;
    sigset_t blocked, before;
    sigfillset(&blocked);
    sigdelset(&blocked, SIGSEGV);
    sigdelset(&blocked, SIGBUS);
    sigdelset(&blocked, SIGFPE);
    sigdelset(&blocked, SIGILL);
    sigdelset(&blocked, SIGABRT);
    sigdelset(&blocked, SIGTRAP);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, N_STACK_BYTES);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    int error = pthread_create(thread, &attributes, work, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return error;
}

/* 0 when somebody will take the ticket. */
static int ensure_worker(void)
{
    if (pool.n_idle >= pool.n_queued)
        return 0;
    worker *added = malloc(sizeof *added);
    int error = added ? start_thread(&added->thread) : ENOMEM;
    if (error == 0) {
        added->next = pool.workers;
        pool.workers = added;
        return 0;
    }
    free(added);
    return pool.workers ? 0 : error; /* those that are there take it in their turn */
}

/* A thread leaves the table before anybody joins it. The lock is let go meanwhile. */
static void join_all(void)
{
    pool.stopping = true;
    pthread_cond_broadcast(&pool.work);
    while (pool.workers) {
        worker *ending = pool.workers;
        pool.workers = ending->next;
        pthread_mutex_unlock(&pool.lock);
        pthread_join(ending->thread, NULL);
        free(ending);
        pthread_mutex_lock(&pool.lock);
    }
#ifdef __GLIBC__
    malloc_trim(0); /* each thread had an arena of its own, which keeps what was freed in it */
#endif
    pool.stopping = false;
    pthread_cond_broadcast(&pool.stopped);
}

wasi_nn_call *wasi_nn_next_call(wasi_nn_call *finished)
{
    static __thread ticket *current;
    if (finished) {
        ticket *done = current;
        current = NULL;
        sem_post(&done->done); /* the ticket is on the caller's stack: gone from here on */
    }
    pthread_mutex_lock(&pool.lock);
    pool.n_idle++;
    while (!pool.first && !pool.stopping)
        pthread_cond_wait(&pool.work, &pool.lock);
    pool.n_idle--;
    current = take_first();
    pthread_mutex_unlock(&pool.lock);
    return current ? current->call : NULL;
}

void wasi_nn_python_ends(void)
{
    if (is_fork)
        return; /* the threads are the other process's */
    pthread_mutex_lock(&pool.lock);
    pool.ended = true;
    while (pool.stopping)
        pthread_cond_wait(&pool.stopped, &pool.lock);
    join_all();
    pthread_mutex_unlock(&pool.lock);
}

/* -- Callers --------------------------------------------------------------------------------------------------------- */

static wasi_nn_error enqueue(ticket *queued)
{
    if (pool.ended)
        return wasi_nn_refuse(runtime_error, "Python has ended in this process: no call is possible any more");
    if (pool.n_users == 0)
        return wasi_nn_refuse(invalid_argument, "no backend is open: call init_backend first");
    if (pool.last)
        pool.last->next = queued;
    else
        pool.first = queued;
    pool.last = queued;
    pool.n_queued++;
    int error = ensure_worker();
    if (error) {
        take_first(); /* without threads the queue was empty, so this is the one */
        return wasi_nn_refuse(runtime_error, "no thread for the call: %s; raise the limit on threads or memory",
                              strerror(error));
    }
    pthread_cond_signal(&pool.work);
    return success;
}

static void wait_for(ticket *waiting)
{
    while (sem_wait(&waiting->done) != 0 && errno == EINTR)
        continue; /* a handler of the host's ran on this thread */
}

static void watch_exit(uint32_t operation);

/* What a caller gets back when its call is over. */
typedef struct caller {
    void *released_gil;
    int cancel_state;
} caller;

/* From here to leave_call the caller may wait, and a thread that is cancelled in a wait would leave its call and buffers
 * to the thread that works on them, or a lock closed. So pthread_cancel has effect after the call: cancel() ends one. */
static caller enter_call(void)
{
    caller entered = {NULL, 0};
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &entered.cancel_state);
    entered.released_gil = wasi_nn_release_gil();
    return entered;
}

static void leave_call(caller entered)
{
    wasi_nn_regain_gil(entered.released_gil);
    pthread_setcancelstate(entered.cancel_state, NULL);
}

/* The caller does not hold Python's lock here. */
static wasi_nn_error hand_over(wasi_nn_call *call)
{
    ticket queued = {.call = call};
    if (is_fork)
        return wasi_nn_refuse(runtime_error, "this process was forked from one that uses the library: start the "
                                             "program anew, or call init_backend only after fork");
    sem_init(&queued.done, 0, 0);
    call->message = last_error;
    call->n_message_bytes_max = sizeof last_error;
    pthread_mutex_lock(&pool.lock);
    wasi_nn_error code = enqueue(&queued);
    pthread_mutex_unlock(&pool.lock);
    if (code == success) {
        wait_for(&queued);
        code = (wasi_nn_error)call->code;
        if (code == success && call->operation != OP_CLOSE_ALL)
            watch_exit(call->operation);
    }
    sem_destroy(&queued.done);
    return code;
}

wasi_nn_error wasi_nn_submit(wasi_nn_call *call)
{
    caller entered = enter_call();
    wasi_nn_error code = hand_over(call);
    leave_call(entered);
    return code;
}

static void note_fork(void)
{
    is_fork = true;
}

static void watch_fork(void)
{
    pthread_atfork(NULL, NULL, note_fork);
}

/* exit() destroys the globals of llama.cpp: what a program left running has to stop before. */
static void close_at_exit(void)
{
    wasi_nn_call call = {.operation = OP_CLOSE_ALL};
    if (is_fork)
        return;
    pthread_mutex_lock(&pool.lock);
    bool is_needed = pool.n_users > 0 && !pool.ended;
    pthread_mutex_unlock(&pool.lock);
    if (is_needed)
        wasi_nn_submit(&call);
    pthread_mutex_lock(&pool.lock);
    pool.ended = true;
    pthread_mutex_unlock(&pool.lock);
}

/* What was registered last runs first, and llama.cpp makes globals as late as in the first compute: so this is registered
 * after the first success of each kind of call. */
static void watch_exit(uint32_t operation)
{
    pthread_mutex_lock(&pool.lock);
    bool is_first = !(pool.watched >> operation & 1);
    pool.watched |= UINT32_C(1) << operation;
    pthread_mutex_unlock(&pool.lock);
    if (is_first)
        atexit(close_at_exit);
}

static void begin_use(void)
{
    pthread_mutex_lock(&pool.lock);
    while (pool.stopping)
        pthread_cond_wait(&pool.stopped, &pool.lock);
    pool.n_users++;
    pthread_mutex_unlock(&pool.lock);
}

static void end_use(void)
{
    pthread_mutex_lock(&pool.lock);
    if (--pool.n_users == 0 && !pool.ended)
        join_all();
    pthread_mutex_unlock(&pool.lock);
}

wasi_nn_error wasi_nn_open(wasi_nn_call *call)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    if (is_fork)
        return hand_over(call); /* says so */
    pthread_once(&once, watch_fork);
    caller entered = enter_call();
    begin_use();
    wasi_nn_error code = hand_over(call);
    if (code != success)
        end_use();
    leave_call(entered);
    return code;
}

wasi_nn_error wasi_nn_close(wasi_nn_call *call)
{
    caller entered = enter_call();
    wasi_nn_error code = hand_over(call);
    if (code == success)
        end_use();
    leave_call(entered);
    return code;
}
