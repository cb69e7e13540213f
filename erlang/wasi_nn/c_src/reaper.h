/* A thread for what must not be done on a scheduler and cannot fail: cancelling, and closing what nobody holds any more.
 * The orders are carried out one after the other. */
#ifndef WASI_NN_REAPER_H
#define WASI_NN_REAPER_H

#include <stdint.h>

typedef struct reaper reaper;

typedef enum { REAP_CANCEL, REAP_CONTEXT, REAP_BACKEND } reap_operation;

/* NULL when there is no memory or no thread. */
reaper *reaper_start(void);

/* Carries out what is left, and ends the thread. */
void reaper_stop(reaper *thread);

/* Returns at once. Where there is no memory for the order, a cancel is lost, and what had to be closed stays open. */
void reaper_order(reaper *thread, reap_operation operation, void *backend, uint32_t context);

#endif
