#include "reaper.h"

#include <erl_nif.h>
#include <stdbool.h>

#include <wasi_nn_llama.h>

typedef struct order {
    struct order *next;
    reap_operation operation;
    void *backend;
    uint32_t context;
} order;

struct reaper {
    ErlNifTid thread;
    ErlNifMutex *lock;
    ErlNifCond *has_orders;
    order *first, **end; /* `end` is where the next order is hung in */
    bool is_stopping;
};

static void carry_out(const order *one)
{
    switch (one->operation) {
    case REAP_CANCEL:
        (void)cancel(one->backend, one->context);
        break;
    case REAP_CONTEXT:
        (void)close_execution_context(one->backend, one->context);
        break;
    case REAP_BACKEND:
        (void)deinit_backend(one->backend);
        break;
    }
}

/* The next order, waiting for it; NULL when there are none left and the thread has to end. */
static order *next_order(reaper *thread)
{
    enif_mutex_lock(thread->lock);
    while (!thread->first && !thread->is_stopping)
        enif_cond_wait(thread->has_orders, thread->lock);
    order *one = thread->first;
    if (one) {
        thread->first = one->next;
        if (!thread->first)
            thread->end = &thread->first;
    }
    enif_mutex_unlock(thread->lock);
    return one;
}

static void *run(void *argument)
{
    for (order *one; (one = next_order(argument));) {
        carry_out(one);
        enif_free(one);
    }
    return NULL;
}

static void release(reaper *thread)
{
    if (thread->has_orders)
        enif_cond_destroy(thread->has_orders);
    if (thread->lock)
        enif_mutex_destroy(thread->lock);
    enif_free(thread);
}

reaper *reaper_start(void)
{
    reaper *thread = enif_alloc(sizeof *thread);
    if (!thread)
        return NULL;
    *thread = (reaper){.lock = enif_mutex_create("wasi_nn_reaper"), .has_orders = enif_cond_create("wasi_nn_reaper")};
    thread->end = &thread->first;
    if (!thread->lock || !thread->has_orders || enif_thread_create("wasi_nn_reaper", &thread->thread, run, thread, NULL)) {
        release(thread);
        return NULL;
    }
    return thread;
}

void reaper_stop(reaper *thread)
{
    enif_mutex_lock(thread->lock);
    thread->is_stopping = true;
    enif_cond_signal(thread->has_orders);
    enif_mutex_unlock(thread->lock);
    enif_thread_join(thread->thread, NULL);
    release(thread);
}

void reaper_order(reaper *thread, reap_operation operation, void *backend, uint32_t context)
{
    order *one = enif_alloc(sizeof *one);
    if (!one)
        return;
    *one = (order){.operation = operation, .backend = backend, .context = context};
    enif_mutex_lock(thread->lock);
    *thread->end = one;
    thread->end = &one->next;
    enif_cond_signal(thread->has_orders);
    enif_mutex_unlock(thread->lock);
}
