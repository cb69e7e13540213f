/* Every function with NULL for each pointer, zero and huge lengths, stale and foreign handles, and after deinit: an error
 * code each, and nothing else happens. Usage: matrix MODEL FOLDER. */
#include "check.h"

#ifdef WASI_NN_WAMR
#define INPUT(text_) ((tensor){NULL, 0, {(uint8_t *)(text_), (uint32_t)strlen(text_)}})
#else
#define INPUT(text_) ((tensor){NULL, u8, (uint8_t *)(text_)})
#endif

static uint8_t text[1 << 16];
static uint32_t size;

static wasi_nn_output output(uint32_t capacity)
{
#ifdef WASI_NN_WAMR
    static tensor_data place;
    place = (tensor_data){text, capacity};
    size = 0xFFFFFFFF; /* as in WAMR's hosts: never set */
    return &place;
#else
    size = capacity;
    return text;
#endif
}

/* Calls that need a backend, with one that is none. The other arguments are right. */
static void refuse_backend(void *ctx, const char *path)
{
    graph g = 77;
    graph_execution_context context = 77;
    tensor input = INPUT("hello");
    graph_builder part = {text, 4};
    graph_builder_array parts = {&part, 1};
    uint32_t n = (uint32_t)strlen(path);
    CHECK_CODE(invalid_argument, deinit_backend(ctx));
    CHECK_CODE(invalid_argument, load(ctx, &parts, ggml, cpu, &g));
    CHECK_CODE(invalid_argument, load_by_name(ctx, path, n, &g));
    CHECK_CODE(invalid_argument, load_by_name_with_config(ctx, path, n, NULL, 0, &g));
    CHECK_CODE(invalid_argument, unload(ctx, 0));
    CHECK_CODE(invalid_argument, init_execution_context(ctx, 0, &context));
    CHECK_CODE(invalid_argument, init_execution_context_with_session_id(ctx, "ada", &context));
    CHECK_CODE(invalid_argument, set_input(ctx, 1, 0, &input));
    CHECK_CODE(invalid_argument, compute(ctx, 1));
    CHECK_CODE(invalid_argument, get_output(ctx, 1, 0, output(sizeof text), &size));
    CHECK_CODE(invalid_argument, run_inference(ctx, 1, 0, &input, output(sizeof text), &size));
    CHECK_CODE(invalid_argument, run_inference_with_config(ctx, 1, 0, &input, output(sizeof text), &size, "{}", 2));
    CHECK_CODE(invalid_argument, compute_single(ctx, 1));
    CHECK_CODE(invalid_argument, get_output_single(ctx, 1, 0, output(sizeof text), &size));
    CHECK_CODE(invalid_argument, fini_single(ctx, 1));
    CHECK_CODE(invalid_argument, cancel(ctx, 1));
    CHECK_CODE(invalid_argument, save_session(ctx, 1, path, n));
    CHECK_CODE(invalid_argument, restore_session(ctx, 0, path, n, &context));
    CHECK_CODE(invalid_argument, close_execution_context(ctx, 1));
    CHECK(g == 77 && context == 77);
}

/* Calls that need a context, with one that is closed or never was. */
static void refuse_context(void *ctx, graph_execution_context context, const char *path)
{
    tensor input = INPUT("hello");
    CHECK_CODE(invalid_argument, set_input(ctx, context, 0, &input));
    CHECK_CODE(invalid_argument, compute(ctx, context));
    CHECK_CODE(invalid_argument, get_output(ctx, context, 0, output(sizeof text), &size));
    CHECK_CODE(invalid_argument, run_inference(ctx, context, 0, &input, output(sizeof text), &size));
    CHECK_CODE(invalid_argument, run_inference_with_config(ctx, context, 0, &input, output(sizeof text), &size, NULL, 0));
    CHECK_CODE(invalid_argument, compute_single(ctx, context));
    CHECK_CODE(invalid_argument, get_output_single(ctx, context, 0, output(sizeof text), &size));
    CHECK_CODE(invalid_argument, fini_single(ctx, context));
    CHECK_CODE(invalid_argument, cancel(ctx, context));
    CHECK_CODE(invalid_argument, save_session(ctx, context, path, (uint32_t)strlen(path)));
    CHECK_CODE(invalid_argument, close_execution_context(ctx, context));
}

static void refuse_graph(void *ctx, graph g, const char *path)
{
    graph_execution_context context = 77;
    CHECK_CODE(invalid_argument, unload(ctx, g));
    CHECK_CODE(invalid_argument, init_execution_context(ctx, g, &context));
    CHECK_CODE(invalid_argument, restore_session(ctx, g, path, (uint32_t)strlen(path), &context));
    CHECK(context == 77);
}

static void refuse_loads(void *ctx, const char *path)
{
    static const char nul_inside[] = "a\0b";
    uint32_t n = (uint32_t)strlen(path);
    graph g = 77;
    CHECK_CODE(invalid_argument, load_by_name(ctx, NULL, n, &g));
    CHECK_CODE(invalid_argument, load_by_name(ctx, path, 0, &g));
    CHECK_CODE(invalid_argument, load_by_name(ctx, path, 0xFFFFFFFF, &g));
    CHECK_CODE(invalid_argument, load_by_name(ctx, path, n, NULL));
    CHECK_CODE(invalid_argument, load_by_name(ctx, path, n, (graph *)gpu)); /* a host with an argument more */
    CHECK_CODE(invalid_argument, load_by_name(ctx, nul_inside, sizeof nul_inside - 1, &g));
    CHECK_CODE(invalid_encoding, load_by_name(ctx, "\xff\xfe", 2, &g));
    CHECK_CODE(invalid_argument, load_by_name_with_config(ctx, NULL, n, NULL, 0, &g));
    CHECK_CODE(invalid_argument, load_by_name_with_config(ctx, path, 0, NULL, 0, &g));
    CHECK_CODE(invalid_argument, load_by_name_with_config(ctx, path, n, NULL, 0, NULL));
    CHECK_CODE(invalid_argument, load_by_name_with_config(ctx, path, n, "{}", 0xFFFFFFFF, &g));
    CHECK_CODE(invalid_argument, load_by_name_with_config(ctx, path, n, "{}", 3, &g));
    CHECK_CODE(invalid_encoding, load_by_name_with_config(ctx, path, n, "{", 1, &g));
    CHECK_CODE(invalid_encoding, load_by_name_with_config(ctx, path, n, "\xff", 1, &g));

    graph_builder parts[2] = {{text, 4}, {NULL, 0}};
    graph_builder_array builders = {parts, 1};
    memcpy(text, "GGUF", 4);
    CHECK_CODE(invalid_argument, load(ctx, NULL, ggml, cpu, &g));
    CHECK_CODE(invalid_argument, load(ctx, &builders, ggml, cpu, NULL));
    CHECK_CODE(invalid_encoding, load(ctx, &builders, (graph_encoding)99, cpu, &g));
    CHECK_CODE(invalid_argument, load(ctx, &builders, ggml, (execution_target)99, &g));
#ifdef WASI_NN_WAMR
    CHECK_CODE(unsupported_operation, load(ctx, &builders, ggml, cpu, &g)); /* a guest loads by name */
#else
    CHECK_CODE(invalid_encoding, load(ctx, &builders, tensorflow, cpu, &g));
    CHECK_CODE(invalid_argument, load(ctx, &builders, ggml, cpu, &g)); /* four bytes are no model */
#endif
    builders.size = 0;
    CHECK_CODE(invalid_argument, load(ctx, &builders, ggml, cpu, &g));
    builders.size = 0xFFFFFFFF;
    CHECK_CODE(invalid_argument, load(ctx, &builders, ggml, cpu, &g));
    builders = (graph_builder_array){NULL, 1};
    CHECK_CODE(invalid_argument, load(ctx, &builders, ggml, cpu, &g));
    builders.buf = parts;
    parts[0] = (graph_builder){NULL, 4};
    CHECK_CODE(invalid_argument, load(ctx, &builders, ggml, cpu, &g));
    parts[0] = (graph_builder){text, 0};
    CHECK_CODE(invalid_argument, load(ctx, &builders, ggml, cpu, &g));
    CHECK(g == 77);
}

static void refuse_inputs(void *ctx, graph_execution_context context)
{
    tensor input = INPUT("hello");
    CHECK_CODE(invalid_argument, set_input(ctx, context, 0, NULL));
    CHECK_CODE(invalid_argument, run_inference(ctx, context, 0, NULL, output(sizeof text), &size));
    CHECK_CODE(invalid_argument, run_inference_with_config(ctx, context, 0, NULL, output(sizeof text), &size, NULL, 0));
    CHECK_CODE(invalid_argument, run_inference(ctx, context, 1, &input, output(sizeof text), &size));
#ifdef WASI_NN_WAMR
    input.data.size = 0;
    CHECK_CODE(invalid_argument, set_input(ctx, context, 0, &input));
    input.data.size = 0xFFFFFFFF;
    CHECK_CODE(too_large, set_input(ctx, context, 0, &input));
    input.data = (tensor_data){NULL, 5};
    CHECK_CODE(invalid_argument, set_input(ctx, context, 0, &input));
    CHECK_CODE(invalid_argument, run_inference(ctx, context, 0, &input, output(9), &size));
#else
    uint32_t lengths[17] = {0xFFFFFFFF, 0xFFFFFFFF, 1};
    tensor_dimensions dimensions = {lengths, 1};
    input.dimensions = &dimensions;
    CHECK_CODE(too_large, set_input(ctx, context, 0, &input));
    dimensions.size = 3; /* their product is 1 in 64 bits that overflow */
    CHECK_CODE(too_large, set_input(ctx, context, 0, &input));
    dimensions.size = 17;
    CHECK_CODE(invalid_argument, set_input(ctx, context, 0, &input));
    dimensions.size = 0xFFFFFFFF;
    CHECK_CODE(invalid_argument, set_input(ctx, context, 0, &input));
    lengths[0] = 0;
    dimensions.size = 1;
    CHECK_CODE(invalid_argument, set_input(ctx, context, 0, &input));
    input.data = NULL;
    CHECK_CODE(invalid_argument, set_input(ctx, context, 0, &input));
    CHECK_CODE(invalid_argument, run_inference(ctx, context, 0, &input, output(9), &size));
    input = (tensor){NULL, (tensor_type)0x12345678, (uint8_t *)"hello"};
    CHECK_CODE(invalid_argument, set_input(ctx, context, 0, &input));
    input = INPUT("");
    CHECK_CODE(invalid_argument, set_input(ctx, context, 0, &input));
#endif
    input = INPUT("{");
    CHECK_CODE(invalid_encoding, set_input(ctx, context, 1, &input));
}

static void refuse_outputs(void *ctx, graph_execution_context context)
{
    wasi_nn_error (*const functions[])(void *, graph_execution_context, uint32_t, wasi_nn_output, uint32_t *) = {
        get_output, get_output_single};
    tensor input = INPUT("hello");
    for (int i = 0; i < 2; i++) {
        CHECK_CODE(invalid_argument, functions[i](ctx, context, 0, NULL, &size));
        CHECK_CODE(invalid_argument, functions[i](ctx, context, 0, output(sizeof text), NULL));
#ifdef WASI_NN_WAMR
        tensor_data nowhere = {NULL, 16};
        CHECK_CODE(invalid_argument, functions[i](ctx, context, 0, &nowhere, &size));
#endif
    }
    CHECK_CODE(invalid_argument, run_inference(ctx, context, 0, &input, NULL, &size));
    CHECK_CODE(invalid_argument, run_inference(ctx, context, 0, &input, output(sizeof text), NULL));
    CHECK_CODE(invalid_argument, run_inference_with_config(ctx, context, 0, &input, NULL, &size, NULL, 0));
    CHECK_CODE(invalid_argument, run_inference_with_config(ctx, context, 0, &input, output(9), NULL, NULL, 0));
    CHECK_CODE(invalid_argument, run_inference_with_config(ctx, context, 0, &input, output(9), &size, "{}", 0xFFFFFFFF));
}

/* Nothing is written beyond the capacity, and the output stays until it fits. */
static void outgrow_buffer(void *ctx, graph_execution_context context)
{
    tensor input = INPUT("hello");
    memset(text, 'x', sizeof text);
    CHECK_CODE(too_large, run_inference(ctx, context, 0, &input, output(1), &size));
    CHECK(size > 1 && size < sizeof text);
    uint32_t needed = size;
    CHECK_CODE(too_large, get_output(ctx, context, 0, output(0), &size));
    CHECK(size == needed);
    CHECK_CODE(too_large, get_output(ctx, context, 0, output(needed - 1), &size));
    CHECK(size == needed && text[0] == 'x' && text[1] == 'x');
    CHECK_CODE(success, get_output(ctx, context, 0, output(needed), &size));
    CHECK(size == needed && text[needed] == 'x'); /* no room for a NUL: none */
    CHECK_CODE(success, get_output(ctx, context, 0, output(needed + 1), &size));
    CHECK(size == needed && text[needed] == 0 && text[needed + 1] == 'x');
    text[0] = 'x';
    CHECK_CODE(success, get_output(ctx, context, 0xFFFFFFFF, output(sizeof text), &size)); /* counts as 0 */
    CHECK(size == needed && text[0] != 'x');
    CHECK_CODE(success, get_output(ctx, context, 1, output(sizeof text), &size));
    CHECK(text[0] == '{' && text[size - 1] == '}');
}

static void refuse_sessions(void *ctx, graph g, graph_execution_context context)
{
    char long_id[300];
    graph_execution_context other = 77;
    memset(long_id, 'a', sizeof long_id - 1);
    long_id[sizeof long_id - 1] = 0;
    CHECK_CODE(invalid_argument, init_execution_context(ctx, g, NULL));
    CHECK_CODE(invalid_argument, init_execution_context_with_session_id(ctx, NULL, &other));
    CHECK_CODE(invalid_argument, init_execution_context_with_session_id(ctx, "", &other));
    CHECK_CODE(invalid_argument, init_execution_context_with_session_id(ctx, long_id, &other));
    CHECK_CODE(invalid_argument, init_execution_context_with_session_id(ctx, "ada", NULL));
    CHECK_CODE(invalid_argument, save_session(ctx, context, NULL, 3));
    CHECK_CODE(invalid_argument, save_session(ctx, context, "x", 0));
    CHECK_CODE(invalid_argument, save_session(ctx, context, "x", 0xFFFFFFFF));
    CHECK_CODE(invalid_argument, restore_session(ctx, g, NULL, 3, &other));
    CHECK_CODE(invalid_argument, restore_session(ctx, g, "x", 0, &other));
    CHECK_CODE(invalid_argument, restore_session(ctx, g, "x", 0xFFFFFFFF, &other));
    CHECK_CODE(invalid_argument, restore_session(ctx, g, "x", 1, NULL));
    CHECK_CODE(not_found, restore_session(ctx, g, "/nowhere/x", 10, &other));
    CHECK(other == 77);
}

static void save_and_restore(void *ctx, graph g, graph_execution_context context, const char *folder)
{
    char path[4000];
    graph_execution_context restored;
    tensor input = INPUT("and again");
    int n = snprintf(path, sizeof path, "%s/session", folder);
    CHECK(n > 0 && n < (int)sizeof path);
    CHECK_CODE(success, save_session(ctx, context, path, (uint32_t)n));
    CHECK_CODE(success, restore_session(ctx, g, path, (uint32_t)n, &restored));
    CHECK(restored != context);
    CHECK_CODE(success, set_input(ctx, restored, 0, &input));
    CHECK_CODE(success, compute(ctx, restored));
    CHECK_CODE(success, close_execution_context(ctx, restored));
}

static void count_tokens(void *ctx, graph_execution_context context)
{
    tensor input = INPUT("hello");
    int n_tokens = 0;
    CHECK_CODE(success, set_input(ctx, context, 0, &input));
    for (int code; (code = (int)compute_single(ctx, context)) != end_of_sequence; n_tokens++) {
        CHECK(code == success);
        CHECK_CODE(success, get_output_single(ctx, context, 0, output(sizeof text), &size));
    }
    CHECK(n_tokens > 0);
    CHECK_CODE(success, fini_single(ctx, context));
    /* The configuration of a run is read by its first call. */
    static const char three[] = "{\"max_tokens\": 3, \"ignore_eos\": true}", wrong[] = "{\"max_tokens\": \"many\"}";
    CHECK_CODE(invalid_encoding, compute_single_with_config(ctx, context, "{", 1));
    CHECK_CODE(invalid_argument, compute_single_with_config(ctx, context, wrong, sizeof wrong - 1));
    for (n_tokens = 0; compute_single_with_config(ctx, context, three, sizeof three - 1) == success;)
        n_tokens++;
    CHECK(n_tokens == 3);
    CHECK_CODE(success, fini_single(ctx, context));
}

int main(int argc, char **argv)
{
    void *ctx = &size, *other = NULL;
    graph g, second;
    graph_execution_context context, again, closed;
    CHECK(argc == 3);
    const char *path = argv[1];
    uint32_t n = (uint32_t)strlen(path);
    static const char config[] = "{\"stopping\": {\"max_tokens\": 8}, \"model\": {\"n_ctx\": 256}}";

    refuse_backend(NULL, path);
    refuse_backend(&size, path); /* before anything was opened */
    CHECK_CODE(invalid_argument, init_backend(NULL));
    CHECK_CODE(invalid_argument, init_backend_with_config(NULL, config, 2));
    CHECK_CODE(invalid_argument, init_backend_with_config(&ctx, config, 0xFFFFFFFF));
    CHECK_CODE(invalid_encoding, init_backend_with_config(&ctx, "{", 1));
    CHECK(ctx == NULL);
    CHECK_CODE(success, init_backend_with_config(&ctx, config, sizeof config - 1));
    refuse_backend(&size, path); /* while another one is open */

    CHECK_CODE(not_found, init_execution_context_with_session_id(ctx, "ada", &again)); /* no graph is loaded */
    refuse_loads(ctx, path);
    refuse_graph(ctx, 0, path);
    CHECK_CODE(success, load_by_name(ctx, path, n, &g));
    CHECK_CODE(success, load_by_name_with_config(ctx, path, n, NULL, 5, &second));
    CHECK(g == 0 && second != g);
    CHECK_CODE(success, unload(ctx, second));
    refuse_graph(ctx, second, path);
    refuse_graph(ctx, 0xFFFFFFFF, path);

    CHECK_CODE(success, init_execution_context(ctx, g, &context));
    CHECK_CODE(success, get_output(ctx, context, 0, output(sizeof text), &size));
    CHECK(size == 0);
    CHECK_CODE(invalid_argument, compute(ctx, context)); /* no prompt */
    refuse_context(ctx, 0, path);
    refuse_context(ctx, 0xFFFFFFFF, path);
    CHECK_CODE(success, init_backend(&other));
    refuse_context(other, context, path); /* another backend's */
    refuse_inputs(ctx, context);
    refuse_outputs(ctx, context);
    outgrow_buffer(ctx, context);
    refuse_sessions(ctx, g, context);
    save_and_restore(ctx, g, context, argv[2]);
    count_tokens(ctx, context);
    CHECK_CODE(success, cancel(ctx, context));

    CHECK_CODE(success, init_execution_context_with_session_id(ctx, "ada", &again));
    CHECK_CODE(success, init_execution_context_with_session_id(ctx, "ada", &closed));
    CHECK(again == closed && again != context);
    CHECK_CODE(success, close_execution_context(ctx, again)); /* one of its two openings */
    CHECK_CODE(success, cancel(ctx, again));
    CHECK_CODE(success, close_execution_context(ctx, again));
    refuse_context(ctx, again, path);
    CHECK_CODE(success, init_execution_context_with_session_id(ctx, "ada", &again));
    CHECK(again != closed);

    CHECK_CODE(invalid_argument, wasi_nn_last_error(ctx, NULL, &size));
    CHECK_CODE(invalid_argument, wasi_nn_last_error(ctx, (char *)text, NULL));
    size = 3;
    CHECK_CODE(too_large, wasi_nn_last_error(ctx, (char *)text, &size));
    CHECK(size > 3 && size < 1024);
    CHECK(strlen(wasi_nn_version()) >= 5);

    CHECK_CODE(success, close_execution_context(ctx, context));
    refuse_context(ctx, context, path);
    CHECK_CODE(success, deinit_backend(ctx));
    refuse_backend(ctx, path); /* while another one is open */
    CHECK_CODE(success, deinit_backend(other));
    refuse_backend(ctx, path);
    refuse_backend(other, path);
    puts("done");
    return 0;
}
