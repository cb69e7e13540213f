/* Threads that do at random what hosts do, right and wrong, with handles that they share and take from each other. Every
 * call has to return one of the header's codes, and nothing may be written beyond a buffer.
 * Usage: stress MODEL FOLDER SEED N_THREADS N_CALLS. Prints how many calls came to which code. */
#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#include "check.h"

enum { N_SLOTS = 8, N_BUFFER_BYTES = 600, N_CODES = 104, CANARY = 0xA5 };

static const char *model, *folder;
static uint64_t seed;
static int n_calls;
static _Atomic(void *) backend;
static _Atomic(uint32_t) graphs[2], contexts[N_SLOTS];
static _Atomic(unsigned) counts[N_CODES];

static const char *const configs[] = {
    "{\"max_tokens\": 3}", "{\"temperature\": 0, \"max_tokens\": 9}", "{\"session_id\": \"moved\"}", "{\"n_ctx\": 512}",
    "{\"n_ctx\": 256}",    "{\"prompt_mode\": \"raw\"}",             "{\"grammar\": \"root ::=\"}",  "{\"stop\": [\"a\"]}",
    "{\"embedding\": true}", "{\"embedding\": false}", "{\"task\": {\"priority\": \"urgent\", \"timeout_ms\": 1}}",
    "{\"task\": {\"priority\": \"low\", \"timeout_ms\": 0}}", "[", "\xff\xfe", "{\"max_tokens\": \"many\"}"};
static const char *const graph_config =
    "{\"n_ctx\": 256, \"max_concurrent\": 3, \"max_sessions\": 6, \"max_tokens\": 12, \"threads\": 1, \"queue_size\": 4}";

/* xorshift64* */
static uint32_t draw(uint64_t *state, uint32_t below)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (uint32_t)((*state * 0x2545F4914F6CDD1DULL) >> 33) % below;
}

static void count(wasi_nn_error code)
{
    CHECK((unsigned)code < N_CODES && ((unsigned)code <= security || (unsigned)code >= end_of_sequence));
    atomic_fetch_add(&counts[code], 1);
}

/* Mostly a live handle, now and then a number of no meaning. */
static uint32_t any(_Atomic(uint32_t) *slots, uint32_t n_slots, uint64_t *random)
{
    return draw(random, 16) ? atomic_load(&slots[draw(random, n_slots)]) : draw(random, UINT32_MAX);
}

static wasi_nn_error set_any_input(void *ctx, uint32_t context, uint64_t *random)
{
    char prompt[512];
    const char *config = configs[draw(random, sizeof configs / sizeof *configs)];
    uint32_t n_bytes = draw(random, 4) ? 1 + draw(random, 60) : draw(random, sizeof prompt);
    tensor_dimensions dimensions = {&n_bytes, 1};
    tensor input = {&dimensions, u8, (uint8_t *)prompt};
    for (uint32_t i = 0; i < n_bytes; i++)
        prompt[i] = (char)('a' + draw(random, 26));
    if (draw(random, 3) == 0) {
        input = (tensor){NULL, u8, (uint8_t *)config};
        return set_input(ctx, context, 1, &input);
    }
    return set_input(ctx, context, 0, &input);
}

static wasi_nn_error get_any_output(void *ctx, uint32_t context, uint64_t *random)
{
    uint8_t buffer[N_BUFFER_BYTES];
    uint32_t capacity = draw(random, N_BUFFER_BYTES - 8), size = capacity, index = draw(random, 3);
    memset(buffer, CANARY, sizeof buffer);
    wasi_nn_error code = draw(random, 2) ? get_output(ctx, context, index, buffer, &size)
                                         : get_output_single(ctx, context, index, buffer, &size);
    for (uint32_t i = capacity; i < N_BUFFER_BYTES; i++)
        CHECK(buffer[i] == CANARY);
    CHECK(code == success ? size <= capacity : buffer[0] == CANARY);
    return code;
}

static wasi_nn_error run_any(void *ctx, uint32_t context, uint64_t *random)
{
    uint8_t buffer[N_BUFFER_BYTES];
    uint32_t size = draw(random, N_BUFFER_BYTES);
    const char *config = configs[draw(random, sizeof configs / sizeof *configs)];
    tensor input = {NULL, u8, (uint8_t *)"the cat sat on the mat"};
    if (draw(random, 2))
        return run_inference(ctx, context, 0, &input, buffer, &size);
    return run_inference_with_config(ctx, context, 0, &input, buffer, &size, config, (uint32_t)strlen(config));
}

static wasi_nn_error open_any_context(void *ctx, uint64_t *random)
{
    char text[64];
    uint32_t opened = 0, slot = draw(random, N_SLOTS), g = any(graphs, 2, random);
    wasi_nn_error code;
    snprintf(text, sizeof text, "session %u", draw(random, 5));
    if (draw(random, 2))
        code = init_execution_context_with_session_id(ctx, text, &opened);
    else
        code = init_execution_context(ctx, g, &opened);
    if (code == success) {
        uint32_t old = atomic_exchange(&contexts[slot], opened);
        if (draw(random, 4)) /* else it is left to the limit */
            count(close_execution_context(ctx, old));
    }
    return code;
}

static wasi_nn_error save_or_restore(void *ctx, uint32_t context, uint64_t *random)
{
    char path[4000];
    uint32_t restored, n = (uint32_t)snprintf(path, sizeof path, "%s/%u", folder, draw(random, 3));
    if (draw(random, 2))
        return save_session(ctx, context, path, n);
    wasi_nn_error code = restore_session(ctx, any(graphs, 2, random), path, n, &restored);
    if (code == success)
        count(close_execution_context(ctx, atomic_exchange(&contexts[draw(random, N_SLOTS)], restored)));
    return code;
}

static wasi_nn_error load_anew(void *ctx, uint64_t *random)
{
    uint32_t loaded;
    wasi_nn_error code = load_by_name_with_config(ctx, model, (uint32_t)strlen(model), graph_config,
                                                  (uint32_t)strlen(graph_config), &loaded);
    if (code == success)
        count(unload(ctx, atomic_exchange(&graphs[draw(random, 2)], loaded)));
    return code;
}

/* A second backend comes and goes, or the one that all use does. */
static wasi_nn_error change_backend(uint64_t *random)
{
    void *opened = NULL;
    wasi_nn_error code = init_backend(&opened);
    CHECK(code == success && opened);
    if (draw(random, 8) == 0) {
        opened = atomic_exchange(&backend, opened);
        count(load_anew(atomic_load(&backend), random));
    }
    return deinit_backend(opened);
}

static wasi_nn_error call_any(uint64_t *random)
{
    void *ctx = atomic_load(&backend);
    uint32_t context = any(contexts, N_SLOTS, random), what = draw(random, 100);
    if (what < 20)
        return set_any_input(ctx, context, random);
    if (what < 35)
        return compute(ctx, context);
    if (what < 50)
        return get_any_output(ctx, context, random);
    if (what < 60)
        return run_any(ctx, context, random);
    if (what < 75)
        return compute_single(ctx, context);
    if (what < 78)
        return fini_single(ctx, context);
    if (what < 82)
        return cancel(ctx, context);
    if (what < 92)
        return open_any_context(ctx, random);
    if (what < 96)
        return save_or_restore(ctx, context, random);
    if (what < 98)
        return close_execution_context(ctx, context);
    return what == 98 ? load_anew(ctx, random) : change_backend(random);
}

static void *work(void *number)
{
    uint64_t random = (seed + 1) * 1000003 + (uint64_t)(uintptr_t)number;
    for (int i = 0; i < n_calls; i++)
        count(call_any(&random));
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t threads[64];
    uint64_t random = 1;
    CHECK(argc == 6);
    model = argv[1];
    folder = argv[2];
    seed = strtoull(argv[3], NULL, 10);
    int n_threads = atoi(argv[4]);
    n_calls = atoi(argv[5]);
    CHECK(n_threads > 0 && n_threads <= 64);
    void *opened;
    CHECK_CODE(success, init_backend(&opened));
    atomic_store(&backend, opened);
    for (int i = 0; i < 2; i++)
        count(load_anew(opened, &random));
    for (intptr_t i = 0; i < n_threads; i++)
        CHECK(pthread_create(&threads[i], NULL, work, (void *)i) == 0);
    for (int i = 0; i < n_threads; i++)
        pthread_join(threads[i], NULL);
    CHECK_CODE(success, deinit_backend(atomic_load(&backend)));
    for (int code = 0; code < N_CODES; code++)
        if (counts[code])
            printf("%d: %u\n", code, counts[code]);
    return 0;
}
