/* The shim over stand_in.c: several backends, calls from many threads, refusals, and an end. */
#include <pthread.h>

#include "check.h"

enum { N_THREADS = 8, N_CALLS = 50 };

static void *converse(void *unused)
{
    (void)unused;
    void *ctx = NULL;
    CHECK_CODE(success, init_backend_with_config(&ctx, "{}", 2));
    for (int i = 0; i < N_CALLS; i++) {
        char prompt[32];
        uint8_t text[32];
        uint32_t size = sizeof text, length = (uint32_t)snprintf(prompt, sizeof prompt, "prompt %d", i);
        tensor_dimensions dimensions = {&length, 1};
        tensor input = {i % 2 ? &dimensions : NULL, u8, (uint8_t *)prompt};
        CHECK_CODE(success, run_inference(ctx, 1, 0, &input, text, &size));
        CHECK(size == length && memcmp(text, prompt, length) == 0);
        size = 2;
        CHECK_CODE(too_large, run_inference(ctx, 1, 0, &input, text, &size));
        CHECK(size == length);
        CHECK_CODE(runtime_error, compute(ctx, 1));
        CHECK(strcmp(last_error(), "the stand-in does not compute") == 0);
        CHECK_CODE(invalid_argument, set_input(ctx, 1, 0, NULL));
        CHECK_CODE(invalid_argument, load_by_name(ctx, "a\0b", 3, &length));
    }
    CHECK_CODE(success, deinit_backend(ctx));
    return NULL;
}

int main(void)
{
    pthread_t threads[N_THREADS];
    CHECK_CODE(invalid_argument, compute(&threads, 1));
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < N_THREADS; i++)
            CHECK(pthread_create(&threads[i], NULL, converse, NULL) == 0);
        for (int i = 0; i < N_THREADS; i++)
            pthread_join(threads[i], NULL);
    }
    CHECK_CODE(invalid_argument, compute(&threads, 1));
    puts("done");
    return 0;
}
