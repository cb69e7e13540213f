/* A host that opens, closes, opens, uses and closes the library 20 times, and finds its process as it was.
 * Usage: guest LIBRARY MODEL. Prints one JSON object with what it counted after each round. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <locale.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include "check.h"

enum { N_ROUNDS = 20, N_STACK_BYTES = 128 << 10, N_FDS = 64 };

static const char *library, *model;

static unsigned count_entries(const char *folder)
{
    DIR *opened = opendir(folder);
    unsigned n = 0;
    CHECK(opened);
    while (readdir(opened))
        n++;
    closedir(opened);
    return n - 2;
}

static unsigned count_resident_kib(void)
{
    unsigned long total, resident;
    FILE *opened = fopen("/proc/self/statm", "r");
    CHECK(opened && fscanf(opened, "%lu %lu", &total, &resident) == 2);
    fclose(opened);
    return (unsigned)(resident * (unsigned long)sysconf(_SC_PAGESIZE) / 1024);
}

/* Threads that have been joined stay in /proc for a moment. */
static unsigned count_threads(unsigned expected)
{
    unsigned n = count_entries("/proc/self/task");
    for (int i = 0; i < 500 && n > expected; i++) {
        usleep(1000);
        n = count_entries("/proc/self/task");
    }
    return n;
}

typedef wasi_nn_error init_function(void **);
typedef wasi_nn_error deinit_function(void *);
typedef wasi_nn_error load_function(void *, const char *, uint32_t, const char *, uint32_t, graph *);
typedef wasi_nn_error context_function(void *, graph, graph_execution_context *);
typedef wasi_nn_error input_function(void *, graph_execution_context, uint32_t, tensor *);
typedef wasi_nn_error compute_function(void *, graph_execution_context);
typedef wasi_nn_error output_function(void *, graph_execution_context, uint32_t, wasi_nn_output, uint32_t *);

static void *find(void *opened, const char *name)
{
    void *symbol = dlsym(opened, name);
    CHECK(symbol);
    return symbol;
}

static void *use(void *opened)
{
    static const char config[] = "{\"max_tokens\": 4, \"n_ctx\": 256}";
    void *ctx = NULL;
    graph g;
    graph_execution_context context;
    uint8_t text[4096], prompt[] = "hello";
    uint32_t size = sizeof text;
    tensor input = {NULL, u8, prompt};
    CHECK_CODE(success, ((init_function *)find(opened, "init_backend"))(&ctx));
    CHECK_CODE(success, ((load_function *)find(opened, "load_by_name_with_config"))(
                            ctx, model, (uint32_t)strlen(model), config, sizeof config - 1, &g));
    CHECK_CODE(success, ((context_function *)find(opened, "init_execution_context"))(ctx, g, &context));
    CHECK_CODE(success, ((input_function *)find(opened, "set_input"))(ctx, context, 0, &input));
    CHECK_CODE(success, ((compute_function *)find(opened, "compute"))(ctx, context));
    CHECK_CODE(success, ((output_function *)find(opened, "get_output"))(ctx, context, 0, text, &size));
    CHECK_CODE(success, ((deinit_function *)find(opened, "deinit_backend"))(ctx));
    return NULL;
}

static void one_round(void)
{
    pthread_attr_t small;
    pthread_t thread;
    void *opened = dlopen(library, RTLD_LAZY);
    if (!opened)
        fprintf(stderr, "%s\n", dlerror());
    CHECK(opened);
    dlclose(opened);
    opened = dlopen(library, RTLD_LAZY | RTLD_LOCAL);
    CHECK(opened);
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, N_STACK_BYTES);
    CHECK(pthread_create(&thread, &small, use, opened) == 0);
    pthread_join(thread, NULL);
    pthread_attr_destroy(&small);
    dlclose(opened);
}

/* wasi_nn_last_error of check.h is not linked here: the library is only opened. */
wasi_nn_error wasi_nn_last_error(void *ctx, char *buffer, uint32_t *size)
{
    (void)ctx;
    CHECK(*size > 0);
    *buffer = 0;
    return success;
}

int main(int argc, char **argv)
{
    struct sigaction before[NSIG], after;
    char folder[4096], folder_after[4096];
    unsigned n_threads_before = count_entries("/proc/self/task"), n_fds_before = count_entries("/proc/self/fd");
    CHECK(argc == 3);
    library = argv[1];
    model = argv[2];
    CHECK(getcwd(folder, sizeof folder));
    for (int i = 1; i < NSIG; i++)
        sigaction(i, NULL, &before[i]);
    printf("{\"before\": {\"threads\": %u, \"fds\": %u}, \"rounds\": [", n_threads_before, n_fds_before);
    for (int i = 0; i < N_ROUNDS; i++) {
        one_round();
        printf("%s{\"threads\": %u, \"fds\": %u, \"resident_kib\": %u}", i ? ", " : "", count_threads(n_threads_before),
               count_entries("/proc/self/fd"), count_resident_kib());
    }
    puts("]}");
    for (int i = 1; i < NSIG; i++)
        if (sigaction(i, NULL, &after) == 0) /* not of the two that are the C library's own */
            CHECK(before[i].sa_handler == after.sa_handler);
    CHECK(strcmp(setlocale(LC_ALL, NULL), "C") == 0);
    CHECK(getcwd(folder_after, sizeof folder_after) && strcmp(folder, folder_after) == 0);
    return 0;
}
