/* The functions of wasi_nn_llama.h: what can be checked without Python is checked here, then the call is handed over.
 * Pointers may lead anywhere, also to odd addresses in a guest's memory, so nothing is read or stored but with memcpy. */
#define _GNU_SOURCE
#include "calls.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum {
    N_NAME_BYTES_MAX = 4095, /* PATH_MAX without its NUL */
    N_SESSION_ID_BYTES_MAX = 255,
    N_CONFIG_BYTES_MAX = 1 << 20,
    N_INPUT_BYTES_MAX = 64 << 20,
    N_DIMENSIONS_MAX = 16,
    TENSOR_TYPE_MAX = 255,
    N_FIRST_PAGE_BYTES = 4096
};

/* -- Arguments --------------------------------------------------------------------------------------------------- */

static wasi_nn_error refuse_null(const char *what)
{
    return wasi_nn_refuse(invalid_argument, "%s is NULL: pass a valid pointer", what);
}

static wasi_nn_error read_text(const char *what, const char *data, uint32_t n_bytes, uint32_t n_bytes_max,
                               wasi_nn_span *span)
{
    if (!data)
        return refuse_null(what);
    if (n_bytes == 0)
        return wasi_nn_refuse(invalid_argument, "%s is empty: pass its length in bytes", what);
    if (n_bytes > n_bytes_max)
        return wasi_nn_refuse(invalid_argument, "%s has %u bytes, and at most %u are allowed: shorten it", what, n_bytes,
                              n_bytes_max);
    if (memchr(data, 0, n_bytes))
        return wasi_nn_refuse(invalid_argument, "%s has a NUL inside: pass its length without the final NUL", what);
    *span = (wasi_nn_span){(const uint8_t *)data, n_bytes};
    return success;
}

static wasi_nn_error read_config(const char *data, uint32_t n_bytes, wasi_nn_span *span)
{
    if (!data || n_bytes == 0)
        return success;
    return read_text("the configuration", data, n_bytes, N_CONFIG_BYTES_MAX, span);
}

#ifndef WASI_NN_WAMR
/* The product of the dimensions; UINT64_MAX when it is beyond all limits. */
static uint64_t count_elements(const tensor_dimensions *dimensions)
{
    uint64_t n_elements = 1;
    for (uint32_t i = 0; i < dimensions->size; i++) {
        uint32_t length;
        memcpy(&length, (const char *)dimensions->buf + i * sizeof length, sizeof length);
        n_elements *= length;
        if (n_elements > N_INPUT_BYTES_MAX)
            return UINT64_MAX;
    }
    return n_elements;
}
#endif

static wasi_nn_error read_length(const tensor *input, const uint8_t **data, uint64_t *n_bytes)
{
#ifdef WASI_NN_WAMR
    *data = input->data.buf;
    *n_bytes = input->data.size;
#else
    tensor_dimensions dimensions = {NULL, 0};
    *data = input->data;
    if (!*data)
        return success;
    if ((uint32_t)input->type > TENSOR_TYPE_MAX)
        return wasi_nn_refuse(invalid_argument, "the tensor's type is %u: text has a type of one byte, such as u8",
                              (unsigned)input->type);
    if (input->dimensions)
        memcpy(&dimensions, input->dimensions, sizeof dimensions);
    if (dimensions.size > N_DIMENSIONS_MAX)
        return wasi_nn_refuse(invalid_argument, "the tensor has %u dimensions: text has one, its length in bytes",
                              dimensions.size);
    if (dimensions.buf && dimensions.size)
        *n_bytes = count_elements(&dimensions);
    else
        *n_bytes = strnlen((const char *)*data, (size_t)N_INPUT_BYTES_MAX + 1);
#endif
    return success;
}

static wasi_nn_error read_tensor(const tensor *pointer, wasi_nn_span *span)
{
    tensor input;
    const uint8_t *data = NULL;
    uint64_t n_bytes = 0;
    if (!pointer)
        return refuse_null("the input tensor");
    memcpy(&input, pointer, sizeof input);
    wasi_nn_error code = read_length(&input, &data, &n_bytes);
    if (code != success)
        return code;
    if (!data)
        return refuse_null("the input tensor's data");
    if (n_bytes == 0)
        return wasi_nn_refuse(invalid_argument, "the input is empty: its length is the tensor's dimension");
    if (n_bytes > N_INPUT_BYTES_MAX)
        return wasi_nn_refuse(too_large, "the input has more than %d bytes: send less", N_INPUT_BYTES_MAX);
    *span = (wasi_nn_span){data, (uint32_t)n_bytes};
    return success;
}

#ifndef WASI_NN_WAMR
/* What a capacity of 0 stands for; 0 when it stands for nothing else. */
static uint32_t legacy_capacity(void)
{
    const char *text = getenv("WASI_NN_LEGACY_OUTPUT_BYTES");
    if (!text || *text < '0' || *text > '9')
        return 0;
    char *end;
    unsigned long n_bytes = strtoul(text, &end, 10);
    return *end || n_bytes > INT32_MAX ? 0 : (uint32_t)n_bytes;
}
#endif

static wasi_nn_error read_output(wasi_nn_output output, const uint32_t *size, wasi_nn_call *call)
{
    if (!output)
        return refuse_null("the output buffer");
    if (!size)
        return refuse_null("the pointer to the output's size");
#ifdef WASI_NN_WAMR
    tensor_data place;
    memcpy(&place, output, sizeof place);
    if (!place.buf)
        return refuse_null("the output tensor's buffer");
    call->output = place.buf;
    call->capacity = place.size;
#else
    call->output = output;
    memcpy(&call->capacity, size, sizeof call->capacity);
    if (call->capacity == 0) {
        call->capacity = legacy_capacity();
        call->may_cut = call->capacity != 0;
    }
#endif
    return success;
}

/* -- Handing over ------------------------------------------------------------------------------------------------- */

static wasi_nn_error forward(void *ctx, wasi_nn_call *call)
{
    if (!ctx)
        return wasi_nn_refuse(invalid_argument, "the backend is NULL: call init_backend, and see what it returns");
    call->backend = (uintptr_t)ctx;
    return wasi_nn_submit(call);
}

/* A call whose result is a handle. Its place lies in the first page where a host passes arguments of another header's:
 * newer WAMR's load_by_name has an execution target before it. */
static wasi_nn_error forward_for_handle(void *ctx, wasi_nn_call *call, uint32_t *handle)
{
    if (!handle)
        return refuse_null("the place for the new handle");
    if ((uintptr_t)handle < N_FIRST_PAGE_BYTES)
        return wasi_nn_refuse(invalid_argument, "the place for the new handle is %p: pass a valid pointer", (void *)handle);
    wasi_nn_error code = forward(ctx, call);
    if (code == success)
        memcpy(handle, &call->handle_out, sizeof *handle);
    return code;
}

/* A call whose result is an output. */
static wasi_nn_error forward_for_output(void *ctx, wasi_nn_call *call, wasi_nn_output output, uint32_t *size)
{
    wasi_nn_error code = read_output(output, size, call);
    if (code != success)
        return code;
    code = forward(ctx, call);
    /* An input beyond a limit is too_large as well, but then there is no output, and no length to tell. */
    if (code == success || (code == too_large && call->n_bytes > 0))
        memcpy(size, &call->n_bytes, sizeof *size);
    return code;
}

/* The name of a model. One that breaks a rule is refused in Python, which has the log. */
static wasi_nn_error read_name(void *ctx, const char *name, uint32_t n_bytes, wasi_nn_span *span)
{
    char rule[128];
    wasi_nn_call refusal = {.operation = OP_REFUSE_NAME, .text = {(const uint8_t *)rule, 0}};
    wasi_nn_error code = read_text("the model's name", name, n_bytes, N_NAME_BYTES_MAX, span);
    if (code == success || !name || n_bytes == 0)
        return code;
    refusal.text.n_bytes = (uint32_t)strnlen(wasi_nn_message(), sizeof rule);
    memcpy(rule, wasi_nn_message(), refusal.text.n_bytes);
    return forward(ctx, &refusal);
}

static wasi_nn_error forward_handle(void *ctx, uint32_t operation, uint32_t handle)
{
    wasi_nn_call call = {.operation = operation, .handle = handle};
    return forward(ctx, &call);
}

/* -- The functions, in the header's order ---------------------------------------------------------------------------- */

wasi_nn_error init_backend(void **ctx)
{
    return init_backend_with_config(ctx, NULL, 0);
}

wasi_nn_error init_backend_with_config(void **ctx, const char *config, uint32_t config_len)
{
    wasi_nn_call call = {.operation = OP_INIT_BACKEND};
    if (!ctx)
        return refuse_null("the place for the new backend");
    *ctx = NULL;
    wasi_nn_error code = read_config(config, config_len, &call.config);
    if (code != success)
        return code;
    code = wasi_nn_open(&call);
    if (code == success)
        *ctx = (void *)(uintptr_t)call.backend;
    return code;
}

wasi_nn_error deinit_backend(void *ctx)
{
    wasi_nn_call call = {.operation = OP_DEINIT_BACKEND, .backend = (uintptr_t)ctx};
    if (!ctx)
        return forward(ctx, &call);
    return wasi_nn_close(&call);
}

wasi_nn_error load(void *ctx, graph_builder_array *builder, graph_encoding encoding, execution_target target, graph *g)
{
    wasi_nn_call call = {.operation = OP_LOAD, .index = (uint32_t)encoding, .target = (uint32_t)target};
    graph_builder_array builders;
    graph_builder parts[2] = {{NULL, 0}, {NULL, 0}};
    if (!builder)
        return refuse_null("the array of graph builders");
    memcpy(&builders, builder, sizeof builders);
    if (builders.size < 1 || builders.size > 2)
        return wasi_nn_refuse(invalid_argument, "load takes a GGUF file and, optionally, configuration; got %u builders",
                              builders.size);
    if (!builders.buf)
        return refuse_null("the list of graph builders");
    memcpy(parts, builders.buf, builders.size * sizeof *parts);
    if (!parts[0].buf)
        return refuse_null("the model in the first graph builder");
    if (parts[0].size == 0)
        return wasi_nn_refuse(invalid_argument, "the model in the first graph builder is empty");
    wasi_nn_error code = read_config((const char *)parts[1].buf, parts[1].size, &call.config);
    if (code != success)
        return code;
    call.text = (wasi_nn_span){parts[0].buf, parts[0].size};
    return forward_for_handle(ctx, &call, g);
}

wasi_nn_error load_by_name(void *ctx, const char *filename, uint32_t filename_len, graph *g)
{
    return load_by_name_with_config(ctx, filename, filename_len, NULL, 0, g);
}

wasi_nn_error load_by_name_with_config(void *ctx, const char *filename, uint32_t filename_len, const char *config,
                                       uint32_t config_len, graph *g)
{
    wasi_nn_call call = {.operation = OP_LOAD_BY_NAME};
    wasi_nn_error code = read_name(ctx, filename, filename_len, &call.text);
    if (code == success)
        code = read_config(config, config_len, &call.config);
    return code == success ? forward_for_handle(ctx, &call, g) : code;
}

wasi_nn_error unload(void *ctx, graph g)
{
    return forward_handle(ctx, OP_UNLOAD, g);
}

wasi_nn_error init_execution_context(void *ctx, graph g, graph_execution_context *exec_ctx)
{
    wasi_nn_call call = {.operation = OP_INIT_EXECUTION_CONTEXT, .handle = g};
    return forward_for_handle(ctx, &call, exec_ctx);
}

wasi_nn_error init_execution_context_with_session_id(void *ctx, const char *session_id,
                                                     graph_execution_context *exec_ctx)
{
    wasi_nn_call call = {.operation = OP_INIT_SESSION};
    uint32_t n_bytes = session_id ? (uint32_t)strnlen(session_id, N_SESSION_ID_BYTES_MAX + 1) : 0;
    wasi_nn_error code = read_text("the session's id", session_id, n_bytes, N_SESSION_ID_BYTES_MAX, &call.text);
    return code == success ? forward_for_handle(ctx, &call, exec_ctx) : code;
}

wasi_nn_error set_input(void *ctx, graph_execution_context exec_ctx, uint32_t index, tensor *input)
{
    wasi_nn_call call = {.operation = OP_SET_INPUT, .handle = exec_ctx, .index = index};
    wasi_nn_error code = read_tensor(input, &call.text);
    return code == success ? forward(ctx, &call) : code;
}

wasi_nn_error compute(void *ctx, graph_execution_context exec_ctx)
{
    return forward_handle(ctx, OP_COMPUTE, exec_ctx);
}

wasi_nn_error get_output(void *ctx, graph_execution_context exec_ctx, uint32_t index, wasi_nn_output output,
                         uint32_t *output_tensor_size)
{
    wasi_nn_call call = {.operation = OP_GET_OUTPUT, .handle = exec_ctx, .index = index};
    return forward_for_output(ctx, &call, output, output_tensor_size);
}

wasi_nn_error run_inference(void *ctx, graph_execution_context exec_ctx, uint32_t index, tensor *input,
                            wasi_nn_output output, uint32_t *output_tensor_size)
{
    return run_inference_with_config(ctx, exec_ctx, index, input, output, output_tensor_size, NULL, 0);
}

wasi_nn_error run_inference_with_config(void *ctx, graph_execution_context exec_ctx, uint32_t index, tensor *input,
                                        wasi_nn_output output, uint32_t *output_tensor_size, const char *runtime_config,
                                        uint32_t config_len)
{
    wasi_nn_call call = {.operation = OP_RUN_INFERENCE, .handle = exec_ctx, .index = index};
    wasi_nn_error code = read_tensor(input, &call.text);
    if (code == success)
        code = read_config(runtime_config, config_len, &call.config);
    return code == success ? forward_for_output(ctx, &call, output, output_tensor_size) : code;
}

wasi_nn_error compute_single(void *ctx, graph_execution_context exec_ctx)
{
    return compute_single_with_config(ctx, exec_ctx, NULL, 0);
}

wasi_nn_error compute_single_with_config(void *ctx, graph_execution_context exec_ctx, const char *runtime_config,
                                         uint32_t config_len)
{
    wasi_nn_call call = {.operation = OP_COMPUTE_SINGLE, .handle = exec_ctx};
    wasi_nn_error code = read_config(runtime_config, config_len, &call.config);
    return code == success ? forward(ctx, &call) : code;
}

wasi_nn_error get_output_single(void *ctx, graph_execution_context exec_ctx, uint32_t index, wasi_nn_output output,
                                uint32_t *output_tensor_size)
{
    wasi_nn_call call = {.operation = OP_GET_OUTPUT_SINGLE, .handle = exec_ctx, .index = index};
    return forward_for_output(ctx, &call, output, output_tensor_size);
}

wasi_nn_error fini_single(void *ctx, graph_execution_context exec_ctx)
{
    return forward_handle(ctx, OP_FINI_SINGLE, exec_ctx);
}

wasi_nn_error cancel(void *ctx, graph_execution_context exec_ctx)
{
    return forward_handle(ctx, OP_CANCEL, exec_ctx);
}

wasi_nn_error save_session(void *ctx, graph_execution_context exec_ctx, const char *path, uint32_t path_len)
{
    wasi_nn_call call = {.operation = OP_SAVE_SESSION, .handle = exec_ctx};
    wasi_nn_error code = read_text("the file's path", path, path_len, N_NAME_BYTES_MAX, &call.text);
    return code == success ? forward(ctx, &call) : code;
}

wasi_nn_error restore_session(void *ctx, graph g, const char *path, uint32_t path_len,
                              graph_execution_context *exec_ctx)
{
    wasi_nn_call call = {.operation = OP_RESTORE_SESSION, .handle = g};
    wasi_nn_error code = read_text("the file's path", path, path_len, N_NAME_BYTES_MAX, &call.text);
    return code == success ? forward_for_handle(ctx, &call, exec_ctx) : code;
}

wasi_nn_error close_execution_context(void *ctx, graph_execution_context exec_ctx)
{
    return forward_handle(ctx, OP_CLOSE_EXECUTION_CONTEXT, exec_ctx);
}

wasi_nn_error wasi_nn_last_error(void *ctx, char *buffer, uint32_t *size)
{
    (void)ctx;
    if (!buffer || !size)
        return invalid_argument;
    const char *message = wasi_nn_message();
    uint32_t n_bytes = (uint32_t)strlen(message), capacity;
    memcpy(&capacity, size, sizeof capacity);
    memcpy(size, &n_bytes, sizeof n_bytes);
    if (capacity < n_bytes)
        return too_large;
    memcpy(buffer, message, capacity > n_bytes ? n_bytes + 1 : n_bytes);
    return success;
}

const char *wasi_nn_version(void)
{
    return WASI_NN_VERSION;
}
