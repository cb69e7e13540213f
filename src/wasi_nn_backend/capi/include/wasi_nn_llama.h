/* WASI-NN for language models, for C and C++ programs.
 *
 * One header, two libraries:
 *
 *   libwasi_nn_backend.so    the layouts below as they stand.
 *   libwasi_nn_llamacpp.so   what WAMR's iwasm opens. Define WASI_NN_WAMR before the include: tensors then carry their
 *                            length, outputs are passed with their capacity, and errors have WAMR's numbers.
 *
 * Calls. Every function that returns a wasi_nn_error returns `success` or the reason of the failure, and changes
 * nothing that it points to when it fails, except where it says so. NULL, lengths that make no sense and handles that
 * are closed or were never given out are `invalid_argument`. wasi_nn_last_error() has the reason in words.
 *
 * Ownership. Memory stays with who allocated it. The library reads what a pointer leads to only during the call, keeps
 * no pointer, and returns none that has to be freed. `ctx` is an opaque value, not an address: do not read it.
 *
 * Threads. Any thread may call any function at any time; a stack of 16 KiB is enough, since the work is done on
 * threads of the library's own. An execution context takes one call at a time: a second one is refused as "in use"
 * (`timeout`; with WASI_NN_WAMR `busy`), except cancel(), get_output() and close_execution_context(). A call blocks
 * nobody but its caller. After fork(), only the parent may go on using the library.
 *
 * Units. All lengths are bytes. Text is UTF-8 and not terminated, except where a function says so.
 */
#ifndef WASI_NN_LLAMA_H
#define WASI_NN_LLAMA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What a call came to. */
#ifdef WASI_NN_WAMR
typedef enum {
    success = 0,
    invalid_argument = 1,
    invalid_encoding = 2,
    missing_memory = 3,
    busy = 4, /* no room now, in use, or out of time: try again */
    runtime_error = 5,
    unsupported_operation = 6, /* also: not allowed */
    too_large = 7,
    not_found = 8,
    end_of_sequence = 100,
    context_full = 101,
    prompt_too_long = 102,
    model_not_found = 103
} wasi_nn_error;
#else
typedef enum {
    success = 0,
    invalid_argument = 1,      /* a value, a handle, or a call that makes no sense in this state */
    invalid_encoding = 2,      /* text that is not UTF-8 or not JSON; a graph encoding other than ggml */
    timeout = 3,               /* out of time, no room now, or in use: try again */
    runtime_error = 4,         /* llama.cpp, Python or the system failed, or the call was cancelled */
    unsupported_operation = 5, /* this build or this model cannot do it */
    too_large = 6,             /* the buffer is too small, or the input beyond a limit */
    not_found = 7,             /* no model of that name */
    security = 8,              /* not allowed */
    unknown = 9,
    end_of_sequence = 100, /* compute_single: there is no further token */
    context_full = 101,    /* the context window is full; the text so far can be read */
    prompt_too_long = 102, /* the prompt does not fit into the context window */
    model_not_found = 103  /* the name is known, or is a path, but the file is missing */
} wasi_nn_error;
#endif

/* A loaded model under one configuration, and one conversation on it. Numbers are not used twice. */
typedef uint32_t graph;
typedef uint32_t graph_execution_context;

/* Element types. They change nothing for text, which may come under any number from 0 to 255. */
#ifdef WASI_NN_WAMR
#ifdef WASM_ENABLE_WASI_EPHEMERAL_NN
enum { fp16 = 0, fp32 = 1, fp64 = 2, u8 = 3, i32 = 4, i64 = 5 };
#else
enum { fp16 = 0, fp32 = 1, up8 = 2, ip32 = 3 };
#endif
typedef uint8_t tensor_type;
#elif defined(WASM_ENABLE_WASI_EPHEMERAL_NN)
typedef enum { fp16 = 0, fp32 = 1, fp64 = 2, bf16 = 3, u8 = 4, i32 = 5, i64 = 6 } tensor_type;
#else
/* `u8` is the newer name of `up8`. */
typedef enum { fp16 = 0, fp32 = 1, up8 = 2, ip32 = 3, u8 = 2 } tensor_type;
#endif

typedef enum {
    openvino = 0,
    onnx = 1,
    tensorflow = 2,
    pytorch = 3,
    tensorflowlite = 4,
    ggml = 5, /* the one that this library runs */
    autodetect = 6
} graph_encoding;

/* A wish: the configuration's n_gpu_layers decides. */
typedef enum { cpu = 0, gpu = 1, tpu = 2 } execution_target;

/* `buf` points to `size` numbers. */
typedef struct {
    uint32_t *buf;
    uint32_t size;
} tensor_dimensions;

#ifdef WASI_NN_WAMR
/* `size` is the length of an input and the capacity of an output. */
typedef struct {
    uint8_t *buf;
    uint32_t size;
} tensor_data;
/* How functions take the place for an output. */
typedef tensor_data *wasi_nn_output;
#else
typedef uint8_t *tensor_data;
typedef uint8_t *wasi_nn_output;
#endif

/* An input. The number of its bytes is the product of `dimensions`, whatever the type: text has one dimension, its
 * length. Where `dimensions` or its `buf` is NULL or its `size` 0, the data ends at its first NUL. With WASI_NN_WAMR the
 * length stands in the data, and the dimensions are not looked at. */
typedef struct {
    tensor_dimensions *dimensions;
    tensor_type type;
    tensor_data data;
} tensor;

/* Parts of a model: the bytes of a GGUF file, and behind it, if there is a second one, configuration JSON. */
typedef struct {
    uint8_t *buf;
    uint32_t size;
} graph_builder;

typedef struct {
    graph_builder *buf;
    uint32_t size;
} graph_builder_array;

/* -- Opening and closing ------------------------------------------------------------------------------------------- */

/* Open a backend and store it in `*ctx`; NULL is stored when that fails. The first call of a process starts Python, which
 * takes about a second. There may be many backends at once; those of one configuration share models and batches.
 * Configuration comes from the file that WASI_NN_CONFIG names, if any. End it with deinit_backend(). */
wasi_nn_error init_backend(void **ctx);

/* The same with configuration JSON on top of that file's. `config` NULL or `config_len` 0: none. */
wasi_nn_error init_backend_with_config(void **ctx, const char *config, uint32_t config_len);

/* Close a backend with its graphs and contexts. Calls under way in other threads end with `runtime_error`. When the last
 * backend is closed, the library's threads have ended before this returns. `ctx` is of no use afterwards. */
wasi_nn_error deinit_backend(void *ctx);

/* -- Models -------------------------------------------------------------------------------------------------------- */

/* Load a model from memory, `builder->buf[0]`. The bytes are copied to a temporary file. Blocks until it is loaded. With
 * WASI_NN_WAMR this needs WASI_NN_ALLOW_LOAD_BYTES=1 (or WASI_NN_ALLOW_ANY_PATH=1), else it is `unsupported_operation`. */
wasi_nn_error load(void *ctx, graph_builder_array *builder, graph_encoding encoding, execution_target target,
                   graph *g);

/* Load a model by its name in WASI_NN_MODELS (`name=path`, separated by colons), by its path below a folder of
 * WASI_NN_MODEL_DIR (separated by colons), or, where neither is set, by its path. Links and `..` that lead out of a folder
 * are `security` (with WASI_NN_WAMR `unsupported_operation`). With WASI_NN_WAMR plain paths need WASI_NN_ALLOW_ANY_PATH=1.
 * Blocks until the model is loaded. */
wasi_nn_error load_by_name(void *ctx, const char *filename, uint32_t filename_len, graph *g);

/* The same with configuration JSON for this graph, over the backend's. `config` NULL or `config_len` 0: none. */
wasi_nn_error load_by_name_with_config(void *ctx, const char *filename, uint32_t filename_len, const char *config,
                                       uint32_t config_len, graph *g);

/* Unload a graph. Running computes finish; its contexts can still be read and closed. */
wasi_nn_error unload(void *ctx, graph g);

/* -- Execution contexts -------------------------------------------------------------------------------------------- */

/* A context of its own on a graph. It remembers its conversation, unless the prompt mode is `raw` (the default of
 * libwasi_nn_llamacpp.so). End it with close_execution_context(). */
wasi_nn_error init_execution_context(void *ctx, graph g, graph_execution_context *exec_ctx);

/* The live context of this session, or a new one on the graph that was loaded last. `session_id` ends with a NUL and has
 * 1 to 255 bytes. The same id gives the same handle, which needs one close for each call of this function; the last one
 * ends the session. Where a limit (max_sessions, idle_timeout_ms) has closed it, this makes a new context with another
 * handle; the old one can still be read, and closed. */
wasi_nn_error init_execution_context_with_session_id(void *ctx, const char *session_id,
                                                     graph_execution_context *exec_ctx);

/* Set what to compute: `index` 0 is the prompt, 1 configuration JSON for this context, any other counts as 0. The data is
 * copied. A `session_id` in the configuration makes the handle stand for that session. */
wasi_nn_error set_input(void *ctx, graph_execution_context exec_ctx, uint32_t index, tensor *input);

/* Generate the answer to the prompt. Blocks until it is complete; cancel() ends it from another thread. After
 * `context_full` and after a cancelled call the text so far can be read. */
wasi_nn_error compute(void *ctx, graph_execution_context exec_ctx);

/* Copy an output: `index` 0 is the text, 1 metadata JSON, any other counts as 0. Before the first compute the text has 0
 * bytes, which is `success`. `*output_tensor_size` holds the capacity of `output` (with WASI_NN_WAMR the capacity is
 * `output->size`, and `*output_tensor_size` is not read) and then the number of bytes written. A NUL follows where there
 * is room, and is not counted. Where the output does not fit, nothing is written but its length to
 * `*output_tensor_size`, the result is `too_large`, and the output can be asked for again.
 * A capacity of 0 counts as the number in WASI_NN_LEGACY_OUTPUT_BYTES, if that is set in the environment: text is then
 * cut to fit. That is for programs that never set the capacity. */
wasi_nn_error get_output(void *ctx, graph_execution_context exec_ctx, uint32_t index, wasi_nn_output output,
                         uint32_t *output_tensor_size);

/* set_input, compute and get_output of the text, in one. `index` is 0. After `too_large` get_output() has the text. */
wasi_nn_error run_inference(void *ctx, graph_execution_context exec_ctx, uint32_t index, tensor *input,
                            wasi_nn_output output, uint32_t *output_tensor_size);

/* The same with configuration JSON for this call only. NULL or 0: none. */
wasi_nn_error run_inference_with_config(void *ctx, graph_execution_context exec_ctx, uint32_t index, tensor *input,
                                        wasi_nn_output output, uint32_t *output_tensor_size, const char *runtime_config,
                                        uint32_t config_len);

/* Generate one token; the first call computes the prompt. `end_of_sequence` when the answer is complete. */
wasi_nn_error compute_single(void *ctx, graph_execution_context exec_ctx);

/* The same with configuration JSON for this run only, which the first call of a run reads. NULL or 0: none. */
wasi_nn_error compute_single_with_config(void *ctx, graph_execution_context exec_ctx, const char *runtime_config,
                                         uint32_t config_len);

/* As get_output(), of the last token: 0 bytes while a character is incomplete. */
wasi_nn_error get_output_single(void *ctx, graph_execution_context exec_ctx, uint32_t index, wasi_nn_output output,
                                uint32_t *output_tensor_size);

/* End a token-by-token run. What was generated counts as the answer. */
wasi_nn_error fini_single(void *ctx, graph_execution_context exec_ctx);

/* Stop what runs in a context: that call returns `runtime_error`. `success` also when nothing runs. */
wasi_nn_error cancel(void *ctx, graph_execution_context exec_ctx);

/* Write a context's conversation and its computed state to a file, to go on later. `path_len` at most 4,095. */
wasi_nn_error save_session(void *ctx, graph_execution_context exec_ctx, const char *path, uint32_t path_len);

/* A context that goes on from save_session(), on a graph of the same model. */
wasi_nn_error restore_session(void *ctx, graph g, const char *path, uint32_t path_len,
                              graph_execution_context *exec_ctx);

/* Close a context; what runs in it is cancelled first. A session ends with the last close, see above. */
wasi_nn_error close_execution_context(void *ctx, graph_execution_context exec_ctx);

/* -- Diagnosis ----------------------------------------------------------------------------------------------------- */

/* The message of the last call that failed in this thread, empty before the first; `ctx` may be NULL. `*size` is the
 * capacity of `buffer`, then the message's length (at most 1,023 bytes); `too_large` and the length when it does not fit.
 * A NUL follows where there is room. This call itself leaves the message as it is. */
wasi_nn_error wasi_nn_last_error(void *ctx, char *buffer, uint32_t *size);

/* The library's version, such as "0.1.0": a constant that stays valid. */
const char *wasi_nn_version(void);

#ifdef __cplusplus
}
#endif

#endif
