/* Stands in for Python, so that valgrind and the thread sanitizer see the shim alone: llama.cpp uses instructions that
 * valgrind does not know. Answers an input with itself; fini_single ends when cancel was called. */
#include <semaphore.h>
#include <string.h>

#include "calls.h"

int wasi_nn_start_python(char *message, size_t n_bytes)
{
    (void)message;
    (void)n_bytes;
    return 0;
}

void *wasi_nn_release_gil(void)
{
    return NULL;
}

void wasi_nn_regain_gil(void *released)
{
    (void)released;
}

static sem_t cancelled;

static void __attribute__((constructor)) prepare(void)
{
    sem_init(&cancelled, 0, 0);
}

static void answer(wasi_nn_call *call)
{
    call->code = success;
    call->backend = 0x4E4E0001;
    call->handle_out = 1;
    if (call->operation == OP_COMPUTE) {
        call->code = runtime_error;
        strncpy(call->message, "the stand-in does not compute", call->n_message_bytes_max);
    } else if (call->operation == OP_REFUSE_NAME) {
        call->code = invalid_argument;
    } else if (call->operation == OP_FINI_SINGLE) {
        sem_wait(&cancelled);
    } else if (call->operation == OP_CANCEL) {
        sem_post(&cancelled);
    } else if (call->operation == OP_RUN_INFERENCE) {
        call->n_bytes = call->text.n_bytes;
        if (call->n_bytes > call->capacity)
            call->code = too_large;
        else
            memcpy(call->output, call->text.data, call->n_bytes);
    }
}

int wasi_nn_serve(void)
{
    wasi_nn_call *call = wasi_nn_next_call(NULL);
    while (call) {
        answer(call);
        call = wasi_nn_next_call(call);
    }
    return 1;
}
