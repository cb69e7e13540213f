/* A program that ends in the middle of everything: one thread computes, nothing is closed. Usage: leave_open MODEL. */
#include <pthread.h>
#include <unistd.h>

#include "check.h"

static void *ctx;
static graph_execution_context context;

static void *work(void *unused)
{
    (void)unused;
    for (;;)
        compute(ctx, context);
    return NULL;
}

int main(int argc, char **argv)
{
    static const char config[] = "{\"max_tokens\": 200, \"n_ctx\": 256}";
    graph g;
    pthread_t thread;
    tensor input = {NULL, u8, (uint8_t *)"hello"};
    CHECK(argc == 2);
    CHECK_CODE(success, init_backend(&ctx));
    CHECK_CODE(success, load_by_name_with_config(ctx, argv[1], (uint32_t)strlen(argv[1]), config, sizeof config - 1, &g));
    CHECK_CODE(success, init_execution_context(ctx, g, &context));
    CHECK_CODE(success, set_input(ctx, context, 0, &input));
    CHECK_CODE(success, compute(ctx, context));
    CHECK(pthread_create(&thread, NULL, work, NULL) == 0);
    usleep(20000); /* somewhere in the middle of a compute */
    puts("done");
    return 0;
}
