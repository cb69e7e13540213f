/* The NIF: each function is one call of the C library, on a dirty scheduler, since all of them may wait.
 *
 * Results are {ok, Value}, done, or {error, Number, Message} with the header's number. Every loaded model has a backend
 * of its own in the C library (those of equal configuration share models and batches), because the library opens
 * sessions by name on the model that was loaded last. Resources hold each other: a context its backend, a graph too. */
#include <erl_nif.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include <wasi_nn_llama.h>

#include "reaper.h"

enum { N_SESSION_ID_BYTES_MAX = 255, N_MESSAGE_BYTES_MAX = 1024, N_OUTPUT_BYTES = 16 << 10, N_TOKEN_BYTES = 1 << 10 };

typedef struct {
    ErlNifResourceType *backends, *graphs, *contexts;
    reaper *reaper;
} library;

typedef struct {
    _Atomic(void *) ctx; /* NULL when it is closed */
} backend_resource;

typedef struct {
    backend_resource *backend;
    graph number;
} graph_resource;

typedef struct {
    backend_resource *backend;
    graph_execution_context number;
    atomic_bool is_open;
} context_resource;

/* -- Terms ---------------------------------------------------------------------------------------------------------- */

static ERL_NIF_TERM atom(ErlNifEnv *env, const char *name)
{
    return enif_make_atom(env, name);
}

static ERL_NIF_TERM ok(ErlNifEnv *env, ERL_NIF_TERM value)
{
    return enif_make_tuple2(env, atom(env, "ok"), value);
}

static ERL_NIF_TERM bytes(ErlNifEnv *env, const void *data, size_t n_bytes)
{
    ERL_NIF_TERM term;
    memcpy(enif_make_new_binary(env, n_bytes, &term), data, n_bytes);
    return term;
}

static ERL_NIF_TERM refusal(ErlNifEnv *env, wasi_nn_error code, const char *message)
{
    return enif_make_tuple3(env, atom(env, "error"), enif_make_int(env, (int)code),
                            bytes(env, message, strlen(message)));
}

/* What the library says of this thread's last call. */
static ERL_NIF_TERM failure(ErlNifEnv *env, wasi_nn_error code)
{
    char message[N_MESSAGE_BYTES_MAX] = "";
    uint32_t size = sizeof message - 1;
    if (wasi_nn_last_error(NULL, message, &size) != success)
        return refusal(env, code, "the library gives no reason");
    message[size] = 0;
    return refusal(env, code, message);
}

static ERL_NIF_TERM result(ErlNifEnv *env, wasi_nn_error code)
{
    return code == success ? ok(env, atom(env, "done")) : failure(env, code);
}

static library *library_of(ErlNifEnv *env)
{
    return enif_priv_data(env);
}

static ERL_NIF_TERM wrap(ErlNifEnv *env, void *resource)
{
    ERL_NIF_TERM term = enif_make_resource(env, resource);
    enif_release_resource(resource);
    return ok(env, term);
}

/* The library's lengths have 32 bits. */
static bool get_bytes(ErlNifEnv *env, ERL_NIF_TERM term, ErlNifBinary *data)
{
    return enif_inspect_binary(env, term, data) && data->size <= UINT32_MAX;
}

static bool get_context(ErlNifEnv *env, ERL_NIF_TERM term, context_resource **context)
{
    return enif_get_resource(env, term, library_of(env)->contexts, (void **)context);
}

/* -- Backends and graphs -------------------------------------------------------------------------------------------- */

static backend_resource *open_backend(ErlNifEnv *env, const ErlNifBinary *config, wasi_nn_error *code)
{
    void *ctx;
    *code = init_backend_with_config(&ctx, (const char *)config->data, (uint32_t)config->size);
    if (*code != success)
        return NULL;
    backend_resource *backend = enif_alloc_resource(library_of(env)->backends, sizeof *backend);
    atomic_init(&backend->ctx, ctx);
    return backend;
}

static ERL_NIF_TERM nif_open(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[])
{
    ErlNifBinary config;
    wasi_nn_error code;
    if (argc != 1 || !get_bytes(env, argv[0], &config))
        return enif_make_badarg(env);
    backend_resource *backend = open_backend(env, &config, &code);
    return backend ? wrap(env, backend) : failure(env, code);
}

/* Of a backend, or of the one that a graph has for itself. */
static ERL_NIF_TERM nif_deinit(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[])
{
    backend_resource *backend;
    graph_resource *model;
    if (argc != 1)
        return enif_make_badarg(env);
    if (enif_get_resource(env, argv[0], library_of(env)->graphs, (void **)&model))
        backend = model->backend;
    else if (!enif_get_resource(env, argv[0], library_of(env)->backends, (void **)&backend))
        return enif_make_badarg(env);
    void *ctx = atomic_exchange(&backend->ctx, NULL);
    return result(env, ctx ? deinit_backend(ctx) : success);
}

static ERL_NIF_TERM nif_load(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[])
{
    ErlNifBinary config, name, graph_config;
    wasi_nn_error code;
    graph number;
    if (argc != 3 || !get_bytes(env, argv[0], &config) || !get_bytes(env, argv[1], &name) ||
        !get_bytes(env, argv[2], &graph_config))
        return enif_make_badarg(env);
    backend_resource *backend = open_backend(env, &config, &code);
    if (!backend)
        return failure(env, code);
    code = load_by_name_with_config(backend->ctx, (const char *)name.data, (uint32_t)name.size,
                                    (const char *)graph_config.data, (uint32_t)graph_config.size, &number);
    if (code != success) {
        ERL_NIF_TERM reason = failure(env, code);
        enif_release_resource(backend);
        return reason;
    }
    graph_resource *model = enif_alloc_resource(library_of(env)->graphs, sizeof *model);
    *model = (graph_resource){.backend = backend, .number = number};
    return wrap(env, model);
}

static ERL_NIF_TERM nif_unload(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[])
{
    graph_resource *model;
    if (argc != 1 || !enif_get_resource(env, argv[0], library_of(env)->graphs, (void **)&model))
        return enif_make_badarg(env);
    return result(env, unload(model->backend->ctx, model->number));
}

/* -- Contexts ------------------------------------------------------------------------------------------------------- */

/* {ok, {Context, Number}}. An empty session id: a context of its own. Otherwise one opening of the session, which the
 * library counts: each has a resource of its own, and all of a live session have one number. */
static ERL_NIF_TERM nif_context(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[])
{
    graph_resource *model;
    ErlNifBinary session;
    char session_id[N_SESSION_ID_BYTES_MAX + 1] = "";
    graph_execution_context number;
    wasi_nn_error code;
    if (argc != 2 || !enif_get_resource(env, argv[0], library_of(env)->graphs, (void **)&model) ||
        !get_bytes(env, argv[1], &session))
        return enif_make_badarg(env);
    if (session.size > N_SESSION_ID_BYTES_MAX || memchr(session.data, 0, session.size))
        return refusal(env, invalid_argument, "a session id has at most 255 bytes and no NUL: shorten it");
    memcpy(session_id, session.data, session.size);
    if (session.size)
        code = init_execution_context_with_session_id(model->backend->ctx, session_id, &number);
    else
        code = init_execution_context(model->backend->ctx, model->number, &number);
    if (code != success)
        return failure(env, code);
    context_resource *context = enif_alloc_resource(library_of(env)->contexts, sizeof *context);
    context->backend = model->backend;
    context->number = number;
    atomic_init(&context->is_open, true);
    enif_keep_resource(model->backend);
    ERL_NIF_TERM term = enif_make_resource(env, context);
    enif_release_resource(context);
    return ok(env, enif_make_tuple2(env, term, enif_make_uint(env, number)));
}

static ERL_NIF_TERM nif_close(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[])
{
    context_resource *context;
    if (argc != 1 || !get_context(env, argv[0], &context))
        return enif_make_badarg(env);
    bool was_open = atomic_exchange(&context->is_open, false);
    return result(env, was_open ? close_execution_context(context->backend->ctx, context->number) : success);
}

/* Not on a dirty scheduler: it must not wait for the calls that it is to end. */
static ERL_NIF_TERM nif_cancel(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[])
{
    context_resource *context;
    if (argc != 1 || !get_context(env, argv[0], &context))
        return enif_make_badarg(env);
    void *ctx = context->backend->ctx;
    if (ctx)
        reaper_order(library_of(env)->reaper, REAP_CANCEL, ctx, context->number);
    return atom(env, "ok");
}

/* -- Work ----------------------------------------------------------------------------------------------------------- */

/* `dimensions` and `length` belong to the tensor, and have to live as long. */
static tensor text_tensor(const ErlNifBinary *text, tensor_dimensions *dimensions, uint32_t *length)
{
    *length = (uint32_t)text->size;
    *dimensions = (tensor_dimensions){.buf = length, .size = 1};
    return (tensor){.dimensions = dimensions, .type = u8, .data = text->data};
}

static ERL_NIF_TERM nif_set_input(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[])
{
    context_resource *context;
    unsigned index;
    ErlNifBinary data;
    tensor_dimensions dimensions;
    uint32_t length;
    if (argc != 3 || !get_context(env, argv[0], &context) || !enif_get_uint(env, argv[1], &index) ||
        !get_bytes(env, argv[2], &data))
        return enif_make_badarg(env);
    tensor input = text_tensor(&data, &dimensions, &length);
    return result(env, set_input(context->backend->ctx, context->number, index, &input));
}

static ERL_NIF_TERM nif_compute(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[])
{
    context_resource *context;
    if (argc != 1 || !get_context(env, argv[0], &context))
        return enif_make_badarg(env);
    return result(env, compute(context->backend->ctx, context->number));
}

typedef wasi_nn_error (*output_function)(void *, graph_execution_context, uint32_t, wasi_nn_output, uint32_t *);

/* {ok, Binary}: asks for the output again when it is longer than `n_bytes`. */
static ERL_NIF_TERM read_output(ErlNifEnv *env, const context_resource *context, output_function get, uint32_t index,
                                uint32_t n_bytes)
{
    ErlNifBinary buffer;
    wasi_nn_error code = too_large;
    uint32_t size = n_bytes;
    if (!enif_alloc_binary(n_bytes, &buffer))
        return refusal(env, runtime_error, "out of memory for the output: ask again with a smaller max_tokens");
    while (code == too_large) {
        if (size > buffer.size && !enif_realloc_binary(&buffer, size))
            break;
        size = (uint32_t)buffer.size;
        code = get(context->backend->ctx, context->number, index, buffer.data, &size);
        if (code == too_large && size <= buffer.size)
            break;
    }
    if (code != success) {
        ERL_NIF_TERM reason = failure(env, code);
        enif_release_binary(&buffer);
        return reason;
    }
    ERL_NIF_TERM text = bytes(env, buffer.data, size);
    enif_release_binary(&buffer);
    return ok(env, text);
}

static ERL_NIF_TERM nif_get_output(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[])
{
    context_resource *context;
    unsigned index;
    if (argc != 2 || !get_context(env, argv[0], &context) || !enif_get_uint(env, argv[1], &index))
        return enif_make_badarg(env);
    return read_output(env, context, get_output, index, N_OUTPUT_BYTES);
}

static ERL_NIF_TERM nif_run_inference(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[])
{
    context_resource *context;
    ErlNifBinary prompt, config;
    tensor_dimensions dimensions;
    uint32_t length, size = N_OUTPUT_BYTES;
    if (argc != 3 || !get_context(env, argv[0], &context) || !get_bytes(env, argv[1], &prompt) ||
        !get_bytes(env, argv[2], &config))
        return enif_make_badarg(env);
    uint8_t *text = enif_alloc(size);
    if (!text)
        return refusal(env, runtime_error, "out of memory for the output: close contexts or unload graphs");
    tensor input = text_tensor(&prompt, &dimensions, &length);
    wasi_nn_error code =
        run_inference_with_config(context->backend->ctx, context->number, 0, &input, text, &size,
                                  (const char *)config.data, (uint32_t)config.size);
    ERL_NIF_TERM term;
    if (code == success)
        term = ok(env, bytes(env, text, size));
    else if (code == too_large && size > N_OUTPUT_BYTES)
        term = read_output(env, context, get_output, 0, size);
    else
        term = failure(env, code);
    enif_free(text);
    return term;
}

/* {ok, Text} of the next token, or done. */
static ERL_NIF_TERM nif_compute_single(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[])
{
    context_resource *context;
    ErlNifBinary config;
    if (argc != 2 || !get_context(env, argv[0], &context) || !get_bytes(env, argv[1], &config))
        return enif_make_badarg(env);
    wasi_nn_error code = compute_single_with_config(context->backend->ctx, context->number, (const char *)config.data,
                                                    (uint32_t)config.size);
    if (code == end_of_sequence)
        return atom(env, "done");
    if (code != success)
        return failure(env, code);
    return read_output(env, context, get_output_single, 0, N_TOKEN_BYTES);
}

/* -- The library ---------------------------------------------------------------------------------------------------- */

static void drop_backend(ErlNifEnv *env, void *object)
{
    backend_resource *backend = object;
    void *ctx = atomic_exchange(&backend->ctx, NULL);
    if (ctx)
        reaper_order(library_of(env)->reaper, REAP_BACKEND, ctx, 0);
}

static void drop_graph(ErlNifEnv *env, void *object)
{
    (void)env;
    enif_release_resource(((graph_resource *)object)->backend);
}

static void drop_context(ErlNifEnv *env, void *object)
{
    context_resource *context = object;
    void *ctx = context->backend->ctx;
    if (ctx && atomic_exchange(&context->is_open, false))
        reaper_order(library_of(env)->reaper, REAP_CONTEXT, ctx, context->number);
    enif_release_resource(context->backend);
}

static int load_library(ErlNifEnv *env, void **priv_data, ERL_NIF_TERM info)
{
    (void)info;
    library *loaded = enif_alloc(sizeof *loaded);
    if (!loaded)
        return 1;
    loaded->backends = enif_open_resource_type(env, NULL, "backend", drop_backend, ERL_NIF_RT_CREATE, NULL);
    loaded->graphs = enif_open_resource_type(env, NULL, "graph", drop_graph, ERL_NIF_RT_CREATE, NULL);
    loaded->contexts = enif_open_resource_type(env, NULL, "context", drop_context, ERL_NIF_RT_CREATE, NULL);
    loaded->reaper = reaper_start();
    if (!loaded->backends || !loaded->graphs || !loaded->contexts || !loaded->reaper) {
        if (loaded->reaper)
            reaper_stop(loaded->reaper);
        enif_free(loaded);
        return 1;
    }
    *priv_data = loaded;
    return 0;
}

static void unload_library(ErlNifEnv *env, void *priv_data)
{
    (void)env;
    library *loaded = priv_data;
    reaper_stop(loaded->reaper);
    enif_free(loaded);
}

#define DIRTY ERL_NIF_DIRTY_JOB_IO_BOUND

static ErlNifFunc functions[] = {
    {"open", 1, nif_open, DIRTY},
    {"deinit", 1, nif_deinit, DIRTY},
    {"load", 3, nif_load, DIRTY},
    {"unload", 1, nif_unload, DIRTY},
    {"context", 2, nif_context, DIRTY},
    {"close", 1, nif_close, DIRTY},
    {"cancel", 1, nif_cancel, 0},
    {"set_input", 3, nif_set_input, DIRTY},
    {"compute", 1, nif_compute, DIRTY},
    {"get_output", 2, nif_get_output, DIRTY},
    {"run_inference", 3, nif_run_inference, DIRTY},
    {"compute_single", 2, nif_compute_single, DIRTY},
};

ERL_NIF_INIT(wasi_nn_nif, functions, load_library, NULL, NULL, unload_library)
