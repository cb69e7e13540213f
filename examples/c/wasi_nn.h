/* Declarations of the WASI-NN imports, as host functions of the module "wasi_ephemeral_nn".
 *
 * The first six are the official witx functions. The rest is what WasmEdge added for language models; a program that
 * does not call them does not import them. Every function returns 0 or an error number (WASI_NN_*).
 */
#ifndef WASI_NN_H
#define WASI_NN_H

#include <stdint.h>

#define WASI_NN_IMPORT(name) __attribute__((import_module("wasi_ephemeral_nn"), import_name(name)))

typedef uint32_t wasi_nn_error;
typedef uint32_t wasi_nn_graph;
typedef uint32_t wasi_nn_context;

enum {
    WASI_NN_SUCCESS = 0,
    WASI_NN_INVALID_ARGUMENT = 1,
    WASI_NN_INVALID_ENCODING = 2,
    WASI_NN_MISSING_MEMORY = 3,
    WASI_NN_BUSY = 4,
    WASI_NN_RUNTIME_ERROR = 5,
    WASI_NN_UNSUPPORTED_OPERATION = 6,
    WASI_NN_TOO_LARGE = 7,
    WASI_NN_NOT_FOUND = 8,
    WASI_NN_END_OF_SEQUENCE = 100,
    WASI_NN_CONTEXT_FULL = 101,
    WASI_NN_PROMPT_TOO_LONG = 102,
    WASI_NN_MODEL_NOT_FOUND = 103
};

/* Tensor indices: input 0 is the prompt, input 1 configuration JSON; output 0 is the text, output 1 metadata JSON. */
enum { WASI_NN_PROMPT = 0, WASI_NN_CONFIG = 1, WASI_NN_TEXT = 0, WASI_NN_METADATA = 1 };

enum { WASI_NN_TYPE_U8 = 3 };

typedef struct {
    const uint32_t *dimensions;
    uint32_t n_dimensions;
    uint8_t type;
    const void *data;
    uint32_t n_data_bytes;
} wasi_nn_tensor;

_Static_assert(sizeof(wasi_nn_tensor) == 20, "the layout that hosts read");

/* Official witx. */
WASI_NN_IMPORT("load_by_name")
wasi_nn_error wasi_nn_load_by_name(const char *name, uint32_t n_name_bytes, wasi_nn_graph *graph);

WASI_NN_IMPORT("init_execution_context")
wasi_nn_error wasi_nn_init_execution_context(wasi_nn_graph graph, wasi_nn_context *context);

WASI_NN_IMPORT("set_input")
wasi_nn_error wasi_nn_set_input(wasi_nn_context context, uint32_t index, const wasi_nn_tensor *tensor);

WASI_NN_IMPORT("compute")
wasi_nn_error wasi_nn_compute(wasi_nn_context context);

WASI_NN_IMPORT("get_output")
wasi_nn_error wasi_nn_get_output(wasi_nn_context context, uint32_t index, void *buffer, uint32_t n_buffer_bytes,
                                 uint32_t *n_bytes);

/* WasmEdge. */
WASI_NN_IMPORT("load_by_name_with_config")
wasi_nn_error wasi_nn_load_by_name_with_config(const char *name, uint32_t n_name_bytes, const char *config,
                                               uint32_t n_config_bytes, wasi_nn_graph *graph);

WASI_NN_IMPORT("compute_single")
wasi_nn_error wasi_nn_compute_single(wasi_nn_context context);

WASI_NN_IMPORT("get_output_single")
wasi_nn_error wasi_nn_get_output_single(wasi_nn_context context, uint32_t index, void *buffer,
                                        uint32_t n_buffer_bytes, uint32_t *n_bytes);

WASI_NN_IMPORT("fini_single")
wasi_nn_error wasi_nn_fini_single(wasi_nn_context context);

WASI_NN_IMPORT("finalize_execution_context")
wasi_nn_error wasi_nn_finalize_execution_context(wasi_nn_context context);

WASI_NN_IMPORT("unload")
wasi_nn_error wasi_nn_unload(wasi_nn_graph graph);

#endif
