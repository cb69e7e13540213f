/* WAMR's order of calls with types of its own, as iwasm has them: probe, close, open again, one backend an instance,
 * instances in parallel on threads of 128 KiB, and nothing released but by deinit.
 * Usage: wamr LIBRARY MODEL. Prints each instance's text, one a line. */
#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_INSTANCES = 4, N_STACK_BYTES = 128 << 10, N_TEXT_BYTES = 2048 };

struct dims {
    uint32_t *buf;
    uint32_t size;
};
struct data {
    uint8_t *buf;
    uint32_t size;
};
struct guest_tensor {
    struct dims *dimensions;
    uint8_t type;
    struct data data;
};
_Static_assert(sizeof(struct data) == 16, "tensor data");
_Static_assert(offsetof(struct guest_tensor, type) == 8, "tensor type");
_Static_assert(offsetof(struct guest_tensor, data) == 16, "place of the data");

static int (*init_backend)(void **);
static int (*deinit_backend)(void *);
static int (*load_by_name)(void *, const char *, uint32_t, uint32_t *);
static int (*load_by_name_with_config)(void *, const char *, uint32_t, const char *, uint32_t, uint32_t *);
static int (*init_execution_context)(void *, uint32_t, uint32_t *);
static int (*set_input)(void *, uint32_t, uint32_t, struct guest_tensor *);
static int (*compute)(void *, uint32_t);
static int (*get_output)(void *, uint32_t, uint32_t, struct data *, uint32_t *);

static const char *model;
static char texts[N_INSTANCES][N_TEXT_BYTES + 1];

static void expect(int expected, int code, const char *what)
{
    if (code != expected) {
        fprintf(stderr, "%s is %d, not %d\n", what, code, expected);
        exit(1);
    }
}

static void look_up(void *library, const char *name, void *place)
{
    void *symbol = dlsym(library, name);
    expect(1, symbol != NULL, name);
    memcpy(place, &symbol, sizeof symbol);
}

static void *instance(void *out)
{
    static const char config[] = "{\"stopping\": {\"max_tokens\": 24}, \"sampling\": {\"temperature\": 0}, \"n_ctx\": 256}";
    char name[4096], prompt[] = "Once upon a time";
    void *ctx = NULL;
    uint32_t graph, context, dimension = 1, size;
    struct dims dims = {&dimension, 1};
    struct guest_tensor input = {&dims, 3, {(uint8_t *)prompt, sizeof prompt - 1}};
    struct data output = {out, N_TEXT_BYTES};
    expect(0, init_backend(&ctx), "init_backend");
    strcpy(name, model);
    expect(0, load_by_name_with_config(ctx, name, (uint32_t)strlen(name), config, sizeof config - 1, &graph), "load");
    memset(name, 'x', sizeof name); /* valid during the call only */
    expect(0, init_execution_context(ctx, graph, &context), "init_execution_context");
    expect(0, set_input(ctx, context, 0, &input), "set_input");
    memset(prompt, 'x', sizeof prompt);
    expect(0, compute(ctx, context), "compute");
    memset(&size, 0xEE, sizeof size);
    expect(0, get_output(ctx, context, 0, &output, &size), "get_output");
    expect(1, size > 0 && size <= N_TEXT_BYTES, "a size in range");
    output.size = 1;
    expect(7, get_output(ctx, context, 0, &output, &size), "get_output into 1 byte");
    expect(1, compute(ctx, 999), "compute on an unknown context");
    expect(0, deinit_backend(ctx), "deinit_backend");
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_attr_t small;
    pthread_t threads[N_INSTANCES];
    uint32_t graph = 0, size = 16;
    struct guest_tensor input = {NULL, 3, {(uint8_t *)"x", 1}};
    expect(3, argc, "the number of arguments");
    model = argv[2];
    void *library = dlopen(argv[1], RTLD_LAZY);
    if (!library)
        fprintf(stderr, "%s\n", dlerror());
    expect(1, library != NULL, "dlopen");
    dlclose(library);
    library = dlopen(argv[1], RTLD_LAZY);
    look_up(library, "init_backend", &init_backend);
    look_up(library, "deinit_backend", &deinit_backend);
    look_up(library, "load_by_name", &load_by_name);
    look_up(library, "load_by_name_with_config", &load_by_name_with_config);
    look_up(library, "init_execution_context", &init_execution_context);
    look_up(library, "set_input", &set_input);
    look_up(library, "compute", &compute);
    look_up(library, "get_output", &get_output);

    /* A guest that goes on after a failed init. */
    expect(1, load_by_name(NULL, model, (uint32_t)strlen(model), &graph), "load_by_name without a backend");
    expect(1, set_input(NULL, 0, 0, &input), "set_input without a backend");
    expect(1, compute(NULL, 0), "compute without a backend");
    expect(1, get_output(NULL, 0, 0, &(struct data){(uint8_t *)texts[0], 16}, &size), "get_output without a backend");

    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, N_STACK_BYTES);
    for (int i = 0; i < N_INSTANCES; i++)
        expect(0, pthread_create(&threads[i], &small, instance, texts[i]), "pthread_create");
    for (int i = 0; i < N_INSTANCES; i++)
        pthread_join(threads[i], NULL);
    dlclose(library);
    for (int i = 0; i < N_INSTANCES; i++)
        puts(texts[i]);
    return 0;
}
