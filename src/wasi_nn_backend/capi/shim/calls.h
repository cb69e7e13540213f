/* What the files of the shim share. The part between the two marks is also read by cffi (capi/build.py). */
#ifndef WASI_NN_CALLS_H
#define WASI_NN_CALLS_H

#include <stddef.h>
#include <stdint.h>

#include "wasi_nn_llama.h"

/* cffi: begin */
enum wasi_nn_operation {
    OP_INIT_BACKEND,
    OP_DEINIT_BACKEND,
    OP_LOAD,
    OP_LOAD_BY_NAME,
    OP_REFUSE_NAME,
    OP_UNLOAD,
    OP_INIT_EXECUTION_CONTEXT,
    OP_INIT_SESSION,
    OP_SET_INPUT,
    OP_COMPUTE,
    OP_GET_OUTPUT,
    OP_RUN_INFERENCE,
    OP_COMPUTE_SINGLE,
    OP_GET_OUTPUT_SINGLE,
    OP_FINI_SINGLE,
    OP_CANCEL,
    OP_SAVE_SESSION,
    OP_RESTORE_SESSION,
    OP_CLOSE_EXECUTION_CONTEXT,
    OP_CLOSE_ALL
};

/* Bytes of the caller's, valid during the call; n_bytes 0: absent. */
typedef struct {
    const uint8_t *data;
    uint32_t n_bytes;
} wasi_nn_span;

/* One call on its way from the caller's thread to a thread that runs Python, and back. */
typedef struct {
    uint32_t operation;
    uint32_t handle; /* of a graph or an execution context */
    uint32_t index;  /* of a tensor; load: the encoding */
    uint32_t target;
    uint64_t backend; /* init_backend: the result */
    wasi_nn_span text; /* prompt, name, path, session id; load: the model; refuse_name: why */
    wasi_nn_span config;
    uint8_t *output;
    uint32_t capacity;
    uint32_t may_cut; /* the capacity is a guess: cut text to fit it */
    uint32_t n_bytes; /* result: of the output */
    uint32_t handle_out;
    int32_t code;
    char *message; /* room for the reason of a failure */
    uint32_t n_message_bytes_max;
} wasi_nn_call;

/* Hand back a finished call, if any, and wait for the next one; NULL: it is time to leave. */
wasi_nn_call *wasi_nn_next_call(wasi_nn_call *finished);

/* Python ends: refuse further calls, and wait until its threads have left. */
void wasi_nn_python_ends(void);

/* The environment as it is now: os.environ is as old as the interpreter. */
char *getenv(const char *name);
/* cffi: end */

/* calls.c: the queue. */
wasi_nn_error wasi_nn_submit(wasi_nn_call *call);
wasi_nn_error wasi_nn_open(wasi_nn_call *call);
wasi_nn_error wasi_nn_close(wasi_nn_call *call);

/* calls.c: the last error of the calling thread. */
enum { WASI_NN_MESSAGE_BYTES_MAX = 1024 };
wasi_nn_error wasi_nn_refuse(wasi_nn_error code, const char *format, ...) __attribute__((format(printf, 2, 3)));
char *wasi_nn_message(void);

/* interpreter.c: 0 when Python runs and the package is imported; else -1 and a message. */
int wasi_nn_start_python(char *message, size_t n_bytes);
/* The state of a lock that was let go, for `regain`; NULL when this thread did not hold it. */
void *wasi_nn_release_gil(void);
void wasi_nn_regain_gil(void *released);

/* The generated cffi module: runs calls until wasi_nn_next_call() says to leave. 1, or 0 when cffi could not start. */
int wasi_nn_serve(void);

#endif
